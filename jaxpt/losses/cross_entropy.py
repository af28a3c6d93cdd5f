"""Cross-entropy over a vocabulary: the one place where logits become losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.types import Array, Readout, Tree

# Logits of all positions in float32 may take this much memory per device; beyond it they are made piece by piece
# and a second time in the backward pass, which costs a third of the output layer's time.
LOGITS_BYTES = 2**30


class CrossEntropy(NamedTuple):
    """What one pass over the logits gives, per position and in float32."""

    loss: Array  # [...]: with label smoothing
    nll: Array  # [...]: -log p(target), without
    log_normalizer: Array  # [...]: log of the sum of exp(logits), log Z
    correct: Array  # [...]: 1 where no token is likelier than the target, else 0; no gradient


def cross_entropy(logits: Array, targets: Array, label_smoothing: float = 0.0) -> CrossEntropy:
    """Return the cross-entropy of each position.

    With the smoothed target q = (1 - eps) onehot(y) + eps / V (the form of optax and of Szegedy et al. 2016;
    fairseq and T5X put eps / (V - 1) on the others instead)::

        loss = -sum_i q_i log p_i = (1 - eps) nll + eps (log Z - mean_i z_i)      dloss/dz = p - q

    Its optimum is biased by eps (1/V - pi_i) against the true pi: report ``nll`` as the metric.

    Args:
      logits: [..., V] of any float type; the arithmetic is float32.
      targets: [...] i32 in 0 .. V-1.
      label_smoothing: eps, in [0, 1).

    >>> import jax.numpy as jnp
    >>> result = cross_entropy(jnp.array([[0.0, 0.0, 2.0, 0.0]]), jnp.array([2]))
    >>> round(float(result.nll[0]), 4), round(float(result.log_normalizer[0]), 4), float(result.correct[0])
    (0.3408, 2.3408, 1.0)
    """
    logits = logits.astype(jnp.float32)
    highest = jax.lax.stop_gradient(logits.max(-1))
    log_normalizer = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(-1))
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_normalizer - target_logit
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_normalizer - jnp.mean(logits, axis=-1))
    return CrossEntropy(loss, nll, log_normalizer, (target_logit >= highest).astype(jnp.float32))


def z_loss(log_normalizer: Array) -> Array:
    """Return (log Z)^2, the auxiliary loss that keeps the logits' normaliser near 1 (PaLM; scale 1e-4).

    As a term of its own with scale lambda, beside the cross-entropy, d/dz = p (1 + 2 lambda log Z) - y.

    Args:
      log_normalizer: [...] f32, of ``cross_entropy``.
    """
    return jnp.square(log_normalizer)


# ------------------------------------------------------------------------------------- from hidden states


def logits_of(readout: Readout) -> Array:
    """Return the logits [..., V] f32 of a readout, whole.

    >>> logits_of(Readout(jnp.ones((2, 3)), jnp.ones((4, 3)))).shape
    (2, 4)
    """
    return _biased(_product(readout.hidden, readout.table.astype(readout.hidden.dtype), (-1,), (1,)), readout.bias)


def linear_cross_entropy(
    readout: Readout, targets: Array, label_smoothing: float = 0.0, *, pieces: int | None = None
) -> CrossEntropy:
    """Return ``cross_entropy(logits_of(readout), targets)`` without ever holding [positions, V] where that is large.

    The gradient is written out: products of the backward pass take operands of the compute dtype, as the forward
    pass does, and no one-hot array or scatter is made. With g the cotangents of loss, nll and log Z,

        dlogits = (g_loss + g_nll + g_logZ) p - ((1 - eps) g_loss + g_nll) onehot(y) - eps g_loss / V

    Args:
      readout: of a head; hidden [R, K, E].
      targets: [R, K] i32 in 0 .. V-1.
      label_smoothing: eps, in [0, 1).
      pieces: how many pieces the K positions are made in; 1 keeps the logits for the backward pass, more make
        them twice. By default what ``LOGITS_BYTES`` asks for.

    >>> readout = Readout(jnp.eye(3)[None], jnp.eye(3))
    >>> linear_cross_entropy(readout, jnp.array([[0, 1, 1]]), pieces=3).nll.round(2)
    Array([[0.55, 0.55, 1.55]], dtype=float32)
    """
    pieces = _pieces(readout) if pieces is None else pieces
    made: Any = _linear(label_smoothing, pieces, readout, targets)
    (loss, nll, log_normalizer), correct = made
    return CrossEntropy(loss, nll, log_normalizer, jax.lax.stop_gradient(correct))


def map_logits(function: Callable[..., Tree], readout: Readout, *others: Array, pieces: int | None = None) -> Tree:
    """Return ``function(logits [R, K, V], *others)`` without ever holding all logits where they are large.

    Args:
      function: from logits [R, k, V] f32 and the same k positions of the others to arrays [R, k, ...]; it works on
        each position by itself.
      readout: of a head; hidden [R, K, E]. A gradient makes the logits of every piece a second time.
      others: [R, K, ...].
      pieces: as of ``linear_cross_entropy``.

    >>> map_logits(lambda logits: logits.argmax(-1), Readout(jnp.eye(3)[None], jnp.eye(3)), pieces=3)
    Array([[0, 1, 2]], dtype=int32)
    """
    pieces = _pieces(readout) if pieces is None else pieces

    def one(piece: tuple[Array, ...]) -> Tree:
        return function(logits_of(readout._replace(hidden=piece[0])), *piece[1:])

    given = (readout.hidden, *others)
    return one(given) if pieces == 1 else _join(jax.lax.map(jax.checkpoint(one), _cut(given, pieces)))


def _pieces(readout: Readout) -> int:
    """How many pieces, that divide the positions, keep the logits of one within ``LOGITS_BYTES`` per device."""
    rows, positions = readout.hidden.shape[:2]
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    wanted = math.ceil(4 * rows * positions * readout.table.shape[0] / devices / LOGITS_BYTES)
    return next(n for n in range(min(wanted, positions), positions + 1) if positions % n == 0)


def _product(x: Array, y: Array, left: tuple[int, ...], right: tuple[int, ...]) -> Array:
    """Contract these axes, with float32 sums."""
    dimensions = ((tuple(axis % x.ndim for axis in left), right), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _biased(scores: Array, bias: Array | None) -> Array:
    return scores if bias is None else scores + bias


def _cut(tree: Tree, pieces: int) -> Tree:
    """Leaves [R, K, ...] as [pieces, R, K / pieces, ...]: piece i takes the positions i, i + pieces, ...

    Strided, so that devices among which the positions are spread share every piece.
    """

    def cut(leaf: Array) -> Array:
        rows, positions, *rest = leaf.shape
        return jnp.moveaxis(leaf.reshape(rows, positions // pieces, pieces, *rest), 2, 0)

    return jax.tree.map(cut, tree)


def _join(tree: Tree) -> Tree:
    """Undo ``_cut``."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2).reshape(leaf.shape[1], -1, *leaf.shape[3:]), tree)


