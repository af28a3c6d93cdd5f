"""Digests of leaves and files, and the description of a step that holds them: ``jaxpt.json``."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from jaxpt.types import Array

MANIFEST = "jaxpt.json"
_FORMAT = 1


class Leaf(NamedTuple):
    """A leaf as it was saved."""

    shape: tuple[int, ...]
    dtype: str
    digest: int  # of its bits and their positions, see ``leaf_digest``


class Saved(NamedTuple):
    """What a step says of itself, without its arrays."""

    step: int
    metric: float | None
    metadata: dict[str, Any]
    leaves: dict[str, Leaf]  # {path: leaf}, for example "params/trunk/embed/tokens"
    files: dict[str, tuple[int, str]]  # {path in the step's directory: (bytes, SHA-256)}

    def render(self) -> bytes:
        """JSON that vouches for itself: with any byte flipped it cannot be parsed, or differs from its rendering."""
        return _render({"format": _FORMAT, **self._asdict()})

    @classmethod
    def parse(cls, data: bytes) -> Saved:
        """The inverse of ``render``.

        Raises:
          ValueError: a byte is not as it was written, or a newer jaxpt wrote it.
        """
        content = json.loads(data)
        if not isinstance(content, dict) or content.pop("sha256", None) is None or _render(content) != data:
            raise ValueError("its own SHA-256 differs")
        if content.pop("format") != _FORMAT:
            raise ValueError("its format is that of another version of jaxpt")
        content["leaves"] = {name: Leaf(tuple(shape), *rest) for name, (shape, *rest) in content["leaves"].items()}
        content["files"] = {name: (size, sha) for name, (size, sha) in content["files"].items()}
        return cls(**content)


def _render(content: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({"sha256": digest, **content}, indent=1).encode()


@jax.jit
def leaf_digest(x: Array) -> Array:
    """A 32-bit digest of an array's bits and their positions, the same on every mesh.

        sum over elements i of  mix(bits[i] xor i * 0x9E3779B1)   modulo 2^32

    A sum of integers is exact in any order, and ``mix`` (the finalizer of MurmurHash3) is one-to-one, so a
    change of one element always changes the digest.

    Args:
      x: an array of any shape and dtype, typed keys included, with any sharding.

    Returns:
      [] u32, replicated.

    >>> a = jnp.arange(6.0).reshape(2, 3)
    >>> bool(leaf_digest(a) == leaf_digest(a + 0)), bool(leaf_digest(a) == leaf_digest(-a[::-1]))
    (True, False)
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype != jnp.bool_:
        width = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
        x = jax.lax.bitcast_convert_type(x, getattr(jnp, f"uint{min(width, 32)}"))  # 64 bits become two elements
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = x.astype(jnp.uint32) ^ (index * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def list_files(folder: epath.Path) -> list[str]:
    """The paths of all files under a folder, relative to it, sorted."""
    found = []
    for path in folder.iterdir():
        found += [f"{path.name}/{name}" for name in list_files(path)] if path.is_dir() else [path.name]
    return sorted(found)


def file_digest(path: epath.Path) -> tuple[int, str]:
    """The size of a file in bytes and its SHA-256."""
    size, sha = 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            sha.update(block)
    return size, sha.hexdigest()


def file_digests(folder: epath.Path, names: list[str]) -> dict[str, tuple[int, str]]:
    """``file_digest`` of each, a few at a time: hashing lets other threads run."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: file_digest(folder / name), names), strict=True))


def file_problems(folder: epath.Path, files: dict[str, tuple[int, str]]) -> list[str]:
    """What is wrong with the files of a step: one sentence each, none where all are as they were written."""

    def problem(name: str) -> str | None:
        size, sha = files[name]
        try:
            found_size, found_sha = file_digest(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if found_size != size:
            return f"{name} has {found_size} bytes instead of {size}"
        return f"{name} is damaged (its SHA-256 differs)" if found_sha != sha else None

    with ThreadPoolExecutor(4) as pool:
        return [found for found in pool.map(problem, files) if found]
