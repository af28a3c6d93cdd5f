"""Masked language modelling: what is hidden, what is predicted, and the gathered projection."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.corruption.selection import FixedCount, Independent, Informative, InverseFrequency, Spans, WholeWord
from jaxpt.losses.cross_entropy import logits_of
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import boundary_head, lm_head, mlm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives import CausalLM
from jaxpt.objectives.masked_lm import MaskedLM, SpanBoundary, mask_rows
from jaxpt.objectives.scores import token_scores
from jaxpt.step import batch_gradient, finish, make_example
from jaxpt.types import Example, Readout, Snapshot, Sums

VOCAB = tiny_vocab()
ENCODER = TransformerConfig(
    depth=2, width=16, heads=2, max_length=64, norm_placement="post", embedding_norm=True, final_norm=False,
    logits_bias=True, layers="unroll",
)  # fmt: skip
CONFIG = MaskedLM(encoder=ENCODER)
ROWS = CONFIG.build(VOCAB).rows
BATCH = packed_batch(ROWS, VOCAB, length=64, size=32)
CANDIDATES = ~VOCAB.is_special[BATCH.tokens]


@functools.cache
def built(config: MaskedLM = CONFIG):
    objective = config.build(VOCAB)
    return objective, jax.jit(objective.init)(jax.random.key(0))


@functools.cache
def corruption(config: MaskedLM):
    objective = config.build(VOCAB)
    return jax.jit(lambda batch, key, step: make_example(objective, Snapshot({}, {}, step), batch, key))


def corrupted(config: MaskedLM, seed: int = 0, step: int = 0) -> Example:
    return jax.device_get(corruption(config)(BATCH, jax.random.key(seed), jnp.int32(step)))


def selected(example: Example) -> np.ndarray:
    mask = np.zeros(BATCH.tokens.shape, bool)
    for row, places, weights in zip(mask, example.inputs["target_positions"], example.weights["mlm"], strict=True):
        row[places[weights > 0]] = True
    return mask


def with_(**changes) -> MaskedLM:
    return dataclasses.replace(CONFIG, **changes)


SHARED = {
    per: with_(selection=Spans(unit="word"), rate=0.3, mask=0.5, random=0.0, decide_per=per)
    for per in ("token", "word", "span")
}
CASES = [
    CONFIG,
    with_(selection=Independent(), rate=0.4),
    with_(selection=WholeWord(), mask=0.0, random=1.0),
    *SHARED.values(),
]


@pytest.mark.parametrize("config", CASES, ids=lambda config: f"{type(config.selection).__name__}-{config.decide_per}")
def test_targets_are_the_originals_and_the_rest_is_untouched(config):
    for seed in range(4):
        example = corrupted(config, seed)
        mask, inputs = selected(example), example.inputs["tokens"]
        places, weights = example.inputs["target_positions"], example.weights["mlm"]
        assert weights.dtype == np.float32
        assert mask.sum() == weights.sum()  # no place twice
        assert mask.any()
        assert not (mask & ~CANDIDATES).any()  # neither [CLS], [SEP] nor padding
        originals = np.take_along_axis(BATCH.tokens, places, axis=1)
        assert (example.inputs["targets"] == originals)[weights > 0].all()
        assert (inputs == BATCH.tokens)[~mask].all()
        allowed = (inputs == VOCAB.mask) | ~VOCAB.is_special[inputs]
        assert allowed[mask].all()
        in_order = np.diff(np.where(weights > 0, places, 999), axis=1) >= 0
        assert in_order.all()


def test_eighty_ten_ten():
    actions = np.zeros(3)
    for seed in range(30):
        example = corrupted(CONFIG, seed)
        mask, inputs = selected(example), example.inputs["tokens"]
        hidden, same = inputs == VOCAB.mask, inputs == BATCH.tokens
        actions += [(mask & hidden).sum(), (mask & ~hidden & ~same).sum(), (mask & same).sum()]
    ordinary = (~VOCAB.is_special).sum()
    shares = np.array([0.8, 0.1 * (1 - 1 / ordinary), 0.1 * (1 + 1 / ordinary)])
    assert actions.sum() > 3000
    np.testing.assert_allclose(actions / actions.sum(), shares, atol=4 * np.sqrt(0.16 / actions.sum()))


@pytest.mark.parametrize("per", list(SHARED))
def test_who_shares_the_choice(per):
    mixed = []
    for seed in range(6):
        example = corrupted(SHARED[per], seed)
        mask, hidden = selected(example), example.inputs["tokens"] == VOCAB.mask
        assert not (hidden & ~mask).any()
        starts = {
            "token": np.ones_like(mask),
            "word": VOCAB.starts_word[BATCH.tokens] | VOCAB.is_special[np.roll(BATCH.tokens, 1, axis=1)],
            "span": mask & ~np.roll(mask, 1, axis=1),
        }
        for kind, start in starts.items():
            if kind == "word":
                start = start | (BATCH.sentence_ids != np.roll(BATCH.sentence_ids, 1, axis=1))
            unit = np.cumsum(start.ravel())[mask.ravel()]
            share = np.bincount(unit, hidden[mask])[np.unique(unit)] / np.bincount(unit)[np.unique(unit)]
            mixed.append((kind, bool(((share > 0) & (share < 1)).any())))
    found = {kind: any(value for name, value in mixed if name == kind) for kind in ("token", "word", "span")}
    whole = {"token": {"token"}, "word": {"token", "word"}, "span": {"token", "word", "span"}}[per]
    assert found == {kind: kind not in whole for kind in found}


def test_masks_change_from_step_to_step():
    first, second = corrupted(CONFIG, 0), corrupted(CONFIG, 1)
    assert (selected(first) != selected(second)).any(axis=1).mean() > 0.9


def test_the_rate_follows_its_schedule_under_one_compilation():
    config = with_(rate=0.4, final_rate=0.1, rate_steps=100, selection=FixedCount(rounding="nearest"))
    rates = {}
    for step in (0, 50, 100, 200):
        example = corrupted(config, 0, step)
        assert example.weights["mlm"].shape == (32, 26)  # room for the highest rate
        rates[step] = example.weights["mlm"].sum() / CANDIDATES.sum()
    assert rates == pytest.approx({0: 0.4, 50: 0.25, 100: 0.1, 200: 0.1}, abs=0.01)
    assert corruption(config)._cache_size() == 1


def test_rate_zero_hides_nothing_and_rate_one_hides_all():
    nothing = corrupted(with_(rate=0.0))
    assert nothing.weights["mlm"].sum() == 0
    np.testing.assert_array_equal(nothing.inputs["tokens"], BATCH.tokens)
    everything = corrupted(with_(rate=1.0, mask=1.0, random=0.0))
    np.testing.assert_array_equal(everything.inputs["tokens"], np.where(CANDIDATES, VOCAB.mask, BATCH.tokens))


def full_logits_loss(params: dict, example: Example, mask: np.ndarray) -> jax.Array:
    """The same loss by projecting every position: nothing of the objective's own ``loss`` is used."""
    inputs = example.inputs
    encoder, head = transformer(ENCODER, VOCAB.size), mlm_head(ENCODER, VOCAB.size)
    pattern = bidirectional(inputs["segment_ids"], inputs["positions"])
    hidden = encoder.apply(params["trunk"], inputs["tokens"], pattern, inputs["positions"])
    logits = logits_of(head.apply(params["head"], hidden, embedding_table(params["trunk"])))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(BATCH.tokens))
    return jnp.sum(losses * mask) / mask.sum()


