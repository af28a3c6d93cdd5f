"""Facts of ELECTRA and DeBERTaV3 (docs/objectives.md)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.corruption.rows import row_keys
from jaxpt.corruption.selection import FixedCount
from jaxpt.losses.cross_entropy import logits_of
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import detection_head, mlm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.sharing import complete
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives import MaskedLM, ReplacedTokenDetection
from jaxpt.objectives.replaced_token_detection import Sampling, writer
from jaxpt.step import batch_gradient, finish, make_example
from jaxpt.types import Objective, Readout, Snapshot, Sums

VOCAB = tiny_vocab()
ENCODER = TransformerConfig(
    depth=1, width=16, heads=2, mlp_width=32, embed_width=8, max_length=64, norm_placement="post",
    embedding_norm=True, final_norm=False, token_types=2, logits_bias=True,
)  # fmt: skip
GENERATOR = dataclasses.replace(ENCODER, width=12, embed_width=None)
CONFIG = ReplacedTokenDetection(encoder=ENCODER, generator=GENERATOR)
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # to compile
SHARING = ("none", "tied", "gradient_disentangled")


@functools.cache
def built(embeddings: str) -> tuple[Objective, dict]:
    """The objective, and parameters that are no fresh ones: all differ, and the generator is sure of something."""
    objective = dataclasses.replace(CONFIG, embeddings=embeddings).build(VOCAB)
    params = jax.jit(objective.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return objective, tree.unflatten([leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


BATCH = packed_batch(CONFIG.build(VOCAB).rows, VOCAB, 64, 32)
KEYS = row_keys(jax.random.key(0), jnp.asarray(BATCH.row_ids))  # as ``views`` draws


@functools.cache
def corruption(config: ReplacedTokenDetection):
    objective = config.build(VOCAB)
    return jax.jit(lambda key: make_example(objective, Snapshot({}, {}, jnp.int32(0)), BATCH, key))


def corrupted(seed: int = 0, config: ReplacedTokenDetection = CONFIG):
    return jax.device_get(corruption(config)(jax.random.key(seed)))


def selected(example) -> np.ndarray:
    mask = np.zeros(BATCH.tokens.shape, bool)
    for row, places, used in zip(mask, example.inputs["target_positions"], example.inputs["used"], strict=True):
        row[places[used]] = True
    return mask


# ------------------------------------------------------------------------------------------ corruption


def test_as_many_tokens_as_published_and_none_twice():
    """ELECTRA's own draws fall on one position twice; here k of n are k (google-research/electra issue 41)."""
    length = BATCH.segment_ids > 0
    want = np.maximum(np.round(np.float32(0.15) * length.sum(1).astype(np.float32)), 1)
    for seed in range(3):
        example = corrupted(seed)
        np.testing.assert_array_equal(example.weights["generator"].sum(1), want)
        np.testing.assert_array_equal(selected(example).sum(1), want)
        np.testing.assert_array_equal(example.weights["discriminator"], length)  # special tokens too, no padding
        np.testing.assert_array_equal(example.counts["discriminator"], length.sum(1))


@pytest.mark.parametrize("share", [0.85, 1.0, 0.0])
def test_the_generator_reads_masks_and_originals(share):
    config = dataclasses.replace(CONFIG, mask=share, rate=0.5)
    hidden = total = 0
    for seed in range(4):
        example = corrupted(seed, config)
        mask, read = selected(example), example.inputs["masked"]
        np.testing.assert_array_equal(read[~mask], BATCH.tokens[~mask])
        assert ((read == VOCAB.mask) | (read == BATCH.tokens)).all()  # no random tokens
        hidden, total = hidden + (read == VOCAB.mask).sum(), total + mask.sum()
    assert total > 900
    assert hidden / total == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / total))


# -------------------------------------------------------------------------------------------- the pair


