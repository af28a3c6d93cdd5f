"""Where parameters, moments and rows live on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import packed_batch, tiny_vocab

from jaxpt.optimizer import OptimizerConfig, make_optimizer
from jaxpt.sharding import (
    MeshConfig,
    check_rows,
    constrain_rows,
    local_rows,
    make_mesh,
    partition_spec,
    put_batch,
    state_shardings,
)
from jaxpt.types import ParamSpec, RowSpec


def test_mesh_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}
    assert dict(make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2)).shape)["fsdp"] == 4


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"fsdp": 0}, {"tensor": 3}, {"data": 16}])
def test_meshes_that_cannot_be(sizes: dict):
    with pytest.raises(ValueError, match="mesh data="):
        make_mesh(MeshConfig(**sizes))


def test_rule_table():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    assert partition_spec(("vocab", "embed"), (64, 16), mesh) == P("tensor", "fsdp")
    assert partition_spec(("layers", "embed", "mlp"), (2, 16, 32), mesh) == P(None, "fsdp", "tensor")
    assert partition_spec(("heads", "mlp"), (4, 4), mesh) == P("tensor", None)  # a mesh axis once
    assert partition_spec(("embed",), (6,), mesh) == P(None)  # only where it divides
    assert partition_spec(("batch", None), (8, 3), mesh) == P("fsdp", None)  # axes of size 1 are left out
    assert partition_spec(("unheard_of",), (8,), mesh) == P(None)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_moments_live_where_their_parameters_live(name: str):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = {"a": {"kernel": ParamSpec(("embed", "mlp"), "kernel")}, "kernel": ParamSpec((None,), "bias")}
    params = {"a": {"kernel": jnp.ones((4, 8))}, "kernel": jnp.ones(4)}
    optimizer = make_optimizer(OptimizerConfig(name), specs, params, 10)
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
    shapes = jax.eval_shape(lambda: state)
    shardings = state_shardings(shapes, specs, shapes["params"], mesh)
    assert shardings["params"]["a"]["kernel"].spec == P("fsdp", "tensor")
    assert shardings["params"]["kernel"].spec == P(None)
    moments = [
        sharding.spec
        for leaf, sharding in zip(
            jax.tree.leaves(shapes["opt_state"]), jax.tree.leaves(shardings["opt_state"]), strict=True
        )
        if leaf.shape == (4, 8)
    ]
    assert moments == [P("fsdp", "tensor")] * {"adamw": 2, "adafactor": 1}[name]
    assert shardings["step"].spec == P()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 4, 2)])
def test_batches_arrive_whole_and_spread(sizes: tuple[int, int, int]):
    mesh = make_mesh(MeshConfig(*sizes))
    batch = packed_batch(RowSpec(), tiny_vocab())
    rows = local_rows(8, mesh)
    np.testing.assert_array_equal(rows, np.arange(8))  # one process reads everything
    placed = put_batch(batch, rows, 8, mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert placed.tokens.sharding.spec == P(("data", "fsdp"))
    shares = {shard.data.shape[0] for shard in placed.tokens.addressable_shards}
    assert shares == {8 // (sizes[0] * sizes[1])}
    with jax.set_mesh(mesh):
        pinned = jax.jit(constrain_rows)(placed)
    assert pinned.tokens.sharding.is_equivalent_to(placed.tokens.sharding, 2)


def test_rows_must_divide():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    check_rows(32, 4, mesh)
    with pytest.raises(ValueError, match="make it a multiple of 32"):
        check_rows(16, 4, mesh)