def test_gathered_and_full_logits_have_the_same_loss_and_gradients():
    objective, params = built()
    params = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    example = corrupted(CONFIG)
    mask = selected(example)
    keys = jax.random.split(jax.random.key(0), 32)
    assert (example.weights["mlm"] == 0).any()  # pad slots, which all point to place 0

    @jax.jit
    def gradient_of(params: dict, example: Example):
        return batch_gradient(objective, objective.specs, Snapshot(params, {}, jnp.int32(0)), example, keys, 1)

    gathered = gradient_of(params, example)
    loss, gradient = jax.jit(jax.value_and_grad(full_logits_loss))(params, example, mask)
    np.testing.assert_allclose(gathered.losses["mlm"] / mask.sum(), loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gathered.grads, gradient)
    assert gathered.grads["head"]["bias"].any()


def test_packed_and_separate_rows_give_the_same_losses():
    """One packed row, and its documents cut out of the corrupted row, each at the start of a row of its own."""
    objective, params = built()
    packed = corrupted(CASES[1], seed=3)
    row, mask = 0, selected(packed)[0]
    room = packed.weights["mlm"].shape[1]
    inputs = {name: np.zeros((3, 64), np.int32) for name in ("tokens", "segment_ids", "positions")}
    places, targets = np.zeros((3, room), np.int32), np.zeros((3, room), np.int32)
    weights = np.zeros((3, room), np.float32)
    for document in range(3):
        where = np.flatnonzero(BATCH.segment_ids[row] == document + 1)
        inputs["tokens"][document, : len(where)] = packed.inputs["tokens"][row, where]
        inputs["segment_ids"][document, : len(where)] = 1
        inputs["positions"][document, : len(where)] = np.arange(len(where))
        inside = np.flatnonzero(mask[where])
        places[document, : len(inside)], weights[document, : len(inside)] = inside, 1
        targets[document, : len(inside)] = BATCH.tokens[row, where[inside]]
    separate = Example(
        inputs | {"target_positions": places, "targets": targets}, np.arange(3, dtype=np.uint32), {"mlm": weights}
    )
    loss = jax.jit(lambda example: objective.loss(Snapshot(params, {}, jnp.int32(0)), example, None).losses["mlm"])
    whole = np.asarray(loss(jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), packed)))[packed.weights["mlm"][:1] > 0]
    parts = np.asarray(loss(jax.tree.map(jnp.asarray, separate)))[weights > 0]
    assert len(whole) > 5
    np.testing.assert_allclose(whole, parts, rtol=1e-5)


