"""Contrastive losses: tell the partner of a vector from the partners of all others; in float32, one loss per anchor.

With anchors a, candidates c, the target t(i) of anchor i and the negatives N(i), the other candidates that count::

    L_ij = scale * <a_i, c_j>                    of vectors of length 1, or as they are ("dot")

    InfoNCE    loss_i = -L_i,t(i) + log(exp L_i,t(i) + sum over j in N(i) of exp L_ij)
    SigLIP     loss_i = -log sigmoid(L_i,t(i) + b) - sum over j in N(i) of log sigmoid(-L_ij - b)

Every anchor wants every candidate, so these belong into ``Objective.couple``, over the global batch. Letters here:
R anchors or pairs, K candidates, E width of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxpt.types import AXIS_RULES, Array, Tree

Similarity: TypeAlias = Literal["cosine", "dot"]
Form: TypeAlias = Literal["one_way", "symmetric", "nt_xent"]

# Similarities in float32 may take this much memory per device; beyond it they are made in blocks of candidates and a
# second time in the backward pass.
SIMILARITY_BYTES = 2**27
LOWEST = -1e30  # a logit that counts for nothing, and of which no gradient is NaN


class Contrast(NamedTuple):
    """What one pass over the similarities gives, per anchor and in float32."""

    loss: Array  # [R]
    correct: Array  # [R]: 1 where the target is likelier than all negatives, 1/2 where one is as likely; no gradient


class _Candidates(NamedTuple):
    vectors: Array  # [K, E] f32
    place: Array  # [K] i32, among all
    valid: Array  # [K] bool
    groups: Array | None  # [K] or [K, H] i32
    owners: Array | None  # [K] i32


def normalize(x: Array) -> Array:
    """Return vectors [..., E] at length 1, in float32; 0 stays 0, with a finite gradient.

    >>> normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    Array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def info_nce(
    anchors_RE: Array,
    candidates_KE: Array,
    targets_R: Array,
    *,
    scale: float | Array = 20.0,
    similarity: Similarity = "cosine",
    groups: tuple[Array, Array] | None = None,
    valid_K: Array | None = None,
    owners_K: Array | None = None,
    own_bias: float = 0.0,
    blocks: int | None = None,
) -> Contrast:
    """Return InfoNCE of each anchor among these candidates (van den Oord et al. 2018, arXiv:1807.03748).

    It is formed as softplus(log sum of exp over the negatives - L_i,t(i)), which keeps its digits where it is small.

    Args:
      anchors_RE: [R, E] of any float type.
      candidates_KE: [K, E].
      targets_R: [R] i32, the candidate that is right; it always counts.
      scale: 1 / temperature.
      similarity: "cosine" or "dot".
      groups: [R] and [K] i32; a candidate of the anchor's own group is no negative of it: another copy of the same
        text, or the anchor itself where anchors are among the candidates. Of several numbers each, [R, G] and [K, H],
        one in common is enough.
      valid_K: [K], 0 = not a candidate (of a filler row), but for its own anchor.
      owners_K: [K] i32, the anchor whose hard negative a candidate is; -1 = of none.
      own_bias: added to the logits of an anchor's own hard negatives; ln 2 counts them twice.
      blocks: how many blocks the candidates are taken in; by default what ``SIMILARITY_BYTES`` asks for.

    >>> made = info_nce(jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.arange(2), scale=1.0)
    >>> [round(float(loss), 4) for loss in made.loss]
    [0.513, 0.3711]
    """

    def reduce(logits_RK: Array, negative_RK: Array) -> tuple[Array, Array]:
        masked_RK = jnp.where(negative_RK, logits_RK, LOWEST)
        return jax.nn.logsumexp(masked_RK, axis=-1), jnp.max(masked_RK, axis=-1)

    anchors_RE, candidates_KE = _prepare(similarity, anchors_RE, candidates_KE)
    candidates = _candidates(candidates_KE, valid_K, groups, owners_K)
    groups_R = groups[0] if groups else None
    parts = _over_negatives(reduce, anchors_RE, targets_R, groups_R, candidates, scale, own_bias, blocks)
    target_R = _target_logits(anchors_RE, candidates_KE, targets_R, scale)
    loss_R = jax.nn.softplus(jax.nn.logsumexp(parts[0], axis=0) - target_R)
    return Contrast(loss_R, _correct(target_R, parts[1]))


