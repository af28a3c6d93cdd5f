"""Causal language modelling: labels and weights inside documents, packing, terms and settings."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import packed_batch, tiny_vocab

from jaxpt.models.config import TransformerConfig
from jaxpt.objectives.causal_lm import CausalLM, next_tokens
from jaxpt.step import batch_gradient, finish, make_example
from jaxpt.types import Batch, Objective, ParamSpec, Snapshot, Sums

VOCAB = tiny_vocab()
DECODER = TransformerConfig(depth=2, width=16, heads=2, max_length=32, norm="rms", positions="rotary", layers="unroll")
CONFIG = CausalLM(decoder=DECODER, z_loss=0.01, label_smoothing=0.1)


@functools.cache
def built(config: CausalLM = CONFIG) -> tuple[Objective, dict]:
    objective = config.build(VOCAB)
    return objective, jax.jit(objective.init)(jax.random.key(0))


@functools.cache
def compiled(config: CausalLM = CONFIG):
    """(params, batch) -> (example, out, gradient of the total)."""
    objective, _ = built(config)

    @jax.jit
    def run(params: dict, batch: Batch):
        snapshot = Snapshot(params, {}, jnp.int32(0))
        example = make_example(objective, snapshot, batch, jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), batch.tokens.shape[0])
        out = objective.loss(snapshot, example, keys)
        return example, out, batch_gradient(objective, objective.specs, snapshot, example, keys, 1).grads

    return run


def row(tokens: list[int], segments: list[int], length: int = 24) -> tuple[list[int], list[int], list[int]]:
    positions = [i - segments.index(segment) if segment else 0 for i, segment in enumerate(segments)]
    pad = [0] * (length - len(tokens))
    return tokens + pad, segments + pad, positions + pad


def batch_of(*rows: tuple[list[int], list[int], list[int]]) -> Batch:
    """Eight rows, so that everything runs under one compilation: these and rows of padding."""
    rows += (row([], []),) * (8 - len(rows))
    tokens, segments, positions = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    ids = np.arange(8, dtype=np.uint32)
    return Batch(tokens, segments, positions, segments * 0, ids, np.zeros(8, np.int32), np.ones(8, np.float32))


def test_labels_and_weights_of_a_packed_row():
    tokens = jnp.array([[3, 8, 1, 9, 1, 5, 4, 1, 0, 0], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7]])
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 2]])
    targets, weights = next_tokens(tokens, segments)
    assert weights.astype(int).tolist() == [[1, 1, 0, 1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert (targets * weights).astype(int)[0].tolist() == [8, 1, 0, 1, 0, 4, 1, 0, 0, 0]
    assert weights.dtype == jnp.float32


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), max_size=4))
def test_the_weights_count_all_but_the_first_token_of_each_document(lengths):
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)
    segments = np.pad(segments, (0, 24 - len(segments)))[None]
    tokens = np.arange(24)[None]
    targets, weights = next_tokens(jnp.array(tokens), jnp.array(segments))
    assert weights.sum() == sum(n - 1 for n in lengths)
    scored = np.asarray(weights[0]) > 0
    assert (np.asarray(targets)[0, scored] == tokens[0, scored] + 1).all()


def test_the_end_of_a_document_is_predicted_and_nothing_after_it():
    objective, params = built()
    assert objective.rows.suffix == (VOCAB.eos,)
    assert objective.rows.prefix == ()
    batch = packed_batch(objective.rows, VOCAB)
    example = compiled()(params, batch)[0]
    ends = np.flatnonzero((batch.tokens == VOCAB.eos).ravel())
    assert (np.asarray(example.weights["lm"]).ravel()[ends] == 0).all()
    assert (np.asarray(example.weights["lm"]).ravel()[ends - 1] == 1).all()
    assert (np.asarray(example.inputs["targets"]).ravel()[ends - 1] == VOCAB.eos).all()


def test_bos_is_read_and_never_predicted():
    objective = dataclasses.replace(CONFIG, bos=True).build(VOCAB)
    assert objective.rows.prefix == (VOCAB.bos,)
    example = objective.corrupt(Snapshot({}, {}, 0), packed_batch(objective.rows, VOCAB), jax.random.key(0))
    scored = np.asarray(example.inputs["targets"])[np.asarray(example.weights["lm"]) > 0]
    assert VOCAB.bos not in scored
    assert VOCAB.eos in scored


FIRST, SECOND = [10, 11, 12, 13, 14, 3], [20, 21, 22, 3]
PACKED = row(FIRST + SECOND, [1] * 6 + [2] * 4)


def test_packed_and_separate_rows_give_the_same_losses_and_gradient():
    _, params = built()
    _, packed, together = compiled()(params, batch_of(PACKED))
    _, separate, apart = compiled()(params, batch_of(row(FIRST, [1] * 6), row(SECOND, [1] * 4)))
    for term in ("lm", "z_loss"):
        np.testing.assert_allclose(packed.losses[term][0, :5], separate.losses[term][0, :5], rtol=1e-5)
        np.testing.assert_allclose(packed.losses[term][0, 6:9], separate.losses[term][1, :3], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), together, apart)


def test_the_first_document_does_not_reach_the_second():
    _, params = built()
    changed = row([30, 31, 32, 33, 34, 3, *SECOND], [1] * 6 + [2] * 4)
    one, two = (compiled()(params, batch_of(r))[1].losses["lm"][0] for r in (PACKED, changed))
    np.testing.assert_array_equal(one[6:9], two[6:9])
    assert (one[:5] != two[:5]).all()


def test_the_future_does_not_reach_the_past():
    _, params = built()
    changed = row([10, 11, 12, 13, 40, 3, *SECOND], [1] * 6 + [2] * 4)  # token 4 is the label of place 3
    one, two = (compiled()(params, batch_of(r))[1].losses["lm"][0] for r in (PACKED, changed))
    np.testing.assert_array_equal(one[:3], two[:3])
    assert (one[3:5] != two[3:5]).all()


def test_terms_and_metrics_of_a_batch():
    """The total against optax on the network's own logits; z-loss is a term of its own, and not in ``nll``."""
    objective, params = built()
    batch = packed_batch(objective.rows, VOCAB)
    example, out, _ = compiled()(params, batch)
    weights, targets = example.weights["lm"], example.inputs["targets"]
    assert objective.scale == {"lm": 1.0, "z_loss": 0.01}
    log_normalizer = np.sqrt(out.losses["z_loss"])
    assert np.abs(log_normalizer - np.log(VOCAB.size)).max() < 1
    total = {term: float(jnp.sum(loss * weights)) for term, loss in out.losses.items()}
    metrics = finish(objective, Sums(total, {term: weights.sum() for term in total}, out.stats))
    ordinary = metrics["loss/lm"]
    clean, _ = built(CONFIG.for_evaluation())
    assert clean.scale == {"lm": 1.0}
    unsmoothed = compiled(CONFIG.for_evaluation())(params, batch)[1].losses["lm"]
    nll = float(jnp.sum(unsmoothed * weights) / weights.sum())
    assert float(metrics["nll"]) == pytest.approx(nll, rel=1e-6)
    assert nll == pytest.approx(np.log(VOCAB.size), rel=0.03)  # a fresh model guesses
    assert ordinary != pytest.approx(nll, rel=1e-6)
    assert float(metrics["perplexity"]) == pytest.approx(np.exp(nll), rel=1e-5)
    size = VOCAB.token_bytes[np.asarray(targets)][np.asarray(weights) > 0].sum()
    assert float(metrics["bits_per_byte"]) == pytest.approx(nll * float(weights.sum()) / np.log(2) / size, rel=1e-5)