def test_metrics_are_those_of_the_scored_positions():
    objective, params = built()
    example = corrupted(CONFIG)
    keys = jax.random.split(jax.random.key(0), 32)
    out = jax.jit(objective.loss)(Snapshot(params, {}, jnp.int32(0)), example, keys)
    weights = np.asarray(example.weights["mlm"])
    losses = {"mlm": jnp.sum(out.losses["mlm"] * weights)}
    metrics = finish(objective, Sums(losses, {"mlm": weights.sum()}, out.stats))
    assert float(metrics["nll"]) == pytest.approx(float(metrics["loss/mlm"]), rel=1e-5)
    assert float(metrics["nll"]) == pytest.approx(np.log(VOCAB.size), rel=0.05)  # a fresh model guesses
    counts = np.where(VOCAB.is_special, 0, VOCAB.unigram_counts + 1)
    probability = (counts / counts.sum())[np.asarray(example.inputs["targets"])[weights > 0]]
    assert float(metrics["unigram_loss"]) == pytest.approx(-np.log(probability).mean(), rel=1e-5)
    assert "bits_per_byte" not in metrics


# ------------------------------------------------------------------------------------- further recipes


def hidden_states(params: dict, example: Example) -> jax.Array:
    inputs = example.inputs
    pattern = bidirectional(inputs["segment_ids"], inputs["positions"])
    encoder = transformer(ENCODER, VOCAB.size)
    return encoder.apply(params["trunk"], inputs["tokens"], pattern, inputs["positions"])


