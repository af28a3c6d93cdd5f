"""From texts to vectors, by what a run has trained: on all devices, in batches of few shapes.

The vector of a text does not depend on which texts stand beside it, nor on how many (but for float rounding).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpt.data.tokenizer import Tokenizer
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import Pooling, pool
from jaxpt.models.patterns import bidirectional, causal
from jaxpt.models.sharing import complete
from jaxpt.models.transformer import transformer
from jaxpt.sharding import ROWS, local_rows, put_batch
from jaxpt.types import Array, Batch, ObjectiveConfig, Snapshot, Vocab


class Vectors(NamedTuple):
    """How token ids become vectors.

    Args:
      embed: as ``Objective.embed``, compiled.
      before, after: tokens that stand around a text, put there before ``embed`` reads it.
      longest: most tokens of a text.
      pad: token of the padding.
    """

    embed: Callable[[Snapshot, Batch, int], Array]
    before: tuple[int, ...]
    after: tuple[int, ...]
    longest: int
    pad: int


def vectors_of(
    config: ObjectiveConfig, vocab: Vocab, length: int, mesh: Mesh, pooling: Pooling | None = None
) -> Vectors:
    """Return how an objective's networks make vectors of texts.

    Objectives of text vectors say it themselves (``Objective.embed``). Of others with one Transformer, "trunk", it is
    the mean over the last states of a text between the tokens that documents stand between in training; a decoder's
    states see what stands before them only.

    Args:
      config: of the objective, as it is evaluated.
      vocab: of the tokenizer.
      length: the model's tokens per row.
      mesh: of the devices.
      pooling: another pooling than that of the objective, or than the mean.

    Raises:
      ValueError: the objective has no vectors.
    """
    objective = config.build(vocab)
    if objective.embed is not None:
        if pooling is not None:
            objective = _with_pooling(config, pooling).build(vocab)
        embed, before, after, taken = objective.embed, (), (), 2
    else:
        owner, name = _reader(config)
        embed = _states_of(owner, name, vocab, pooling or "mean")
        before, after = objective.rows.prefix, objective.rows.suffix
        if not before and not after and hasattr(owner, "encoder"):
            before, after = (vocab.require("cls", "text vectors"),), (vocab.require("sep", "text vectors"),)
        taken = len(before) + len(after)
    assert embed is not None
    # what does not fit together is said now, and not when a run has been trained
    shapes, row = (
        jax.eval_shape(objective.init, jax.random.key(0)),
        text_rows([[vocab.pad]], 1, max(length - 2, 1), vocab.pad),
    )
    jax.eval_shape(lambda params, batch: embed(Snapshot(params, {}, jnp.int32(0)), batch, 0), shapes, row)
    compiled = jax.jit(embed, static_argnums=2, out_shardings=NamedSharding(mesh, P()))
    return Vectors(compiled, before, after, length - taken, vocab.pad)


def _with_pooling(config: Any, pooling: Pooling) -> ObjectiveConfig:
    if not hasattr(config, "pooling"):
        raise ValueError(f"{type(config).__name__} says itself what a vector is made of: leave --pooling out")
    return dataclasses.replace(config, pooling=pooling)


def _reader(config: Any) -> tuple[Any, str]:
    """The objective itself, or of a combination the first part that has a Transformer; and that one's name there."""
    for part in getattr(config, "parts", ()):
        owner, name = _reader(part.objective)
        if _network(owner) is not None:
            return owner, f"{part.name}_{name}" if name in part.own else name
    return config, "trunk"


def _network(config: Any) -> TransformerConfig | None:
    found = getattr(config, "encoder", None) or getattr(config, "decoder", None)
    return found if isinstance(found, TransformerConfig) else None


def _states_of(config: Any, name: str, vocab: Vocab, pooling: Pooling) -> Callable[[Snapshot, Batch, int], Array]:
    """The pooled last states of an objective's "trunk", which has this name."""
    network = _network(config)
    if network is None:
        raise ValueError(
            f"{type(config).__name__} has no vectors of texts, and no Transformer of its own to take them from: "
            f"continue the run by an objective that makes them (--init-from; docs/vectors.md)"
        )
    trunk = transformer(network, vocab.size)
    pattern_of = bidirectional if hasattr(config, "encoder") else causal

    def embed(snapshot: Snapshot, batch: Batch, text: int) -> Array:
        pattern, params = pattern_of(batch.segment_ids, batch.positions), snapshot.params
        whole = complete(params)[0] if "delta" in params and name == "trunk" else params[name]
        hidden_RLD = trunk.apply(whole, batch.tokens, pattern, batch.positions)
        return pool(pooling, hidden_RLD, batch.segment_ids).astype(jnp.float32)

    return embed


