"""Parameters: declared by Flax NNX modules, kept everywhere else as a plain nest of float32 arrays.

A module declares each parameter once, with its shape, logical axes, role and initializer, and holds no array.
``split`` takes it apart, once and outside jit; ``Declared.bind`` puts arrays in, inside jit. No other part of
NNX is used, and nothing outside this folder knows that Flax is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpt.types import AXIS_RULES, Array, Key, Params, ParamSpec, Role, Tree

Initializer = Callable[[Key, tuple[int, ...]], Array]  # (key, shape) -> float32 array
M = TypeVar("M", bound=nnx.Module)


@dataclass(frozen=True)
class Declaration:
    """One parameter before it has numbers; ``stack`` layers of it are initialised one by one."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: Role
    init: Initializer
    stack: int | None = None

    def spec(self) -> ParamSpec:
        """The axes and the role, for sharding and weight decay."""
        return ParamSpec(self.axes if self.stack is None else ("layers", *self.axes), self.role)

    def create(self, key: Key, layer_keys: Key) -> Array:
        """The initial array, from the leaf's key or from one key per layer."""
        if self.stack is None:
            return self.init(key, self.shape)
        # A loop, not vmap: half the time to compile on a CPU.
        return jax.lax.map(lambda k: self.init(k, self.shape), layer_keys[: self.stack])


def param(shape: tuple[int, ...], axes: tuple[str | None, ...], role: Role, init: Initializer) -> nnx.Param:
    """Declare a float32 parameter of a module."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(
        jax.ShapeDtypeStruct(shape, jnp.float32),
        declaration=Declaration(tuple(shape), tuple(axes), role, init),
    )


@dataclass(frozen=True, eq=False)
class Declared(Generic[M]):
    """A module taken apart: ``tree`` is a nested dict of Declarations, ``bind`` gives the module its arrays."""

    tree: Tree
    graphdef: Any
    skeleton: Any

    def bind(self, params: Params) -> M:
        """The module with these arrays; call it inside jit."""
        state = jax.tree.map(lambda leaf: leaf, self.skeleton)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graphdef, state)


def split(module: M) -> Declared[M]:
    """Take a freshly built module apart into its declarations and its structure."""
    graphdef, skeleton = nnx.split(module)
    variables = jax.tree.leaves(skeleton, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    structure = jax.tree.structure(nnx.to_pure_dict(skeleton))
    tree = jax.tree.unflatten(structure, [v.get_metadata()["declaration"] for v in variables])
    return Declared(tree, graphdef, skeleton)


def stacked(tree: Tree, depth: int) -> Tree:
    """The declarations of ``depth`` like layers, stacked along a leading axis."""
    return map_declarations(lambda d: replace(d, stack=depth), tree)


def map_declarations(function: Callable[[Declaration], Any], tree: Tree) -> Tree:
    """``jax.tree.map`` over Declarations."""
    return jax.tree.map(function, tree, is_leaf=lambda leaf: isinstance(leaf, Declaration))


def specs_of(tree: Tree) -> Tree:
    """The ParamSpecs of a tree of Declarations."""
    return map_declarations(Declaration.spec, tree)


def initializer_of(tree: Tree) -> Callable[[Key], Params]:
    """``init(key)`` of a tree of Declarations; a leaf's key is ``fold_in(key, crc32(path))``.

    Layer i of a stack draws from ``fold_in(leaf key, i)``. So a parameter's first numbers depend on its name and
    layer alone: adding a parameter or a layer reshuffles no other.
    """
    is_leaf = lambda leaf: isinstance(leaf, Declaration)  # noqa: E731
    paths, structure = jax.tree.flatten_with_path(tree, is_leaf=is_leaf)
    names = ["/".join(str(part.key) for part in path) for path, _ in paths]
    declarations: list[Declaration] = [declaration for _, declaration in paths]
    hashes = np.array([crc32(name.encode()) for name in names], np.uint32)
    layers = np.arange(max((d.stack or 0 for d in declarations), default=0))
    fold = jax.vmap(jax.random.fold_in, (None, 0))

    def init(key: Key) -> Params:
        if not declarations:
            return structure.unflatten([])
        keys = fold(key, hashes)  # all at once, since every fold of its own would be a kernel to compile
        layer_keys = jax.vmap(fold, (0, None))(keys, layers)
        return structure.unflatten([d.create(keys[i], layer_keys[i]) for i, d in enumerate(declarations)])

    return init


def platform() -> str:
    """What the program that is being traced will run on: "cpu", "gpu" or "tpu".

    The ambient mesh (``jax.set_mesh``) knows, also where it is the mesh of a machine that is not here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def constrain(x: Array, *names: str | None) -> Array:
    """Pin the sharding of an activation by AXIS_RULES on the ambient mesh (``jax.set_mesh``).

    Mesh axes that the mesh lacks, that are not Auto, that another dimension took or that do not divide the
    dimension are left out. Without a mesh nothing happens.

    Args:
      x: any array.
      names: a logical axis name or None for each dimension of ``x``.

    Example:
      >>> constrain(jnp.ones((2, 3)), "batch", None).shape
      (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    assert len(names) == x.ndim, (names, x.shape)
    auto = {
        axis: mesh.shape[axis]
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Auto
    }
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(names, x.shape, strict=True):
        taken: list[str] = []
        for axis in AXIS_RULES.get(name, ()) if name else ():
            if auto.get(axis, 1) > 1 and size % auto[axis] == 0:
                size //= auto.pop(axis)
                taken.append(axis)
        entries.append(tuple(taken) or None)
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*entries))