def test_a_token_is_predicted_by_the_place_before_it():
    """GPT-BERT: the labels are moved by one, nothing else; trunk and head are those of causal_lm."""
    config = with_(predict_from="previous")
    objective, params = config.build(VOCAB), built(CausalLM(decoder=ENCODER))[1]
    plain, moved = corrupted(CONFIG), corrupted(config)
    np.testing.assert_array_equal(plain.inputs["tokens"], moved.inputs["tokens"])
    np.testing.assert_array_equal(plain.weights["mlm"], moved.weights["mlm"])  # every document starts with [CLS]
    used = plain.weights["mlm"] > 0
    assert (plain.inputs["target_positions"] - 1 == moved.inputs["target_positions"])[used].all()
    assert jax.tree.structure(jax.eval_shape(objective.init, jax.random.key(0))) == jax.tree.structure(params)
    snapshot = Snapshot(params, {}, jnp.int32(0))

    @jax.jit
    def both(example: Example) -> tuple:
        head = lm_head(ENCODER, VOCAB.size)
        logits = logits_of(head.apply(params["head"], hidden_states(params, example), embedding_table(params["trunk"])))
        nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.asarray(BATCH.tokens[:, 1:]))
        return objective.loss(snapshot, example, None).losses["mlm"], nll

    got, nll = map(np.asarray, both(moved))
    places = np.maximum(plain.inputs["target_positions"] - 1, 0)
    np.testing.assert_allclose(got[used], np.take_along_axis(nll, places, axis=1)[used], rtol=1e-5)
    # where a piece starts without a special token, its first token has nobody to predict it
    bare = BATCH._replace(tokens=np.where(VOCAB.is_special[BATCH.tokens], 20, BATCH.tokens))
    everything = with_(predict_from="previous", rate=1.0)
    _, weights = jax.jit(lambda batch: mask_rows(everything, VOCAB, batch, jax.random.key(0), jnp.int32(0)))(bare)
    assert weights["mlm"].sum() == (bare.segment_ids > 0).sum() - bare.segment_ids.max(axis=1).sum()


def test_corruption_and_prediction_are_two_rates():
    example = corrupted(with_(rate=0.4, prediction_rate=0.15, mask=1.0, random=0.0))
    hidden = example.inputs["tokens"] == VOCAB.mask
    asked = selected(example)
    assert not (asked & ~hidden).any()
    count = CANDIDATES.sum(axis=1)
    assert (np.abs(hidden.sum(axis=1) - 0.4 * count) < 1).all()
    assert (np.abs(asked.sum(axis=1) - 0.15 * count) < 1).all()
    assert example.weights["mlm"].shape == (32, 10)  # no more room than is asked
    asked = sum(selected(corrupted(with_(rate=0.4, prediction_rate=0.15, mask=1.0, random=0.0), n)) for n in range(20))
    share = [asked[:, part].sum() / CANDIDATES[:, part].sum() / 20 for part in (slice(0, 12), slice(12, 64))]
    assert share == pytest.approx([0.15, 0.15], abs=0.01)  # any of the hidden ones, not the first


def test_the_boundary_objective_is_spanberts():
    """Both terms against the same computation written out: no gather, and the head by its formula."""
    boundary = SpanBoundary(places=2, place_width=5)
    config = with_(selection=Spans(unit="word", rounding="ceil"), rate=0.4, decide_per="span", boundary=boundary)
    objective, params = built(config)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    example = corrupted(config)
    inputs, weights = example.inputs, example.weights["sbo"]
    assert set(objective.scale) == set(example.weights) == {"mlm", "sbo"}
    assert 0 < weights.sum() < example.weights["mlm"].sum()
    mask = selected(example)
    rows = np.arange(32)[:, None]
    for end in ("left", "right"):  # both ends are ordinary tokens that were not selected, of the same document
        tokens = BATCH.tokens[rows, inputs[end]]
        scored = weights > 0
        assert not VOCAB.is_special[tokens][scored].any()
        assert not mask[rows, inputs[end]][scored].any()
        segments = BATCH.segment_ids[rows, inputs[end]] == BATCH.segment_ids[rows, inputs["target_positions"]]
        assert segments[scored].all()
    assert (inputs["target_positions"] == inputs["left"] + 1 + inputs["place"])[scored].all()
    assert set(inputs["place"][scored]) == {0, 1}

    def layer(x, dense, norm):
        x = jax.nn.gelu(x @ dense["kernel"] + dense["bias"], approximate=False)
        return (x - x.mean()) / jnp.sqrt(x.var() + ENCODER.norm_epsilon) * norm["scale"] + norm["bias"]

    @jax.jit
    def both(params: dict) -> tuple:
        hidden, head = hidden_states(params, example), params["boundary"]

        def one(row, left, right, place, target):
            x = jnp.concatenate([hidden[row, left], hidden[row, right], head["places"][place]])
            x = layer(x, head["first"], head["first_norm"])
            x = layer(x, head["rest"]["transform"], head["rest"]["norm"])
            return -jax.nn.log_softmax(embedding_table(params["trunk"]) @ x + head["rest"]["bias"])[target]

        each = [inputs[name] for name in ("left", "right", "place", "targets")]
        want = jax.vmap(jax.vmap(one))(jnp.broadcast_to(rows, each[0].shape), *each)
        return objective.loss(Snapshot(params, {}, jnp.int32(0)), example, None).losses, want

    losses, want = both(params)
    np.testing.assert_allclose(np.asarray(losses["sbo"])[scored], np.asarray(want)[scored], rtol=2e-4)
    assert config.for_evaluation().boundary == boundary


