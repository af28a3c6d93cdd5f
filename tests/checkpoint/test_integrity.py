"""Digests: against an independent implementation, over meshes, and against damage."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpt.checkpoint.integrity import Leaf, Saved, file_digests, file_problems, leaf_digest, list_files


def digest_in_numpy(array: np.ndarray) -> int:
    """The formula of ``leaf_digest``, written over Python integers from the raw bytes."""
    width = min(array.dtype.itemsize, 4)
    raw = np.ascontiguousarray(array).tobytes()
    words = [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width)]
    total = 0
    for index, word in enumerate(words):
        mixed = word ^ (index * 0x9E3779B1 % 2**32)
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        total += mixed ^ mixed >> 16
    return total % 2**32


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (8, 4, 3)])
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint8", "int32", "uint32", "bool"]
)
def test_digest_equals_the_formula_over_raw_bytes(dtype, shape):
    rng = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    raw = rng.integers(0, 2 if dtype == "bool" else 256, (*shape, kind.itemsize), np.uint8)
    array = np.frombuffer(raw.tobytes(), kind).reshape(shape)
    assert int(leaf_digest(jnp.asarray(array))) == digest_in_numpy(array)


def test_digest_of_keys_and_of_small_and_complex_numbers():
    key = jax.random.key(3)
    assert int(leaf_digest(key)) == digest_in_numpy(np.asarray(jax.random.key_data(key)))
    four_bits = jnp.arange(-8, 8).astype(jnp.int4)
    assert int(leaf_digest(four_bits)) == digest_in_numpy((np.arange(-8, 8) & 15).astype(np.uint8))
    z = np.array([1 + 2j, 3 - 4j], np.complex64)
    assert int(leaf_digest(jnp.asarray(z))) == digest_in_numpy(np.stack([z.real, z.imag]))


@pytest.mark.parametrize(("devices", "spec"), [(1, ()), (2, ("a",)), (4, (None, "a")), (8, (("a",), None)), (8, ())])
def test_digest_does_not_depend_on_the_mesh(devices, spec):
    array = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    mesh = jax.make_mesh((devices,), ("a",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert int(leaf_digest(placed)) == digest_in_numpy(array)
    assert leaf_digest(placed).is_fully_replicated


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_digest_notices_any_flipped_bit_and_any_swap(dtype):
    rng = np.random.default_rng(2)
    array = np.asarray(jnp.asarray(rng.normal(size=(6, 5)) * 9, dtype))
    good = int(leaf_digest(jnp.asarray(array)))
    for _ in range(20):
        raw = bytearray(array.tobytes())
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        assert int(leaf_digest(jnp.asarray(np.frombuffer(bytes(raw), array.dtype).reshape(6, 5)))) != good
    swapped = array.copy()
    swapped[0, 0], swapped[5, 4] = array[5, 4], array[0, 0]
    assert int(leaf_digest(jnp.asarray(swapped))) != good
    assert int(leaf_digest(jnp.zeros(3))) != int(leaf_digest(-jnp.zeros(3)))


def test_manifest_round_trip_and_every_flipped_byte():
    saved = Saved(
        step=12,
        metric=2.345678901234567,
        metadata={"config": {"name": "klein \u2014 小", "rate": 1e-3, "none": None}, "phases": [1, 2]},
        leaves={"params/w": Leaf((3, 4), "float32", 77), "step": Leaf((), "int32", 1)},
        files={"state/d/abc": (5, "0" * 64)},
    )
    data = saved.render()
    assert Saved.parse(data) == saved
    rng = np.random.default_rng(3)
    for place in range(len(data)):
        bad = bytearray(data)
        bad[place] ^= 1 << rng.integers(8)
        with pytest.raises(ValueError):
            Saved.parse(bytes(bad))
    for bad in (b"", data[:-1], data + b" ", b"[]", b"{}"):
        with pytest.raises(ValueError):
            Saved.parse(bad)


def test_file_problems_name_each_file(tmp_path):
    folder = epath.Path(tmp_path)
    (folder / "a").mkdir()
    for name in ("a/flipped", "a/short", "gone", "sound"):
        (folder / name).write_bytes(b"0123456789" * 100)
    (folder / "empty").touch()
    names = list_files(folder)
    assert names == ["a/flipped", "a/short", "empty", "gone", "sound"]
    files = file_digests(folder, names)
    assert file_problems(folder, files) == []
    (folder / "a/flipped").write_bytes(b"0123456789" * 99 + b"0123456788")
    (folder / "a/short").write_bytes(b"0123456789" * 99)
    (folder / "gone").unlink()
    assert file_problems(folder, files) == [
        "a/flipped is damaged (its SHA-256 differs)",
        "a/short has 990 bytes instead of 1000",
        "gone is missing",
    ]