@functools.cache
def observed(embeddings: str) -> dict:
    """One pass of the objective, and the same pair of networks run by hand."""
    objective, params = built(embeddings)
    discriminator, head = transformer(ENCODER, VOCAB.size), detection_head(ENCODER)
    generator_config = GENERATOR if embeddings == "none" else dataclasses.replace(GENERATOR, embed_width=8)
    generator, generator_head = transformer(generator_config, VOCAB.size), mlm_head(generator_config, VOCAB.size)

    @fast
    def run(params: dict):
        snapshot = Snapshot(params, {}, jnp.int32(0))
        example = make_example(objective, snapshot, BATCH, jax.random.key(0))
        out, views = objective.loss(snapshot, example, KEYS), objective.views(snapshot, example)
        told = bidirectional(jnp.asarray(BATCH.segment_ids), jnp.asarray(BATCH.positions)), jnp.asarray(BATCH.positions)
        trunk_params, generator_params = complete(params)
        hidden = generator.apply(generator_params, example.inputs["masked"], *told)
        logits = logits_of(generator_head.apply(params["generator_head"], hidden, embedding_table(generator_params)))
        hidden = discriminator.apply(trunk_params, views["discriminator"].tokens, *told)
        scores = head.apply(params["detector"], hidden, told[1])
        written, labels = views["discriminator"].tokens, views["discriminator"].targets
        return {"example": example, "out": out, "logits": logits, "scores": scores, "read": written, "labels": labels}

    return jax.device_get(run(params))


@pytest.mark.parametrize("embeddings", SHARING)
def test_the_discriminator_reads_samples_and_no_mask(embeddings):
    seen = observed(embeddings)
    mask, read = selected(seen["example"]), seen["read"]
    np.testing.assert_array_equal(read[~mask], BATCH.tokens[~mask])
    assert not VOCAB.is_special[read[mask]].any()  # [MASK] among them
    assert (read != seen["example"].inputs["masked"])[seen["example"].inputs["masked"] == VOCAB.mask].all()
    np.testing.assert_array_equal(seen["labels"], mask & (read != BATCH.tokens))
    assert 0 < seen["labels"].sum() < mask.sum()  # some samples hit the original, and count as original


@pytest.mark.parametrize("embeddings", SHARING)
def test_both_losses_and_every_metric_by_hand(embeddings):
    seen = observed(embeddings)
    example, out, mask = seen["example"], seen["out"], selected(seen["example"])
    log_p = np.asarray(jax.nn.log_softmax(seen["logits"]), np.float64)
    nll = -np.take_along_axis(log_p, BATCH.tokens[..., None], -1)[..., 0]
    weights = example.weights["generator"]
    assert (out.losses["generator"] * weights).sum() == pytest.approx(nll[mask].sum(), rel=1e-5)
    z, label = seen["scores"].astype(np.float64), seen["labels"]
    bce = np.logaddexp(0, z) - label * z
    np.testing.assert_allclose(out.losses["discriminator"], bce, rtol=1e-4, atol=1e-5)
    assert example.counts["discriminator"].sum() == (BATCH.segment_ids > 0).sum()

    objective, _ = built(embeddings)
    sums = {term: (loss * example.weights[term]).sum() for term, loss in out.losses.items()}
    counts = {term: count.sum() for term, count in example.counts.items()}
    metrics = finish(objective, Sums(sums, counts, out.stats))
    present = BATCH.segment_ids > 0
    assert float(metrics["nll"]) == pytest.approx(nll[mask].mean(), rel=1e-5)
    assert float(metrics["replaced"]) == pytest.approx(label[present].mean(), rel=1e-5)
    assert float(metrics["sampled_accuracy"]) == pytest.approx(1 - label.sum() / mask.sum(), rel=1e-5)
    assert float(metrics["recall"]) == pytest.approx((z >= 0)[label > 0].mean(), rel=1e-5)
    assert float(metrics["detection_accuracy"]) == pytest.approx(((z >= 0) == label)[present].mean(), rel=1e-5)
    positive, negative = z[present & (label > 0)], z[present & (label == 0)]
    auc = (positive[:, None] > negative[None]).mean() + 0.5 * (positive[:, None] == negative[None]).mean()
    assert float(metrics["auc"]) == pytest.approx(auc, abs=0.02)  # bins of 1/16


