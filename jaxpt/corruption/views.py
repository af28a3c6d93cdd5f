"""Views of a text: what may be taken from its embeddings, and how its positions are mixed, before the first layer reads
it (ConSERT, Yan et al. 2021, arXiv:2105.11741).

Whatever is taken becomes 0, and the rest stays as it is: nothing is scaled up, as dropout would.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import draw_ranks, draw_subset, uniform
from jaxpt.types import Array, Key


@dataclass(frozen=True)
class Perturbation:
    """What a view does to the embeddings of a text; several things at once are allowed."""

    shuffle: bool = False
    """Give the tokens each other's positions, [CLS] and [SEP] among them."""
    tokens: float = 0.0
    """Share of the tokens, rounded down, that become 0 ("token cutoff")."""
    span: float = 0.0
    """Likewise, of tokens that stand side by side."""
    features: float = 0.0
    """Share of the width, rounded down, that becomes 0 in all tokens of a text ("feature cutoff")."""
    elements: float = 0.0
    """Probability of 0 of every single number ("dropout", but not scaled up)."""

    def __post_init__(self) -> None:
        for name in ("tokens", "span", "features", "elements"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"a view's {name} is a share in [0, 1), not {getattr(self, name)}")

    @property
    def masks(self) -> bool:
        """Whether anything becomes 0."""
        return max(self.tokens, self.span, self.features, self.elements) > 0


def draw_view(key: Key, segment_ids_L: Array, width: int, view: Perturbation) -> tuple[Array, Array]:
    """Draw one view of one text.

    Args:
      key: of this text and view.
      segment_ids_L: [L] i32, 1 from the first place on as far as the text goes, 0 = padding.
      width: D, of the embeddings.
      view: what is done.

    Returns:
      positions [L] i32, and which numbers of the embeddings stay, [L or 1, D or 1] bool.
    """
    present_L, length = segment_ids_L > 0, segment_ids_L.shape[0]
    wanted = {"shuffle": length, "tokens": length, "span": 1, "features": width, "elements": length * width}
    sizes = [wanted[field.name] if getattr(view, field.name) else 0 for field in fields(view)]
    drawn = jax.random.bits(key, (sum(sizes),), jnp.uint32)  # at once: every call is a kernel to compile
    bits = dict(zip(wanted, jnp.split(drawn, np.cumsum(sizes)[:-1]), strict=True))

    positions_L = jnp.arange(length, dtype=jnp.int32)
    if view.shuffle:
        positions_L = draw_positions(bits["shuffle"], present_L)
    keep = jnp.ones((1, 1), bool)
    if view.tokens:
        keep &= draw_cutoff(bits["tokens"], present_L, view.tokens)[:, None]
    if view.span:
        keep &= draw_span_cutoff(bits["span"][0], present_L, view.span)[:, None]
    if view.features:
        keep &= draw_cutoff(bits["features"], jnp.ones(width, bool), view.features)
    if view.elements:
        keep &= uniform(bits["elements"]).reshape(length, width) >= view.elements
    return positions_L, keep


def draw_positions(bits_L: Array, present_L: Array) -> Array:
    """Put the positions of a text that begins at the first place into a random order, [L] i32; padding keeps its own.

    >>> draw_positions(jnp.array([7, 9, 8, 4], jnp.uint32), jnp.array([True, True, True, False])).tolist()
    [0, 2, 1, 3]
    """
    places_L = jnp.arange(present_L.shape[0], dtype=jnp.int32)
    return jnp.where(present_L, draw_ranks(bits_L, present_L), places_L)


def draw_cutoff(bits_N: Array, candidates_N: Array, rate: float) -> Array:
    """Leave out exactly floor(rate * n) of the n candidates: [N] bool, False where one is left out.

    >>> kept = draw_cutoff(jnp.array([7, 9, 8, 4], jnp.uint32), jnp.array([True, True, True, False]), 0.4)
    >>> kept.astype(int).tolist()
    [0, 1, 1, 1]
    """
    return ~draw_subset(bits_N, candidates_N, _share(rate, candidates_N))


def draw_span_cutoff(bits: Array, present_L: Array, rate: float) -> Array:
    """Leave out floor(rate * n) neighbours of the n tokens of a text, any such span equally likely: [L] bool.

    >>> draw_span_cutoff(jnp.uint32(6), jnp.array([True] * 5 + [False]), 0.5).astype(int).tolist()
    [1, 1, 0, 0, 1, 1]
    """
    size = _share(rate, present_L)
    starts = jnp.sum(present_L) - size + 1
    start = (bits % starts.astype(jnp.uint32)).astype(jnp.int32)
    place_L = jnp.arange(present_L.shape[0])
    return (place_L < start) | (place_L >= start + size)


def _share(rate: float, candidates_N: Array) -> Array:
    # looked up, since the product in float32 may fall below a whole number
    counts = np.floor(rate * np.arange(candidates_N.shape[0] + 1) + 1e-6).astype(np.int32)
    return jnp.asarray(counts)[jnp.sum(candidates_N)]
