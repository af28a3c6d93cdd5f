"""What the decoder-only objectives that show a token what stands behind it have in common."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from jaxpt.losses.cross_entropy import CrossEntropy, linear_cross_entropy, z_loss
from jaxpt.losses.token_metrics import TokenTables, ratio, token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import lm_head
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.parts import check, initializer_of, specs_of
from jaxpt.types import (
    Array,
    Batch,
    Example,
    Key,
    Network,
    Objective,
    Out,
    Params,
    RowSpec,
    Snapshot,
    Sums,
    Tree,
    View,
    Vocab,
)

# What a label is, for the metrics: a token of a document as it stands, of the text around a gap, or of a gap.
PLAIN, CONTEXT, INFILL = 0, 1, 2


def require_sentinels(vocab: Vocab, count: int, name: str) -> tuple[int, ...]:
    """Return the first ``count`` sentinels; raises ValueError where the tokenizer has fewer."""
    check(
        len(vocab.sentinels) >= count,
        f"{name} needs {count} sentinel tokens and this tokenizer has {len(vocab.sentinels)}: build the data with a "
        f"tokenizer that has them (`jaxpt data build` adds 100 to every tokenizer)",
    )
    return vocab.sentinels[:count]


def predict(decoder: Network, head: Network, params: Params, inputs: dict[str, Tree], keys: Array) -> CrossEntropy:
    """Read ``tokens`` at ``positions`` under ``pattern`` and compare every place with its label in ``targets``."""
    hidden_RLD = decoder.apply(params["trunk"], inputs["tokens"], inputs["pattern"], inputs["positions"], keys=keys)
    readout = head.apply(params["head"], hidden_RLD, embedding_table(params["trunk"]))
    return linear_cross_entropy(readout, inputs["targets"])


def view_of(example: Example, term: str) -> View:
    """Return the sequence that ``predict`` reads and what it must say, for a person."""
    inputs = example.inputs
    return View(
        inputs["tokens"],
        inputs["segment_ids"],
        inputs["positions"],
        inputs["pattern"],
        inputs["targets"],
        weights=example.weights[term],
    )


def infilling_sums(
    result: CrossEntropy, targets: Array, kinds: Array, weights: Array, tables: TokenTables
) -> dict[str, Array]:
    """The sums of ``token_sums``, and those of plain and of infilled labels apart.

    Args:
      result: of ``predict``, [R, L].
      targets, kinds: [R, L] i32, labels and what they are: ``PLAIN``, ``CONTEXT`` or ``INFILL``.
      weights: [R, L] f32.
      tables: of this vocabulary.
    """
    sums = token_sums(result, targets, weights, tables)
    for name, kind in {"plain": PLAIN, "infill": INFILL}.items():
        weights_RL = weights * (kinds == kind)
        sums |= {f"{name}_tokens": jnp.sum(weights_RL), f"{name}_nll": jnp.sum(weights_RL * result.nll)}
    return sums


def infilling_metrics(sums: dict[str, Array]) -> dict[str, Array]:
    """Finish the sums: the metrics of ``token_metrics``, and three of infilling.

    Returns:
      also plain_nll (of documents left as they are), infill_nll (of what was taken out and its end) and rearranged
      (share of the labels that stand in documents with a gap).
    """
    return token_metrics(sums, likelihood=True) | {
        "plain_nll": ratio(sums["plain_nll"], sums["plain_tokens"]),
        "infill_nll": ratio(sums["infill_nll"], sums["infill_tokens"]),
        "rearranged": ratio(sums["tokens"] - sums["plain_tokens"], sums["tokens"]),
    }


def room_for_sentinels(reserve: int, setting: str) -> Callable[[int], int]:
    """Return ``RowSpec.raw_length`` of rows that keep ``reserve`` slots free; ``setting`` is what asks for them."""

    def raw_length(length: int) -> int:
        check(
            length > reserve,
            f"rows of {length} tokens have no room beside the {reserve} slots for the sentinels of {setting}: lower it "
            f"or lengthen the rows (--seq-len)",
        )
        return length - reserve

    return raw_length


def infilling_lm(
    config: TransformerConfig, vocab: Vocab, rows: RowSpec, corrupt: Callable[[Snapshot, Batch, Key], Example]
) -> Objective:
    """Return the objective of a decoder over rows with gaps: what is left when ``corrupt`` is written.

    Args:
      config: of the decoder.
      vocab: its vocabulary.
      rows: what it asks of the data.
      corrupt: makes tokens, segment_ids, positions, pattern, targets and kinds, and the weights of the term "lm".
    """

    def sums(result: CrossEntropy, example: Example, tables: TokenTables) -> dict[str, Array]:
        inputs = example.inputs
        return infilling_sums(result, inputs["targets"], inputs["kinds"], example.weights["lm"], tables)

    return language_model(config, vocab, rows, corrupt, sums=sums, metrics=infilling_metrics)


def language_model(
    config: TransformerConfig,
    vocab: Vocab,
    rows: RowSpec,
    corrupt: Callable[[Snapshot, Batch, Key], Example],
    *,
    sums: Callable[[CrossEntropy, Example, TokenTables], dict[str, Array]] | None = None,
    metrics: Callable[[dict[str, Array]], dict[str, Array]] | None = None,
    z_loss_scale: float = 0.0,
) -> Objective:
    """Return the objective of a decoder that predicts from every place of a row: what is left beside ``corrupt``.

    Args:
      config: of the decoder.
      vocab: its vocabulary.
      rows: what it asks of the data.
      corrupt: makes what ``predict`` and ``view_of`` read, and the weights of the term "lm".
      sums, metrics: what is measured; None = ``token_sums`` and ``token_metrics`` of a part of the text.
      z_loss_scale: of the term (log Z)^2, 0 = none.
    """
    decoder, head = transformer(config, vocab.size), lm_head(config, vocab.size)
    networks, tables = {"trunk": decoder, "head": head}, token_tables(vocab)
    scale = {"lm": 1.0} | ({"z_loss": z_loss_scale} if z_loss_scale else {})

    def checked(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
        example = corrupt(snapshot, batch, key)
        return example._replace(weights=dict.fromkeys(scale, example.weights["lm"]))

    def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
        result = predict(decoder, head, snapshot.params, example.inputs, keys)
        losses = {"lm": result.loss} | ({"z_loss": z_loss(result.log_normalizer)} if z_loss_scale else {})
        if sums is not None:
            return Out(losses, sums(result, example, tables))
        return Out(losses, token_sums(result, example.inputs["targets"], example.weights["lm"], tables))

    def summary(sums: Sums) -> dict[str, Array]:
        return metrics(sums.stats) if metrics else token_metrics(sums.stats, likelihood=False)

    def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
        return {"decoder": view_of(example, "lm")}

    init = initializer_of(networks)
    return Objective(rows, specs_of(networks), init, checked, loss, scale, summary=summary, views=views)
