"""What the objectives of an encoder and a decoder have in common.

    loss = mean over the target tokens of -log p(y[t] | y[..t-1], what the encoder has read)

The encoder reads its side of a row from both sides; the decoder reads the targets shifted right by one, and of the
encoder's side what belongs to the same document. Both sides are packed rows of their own lengths, and a document has
the same segment id on both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp

from jaxpt.losses.cross_entropy import linear_cross_entropy, z_loss
from jaxpt.losses.token_metrics import token_metrics, token_sums, token_tables
from jaxpt.models.encoder_decoder import EncoderDecoderConfig, encoder_decoder
from jaxpt.models.heads import lm_head
from jaxpt.models.patterns import bidirectional, causal, cross
from jaxpt.models.transformer import embedding_table
from jaxpt.objectives import parts
from jaxpt.objectives.parts import check, check_length, initializer_of, specs_of
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, RowSpec, Snapshot, Sums, Tree, View, Vocab

TERM = "lm"


def sides(
    encoder: tuple[Array, Array, Array], targets: Array, segment_ids: Array, positions: Array, start: int
) -> dict[str, Tree]:
    """Return ``Example.inputs`` of both sides.

    Args:
      encoder: tokens, segment_ids and positions of the encoder's side, [R, L] i32 each.
      targets: [R, K] i32, what the decoder says.
      segment_ids: [R, K] i32, the documents of the targets; 0 = padding.
      positions: [R, K] i32, of the decoder.
      start: the token that the decoder reads first in each document.
    """
    return {
        **dict(zip(("tokens", "segment_ids", "positions"), encoder, strict=True)),
        "decoder_tokens": shift_right(targets, segment_ids, start),
        "decoder_segment_ids": segment_ids,
        "decoder_positions": positions,
        "targets": targets,
    }


def shift_right(targets_RK: Array, segment_ids_RK: Array, start: int) -> Array:
    """Return what a decoder reads: the token before each target, ``start`` at the first of each document.

    Args:
      targets_RK: [R, K] i32.
      segment_ids_RK: [R, K] i32, 0 = padding.
      start: a token.

    >>> shift_right(jnp.array([[7, 8, 1, 9, 1, 0]]), jnp.array([[1, 1, 1, 2, 2, 0]]), start=2).tolist()
    [[2, 7, 8, 2, 9, 2]]
    """
    first_RK = jnp.pad(segment_ids_RK[:, 1:] != segment_ids_RK[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(first_RK | (segment_ids_RK == 0), start, jnp.roll(targets_RK, 1, axis=1))


def sequence_to_sequence(
    config: EncoderDecoderConfig,
    vocab: Vocab,
    rows: RowSpec,
    corrupt: Callable[[Snapshot, Batch, Key], Example],
    name: str,
    *,
    label_smoothing: float = 0.0,
    z_loss_scale: float = 0.0,
) -> Objective:
    """Return the objective of an encoder and a decoder: what is left when ``corrupt`` is written.

    Its networks are "trunk" (both stacks) and "head", in every objective that is made here.

    Args:
      config: of both stacks; the head has the decoder's settings.
      vocab: their vocabulary.
      rows: what it asks of the data.
      corrupt: makes the inputs of ``sides`` and the weights of the term "lm" [R, K] (``weights_of`` where z_loss_scale
        may be set).
      name: of the objective, for messages.
      label_smoothing: eps of the target (1 - eps) onehot + eps / V.
      z_loss_scale: of the term (log Z)^2, 0 = none.

    Raises:
      ValueError: settings that cannot be.
    """
    check(0 <= label_smoothing < 1, f"{name}: label_smoothing is in [0, 1), not {label_smoothing}")
    check(z_loss_scale >= 0, f"{name}: z_loss is a scale and cannot be negative, not {z_loss_scale}")
    trunk, head = encoder_decoder(config, vocab.size), lm_head(config.decoder, vocab.size)
    networks, tables = {"trunk": trunk, "head": head}, token_tables(vocab)
    scale = {TERM: 1.0} | ({"z_loss": z_loss_scale} if z_loss_scale else {})

    def checked(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
        example = corrupt(snapshot, batch, key)
        check_length(config.encoder, example.inputs["tokens"].shape[1], f"{name}, its encoder")
        check_length(config.decoder, example.inputs["targets"].shape[1], f"{name}, its decoder")
        return example._replace(weights=dict.fromkeys(scale, example.weights[TERM]))

    def read(inputs: dict[str, Array]) -> tuple[View, View]:
        segments, positions = inputs["segment_ids"], inputs["positions"]
        segments_RK, positions_RK = inputs["decoder_segment_ids"], inputs["decoder_positions"]
        return (
            View(inputs["tokens"], segments, positions, bidirectional(segments, positions)),
            View(inputs["decoder_tokens"], segments_RK, positions_RK, causal(segments_RK, positions_RK)),
        )

    def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
        params, targets = snapshot.params, example.inputs["targets"]
        heard, said = read(example.inputs)
        between = cross(said.segment_ids, said.positions, heard.segment_ids, heard.positions)
        hidden_RKD = trunk.apply(params["trunk"], *heard[:1], heard.pattern, heard.positions, *said[:1], said.pattern,
                                 said.positions, between, keys=keys)  # fmt: skip
        readout = head.apply(params["head"], hidden_RKD, embedding_table(params["trunk"]))
        result = linear_cross_entropy(readout, targets, label_smoothing)
        losses = {TERM: result.loss} | ({"z_loss": z_loss(result.log_normalizer)} if z_loss_scale else {})
        return Out(losses, token_sums(result, targets, example.weights[TERM], tables))

    def summary(sums: Sums) -> dict[str, Array]:
        return token_metrics(sums.stats, likelihood=False)

    def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
        heard, said = read(example.inputs)
        return {
            "encoder": heard,
            "decoder": said._replace(targets=example.inputs["targets"], weights=example.weights[TERM]),
        }

    init = initializer_of(networks)
    return Objective(rows, specs_of(networks), init, checked, loss, scale, summary=summary, views=views)


def without_dropout(config: EncoderDecoderConfig) -> EncoderDecoderConfig:
    """Return both stacks as they are evaluated."""
    return replace(config, encoder=parts.without_dropout(config.encoder), decoder=parts.without_dropout(config.decoder))