def in_batch(
    first_RE: Array,
    second_RE: Array,
    form: Form = "one_way",
    *,
    scale: float | Array = 20.0,
    similarity: Similarity = "cosine",
    hard_RKE: Array | None = None,
    hard_bias: float = 0.0,
    hard_texts_RK: Array | None = None,
    hard_valid_RK: Array | None = None,
    texts_R: Array | None = None,
    valid_R: Array | None = None,
    blocks: int | None = None,
) -> Contrast:
    """Return InfoNCE of each pair of a batch, whose other pairs are the negatives::

        one_way     first among all second (SimCSE, arXiv:2104.08821) and, if given, all hard negatives
        symmetric   the mean of first among second and second among first (CLIP, arXiv:2103.00020)
        nt_xent     the mean over both sides of each among all others of both (SimCLR, arXiv:2002.05709)

    Args:
      first_RE, second_RE: [R, E], the two sides of R pairs.
      form: see above.
      scale: 1 / temperature.
      similarity: "cosine" or "dot".
      hard_RKE: [R, K, E], K hard negatives of each pair, which all anchors have; "one_way" only.
      hard_bias: added to the logits of the pair's own.
      hard_texts_RK: [R, K] i32, numbers as in ``texts_R``: a text is no hard negative of pairs that it is in.
      hard_valid_RK: [R, K], 0 = there is no such hard negative.
      texts_R: [R] i32 from 0 on, or [R, 2] where the sides of a pair are different texts; pairs that share a text are
        no negatives of each other.
      valid_R: [R], 0 = a filler row: nobody's negative, and its own loss is to be weighed 0.
      blocks: as of ``info_nce``.

    Returns:
      Per pair, [R]; ``correct`` is a mean over the directions.

    >>> first, second = jnp.array([[1, 0], [0, 1], [0.6, 0.8]]), jnp.array([[0.8, 0.6], [-0.6, 0.8], [0, 1.0]])
    >>> [round(float(in_batch(first, second, form).loss.mean()), 4) for form in ("one_way", "symmetric", "nt_xent")]
    [2.4195, 2.4195, 2.5507]
    """
    assert hard_RKE is None or form == "one_way", f"{form} has no hard negatives"
    count = first_RE.shape[0]
    index_R = jnp.arange(count)
    settings: dict[str, Any] = {"scale": scale, "similarity": similarity, "blocks": blocks}
    if form == "nt_xent":
        both = jnp.concatenate([first_RE, second_RE])
        groups = jnp.concatenate([index_R if texts_R is None else texts_R] * 2)  # one's own side is of one's group
        valid = None if valid_R is None else jnp.tile(valid_R, 2)
        partner = jnp.concatenate([index_R + count, index_R])
        made = info_nce(both, both, partner, groups=(groups, groups), valid_K=valid, **settings)
        return Contrast(*(value.reshape(2, count).mean(0) for value in made))
    groups = None if texts_R is None else (texts_R, texts_R)
    if form == "symmetric":
        made = [
            info_nce(one, other, index_R, groups=groups, valid_K=valid_R, **settings)
            for one, other in ((first_RE, second_RE), (second_RE, first_RE))
        ]
        return Contrast(*((one + other) / 2 for one, other in zip(*made, strict=True)))
    if hard_RKE is None:
        return info_nce(first_RE, second_RE, index_R, groups=groups, valid_K=valid_R, **settings)
    more = hard_RKE.shape[1]
    owners = jnp.repeat(index_R, more)
    valid_R = jnp.ones(count) if valid_R is None else valid_R
    hard_valid = jnp.repeat(valid_R, more)
    if hard_valid_RK is not None:
        hard_valid *= hard_valid_RK.reshape(-1)
    if texts_R is not None:
        texts = texts_R.reshape(count, -1)
        hard_texts = jnp.full_like(owners, -1) if hard_texts_RK is None else hard_texts_RK.reshape(-1)
        hard_texts = jnp.broadcast_to(hard_texts[:, None], (count * more, texts.shape[1]))
        groups = (texts, jnp.concatenate([texts, hard_texts]))
    return info_nce(
        first_RE,
        jnp.concatenate([second_RE, hard_RKE.reshape(count * more, -1)]),
        index_R,
        groups=groups,
        valid_K=jnp.concatenate([valid_R, hard_valid]),
        owners_K=jnp.concatenate([jnp.full_like(index_R, -1), owners]),
        own_bias=hard_bias,
        **settings,
    )