# ------------------------------------------------------------------------------------------------ texts


def encode(tokenizer: Tokenizer, texts: Sequence[str], longest: int) -> tuple[list[np.ndarray], int]:
    """Return the tokens [n] i32 of each text, and how many texts were cut at ``longest`` tokens.

    Raises:
      ValueError: a text has no tokens.
    """
    encoded = [tokenizer.encode(text)[0] for text in texts]
    for number, (text, tokens) in enumerate(zip(texts, encoded, strict=True), 1):
        if not len(tokens):
            raise ValueError(f"text {number} ({text[:40]!r}) has no tokens: every text needs some")
    return [tokens[:longest] for tokens in encoded], sum(len(tokens) > longest for tokens in encoded)


def make_vectors(
    vectors: Vectors,
    snapshot: Snapshot,
    tokens: Sequence[np.ndarray],
    mesh: Mesh,
    *,
    text: int = 0,
    batch_size: int = 64,
    into: np.ndarray | None = None,
    progress: Callable[[int], Any] = lambda n: None,
) -> np.ndarray:
    """Return the vectors [N, E] f32 of N texts, in their order.

    Args:
      vectors: how they are made.
      snapshot: the parameters.
      tokens: of each text, at most ``vectors.longest``.
      mesh: of the devices.
      text: for which of the texts of an example they stand, where those are read by different networks.
      batch_size: rows per batch; rounded up to a multiple of the devices that divide rows.
      into: [N, E] f32 to write to, for example a file.
      progress: told how many more texts are done.
    """
    share = int(np.prod([mesh.shape[axis] for axis in ROWS]))
    size = -(-batch_size // share) * share
    for places, batch in _batches(vectors, tokens, size):
        own = local_rows(size, mesh)
        placed = put_batch(jax.tree.map(lambda leaf: leaf[own], batch), own, size, mesh)  # noqa: B023  used at once
        made = np.asarray(vectors.embed(snapshot, placed, text))
        into = np.zeros((len(tokens), made.shape[1]), np.float32) if into is None else into
        into[places] = made[: len(places)]
        progress(len(places))
    assert into is not None, "there are texts"
    return into


def _batches(vectors: Vectors, tokens: Sequence[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches of texts of about one length, and which texts they are.

    A row is as wide as the next power of two, less the two tokens that an objective puts around it: by its own length
    alone, so that what stands in its batch changes nothing.
    """
    around = len(vectors.before) + len(vectors.after)
    widths = np.array([_width(len(each) + around, vectors.longest + around) for each in tokens])
    for width in np.unique(widths).tolist():
        mine = np.flatnonzero(widths == width)
        for begin in range(0, len(mine), size):
            places = mine[begin : begin + size]
            rows = [[*vectors.before, *tokens[place], *vectors.after] for place in places]
            yield places, text_rows(rows, size, width, vectors.pad)


def _width(tokens: int, longest: int) -> int:
    return min(max(16, 1 << (tokens + 1).bit_length()) - 2, longest)


def text_rows(rows: Sequence[Sequence[int]], size: int, width: int, pad: int) -> Batch:
    """Return texts as the rows of a batch [size, width], as ``Objective.embed`` reads them; the rest is padding."""
    tokens, inside = np.full((size, width), pad, np.int32), np.zeros((size, width), np.int32)
    for row, line in enumerate(rows):
        tokens[row, : len(line)], inside[row, : len(line)] = line, 1
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "segment_ids": inside,
        "positions": np.where(inside, np.arange(width, dtype=np.int32), 0),
        "sentence_ids": np.zeros_like(inside),
        "row_ids": np.arange(size, dtype=np.uint32),
        "source_ids": np.zeros(size, np.int32),
        "valid": (np.arange(size) < len(rows)).astype(np.float32),
    }
    return Batch(**arrays)
