"""A state as leaves by path: their comparison, and their way to Orbax and back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxpt.checkpoint.integrity import Leaf, leaf_digest
from jaxpt.types import Array, Tree

_SHOWN = 12  # leaves or files that one message names


def flatten(tree: Tree, kind: Any, prefix: str = "") -> tuple[dict[str, Any], Any]:
    """The leaves by path. Of the containers, nothing but these paths is saved."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {prefix + jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len({name.replace("/", ".") for name in leaves}) < len(pairs):  # Orbax joins the names with dots
        raise ValueError("two leaves of the state have the same path: avoid '/' and '.' in its keys")
    if wrong := [f"{name} ({type(leaf).__name__})" for name, leaf in leaves.items() if not isinstance(leaf, kind)]:
        raise ValueError(f"every leaf of the state must be a jax.Array or its ShapeDtypeStruct, not {short(wrong)}")
    return leaves, treedef


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """Plain nested dicts, which Orbax stores as they are; without empty arrays, which it refuses."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if math.prod(leaf.shape):
            *folders, last = name.split("/")
            inner = tree
            for folder in folders:
                inner = inner.setdefault(folder, {})
            inner[last] = leaf
    return tree


def describe(leaves: dict[str, Array]) -> dict[str, Leaf]:
    """Shape, dtype and digest of each leaf.

    One after the other: leaves of the same shape and sharding share a compiled program, and many programs with
    collectives in flight at once starve each other on virtual CPU devices, which XLA answers by aborting.
    """
    return {name: Leaf(tuple(x.shape), str(x.dtype), int(leaf_digest(x))) for name, x in leaves.items()}


def load(folder: epath.Path, wanted: dict[str, Any]) -> dict[str, Array]:
    """Load these leaves of a step, with their shardings."""
    targets = {name: _placed(name, leaf) for name, leaf in wanted.items()}
    arrays = {
        name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in targets.items()
        if not math.prod(leaf.shape)
    }
    tree = nest(targets)
    if tree:
        context = ocp.Context()
        context.pytree_options.loading.partial_load = True
        with context:
            loaded = ocp.load(folder, tree)
        arrays |= flatten(loaded, jax.Array)[0]
    return {name: arrays[name] for name in wanted}


def _placed(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError(f"with several processes every leaf to restore needs a sharding; {name} has none")
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def say(leaf: Any) -> str:
    """A leaf's dtype and shape in words."""
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def differences(wanted: dict[str, Any], saved: dict[str, Leaf]) -> list[str]:
    """A sentence per leaf whose presence, shape or dtype differs."""
    pairs = {name: (say(wanted.get(name)), say(saved.get(name))) for name in sorted(wanted.keys() | saved.keys())}
    return [f"{name}: {here} here, {there} in the checkpoint" for name, (here, there) in pairs.items() if here != there]


def short(items: Iterable[str], separator: str = ", ") -> str:
    """The items joined, but not endlessly many."""
    items = list(items)
    return separator.join([*items[:_SHOWN], *([f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else [])])