def sigmoid_pairs(
    first_RE: Array,
    second_RE: Array,
    *,
    scale: float | Array = 10.0,
    bias: float | Array = -10.0,
    texts_R: Array | None = None,
    valid_R: Array | None = None,
    blocks: int | None = None,
) -> Contrast:
    """Return SigLIP's loss of each pair of a batch by cosine: a yes or no about every combination (arXiv:2303.15343).

    The published loss is the sum of these over the number of pairs. It wants a bias near -ln(R - 1), the log-odds of a
    combination that is a pair: at 0 the negatives drown the pairs.

    Args:
      first_RE, second_RE: [R, E], the two sides of R pairs.
      scale: exp(t') of the paper, learned.
      bias: b, learned.
      texts_R, valid_R: as of ``in_batch``.
      blocks: as of ``info_nce``.

    >>> round(float(sigmoid_pairs(jnp.eye(64), jnp.eye(64)).loss.mean()), 5)
    0.69601
    """

    def reduce(logits_RK: Array, negative_RK: Array) -> tuple[Array, Array]:
        masked_RK = jnp.where(negative_RK, logits_RK, LOWEST)
        return jnp.sum(jax.nn.softplus(masked_RK + bias), axis=-1), jnp.max(masked_RK, axis=-1)

    first_RE, second_RE = _prepare("cosine", first_RE, second_RE)
    index_R = jnp.arange(first_RE.shape[0])
    candidates = _candidates(second_RE, valid_R, None if texts_R is None else (texts_R, texts_R), None)
    parts = _over_negatives(reduce, first_RE, index_R, texts_R, candidates, scale, 0.0, blocks)
    target_R = _target_logits(first_RE, second_RE, index_R, scale)
    return Contrast(jax.nn.softplus(-target_R - bias) + parts[0].sum(0), _correct(target_R, parts[1]))


def potential(units_RE: Array, valid_R: Array, *, blocks: int | None = None) -> Array:
    """Return the Gaussian potential of each vector, sum over the others of exp(-2 |u - v|^2) (arXiv:2005.10242).

    Args:
      units_RE: [R, E] of length 1.
      valid_R: [R], 0 = not among the others.
      blocks: as of ``info_nce``.

    >>> [round(float(jnp.log(value)), 4) for value in potential(jnp.array([[1.0, 0.0], [-1.0, 0.0]]), jnp.ones(2))]
    [-8.0, -8.0]
    """

    def reduce(logits_RK: Array, negative_RK: Array) -> Array:
        return jnp.sum(jnp.where(negative_RK, jnp.exp(logits_RK - 4.0), 0.0), axis=-1)  # |u - v|^2 = 2 - 2 <u, v>

    candidates = _candidates(units_RE, valid_R, None, None)
    return _over_negatives(reduce, units_RE, jnp.arange(len(units_RE)), None, candidates, 4.0, 0.0, blocks).sum(0)