def test_a_calibrated_generator_is_right_as_often_as_its_law_says():
    """P(the sample is x) = q(x), so that the sampled accuracy is the mean probability of the originals."""
    objective, params = built("tied")
    hits = total = 0.0
    p = np.asarray(jax.nn.softmax(np.where(VOCAB.is_special, -np.inf, observed("tied")["logits"])))
    wanted = np.take_along_axis(p, BATCH.tokens[..., None], -1)[..., 0][selected(observed("tied")["example"])]
    snapshot = Snapshot(params, {}, jnp.int32(0))
    example = jax.tree.map(jnp.asarray, observed("tied")["example"])
    stats = fast(lambda key: objective.loss(snapshot, example, row_keys(key, example.row_ids)).stats)
    for seed in range(20):
        given = stats(jax.random.key(seed))
        hits, total = hits + float(given["tokens"] - given["positives"].sum()), total + float(given["tokens"])
    error = np.sqrt((wanted * (1 - wanted)).mean() / total)
    assert hits / total == pytest.approx(wanted.mean(), abs=4 * float(error))
    assert wanted.mean() > 5 * error


def test_fresh_networks_guess():
    objective = CONFIG.build(VOCAB)
    params = jax.jit(objective.init)(jax.random.key(0))
    example = jax.tree.map(jnp.asarray, corrupted())
    losses = jax.jit(objective.loss)(Snapshot(params, {}, jnp.int32(0)), example, KEYS).losses
    means = {term: float(jnp.sum(losses[term] * w) / w.sum()) for term, w in example.weights.items()}
    assert means["generator"] == pytest.approx(np.log(VOCAB.size), rel=0.02)
    assert means["discriminator"] == pytest.approx(np.log(2), rel=0.02)


# ------------------------------------------------------------------------------------------ gradients


