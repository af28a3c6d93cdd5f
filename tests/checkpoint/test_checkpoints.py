"""Saving, keeping, restoring onto other meshes, and every kind of damage."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpt.checkpoint import CheckpointError, Checkpoints
from jaxpt.checkpoint.integrity import Saved
from jaxpt.types import Guard, TrainState


def noise(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_state(step: int, averaged: bool = True) -> TrainState:
    """A state with every sort of container and leaf that a run may have."""
    key = jax.random.key(step)
    params = {
        "encoder": {"embed": noise(step, 16, 8), "stack": noise(step, 2, 8, 16)},
        "head": {"bias": jnp.full((16,), step, jnp.bfloat16), "empty": jnp.zeros((0, 4))},
    }
    return TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=None)).init(params),
        carry={"memory": None, "key": key, "keys": jax.random.split(key, 8), "flags": jnp.array([True, False])},
        averaged=jax.tree.map(lambda x: x * 2, params) if averaged else None,
        guard=Guard(jnp.float32(0.5), jnp.int32(step), jnp.int32(0), jnp.int32(0)),
    )


def place(tree, devices: int, abstract: bool = False):
    """Onto a mesh: rows over its devices where they divide, otherwise replicated."""
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

    def one(x):
        spec = PartitionSpec("fsdp") if x.ndim and x.shape[0] and x.shape[0] % devices == 0 else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if abstract else jax.device_put(x, sharding)

    return jax.tree.map(one, tree)


def target(devices: int = 8, averaged: bool = True):
    return place(jax.eval_shape(lambda: make_state(0, averaged)), devices, abstract=True)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """Steps 10 and 20, saved on 8 devices; tests copy it."""
    folder = tmp_path_factory.mktemp("two_steps")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(10, place(make_state(10), 8), {"config": {"depth": 2}, "at": 10}, metric=1.0)
        checkpoints.save(20, place(make_state(20), 8), {"config": {"depth": 2}, "at": 20}, metric=2.0)
    return folder


@pytest.fixture
def run(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


@pytest.mark.parametrize("devices", [8, 4, 2, 1])
def test_restores_onto_any_number_of_devices(two_steps, devices):
    restored = Checkpoints(two_steps).restore(target(devices))
    assert (restored.step, restored.metadata, restored.refused) == (20, {"config": {"depth": 2}, "at": 20}, [])
    assert_same(restored.state, make_state(20))
    for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target(devices)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_no_warnings_in_ordinary_use(tmp_path, caplog, recwarn, capfd):
    with caplog.at_level(logging.WARNING), Checkpoints(tmp_path / "new" / "run") as checkpoints:
        assert (checkpoints.latest, checkpoints.best, checkpoints.steps()) == (None, None, [])
        for step in range(3):
            checkpoints.save(step, place(make_state(step), 8))
        checkpoints.wait()
        assert_same(checkpoints.restore(target(8), step=1).state, make_state(1))
    assert (caplog.records, list(recwarn), capfd.readouterr()) == ([], [], ("", ""))


def test_a_state_may_be_donated_at_once(tmp_path):
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 - 1, tree), donate_argnums=0)
    state = place({"w": noise(0, 512, 256), "n": jnp.float32(3)}, 8)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state = change(state)
        checkpoints.wait()
        assert_same(checkpoints.restore(place(jax.eval_shape(lambda: state), 8, abstract=True)).state, expected)


def test_one_flipped_byte_in_any_file_is_named_and_the_previous_step_used(run):
    rng = np.random.default_rng(0)
    checkpoints = Checkpoints(run)
    files = [path for path in sorted((run / "20").rglob("*")) if path.is_file() and path.stat().st_size]
    assert {"jaxpt.json", "_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA"} <= {path.name for path in files}
    tries = 0
    for path in files:
        good = path.read_bytes()
        for place_in_file in rng.integers(len(good), size=3):
            bad = bytearray(good)
            bad[place_in_file] ^= 1 << rng.integers(8)
            path.write_bytes(bytes(bad))
            restored = checkpoints.restore(target(1))
            assert restored.step == 10
            assert len(restored.refused) == 1
            assert restored.refused[0].startswith(f"step 20: {path.relative_to(run / '20')} is damaged")
            tries += 1
        path.write_bytes(good)
    assert tries >= 20
    assert_same(restored.state, make_state(10))
    assert checkpoints.restore(target(1))[::3] == (20, [])


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/_METADATA", "commit_success.txt", "jaxpt.json"])
@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_truncated_and_removed_files(run, name, how):
    path = run / "20" / name
    path.unlink() if how == "removed" else path.write_bytes(path.read_bytes()[:-1])
    restored = Checkpoints(run).restore(target(1))
    assert restored.step == 10
    (refused,) = restored.refused
    assert refused.startswith("step 20: ")
    assert name in refused


def test_half_written_steps_are_named_and_cleared_by_the_next_save(run):
    shutil.copytree(run / "20", run / "30.orbax-checkpoint-tmp")
    shutil.copytree(run / "20", run / "25")
    (run / "25" / "jaxpt.json").unlink()
    shutil.copytree(run / "20", run / "0030")  # nobody's
    shutil.copytree(run / "20", run / "5")
    (run / "5" / "deleting").touch()
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        restored = checkpoints.restore(target(1))
        assert restored.step == 20
        assert [each.split(":")[0] for each in restored.refused] == ["step 30.orbax-checkpoint-tmp", "step 25"]
        checkpoints.save(30, make_state(30))
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20, 30]  # 10 is the best
    assert sorted(path.name for path in run.iterdir()) == ["0030", "10", "20", "25.damaged", "30"]


def test_a_damaged_leaf_is_named(run):
    """As if the bits had changed before the files were hashed."""
    manifest = run / "20" / "jaxpt.json"
    saved = Saved.parse(manifest.read_bytes())
    name = "params/head/bias"
    leaf = saved.leaves[name]
    manifest.write_bytes(saved._replace(leaves=saved.leaves | {name: leaf._replace(digest=leaf.digest ^ 1)}).render())
    restored = Checkpoints(run).restore(target(2))
    assert restored.step == 10
    assert restored.refused == [f"step 20: {name} is damaged (its digest differs)"]


def test_no_sound_step_is_an_error_that_lists_why(run):
    (run / "20" / "state" / "_METADATA").unlink()
    (run / "10" / "jaxpt.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"(?s)step 20: state/_METADATA is missing.*step 10: jaxpt.json is dam"):
        Checkpoints(run).restore(target(1))
    with pytest.raises(CheckpointError, match="there are none"):
        Checkpoints(run / "nowhere").restore(target(1))
    with pytest.raises(CheckpointError, match="step 7: there is no such step"):
        Checkpoints(run).restore(target(1), step=7)


def test_a_step_asked_for_by_number_has_no_stand_in(run):
    (run / "20" / "state" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="state/_METADATA is missing"):
        Checkpoints(run).restore(target(1), step=20)


def test_another_structure_shape_or_dtype_is_refused_by_leaf(two_steps):
    wanted = target(1)._asdict()
    wanted["params"] = {
        "encoder": {"embed": jax.ShapeDtypeStruct((16, 9), jnp.float32), "new": jax.ShapeDtypeStruct((2,), jnp.int8)},
        "head": wanted["params"]["head"] | {"bias": jax.ShapeDtypeStruct((16,), jnp.float32)},
    }
    with pytest.raises(ValueError) as error:
        Checkpoints(two_steps).restore(wanted)
    assert not isinstance(error.value, CheckpointError)
    assert str(error.value).splitlines()[1:] == [
        "  params/encoder/embed: float32[16, 9] here, float32[16, 8] in the checkpoint",
        "  params/encoder/new: int8[2] here, nothing in the checkpoint",
        "  params/encoder/stack: nothing here, float32[2, 8, 16] in the checkpoint",
        "  params/head/bias: float32[16] here, bfloat16[16] in the checkpoint",
    ]


def test_damaged_steps_are_moved_aside_never_deleted_never_counted(run):
    damaged = run / "20" / "state" / "_METADATA"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with Checkpoints(run, keep=2, keep_best=0) as checkpoints:
        assert checkpoints.restore(target(1)).step == 10
        assert (checkpoints.latest, checkpoints.steps()) == (10, [10])
        checkpoints.save(20, make_state(21), {"again": True})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20]  # keep=2: the damaged one does not count
        restored = checkpoints.restore(target(1))
        assert (restored.step, restored.metadata, restored.refused) == (20, {"again": True}, [])
        assert_same(restored.state, make_state(21))
        (run / "20" / "jaxpt.json").write_bytes(b"")
        assert checkpoints.restore(target(1)).step == 10
        checkpoints.save(30, make_state(30))
    assert sorted(path.name for path in run.iterdir()) == ["10", "20.damaged", "20.damaged-2", "30"]
    assert (run / "20.damaged" / "state" / "_METADATA").exists()


def test_keeps_the_newest_and_the_best(tmp_path):
    state = {"w": jnp.ones(3)}
    with Checkpoints(tmp_path, keep=2, keep_best=2) as checkpoints:
        for step, metric in enumerate([None, 3.0, 1.0, float("nan"), 2.0, 2.0, None, 9.0]):
            checkpoints.save(step, {"w": state["w"] + step}, metric=metric)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6, 7]
        assert (checkpoints.best, checkpoints.latest) == (2, 7)
        assert checkpoints.describe("best").metric == 1.0
        assert checkpoints.describe().metric == 9.0
    with pytest.raises(ValueError, match="keep must be"):
        Checkpoints(tmp_path, keep=0)


def test_saving_a_step_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(3)}, {"try": 1})
        checkpoints.save(1, {"w": jnp.arange(3)}, {"try": 2})
        checkpoints.wait()
        assert checkpoints.describe(1).metadata == {"try": 1}  # the same leaves: left alone
        checkpoints.save(1, {"w": jnp.arange(4)}, {"try": 3})
        checkpoints.wait()
        assert checkpoints.describe(1).metadata == {"try": 3}
        (tmp_path / "1" / "state" / "_METADATA").write_bytes(b"")
        checkpoints.save(1, {"w": jnp.arange(4)}, {"try": 4})
        checkpoints.wait()
        assert checkpoints.describe(1).metadata == {"try": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.replaced", "1.replaced-2"]


def test_parameters_alone(two_steps):
    checkpoints = Checkpoints(two_steps)
    wanted = target(4).params
    assert_same(checkpoints.restore_params(wanted).state, make_state(20).params)
    best = checkpoints.restore_params(wanted, "best", averaged=True)
    assert (best.step, best.metadata["at"]) == (10, 10)
    assert_same(best.state, make_state(10).averaged)
    with pytest.raises(ValueError, match=r"params/encoder/embed: nothing here"):
        checkpoints.restore_params(wanted | {"encoder": {"stack": wanted["encoder"]["stack"]}})
    saved = checkpoints.describe()
    assert saved.leaves["params/encoder/stack"][:2] == ((2, 8, 16), "float32")
    assert saved.leaves["opt_state/1/0/mu/encoder/embed"][:2] == ((16, 8), "float32")


def test_the_best_when_damaged_is_replaced_by_another(run):
    (run / "10" / "state" / "_METADATA").unlink()
    restored = Checkpoints(run).restore_params(target(1).params, "best")
    assert restored.step == 20
    assert restored.refused == ["step 10: state/_METADATA is missing"]


def test_parameters_without_an_average(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1, averaged=False))
        checkpoints.wait()
        assert checkpoints.restore(target(1, averaged=False)).state.averaged is None
        with pytest.raises(ValueError, match="holds no averaged parameters"):
            checkpoints.restore_params(target(1).params, averaged=True)


def test_taking_what_fits_from_another_run(two_steps):
    params = {"encoder": {"embed": noise(5, 16, 8), "stack": noise(5, 3, 8, 16)}, "decoder": {"w": noise(5, 4, 4)}}
    params = place(params, 2)
    got = Checkpoints(two_steps).restore_into(params)
    assert (got.step, got.taken, got.refused) == (20, ["encoder/embed"], [])
    assert got.left == [
        "decoder/w: float32[4, 4] here, nothing in the checkpoint",
        "encoder/stack: float32[3, 8, 16] here, float32[2, 8, 16] in the checkpoint",
        "head/bias: nothing here, bfloat16[16] in the checkpoint",
        "head/empty: nothing here, float32[0, 4] in the checkpoint",
    ]
    assert_same(
        got.params, params | {"encoder": params["encoder"] | {"embed": make_state(20).params["encoder"]["embed"]}}
    )
    embed = params["encoder"]["embed"]
    assert got.params["encoder"]["embed"].sharding.is_equivalent_to(embed.sharding, 2)
    with pytest.raises(ValueError, match="other: float32"):
        Checkpoints(two_steps).restore_into({"other": jnp.ones(2)})


def test_what_cannot_be_saved_is_said_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"not n \(int\), w \(ndarray\)"):
            checkpoints.save(1, {"w": np.ones(3), "n": 3})
        with pytest.raises(ValueError, match="same path"):
            checkpoints.save(1, {"a": {"b": jnp.ones(3)}, "a.b": jnp.ones(3)})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(1, {"w": jnp.ones(3)}, {"w": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_in_the_background_is_raised(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("jaxpt.checkpoint.checkpoints.file_digests", full)
        checkpoints.save(1, {"w": jnp.ones(3)})
        with pytest.raises(RuntimeError, match="no space left"):
            checkpoints.wait()
    assert checkpoints.latest is None
    checkpoints.save(1, {"w": jnp.ones(3)})
    checkpoints.close()
    assert checkpoints.latest == 1


def test_what_orbax_wrote_can_be_read_by_orbax_alone(two_steps):
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    with context:
        loaded = ocp.load(two_steps / "20", {"params": {"encoder": target(2).params["encoder"]}})
    assert_same(loaded["params"]["encoder"], make_state(20).params["encoder"])
    assert json.loads((two_steps / "20" / "jaxpt.json").read_text())["metadata"]["at"] == 20