def test_a_row_of_padding_gives_zeros():
    objective, params = built()
    example, out, gradient = compiled()(params, batch_of())
    assert example.weights["lm"].sum() == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    sums = Sums({}, {}, out.stats)
    assert all(np.isfinite(value) for value in finish(objective, sums).values())


def test_tied_and_untied_output():
    tied, untied = (CausalLM(decoder=dataclasses.replace(DECODER, tie_embeddings=tie)) for tie in (True, False))
    assert not jax.tree.leaves(tied.build(VOCAB).specs["head"], is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    shapes = jax.eval_shape(untied.build(VOCAB).init, jax.random.key(0))
    assert [leaf.shape for leaf in jax.tree.leaves(shapes["head"])] == [(VOCAB.size, 16)]


def test_evaluation_has_no_dropout():
    config = CausalLM(decoder=dataclasses.replace(DECODER, dropout=0.5, attention_dropout=0.5, mlp_dropout=0.5))
    _, params = built()
    example = compiled()(params, batch_of(PACKED))[0]
    for settings_, same in ((config.for_evaluation(), True), (config, False)):
        loss = jax.jit(settings_.build(VOCAB).loss)
        keys = (jax.random.split(jax.random.key(seed), 8) for seed in (0, 1))
        one, two = (loss(Snapshot(params, {}, jnp.int32(0)), example, key).losses["lm"] for key in keys)
        assert (one == two).all() == same


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"z_loss": -1.0}, "z_loss"), ({"label_smoothing": 1.0}, "label_smoothing")],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes).build(VOCAB)


def test_what_the_tokenizer_or_the_model_lacks_is_said():
    with pytest.raises(ValueError, match=r"causal_lm needs a \[EOS\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, eos=None))
    objective = CausalLM(decoder=dataclasses.replace(DECODER, positions="learned", max_length=16)).build(VOCAB)
    with pytest.raises(ValueError, match="max_length=16"):
        objective.corrupt(Snapshot({}, {}, 0), batch_of(PACKED), jax.random.key(0))