Result = tuple[tuple[Array, Array, Array], Array]  # (loss, nll, log Z), correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(smoothing: float, pieces: int, readout: Readout, targets: Array) -> Result:
    return _forward(smoothing, pieces, readout, targets)[0]


def _forward(smoothing: float, pieces: int, readout: Readout, targets: Array) -> tuple[Result, tuple]:
    table = Readout(readout.hidden[:0], readout.table.astype(readout.hidden.dtype), readout.bias)

    def one(piece: tuple[Array, Array]) -> tuple[Result, Array]:
        scores = logits_of(table._replace(hidden=piece[0], bias=None))
        made = cross_entropy(_biased(scores, readout.bias), piece[1], smoothing)
        return (
            (made.loss, made.nll, made.log_normalizer),
            made.correct,
        ), scores  # the bias is added where they are read, not in a pass of its own

    if pieces == 1:
        result, scores = one((readout.hidden, targets))
    else:
        result = _join(jax.lax.map(lambda piece: one(piece)[0], _cut((readout.hidden, targets), pieces)))
        scores = None
    return result, (readout, targets, result[0][2], scores)


def _backward(smoothing: float, pieces: int, saved: tuple, cotangents: Result) -> tuple[Readout, None]:
    readout, targets, log_normalizer, saved_scores = saved
    (g_loss, g_nll, g_normalizer), _ = cotangents
    dtype, vocab = readout.hidden.dtype, readout.table.shape[0]
    table = readout.table.astype(dtype)

    def one(piece: tuple) -> tuple[Array, tuple[Array, Array | None]]:
        (hidden, targets, normalizer, of_p, of_target, of_all), scores = piece
        logits = _biased(logits_of(Readout(hidden, table)) if scores is None else scores, readout.bias)
        dlogits = of_p[..., None] * jnp.exp(logits - normalizer[..., None])
        is_target = targets[..., None] == jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
        dlogits = (dlogits - jnp.where(is_target, of_target[..., None], 0.0) - of_all[..., None]).astype(dtype)
        leading = tuple(range(dlogits.ndim - 1))
        dbias = None
        if readout.bias is not None:  # as a product, because a sum over rows is slow on a CPU
            dbias = _product(jnp.ones(dlogits.shape[:-1], dtype), dlogits, leading, leading)
        dtable = _product(dlogits, hidden, leading, leading)
        return _product(dlogits, table, (-1,), (0,)).astype(dtype), (dtable, dbias)

    factors = (g_loss + g_nll + g_normalizer, (1 - smoothing) * g_loss + g_nll, smoothing / vocab * g_loss)
    given = (readout.hidden, targets, log_normalizer, *factors)
    if pieces == 1:
        dhidden, (dtable, dbias) = one((given, saved_scores))
    else:

        def add(total: tuple, piece: tuple) -> tuple[tuple, Array]:
            dhidden, more = one((piece, None))
            return jax.tree.map(jnp.add, total, more), dhidden

        zeros = jax.tree.map(jnp.zeros_like, (readout.table, readout.bias))
        (dtable, dbias), stacked = jax.lax.scan(add, zeros, _cut(given, pieces))
        dhidden = _join(stacked)
    return Readout(dhidden, dtable, dbias), None


_linear.defvjp(_forward, _backward)
