"""How the terms of a loss get along, and how it bends: measured beside a run, changing nothing of it.

    alignment     <g_a, g_b> / (|g_a| |g_b|)       gradients of two terms of the loss on the same batch
    noise floor   the same for one term on two halves of the batch: what an alignment must be read against
    curvature     g'Hg / g'g, the eigenvalue of H that is largest in size, and trace H

H is the Hessian of the loss on this batch, which is never formed: Hv is the derivative of the gradient along v,
forward over reverse (Pearlmutter 1994), at two to three times the cost of a gradient. Where an objective stops a
gradient, H is that of the loss with the stopped values held.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.rows import row_keys
from jaxpt.models.params import constrain
from jaxpt.optimizer import restore_frozen, trainable
from jaxpt.step import batch_gradient, make_example, seed_key
from jaxpt.types import Array, Batch, Example, Key, Objective, Schedule, Snapshot, Tree

LAYERS = "layers"  # where a network keeps what repeats
TINY = 1e-30  # beside norms that may be 0


class Alignment(NamedTuple):
    """Products <g_a, g_b> of gradients per group of layers; stacked layers have an axis [N] before the last two."""

    terms: dict[str, Array]  # {group: [T, T]} of the T terms; empty where there is one
    halves: dict[str, Array]  # {group: [T, 2, 2]} of the two halves of the batch, for each term


class Curvature(NamedTuple):
    """What ``curvature`` measures; scalars."""

    gradient: Array  # g'Hg / g'g: the curvature along the steepest descent
    top: Array  # v'Hv / v'v of the last vector of the power iteration
    top_residual: Array  # |Hv - top v| / |top v|: 0 at an eigenvector
    trace: Array
    trace_error: Array  # standard error of the trace


# --------------------------------------------------------------------------------------------- alignment


def make_alignment(
    objective: Objective, specs: Tree, *, seed: int, microbatches: int = 1
) -> Callable[[Snapshot, Batch], Alignment]:
    """Return the pure function (snapshot, batch) -> Alignment, with the masks and the dropout of the train step.

    It costs three gradients per term and holds those of all terms; with one term, two gradients.

    Args:
      objective: what is trained; its terms are taken with their scales.
      specs: tree of ParamSpec with groups assigned.
      seed, microbatches: the run's.
    """
    terms = tuple(objective.scale)

    def alignment(snapshot: Snapshot, batch: Batch) -> Alignment:
        example, keys = _drawn(objective, snapshot, batch, seed)

        def gradient(chosen_T: Array, rows_R: Array) -> Tree:
            scale = {term: _times(objective.scale[term], share) for term, share in zip(terms, chosen_T, strict=True)}
            part = _of_rows(example, rows_R)
            chosen = objective._replace(scale=scale)
            return _placed(specs, batch_gradient(chosen, specs, snapshot, part, keys, microbatches).grads)

        def halves(chosen_T: Array) -> dict[str, Array]:
            return products(specs, jax.lax.map(lambda rows_R: gradient(chosen_T, rows_R), jnp.stack([even, 1 - even])))

        even = (jnp.arange(example.row_ids.shape[0]) % 2).astype(jnp.float32)
        one_by_one = jnp.eye(len(terms))
        whole: dict[str, Array] = {}
        if len(terms) > 1:
            stack = jax.lax.map(lambda chosen_T: gradient(chosen_T, jnp.ones_like(even)), one_by_one)
            whole = products(specs, stack)
        return Alignment(whole, jax.lax.map(halves, one_by_one))

    return alignment


def _drawn(objective: Objective, snapshot: Snapshot, batch: Batch, seed: int) -> tuple[Example, Array]:
    """The example and the row keys of the train step at this step."""
    corrupt_key, loss_key = (jax.random.fold_in(seed_key(seed, use), snapshot.step) for use in ("corrupt", "loss"))
    example = make_example(objective, snapshot, batch, corrupt_key)
    return example, row_keys(loss_key, example.row_ids)


def _times(scale: float | Schedule, share: Array) -> Schedule:
    return lambda step: share * (scale(step) if callable(scale) else scale)


def _of_rows(example: Example, rows_R: Array) -> Example:
    """The example with weights and counts of some rows only."""
    weigh = lambda leaf: leaf * rows_R.reshape(-1, *[1] * (leaf.ndim - 1))  # noqa: E731
    weights, counts = jax.tree.map(weigh, (example.weights, example.counts))
    return example._replace(weights=weights, counts=counts)


def _placed(specs: Tree, tree: Tree) -> Tree:
    """Values per parameter, spread over the devices as the parameters are."""
    return jax.tree.map(lambda spec, leaf: None if leaf is None else constrain(leaf, *spec.axes), specs, tree)


def products(specs: Tree, stack: Tree) -> dict[str, Array]:
    """Return the products of S gradients with each other, per group of the layers that terms can share.

    Those are the networks that have layers (all networks, where none has): heads are left out. A token table is a
    group of its own, because a tied one also is an output layer; "" is everything but such tables.

    Args:
      specs: tree of ParamSpec.
      stack: gradients, leaves [S, ...]; None where frozen.

    Returns:
      {group: [S, S]}, for stacked layers [N, S, S]; f32.

    >>> from jaxpt.types import ParamSpec
    >>> stack = {"trunk": {"layers": {"w": jnp.array([[[1.0], [2.0]], [[3.0], [-1.0]]])}}, "head": jnp.ones(2)}
    >>> specs = {"trunk": {"layers": {"w": ParamSpec(("layers", None), "kernel")}}, "head": ParamSpec((), "bias")}
    >>> print({group: each.tolist() for group, each in products(specs, stack).items()})
    {'trunk/layers': [[[1.0, 3.0], [3.0, 9.0]], [[4.0, -2.0], [-2.0, 1.0]]], '': [[5.0, 1.0], [1.0, 10.0]]}
    """
    paths, structure = jax.tree.flatten_with_path(specs)
    named = [(tuple(str(part.key) for part in path), spec) for path, spec in paths]
    trunks = {names[0] for names, _ in named if LAYERS in names} or {names[0] for names, _ in named}
    found: dict[str, Array] = {}
    for (names, spec), leaf in zip(named, structure.flatten_up_to(stack), strict=True):
        if leaf is None or names[0] not in trunks:
            continue
        is_stacked = spec.axes[:1] == (LAYERS,)
        rest = tuple(range(1 + is_stacked, leaf.ndim))
        layers = ((1,), (1,)) if is_stacked else ((), ())
        # float32 sums, also where products would be rounded to bfloat16 operands
        product = jax.lax.dot_general(leaf, leaf, ((rest, rest), layers), precision="highest")
        is_table = spec.role == "embedding" and "vocab" in spec.axes
        depth = names.index(LAYERS) + 1 if LAYERS in names else len(names) if is_table else 2
        sums = {"/".join(names[:depth]): product}
        if not is_table:
            sums[""] = product.sum(0) if is_stacked else product
        for group, each in sums.items():
            found[group] = _added(found[group], each) if group in found else each
    return found


def _added(a: Array, b: Array) -> Array:
    """The sum of products of layers; a shorter stack lacks the first ones (the norm that ModernBERT leaves out)."""
    if a.ndim == 3 and a.shape != b.shape:
        longest = max(a.shape[0], b.shape[0])
        a, b = (jnp.pad(each, ((longest - each.shape[0], 0), (0, 0), (0, 0))) for each in (a, b))
    return a + b


# --------------------------------------------------------------------------------------------- curvature


def make_curvature(
    objective: Objective, specs: Tree, *, seed: int, microbatches: int = 1, iterations: int = 15, samples: int = 8
) -> Callable[[Snapshot, Batch], Curvature]:
    """Return the pure function (snapshot, batch) -> Curvature of the whole loss over everything that is trained.

    The random vectors are the same at every step, so that two readings differ by parameters and data alone.

    Args:
      objective: what is trained, in float32, without dropout, with dense or blockwise attention: the kernels of
        accelerators have no second derivative.
      specs: tree of ParamSpec with groups assigned.
      seed, microbatches: the run's.
      iterations, samples: see ``curvature``.
    """

    def measure(snapshot: Snapshot, batch: Batch) -> Curvature:
        example, keys = _drawn(objective, snapshot, batch, seed)

        def gradient(part: Tree) -> Tree:
            look = snapshot._replace(params=restore_frozen(_placed(specs, part), snapshot.params))
            return _placed(specs, batch_gradient(objective, specs, look, example, keys, microbatches).grads)

        with jax.default_matmul_precision("highest"):
            key, variable = seed_key(seed, "diagnostics"), trainable(specs, snapshot.params)
            return curvature(gradient, variable, key, iterations=iterations, samples=samples)

    return measure


def curvature(
    gradient: Callable[[Tree], Tree], point: Tree, key: Key, *, iterations: int = 15, samples: int = 8
) -> Curvature:
    """Return what 1 + iterations + samples products with the Hessian tell about it.

    The power iteration v <- Hv / |Hv| finds the eigenvalue that is largest in size, with its sign. The trace is
    the mean of v'Hv over random signs v (Hutchinson 1990), of variance 2 sum over i != j of H[i, j]^2 each.

    Args:
      gradient: of the loss, from parameters to a tree like them.
      point: the parameters, float32.
      key: of the random vectors.
      iterations: of the power iteration, from a normal vector.
      samples: of the trace, at least 2.

    >>> H = jnp.diag(jnp.array([1.0, -4.0, 2.0]))
    >>> found = curvature(lambda x: H @ x, jnp.ones(3), jax.random.key(0))
    >>> [round(float(each), 3) for each in found]  # g = (1, -4, 2)
    [-2.619, -4.0, 0.0, -1.0, 0.0]
    """
    assert iterations >= 1 and samples >= 2
    start_key, sign_key = jax.random.split(key)

    def start() -> Tree:
        return _random(jax.random.normal, start_key, point)

    # The vectors are taken one after the other by one program, which compiles once and holds few of them: first those
    # of the power iteration, then the gradient, which each product gives as well, then the signs.
    def one(last: tuple[Tree, Tree], which: tuple[Array, Array]) -> tuple[tuple[Tree, Tree], tuple[Array, Array]]:
        (along, image), (kind, index) = last, which
        size = jnp.maximum(jnp.sqrt(_dot(image, image)), TINY)
        vector = jax.lax.switch(
            kind,
            (
                start,
                lambda: jax.tree.map(lambda leaf: leaf / size, image),
                lambda: along,
                lambda: _random(jax.random.rademacher, jax.random.fold_in(sign_key, index), point),
            ),
        )
        along, image = jax.jvp(gradient, (point,), (vector,))
        product, square = _dot(vector, image), _dot(vector, vector)
        quotient = product / jnp.maximum(square, TINY)
        left = jax.tree.map(lambda a, b: a - quotient * b, image, vector)
        residual = jnp.sqrt(_dot(left, left) / jnp.maximum(quotient**2 * square, TINY))
        return (along, image), (jnp.where(kind == 3, product, quotient), residual)

    kinds = jnp.array([0] + [1] * (iterations - 1) + [2] + [3] * samples)
    zeros = jax.tree.map(jnp.zeros_like, point)
    _, (values, residuals) = jax.lax.scan(one, (zeros, zeros), (kinds, jnp.arange(len(kinds))))
    top, traces = iterations - 1, values[iterations + 1 :]
    error = jnp.std(traces, ddof=1) / samples**0.5
    return Curvature(values[iterations], values[top], residuals[top], traces.mean(), error)


def _random(draw: Callable[..., Array], key: Key, like: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([draw(k, leaf.shape, jnp.float32) for k, leaf in zip(keys, leaves, strict=True)])


def _dot(a: Tree, b: Tree) -> Array:
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)), jnp.zeros(()))


# ---------------------------------------------------------------------------------------------- readings


def readings(terms: Sequence[str], alignment: Alignment, curvature: Curvature) -> dict[str, float]:
    """Return measurements as named numbers.

    Args:
      terms: of ``Objective.scale``, in order.
      alignment, curvature: as arrays on the host.

    Returns:
      {"cosine/A-B": of the gradients of two terms, "norm/A": their length, "noise_floor/A": the cosine of two halves
      of the batch, each over all groups but token tables; "cosine/A-B/GROUP" and "noise_floor/A/GROUP"; and
      "curvature/WHAT"}. A slash in a term becomes a dot. Where a gradient is 0 there is no cosine.

    >>> one = Curvature(*np.arange(5.0))
    >>> readings(("a", "m/b"), Alignment({"": np.array([[4.0, 1.0], [1.0, 1.0]])}, {}), one)["cosine/a-m.b"]
    0.5
    """
    names = [term.replace("/", ".") for term in terms]
    found: dict[str, float] = {}
    for group, grams in _single(alignment.terms):
        if not group:
            found |= {
                f"norm/{name}": float(length) for name, length in zip(names, np.sqrt(np.diag(grams)), strict=True)
            }
        for a, b in itertools.combinations(range(len(names)), 2):
            found |= _cosine(f"cosine/{names[a]}-{names[b]}", group, grams[a, a], grams[b, b], grams[a, b])
    for place, name in enumerate(names):
        for group, gram in _single({group: halves[place] for group, halves in alignment.halves.items()}):
            found |= _cosine(f"noise_floor/{name}", group, gram[0, 0], gram[1, 1], gram[0, 1])
    return found | {f"curvature/{name}": float(value) for name, value in curvature._asdict().items()}


def _single(groups: dict[str, Array]) -> list[tuple[str, Array]]:
    """Stacked layers one by one."""
    flat: list[tuple[str, Array]] = []
    for group, gram in groups.items():
        layers = [(f"{group}/{layer}", each) for layer, each in enumerate(gram)]
        flat += layers if gram.ndim == 3 else [(group, gram)]
    return flat


def _cosine(name: str, group: str, aa: Array, bb: Array, ab: Array) -> dict[str, float]:
    norms = np.sqrt(aa) * np.sqrt(bb)
    return {} if norms == 0 else {f"{name}/{group}".rstrip("/"): float(ab / norms)}