# ------------------------------------------------------------------------------------------ similarities


def _prepare(similarity: Similarity, *vectors: Array) -> tuple[Array, ...]:
    return tuple(normalize(x) if similarity == "cosine" else x.astype(jnp.float32) for x in vectors)


def _candidates(
    vectors_KE: Array, valid_K: Array | None, groups: tuple[Array, Array] | None, owners_K: Array | None
) -> _Candidates:
    index_K = jnp.arange(vectors_KE.shape[0])
    valid = jnp.ones(index_K.shape, bool) if valid_K is None else valid_K != 0
    return _Candidates(vectors_KE, index_K, valid, groups[1] if groups else None, owners_K)


def _target_logits(anchors_RE: Array, candidates_KE: Array, targets_R: Array, scale: float | Array) -> Array:
    return scale * jnp.sum(anchors_RE * candidates_KE[targets_R], axis=-1)


def _correct(target_R: Array, highest: Array) -> Array:
    """1 where the target is likelier than the highest negative [blocks, R] of all blocks, 1/2 where as likely."""
    highest_R = highest.max(0)
    return jax.lax.stop_gradient((target_R > highest_R) + 0.5 * (target_R == highest_R)).astype(jnp.float32)


def _over_negatives(
    reduce: Callable[[Array, Array], Tree],
    anchors_RE: Array,
    targets_R: Array,
    groups_R: Array | None,
    candidates: _Candidates,
    scale: float | Array,
    own_bias: float,
    blocks: int | None,
) -> Tree:
    """Return ``reduce(logits [R, k], which of them are negatives)`` of each block of candidates: leaves [blocks, R]."""

    def one(block: _Candidates) -> Tree:
        # a TPU would multiply in bfloat16, whose step below 1 is 0.08 of a logit at scale 20
        products_RK = jnp.matmul(anchors_RE, block.vectors.T, precision=jax.lax.Precision.HIGHEST)
        logits_RK = scale * products_RK
        negative_RK = block.valid & (block.place != targets_R[:, None])
        if block.groups is not None and groups_R is not None:
            negative_RK &= ~_share(groups_R, block.groups)
        if block.owners is not None:
            logits_RK += own_bias * (block.owners == jnp.arange(len(anchors_RE))[:, None])
        return reduce(logits_RK, negative_RK)

    blocks = _blocks(len(anchors_RE), len(candidates.place)) if blocks is None else blocks
    if blocks == 1:
        return jax.tree.map(lambda leaf: leaf[None], one(candidates))
    return jax.lax.map(jax.checkpoint(one), _cut(candidates, blocks))


def _share(numbers_R: Array, numbers_K: Array) -> Array:
    """[R, K] bool: whether a number of the one is a number of the other."""
    some_RG, some_KH = (numbers.reshape(len(numbers), -1) for numbers in (numbers_R, numbers_K))
    return jnp.any(some_RG[:, None, :, None] == some_KH[None, :, None, :], axis=(-2, -1))


def _blocks(anchors: int, candidates: int) -> int:
    """How many blocks keep the similarities of one within ``SIMILARITY_BYTES`` per device; anchors spread as rows."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape.get(axis, 1) for axis in AXIS_RULES["batch"])
    return min(candidates, math.ceil(4 * anchors * candidates / devices / SIMILARITY_BYTES))


def _cut(candidates: _Candidates, blocks: int) -> _Candidates:
    """Leaves [K, ...] as [blocks, ceil(K / blocks), ...], filled with candidates that are none (``valid`` is False).

    Strided, so that devices among which the candidates are spread share every block.
    """

    def cut(leaf: Array) -> Array:
        leaf = jnp.pad(leaf, [(0, -len(leaf) % blocks), *[(0, 0)] * (leaf.ndim - 1)])
        return leaf.reshape(-1, blocks, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, candidates)
