"""What the objectives of text vectors have in common: texts in rows of their own, their vectors, and how those lie.

    alignment      mean over pairs of |z - z'|^2
    uniformity     log of the mean over pairs of texts of exp(-2 |z_i - z_j|^2)
    effective rank (tr C)^2 / tr(C C),   C the covariance of the vectors

all of vectors of length 1 (Wang & Isola 2020, arXiv:2005.10242; the rank is the participation ratio of C's spectrum).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.losses.contrastive import normalize, potential
from jaxpt.losses.token_metrics import ratio
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import Pooling, pool, pooler
from jaxpt.models.patterns import bidirectional
from jaxpt.models.transformer import transformer
from jaxpt.objectives.parts import check_length
from jaxpt.types import Array, Network, Params, View, Vocab

# ------------------------------------------------------------------------------------------------ texts


class Texts(NamedTuple):
    """Texts, each from the first place of a row of its own."""

    tokens: Array  # [..., L] i32
    segment_ids: Array  # [..., L] i32: 1, and 0 = padding

    @property
    def positions(self) -> Array:
        """[..., L] i32."""
        return jnp.cumsum(self.segment_ids, axis=-1) - self.segment_ids

    @property
    def present(self) -> Array:
        """[...] f32: 1 where there is a text."""
        return self.segment_ids[..., 0].astype(jnp.float32)

    def view(self) -> View:
        """What a person is shown of texts [R, L]."""
        return View(*self, self.positions, bidirectional(self.segment_ids, self.positions))


def separate(
    tokens_RL: Array, segment_ids_RL: Array, sentence_ids_RL: Array, texts: int, length: int
) -> tuple[Texts, Array]:
    """Give each text of a row's first document a row of its own.

    Args:
      tokens_RL, segment_ids_RL, sentence_ids_RL: [R, L] i32 of a ``Batch``; where an example is built of several texts
        they are its sentences.
      texts: T, how many are read; 1 = the document is one text.
      length: J, of the new rows; what is longer is cut.

    Returns:
      texts [R, T, J], and how many of each row were cut, [R] i32.

    >>> made, cut = separate(jnp.array([[7, 8, 9, 6, 0]]), jnp.array([[1, 1, 1, 1, 0]]), jnp.array([[0, 0, 0, 1, 0]]),
    ...                      texts=2, length=2)
    >>> made.tokens.tolist(), made.segment_ids.tolist(), cut.tolist()
    ([[[7, 8], [6, 0]]], [[[1, 1], [1, 0]]], [1])
    """
    numbers_RL = sentence_ids_RL if texts > 1 else jnp.zeros_like(sentence_ids_RL)
    inside_RTL = (numbers_RL[:, None] == jnp.arange(texts)[:, None]) & (segment_ids_RL[:, None] == 1)
    sizes_RT = jnp.sum(inside_RTL, axis=-1, dtype=jnp.int32)
    places_RTJ = jnp.argmax(inside_RTL, axis=-1)[..., None] + jnp.arange(length)
    places_RTJ = jnp.minimum(places_RTJ, tokens_RL.shape[1] - 1)
    kept_RTJ = jnp.arange(length) < sizes_RT[..., None]
    tokens_RTJ = jnp.take_along_axis(tokens_RL[:, None], places_RTJ, axis=-1)
    made = Texts(jnp.where(kept_RTJ, tokens_RTJ, 0), kept_RTJ.astype(jnp.int32))
    return made, jnp.sum(sizes_RT > length, axis=1, dtype=jnp.int32)


def enclose(texts: Texts, cls: int, sep: int, pad: int) -> Texts:
    """Put [CLS] before each text and [SEP] behind it.

    Args:
      texts: [..., L].
      cls, sep, pad: ids.

    Returns:
      [..., L + 2]; a row without a text stays empty.

    >>> texts = Texts(jnp.array([[7, 8, 0], [0, 0, 0]]), jnp.array([[1, 1, 0], [0, 0, 0]]))
    >>> [array.tolist() for array in enclose(texts, 4, 5, 0)]
    [[[4, 7, 8, 5, 0], [0, 0, 0, 0, 0]], [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]]
    """
    tokens, segment_ids = texts
    last = jnp.sum(segment_ids > 0, axis=-1, keepdims=True) + 1
    place = jnp.arange(tokens.shape[-1] + 2)
    inside = (last > 1) & (place <= last)
    tokens = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(1, 1)])
    tokens = jnp.where(place == 0, cls, jnp.where(place == last, sep, tokens))
    return Texts(jnp.where(inside, tokens, pad), inside.astype(jnp.int32))


def text_numbers(tokens: Array) -> Array:
    """Return a number from 0 on, [...] i32, for tokens [..., L]: the same for the same, of 2^31 for others.

    >>> numbers = text_numbers(jnp.array([[4, 7, 8], [4, 8, 7], [4, 7, 8]]))
    >>> bool(numbers[0] == numbers[2]), bool(numbers[0] == numbers[1])
    (True, False)
    """
    factors_L = np.cumprod(np.full(tokens.shape[-1], 0x9E3779B1, np.uint32), dtype=np.uint32)
    sums = jnp.sum(tokens.astype(jnp.uint32) * factors_L, axis=-1, dtype=jnp.uint32)
    return (sums >> 1).astype(jnp.int32)


# ---------------------------------------------------------------------------------------------- vectors


class TextEncoder(NamedTuple):
    """A Transformer as a function from texts to vectors."""

    config: TransformerConfig
    networks: dict[str, Network]  # "trunk", and "mlp" where there is one
    pooling: Pooling

    def __call__(
        self,
        params: Params,
        texts: Texts,
        keys: Array | None = None,
        positions: Array | None = None,
    ) -> Array:
        """Return the vectors [..., E] f32 of texts [..., L].

        Args:
          params: of the networks, by name.
          texts: at most ``max_length`` tokens each, where positions are learned.
          keys: [...] typed, which turn dropout on.
          positions: [..., L] i32, where they are not 0, 1, 2, ...
        """
        check_length(self.config, texts.tokens.shape[-1], "text vectors")
        lead, length = texts.tokens.shape[:-1], texts.tokens.shape[-1]
        places = texts.positions if positions is None else positions
        tokens, segment_ids, places = (array.reshape(-1, length) for array in (*texts, places))
        pattern = bidirectional(segment_ids, places)
        keys = None if keys is None else keys.reshape(-1)
        hidden = self.networks["trunk"].apply(params["trunk"], tokens, pattern, places, keys=keys)
        vectors = pool(self.pooling, hidden, segment_ids)
        if "mlp" in self.networks:
            vectors = self.networks["mlp"].apply(params["mlp"], vectors)
        return vectors.astype(jnp.float32).reshape(*lead, -1)


def text_encoder(config: TransformerConfig, vocab: Vocab, pooling: Pooling, *, mlp: bool) -> TextEncoder:
    """Return the encoder of texts that stand between [CLS] and [SEP].

    Args:
      config: of the Transformer.
      vocab: of the tokenizer.
      pooling: "first", "mean" or "last".
      mlp: dense and tanh behind it.
    """
    networks = {"trunk": transformer(config, vocab.size)} | ({"mlp": pooler(config)} if mlp else {})
    return TextEncoder(config, networks, pooling)


def split_keys(keys_R: Array, number: int) -> Array:
    """Return [R, number] keys: so many of each row."""
    return jax.vmap(lambda key: jax.random.split(key, number))(keys_R)


# ---------------------------------------------------------------------------------------------- metrics


def vector_sums(vectors_RE: Array, valid_R: Array) -> dict[str, Array]:
    """Return the sums from which ``vector_metrics`` are made; no gradient passes.

    Args:
      vectors_RE: [R, E] of any length.
      valid_R: [R] f32, 0 = a row without a text.
    """
    units_RE = normalize(jax.lax.stop_gradient(vectors_RE)) * valid_R[:, None]
    count = valid_R.sum()
    return {
        "vectors": count,
        "vector_sum": units_RE.sum(0),
        "vector_products": jnp.matmul(units_RE.T, units_RE, precision=jax.lax.Precision.HIGHEST),
        "vector_pairs": count * (count - 1),
        "vector_potential": jnp.sum(potential(units_RE, valid_R) * valid_R),
    }


def vector_metrics(stats: dict[str, Array]) -> dict[str, Array]:
    """Return how the vectors of some texts lie: ``uniformity``, ``effective_rank``, ``spread``, ``cosine_of_others``.

    Args:
      stats: sums of ``vector_sums``, of one or several batches; uniformity is that of pairs within a batch.

    >>> metrics = vector_metrics(vector_sums(jnp.eye(4), jnp.ones(4)))
    >>> {name: round(float(value), 3) for name, value in metrics.items()}
    {'uniformity': -4.0, 'effective_rank': 3.0, 'spread': 0.75, 'cosine_of_others': 0.0}
    """
    count = stats["vectors"]
    mean_E = ratio(stats["vector_sum"], count)
    covariance_EE = ratio(stats["vector_products"], count) - jnp.outer(mean_E, mean_E)
    trace = jnp.maximum(jnp.trace(covariance_EE), 0.0)
    cosines = jnp.sum(jnp.square(stats["vector_sum"])) - count
    return {
        "uniformity": jnp.log(jnp.maximum(ratio(stats["vector_potential"], stats["vector_pairs"]), 1e-30)),
        "effective_rank": ratio(jnp.square(trace), jnp.sum(jnp.square(covariance_EE))),
        "spread": trace,
        "cosine_of_others": ratio(cosines, count * (count - 1)),
    }


def collapse_alarm(metrics: dict[str, Array], armed: Array, spread: float) -> dict[str, Array]:
    """Return ``alarm/collapse``: 1 where all vectors are nearly one, or lie on a line.

    Args:
      metrics: of ``vector_metrics``.
      armed: [] f32, above 0 where an alarm is due.
      spread: under which vectors count as collapsed; 1 = all over the sphere, 0 = all the same.
    """
    collapsed = (metrics["spread"] < spread) | (metrics["effective_rank"] < 1.5)
    return {"alarm/collapse": ((armed > 0) & collapsed).astype(jnp.float32)}