@functools.cache
def gradients(embeddings: str) -> dict[int, dict]:
    """Gradients with the discriminator's loss at weight 0 and 50, by one program."""
    objective, params = built(embeddings)
    objective = objective._replace(scale={"generator": 1.0, "discriminator": lambda step: 50.0 * step})
    example, keys = jax.tree.map(jnp.asarray, corrupted()), KEYS

    @fast
    def run(step):
        return batch_gradient(objective, objective.specs, Snapshot(params, {}, step), example, keys, 1).grads

    return {weight: jax.device_get(run(jnp.int32(weight // 50))) for weight in (0, 50)}


@pytest.mark.parametrize("embeddings", SHARING)
def test_the_discriminator_teaches_the_generator_nothing(embeddings):
    without, with_ = gradients(embeddings)[0], gradients(embeddings)[50]
    for name in ("generator", "generator_head"):
        jax.tree.map(np.testing.assert_array_equal, without[name], with_[name])
    assert not any(leaf.any() for leaf in jax.tree.leaves(without["detector"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(with_["detector"]))
    shared = without["trunk"]["embed"].get("tokens", np.zeros(1))
    assert shared.any() == (embeddings == "tied")  # the one table, which both teach


def test_the_difference_learns_what_the_discriminators_own_table_would():
    """Gradient-disentangled, dL/d(delta) = dL/d(E of the discriminator); a fresh pair has one table."""
    objective, params = built("gradient_disentangled")
    example = jax.tree.map(jnp.asarray, corrupted())
    seen = observed("gradient_disentangled")
    head, network = detection_head(ENCODER), transformer(ENCODER, VOCAB.size)

    @fast
    @jax.grad
    def by_hand(trunk: dict):
        told = bidirectional(example.inputs["segment_ids"], example.inputs["positions"]), example.inputs["positions"]
        scores = head.apply(params["detector"], network.apply(trunk, jnp.asarray(seen["read"]), *told), told[1])
        losses = jnp.logaddexp(0, scores) - seen["labels"] * scores
        return 50 * jnp.sum(losses * example.weights["discriminator"]) / example.weights["discriminator"].sum()

    want, got = by_hand(complete(params)[0])["embed"], gradients("gradient_disentangled")[50]["delta"]
    assert set(got) == {"tokens", "positions", "token_types"}
    for name, leaf in got.items():
        np.testing.assert_allclose(leaf, want[name], rtol=1e-3, atol=1e-4 * np.abs(want[name]).max())
    fresh = jax.jit(objective.init)(jax.random.key(0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(fresh["delta"]))
    np.testing.assert_array_equal(complete(fresh)[0]["embed"]["tokens"], fresh["generator"]["embed"]["tokens"])


@pytest.mark.parametrize("embeddings", SHARING)
def test_who_owns_the_embeddings(embeddings):
    _, params = built(embeddings)
    trunk, generator = complete(params)
    names = {"tokens", "positions", "token_types", "norm", "project"}
    assert set(trunk["embed"]) == names
    assert set(generator["embed"]) == (names - {"project"} if embeddings == "none" else names)
    for network, config in ((trunk, ENCODER), (generator, GENERATOR)):
        config = config if embeddings == "none" else dataclasses.replace(config, embed_width=8)
        want = jax.eval_shape(transformer(config, VOCAB.size).init, jax.random.key(0))
        assert jax.tree.map(jnp.shape, network) == jax.tree.map(jnp.shape, want)
    equal = {name for name in names & set(generator["embed"]) if generator["embed"][name] is trunk["embed"][name]}
    assert equal == (names - {"project"} if embeddings == "tied" else set())
    assert ("delta" in params) == (embeddings == "gradient_disentangled")
    # the trunk is that of every other objective
    if embeddings != "gradient_disentangled":
        other = jax.eval_shape(MaskedLM(encoder=ENCODER).build(VOCAB).init, jax.random.key(0))["trunk"]
        assert jax.tree.map(jnp.shape, params["trunk"]) == jax.tree.map(jnp.shape, other)


# ------------------------------------------------------------------------------------- harder negatives


@functools.cache
def draws(sampling: Sampling):
    return jax.jit(lambda step, keys: writer(sampling, VOCAB)(step, READOUT, TABLE, INPUTS, keys, judged))


rng = np.random.default_rng(1)
INPUTS = {name: jnp.asarray(array) for name, array in corrupted(3).inputs.items()}
USED, PLACES = np.asarray(INPUTS["used"]), np.asarray(INPUTS["target_positions"])
ORIGINALS = np.take_along_axis(BATCH.tokens, PLACES, 1)
TABLE = jnp.asarray(rng.standard_normal((VOCAB.size, 8), np.float32))
READOUT = Readout(jnp.asarray(rng.standard_normal((*PLACES.shape, 8), np.float32)), TABLE)
LOGITS = np.where(VOCAB.is_special, -np.inf, np.asarray(logits_of(READOUT)))


def judged(tokens):  # a discriminator that looks at single tokens: the higher, the more replaced
    return ((tokens * 37) % 11).astype(jnp.float32)


def drawn(sampling: Sampling, step: int = 0, keys=KEYS) -> np.ndarray:
    """The samples at the selected tokens, [n]."""
    written = np.asarray(draws(sampling)(jnp.int32(step), keys))
    return np.take_along_axis(written, PLACES, 1)[USED]


def test_a_schedule_takes_the_temperature_to_the_best_guess_under_one_compilation():
    sampling = Sampling(temperature=1.0, final_temperature=0.0, steps=10)
    best = LOGITS.argmax(-1)[USED]
    agree = [(drawn(sampling, step) == best).mean() for step in (0, 5, 10, 99)]
    assert agree[0] < agree[1] < agree[2] == agree[3] == 1
    np.testing.assert_array_equal(drawn(sampling), drawn(Sampling()))
    assert draws(sampling)._cache_size() == 1


def test_top_k_samples_are_among_the_likeliest():
    ranks = (-LOGITS).argsort(-1).argsort(-1)[USED]
    rank = np.take_along_axis(ranks, drawn(Sampling(top_k=3))[:, None], 1)
    assert set(rank.ravel()) == {0, 1, 2}
    plain = np.take_along_axis(ranks, drawn(Sampling())[:, None], 1)
    assert plain.max() > 2


def test_a_disallowed_original_is_never_sampled():
    assert (drawn(Sampling()) == ORIGINALS[USED]).any()
    assert (drawn(Sampling(disallow_correct=True)) != ORIGINALS[USED]).all()


def test_confused_tokens_are_neighbours_of_the_original():
    unit = np.asarray(TABLE) / np.linalg.norm(TABLE, axis=1, keepdims=True)
    cosines = unit[ORIGINALS[USED]] @ unit.T
    cosines[:, VOCAB.is_special] = -np.inf
    np.put_along_axis(cosines, ORIGINALS[USED][:, None], -np.inf, 1)
    nearest = np.sort(cosines.argsort(1)[:, -3:], 1)
    got = drawn(Sampling(confusion=1.0, neighbours=3))
    assert (nearest == got[:, None]).any(1).all()
    later = Sampling(confusion=0.0, final_confusion=0.5, steps=1, neighbours=3)
    np.testing.assert_array_equal(drawn(later), drawn(Sampling()))
    share = (drawn(later, step=1) == got).mean()  # the neighbour where the coin says so
    assert 0.3 < share < 0.7


def test_mined_candidates_are_the_hardest_of_what_was_drawn():
    folded = [jax.vmap(jax.random.fold_in, (0, None))(KEYS, number) for number in range(4)]
    columns = np.stack([drawn(Sampling(), keys=keys) for keys in folded])
    originals, scores = ORIGINALS[USED], np.asarray(judged(columns))
    got = drawn(Sampling(candidates=4))
    wrong = columns != originals
    want = columns[np.where(wrong, scores, np.inf).argmin(0), np.arange(columns.shape[1])]
    np.testing.assert_array_equal(got, np.where(wrong[0], want, originals))
    assert judged(got)[wrong[0]].mean() < scores[0][wrong[0]].mean() - 1


# -------------------------------------------------------------------------------------------- settings


def test_mining_with_the_real_discriminator_sends_no_gradient_to_the_generator():
    config = dataclasses.replace(CONFIG, embeddings="none", sampling=Sampling(candidates=2, confusion=0.2))
    objective, params = config.build(VOCAB), built("none")[1]
    objective = objective._replace(scale={"generator": 0.0, "discriminator": 1.0})
    example = jax.tree.map(jnp.asarray, corrupted())
    grads = fast(
        lambda: batch_gradient(objective, objective.specs, Snapshot(params, {}, jnp.int32(0)), example, KEYS, 1).grads
    )()
    for name, tree in grads.items():
        assert any(leaf.any() for leaf in jax.tree.leaves(tree)) == (name in ("trunk", "detector")), name


def test_evaluation_settings():
    dropped = dataclasses.replace(ENCODER, dropout=0.1)
    config = dataclasses.replace(CONFIG, encoder=dropped, sampling=Sampling(temperature=0.5, candidates=3), rate=0.25)
    assert config.for_evaluation() == dataclasses.replace(CONFIG, rate=0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.5}, "rate"),
        ({"mask": -0.1}, "mask"),
        ({"generator": dataclasses.replace(GENERATOR, tie_embeddings=False)}, "tie_embeddings"),
        ({"generator": dataclasses.replace(GENERATOR, max_length=32)}, "one max_length"),
        ({"generator": dataclasses.replace(GENERATOR, token_types=0)}, "one token_types"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes).build(VOCAB)


@pytest.mark.parametrize(
    "changes",
    [{"temperature": -1.0}, {"top_k": -1}, {"candidates": 0}, {"confusion": 2.0}, {"final_temperature": 0.5}],
)
def test_samplings_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match="sampling"):
        Sampling(**changes)


@pytest.mark.parametrize("token", ["mask", "cls", "sep"])
def test_a_tokenizer_without_the_special_token_is_refused(token):
    with pytest.raises(ValueError, match=rf"replaced_token_detection needs a \[{token.upper()}\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, **{token: None}))


def test_deberta_v3_reads_the_first_token_of_each_document():
    head = detection_head(ENCODER, with_first=True)
    params = head.init(jax.random.key(0))
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    hidden = jnp.asarray(rng.standard_normal((1, 6, 16), np.float32))
    before = head.apply(params, hidden, positions)
    changed = head.apply(params, hidden.at[0, 3].add(1), positions) != before
    assert changed.tolist() == [[False, False, False, True, True, False]]


def test_selection_is_published():
    assert CONFIG.selection == FixedCount("nearest", minimum=1, count_special=True)
    assert (CONFIG.mask, CONFIG.scale, CONFIG.rate) == (0.85, 50.0, 0.15)
