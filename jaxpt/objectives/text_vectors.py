"""What the objectives of text vectors have in common: texts in rows of their own, their vectors, and how those lie.

    alignment      mean over pairs of |z - z'|^2
    uniformity     log of the mean over pairs of texts of exp(-2 |z_i - z_j|^2)
    effective rank (tr C)^2 / tr(C C),   C the covariance of the vectors

all of vectors of length 1 (Wang & Isola 2020, arXiv:2005.10242; the rank is the participation ratio of C's spectrum).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.losses.contrastive import Contrast, normalize, potential
from jaxpt.losses.token_metrics import ratio
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import Pooling, pool, pooler
from jaxpt.models.patterns import bidirectional
from jaxpt.models.transformer import transformer
from jaxpt.objectives.parts import check, check_length
from jaxpt.types import Array, Batch, Network, Params, RowSpec, Snapshot, View, Vocab

TextPooling: TypeAlias = Pooling | Literal["mean_last_two"]

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
        """What a person is shown of texts [R, L], or of texts [R, T, L], which are laid one behind the other."""
        segment_ids = self.segment_ids
        if segment_ids.ndim == 3:
            segment_ids *= jnp.arange(1, segment_ids.shape[1] + 1)[:, None]
        rows = (array.reshape(len(array), -1) for array in (self.tokens, segment_ids, self.positions))
        tokens, segment_ids, positions = rows
        return View(tokens, segment_ids, positions, bidirectional(segment_ids, positions))


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
    made = spans(tokens_RL, jnp.argmax(inside_RTL, axis=-1), sizes_RT, length)
    return made, jnp.sum(sizes_RT > length, axis=1, dtype=jnp.int32)


def spans(tokens_RL: Array, starts_RT: Array, sizes_RT: Array, length: int) -> Texts:
    """Give each of some spans of a row, which may overlap, a row of its own.

    Args:
      tokens_RL: [R, L] i32.
      starts_RT, sizes_RT: [R, T] i32, in tokens; of size 0 there is no text.
      length: J, of the new rows; what is longer is cut.

    Returns:
      [R, T, J].

    >>> made = spans(jnp.array([[7, 8, 9, 6]]), jnp.array([[0, 2]]), jnp.array([[3, 1]]), length=3)
    >>> made.tokens.tolist(), made.segment_ids.tolist()
    ([[[7, 8, 9], [9, 0, 0]]], [[[1, 1, 1], [1, 0, 0]]])
    """
    places_RTJ = jnp.minimum(starts_RT[..., None] + jnp.arange(length), tokens_RL.shape[1] - 1)
    kept_RTJ = jnp.arange(length) < sizes_RT[..., None]
    tokens_RTJ = jnp.take_along_axis(tokens_RL[:, None], places_RTJ, axis=-1)
    return Texts(jnp.where(kept_RTJ, tokens_RTJ, 0), kept_RTJ.astype(jnp.int32))


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


def rows_of_texts(texts: int) -> RowSpec:
    """Return rows that hold an example of so many texts, or one document of any data, which is one text."""
    if texts == 1:
        return RowSpec("one_document", reserve=2)
    return RowSpec("one_document", raw_length=lambda length: texts * (length - 2), texts=texts)


def read_texts(batch: Batch, texts: int, length: int, vocab: Vocab) -> tuple[Texts, Array]:
    """Return the texts of each row between [CLS] and [SEP], and how many of them were cut.

    Args:
      batch: rows of one document, or one example of several texts.
      texts: T, see ``separate``.
      length: L, with [CLS] and [SEP].
      vocab: which has both.

    Returns:
      texts [R, T, L] and [R] i32.
    """
    made, cut_R = separate(batch.tokens, batch.segment_ids, batch.sentence_ids, texts, length - 2)
    assert vocab.cls is not None and vocab.sep is not None
    return enclose(made, vocab.cls, vocab.sep, vocab.pad), cut_R


def document_of(batch: Batch) -> Texts:
    """Return the first document of each row, [R, L], as one text."""
    made, _ = separate(batch.tokens, batch.segment_ids, batch.sentence_ids, 1, batch.tokens.shape[1])
    return Texts(made.tokens[:, 0], made.segment_ids[:, 0])


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
    pooling: TextPooling

    def __call__(
        self,
        params: Params,
        texts: Texts,
        keys: Array | None = None,
        positions: Array | None = None,
        embedding_mask: Array | None = None,
    ) -> Array:
        """Return the vectors [..., E] f32 of texts [..., L].

        Args:
          params: of the networks, by name.
          texts: at most ``max_length`` tokens each, where positions are learned.
          keys: [...] typed, which turn dropout on.
          positions: [..., L] i32, where they are not 0, 1, 2, ...
          embedding_mask: [..., L or 1, D or 1], multiplied with what the first layer reads.
        """
        return self.vectors(params, texts, self.states(params, texts, keys, positions, embedding_mask))

    def states(
        self,
        params: Params,
        texts: Texts,
        keys: Array | None = None,
        positions: Array | None = None,
        embedding_mask: Array | None = None,
    ) -> Array:
        """Return the hidden states [..., L, D] of texts [..., L], for those who also want those of single tokens."""
        check_length(self.config, texts.tokens.shape[-1], "text vectors")
        shape, length = texts.tokens.shape, texts.tokens.shape[-1]
        places = texts.positions if positions is None else positions
        tokens, segment_ids, places = (array.reshape(-1, length) for array in (*texts, places))
        pattern = bidirectional(segment_ids, places)
        keys = None if keys is None else keys.reshape(-1)
        if embedding_mask is not None:
            embedding_mask = embedding_mask.reshape(-1, *embedding_mask.shape[-2:])
        two = self.pooling == "mean_last_two"
        made = self.networks["trunk"].apply(
            params["trunk"], tokens, pattern, places, keys=keys, return_layers=two, embedding_mask=embedding_mask
        )
        hidden = (made[0] + made[1][-2]) / 2 if two else made
        return hidden.reshape(*shape, -1)

    def vectors(self, params: Params, texts: Texts, hidden: Array) -> Array:
        """Return the vectors [..., E] f32 of texts [..., L] from their hidden states [..., L, D]."""
        segment_ids = texts.segment_ids.reshape(-1, texts.segment_ids.shape[-1])
        kind = "mean" if self.pooling == "mean_last_two" else self.pooling
        vectors = pool(kind, hidden.reshape(*segment_ids.shape, -1), segment_ids)
        if "mlp" in self.networks:
            vectors = self.networks["mlp"].apply(params["mlp"], vectors)
        return vectors.astype(jnp.float32).reshape(*texts.tokens.shape[:-1], -1)


def text_encoder(config: TransformerConfig, vocab: Vocab, pooling: TextPooling, *, mlp: bool) -> TextEncoder:
    """Return the encoder of texts that stand between [CLS] and [SEP].

    Args:
      config: of the Transformer.
      vocab: of the tokenizer.
      pooling: "first", "mean" or "last"; "mean_last_two" is the mean over the states of the last two layers, which
        want the norm behind each ("post").
      mlp: dense and tanh behind it.

    Raises:
      ValueError: two layers are asked for, and there is one, or their states have no norm.
    """
    two = pooling == "mean_last_two"
    check(not two or config.depth > 1, 'pooling="mean_last_two" needs a depth of at least 2')
    check(
        not two or config.norm_placement == "post",
        'pooling="mean_last_two" needs norm_placement="post": with "pre" the states of the last layer but one have no '
        'norm; set pooling="mean"',
    )
    networks = {"trunk": transformer(config, vocab.size)} | ({"mlp": pooler(config)} if mlp else {})
    return TextEncoder(config, networks, pooling)


def embedder(encoder: TextEncoder, vocab: Vocab) -> Callable[[Snapshot, Batch, int], Array]:
    """Return ``Objective.embed`` of an encoder that reads every text of an example alike, between [CLS] and [SEP]."""

    def embed(snapshot: Snapshot, batch: Batch, text: int) -> Array:
        texts, _ = read_texts(batch, 1, batch.tokens.shape[1] + 2, vocab)
        return encoder(snapshot.params, texts)[:, 0]

    return embed


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


def pair_sums(first_RE: Array, second_RE: Array, made: Contrast, weights_R: Array) -> dict[str, Array]:
    """Return the sums from which ``pair_metrics`` are made; no gradient passes.

    Args:
      first_RE, second_RE: [R, E], the two sides of each pair.
      made: what telling them apart gave.
      weights_R: [R] f32, 0 = a row without a pair.
    """
    apart_R = jnp.sum(jnp.square(normalize(first_RE) - normalize(second_RE)), axis=-1)
    return {
        "pairs": weights_R.sum(),
        "pairs_found": jnp.sum(weights_R * made.correct),  # on a TPU, a product of matrices would be rounded
        "pairs_apart": jnp.sum(weights_R * jax.lax.stop_gradient(apart_R)),
    }


def pair_metrics(stats: dict[str, Array]) -> dict[str, Array]:
    """Return ``text_accuracy``, how often the partner is the nearest, and ``alignment``, how far apart partners are."""
    return {
        "text_accuracy": ratio(stats["pairs_found"], stats["pairs"]),
        "alignment": ratio(stats["pairs_apart"], stats["pairs"]),
    }


def collapse_alarm(metrics: dict[str, Array], armed: Array, spread: float) -> dict[str, Array]:
    """Return ``alarm/collapse``: 1 where all vectors are nearly one, or lie on a line.

    Args:
      metrics: of ``vector_metrics``.
      armed: [] f32, of how many vectors where an alarm is due, else 0; of fewer than 8 none is, as few vectors always
        lie in few directions.
      spread: under which vectors count as collapsed; 1 = all over the sphere, 0 = all the same.
    """
    collapsed = (metrics["spread"] < spread) | (metrics["effective_rank"] < 1.5)
    return {"alarm/collapse": ((armed >= 8) & collapsed).astype(jnp.float32)}