def test_the_count_of_the_boundary_head():
    """SpanBERT-Base: 200-wide places, (2 * 768 + 200) x 768, 768 x 768, two norms and a bias over the vocabulary."""
    config = TransformerConfig(depth=1, width=768, heads=12, logits_bias=True)
    shapes = jax.eval_shape(boundary_head(config, 28996, places=15, place_width=200).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == 15 * 200 + 1736 * 768 + 768 + 768 * 768 + 768 + 4 * 768 + 28996


def test_z_loss_is_a_term_of_its_own():
    config = with_(z_loss=1e-4)
    example = corrupted(config)
    assert config.build(VOCAB).scale == {"mlm": 1.0, "z_loss": 1e-4}
    np.testing.assert_array_equal(example.weights["z_loss"], example.weights["mlm"])


def copier(tokens_RL: jax.Array, places_RK: jax.Array) -> Readout:
    """A model that knows every token that it can see, and nothing of the others."""
    seen_RK = jnp.take_along_axis(tokens_RL, places_RK, axis=1)
    return Readout(50.0 * jax.nn.one_hot(seen_RK, VOCAB.size), jnp.eye(VOCAB.size))


@pytest.mark.parametrize("passes", [1, 2])
def test_no_token_is_scored_where_it_can_be_seen(passes):
    def scores(selection):
        return np.asarray(
            jax.jit(lambda batch: token_scores(selection, copier, VOCAB, batch, jax.random.key(1)))(BATCH)
        )

    surprisal = scores(Informative(passes=passes))
    assert (surprisal[~CANDIDATES] == -1).all()
    scored = surprisal >= 0
    assert (scored.sum(axis=1) == (CANDIDATES.sum(axis=1) + 2 - passes) // (3 - passes)).all()
    np.testing.assert_allclose(surprisal[scored], 50.0, atol=1e-3)  # it says [MASK]; a token in sight would cost 0
    entropy = scores(Informative(passes=passes, score="entropy"))
    np.testing.assert_allclose(entropy[scored], 0, atol=1e-3)
    assert (entropy[scored] >= 0).all()


def test_surprising_tokens_are_selected_more_often():
    """A head that expects one half of the vocabulary: the other half is selected more often, at the same count."""
    config = with_(selection=Informative(unbiased=True, floor=0.2))
    objective, params = built(config)
    expected = np.arange(VOCAB.size) % 2 == 0
    params = jax.tree.map(lambda leaf: leaf, params)
    params["head"]["bias"] = jnp.where(expected, 6.0, 0.0)
    draw = jax.jit(lambda key: make_example(objective, Snapshot(params, {}, jnp.int32(0)), BATCH, key))
    share, importance = np.zeros(2), []
    for seed in range(6):
        example = jax.device_get(draw(jax.random.key(seed)))
        used = example.weights["mlm"] > 0
        count = 0.15 * CANDIDATES.sum(axis=1)
        assert (np.abs(used.sum(axis=1) - count) < 1).all()
        share += np.bincount(expected[example.inputs["targets"][used]], minlength=2)
        importance.append(example.inputs["importance"][used])
    frequency = np.bincount(expected[BATCH.tokens[CANDIDATES]], minlength=2)
    assert (share / frequency)[0] > 1.4 * (share / frequency)[1]  # 9.4 nats to 3.4 and a floor of .2: about 2.2
    assert np.concatenate(importance).max() > 1.5
    assert np.concatenate(importance).mean() == pytest.approx(1.0, abs=0.3)  # E[(k / n) / P] = 1 over the draws
    out = jax.jit(objective.loss)(Snapshot(params, {}, jnp.int32(0)), example, jax.random.split(jax.random.key(0), 32))
    nll = np.asarray(out.stats["nll"] / out.stats["tokens"])
    weighed = (np.asarray(out.losses["mlm"]) * example.weights["mlm"]).sum() / example.weights["mlm"].sum()
    assert weighed < nll - 0.3  # the easy half counts for more than it was drawn


def test_rare_words_and_phrases():
    rare = with_(selection=InverseFrequency(cap=1.0))
    counts, frequency = np.zeros(VOCAB.size), np.bincount(BATCH.tokens[CANDIDATES], minlength=VOCAB.size)
    for seed in range(20):
        counts += np.bincount(BATCH.tokens[selected(corrupted(rare, seed))], minlength=VOCAB.size)
    share = counts / np.maximum(20 * frequency, 1)
    assert share[45:57][frequency[45:57] > 0].mean() > 2 * share[7:17].mean()  # counts fall with the id
    phrases = with_(selection=WholeWord(unit="phrase"))
    rows = phrases.build(VOCAB).rows
    assert rows.fields == ("phrase_starts",)
    assert CONFIG.build(VOCAB).rows.fields == ()
    batch = packed_batch(rows, VOCAB, length=64, size=32)
    objective = phrases.build(VOCAB)
    example = jax.device_get(objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(0)))
    mask = selected(example)
    begins = np.asarray(batch.extras["phrase_starts"]) | ~CANDIDATES | ~np.roll(CANDIDATES, 1, axis=1)
    begins |= batch.sentence_ids != np.roll(batch.sentence_ids, 1, axis=1)
    phrase = np.cumsum(begins.ravel())
    taken, size = np.bincount(phrase, mask.ravel()), np.bincount(phrase)
    assert ((taken == 0) | (taken == size)).all()
    assert (taken > 1).any()
    with pytest.raises(ValueError, match="--phrases"):
        objective.corrupt(Snapshot({}, {}, jnp.int32(0)), BATCH, jax.random.key(0))


def test_evaluation_settings():
    for by_hardness in (InverseFrequency(), Informative()):
        assert with_(selection=by_hardness).for_evaluation() == CONFIG
    assert with_(rate=0.4, prediction_rate=0.2, z_loss=1e-4).for_evaluation() == CONFIG
    config = MaskedLM(
        encoder=dataclasses.replace(ENCODER, dropout=0.1, attention_dropout=0.1),
        rate=0.4, final_rate=0.3, rate_steps=10, selection=Spans(), label_smoothing=0.1,
    )  # fmt: skip
    assert config.for_evaluation() == MaskedLM(encoder=ENCODER, rate=0.15, rate_steps=10, selection=Spans())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.5}, "rate"),
        ({"mask": -0.1}, "mask"),
        ({"mask": 0.8, "random": 0.3}, r"mask \+ random"),
        ({"final_rate": 0.3}, "rate_steps"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"prediction_rate": 0.3}, r"lower mask \+ random"),
        ({"z_loss": -1.0}, "z_loss"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        with_(**changes).build(VOCAB)


@pytest.mark.parametrize("token", ["mask", "cls", "sep"])
def test_a_tokenizer_without_the_special_token_is_refused(token):
    with pytest.raises(ValueError, match=rf"masked_lm needs a \[{token.upper()}\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, **{token: None}))


def test_rows_longer_than_the_position_table_are_refused():
    objective = MaskedLM(encoder=dataclasses.replace(ENCODER, max_length=32)).build(VOCAB)
    with pytest.raises(ValueError, match="max_length=32"):
        objective.corrupt(Snapshot({}, {}, jnp.int32(0)), BATCH, jax.random.key(0))
