"""SimCSE: two passes that differ by dropout alone, who is a negative, what stands where, the published MLP; hard
negatives, ConSERT's views, masked LM beside it; what order, microbatches and memory make of a batch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.corruption.rows import row_keys
from jaxpt.corruption.views import Perturbation
from jaxpt.losses.contrastive import normalize
from jaxpt.losses.cross_entropy import logits_of
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import mlm_head, pool
from jaxpt.models.patterns import bidirectional
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives import simcse
from jaxpt.objectives.masked_lm import MaskedLM
from jaxpt.objectives.simcse import SimCSE
from jaxpt.objectives.text_vectors import Texts, enclose, text_encoder, vector_metrics
from jaxpt.step import batch_gradient, make_eval_step, make_example
from jaxpt.types import Batch, Example, Snapshot

VOCAB = tiny_vocab()
ENCODER = TransformerConfig(depth=1, width=16, heads=2, positions="rotary", dropout=0.1, layers="unroll")
BLIND = dataclasses.replace(ENCODER, dropout=0.0, positions="none")
CONFIG = SimCSE(encoder=ENCODER)
BATCH = packed_batch(CONFIG.build(VOCAB).rows, VOCAB, length=16)


@functools.cache
def passes(config: SimCSE):
    """(params, batch, key) -> (example, vectors [R, 2, E], losses [R], stats and losses of rows)."""
    objective = config.build(VOCAB)

    @jax.jit
    def run(params: dict, batch: Batch, key: jax.Array):
        snapshot = Snapshot(params, {}, jnp.int32(0))
        example = make_example(objective, snapshot, batch, key)
        keys = row_keys(key, example.row_ids)
        out = objective.loss(snapshot, example, keys)
        losses, stats = objective.couple(snapshot, out.features, example)
        return example, out.features["vectors"], losses["contrastive"], stats | out.stats | out.losses

    return run


@functools.cache
def params(depth: int = 1) -> dict:
    deep = dataclasses.replace(CONFIG, masked=MaskedLM(), encoder=dataclasses.replace(ENCODER, depth=depth))
    made = jax.jit(deep.build(VOCAB).init)(jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, made)  # so that texts differ


def run(config: SimCSE = CONFIG, batch: Batch = BATCH, seed: int = 0):
    read = {name: params(config.encoder.depth)[name] for name in config.build(VOCAB).specs}
    return jax.device_get(passes(config)(read, batch, jax.random.key(seed)))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_text_stands_between_cls_and_sep():
    """A piece of a long document has both, too, and the longest text fits."""
    tokens = jnp.array([[7, 8, 9], [7, 8, 0], [0, 0, 0]])
    got, segment_ids = enclose(Texts(tokens, jnp.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]])), 4, 5, 0)
    assert got.tolist() == [[4, 7, 8, 9, 5], [4, 7, 8, 5, 0], [0, 0, 0, 0, 0]]
    assert segment_ids.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    example = run()[0]
    assert example.inputs["tokens"].shape == (8, 1, 16)


def test_the_views_differ_by_dropout_alone():
    """Another mask for each view and each key, the same one for the same key; none where there is no dropout."""
    vectors = run()[1]
    assert (np.abs(vectors[:, 0] - vectors[:, 1]).max(-1) > 1e-3).all()
    np.testing.assert_array_equal(run()[1], vectors)
    assert (np.abs(run(seed=1)[1] - vectors).max(-1) > 1e-3).all()
    # the row's key alone says which: the same text in other rows has other masks
    same = BATCH._replace(tokens=np.repeat(BATCH.tokens[:1], 8, 0), segment_ids=np.repeat(BATCH.segment_ids[:1], 8, 0))
    of_copies = run(batch=same)[1].reshape(16, -1)
    apart = np.abs(of_copies[:, None] - of_copies).max(-1) + np.eye(16)
    assert (apart > 1e-3).all()
    quiet = run(CONFIG.for_evaluation())[1]
    np.testing.assert_array_equal(quiet[:, 0], quiet[:, 1])


def test_the_loss_is_a_cross_entropy_over_the_batch():
    _, vectors, losses, stats = run()
    first, second = unit(vectors[:, 0]), unit(vectors[:, 1])
    want = optax.softmax_cross_entropy_with_integer_labels(20 * first @ second.T, np.arange(8))
    np.testing.assert_allclose(losses, want, rtol=1e-3, atol=1e-4)
    assert stats["pairs_apart"] == pytest.approx(np.square(first - second).sum(), rel=1e-3)
    metrics = vector_metrics(stats)
    others = (first @ first.T)[~np.eye(8, dtype=bool)]
    assert metrics["cosine_of_others"] == pytest.approx(others.mean(), rel=1e-3)
    assert metrics["uniformity"] == pytest.approx(np.log(np.exp(4 * others - 4).mean()), rel=1e-3)
    spectrum = np.linalg.eigvalsh(np.cov(first.T, bias=True))
    assert metrics["effective_rank"] == pytest.approx(spectrum.sum() ** 2 / np.square(spectrum).sum(), rel=1e-3)
    assert metrics["spread"] == pytest.approx(spectrum.sum(), rel=1e-3)


def test_equal_texts_and_empty_rows_are_nobodys_negatives():
    """Rows 0 and 3 are copies and row 5 is empty: row 1 has five negatives left, row 0 four."""
    tokens, segment_ids = BATCH.tokens.copy(), BATCH.segment_ids.copy()
    tokens[3], segment_ids[3] = tokens[0], segment_ids[0]
    segment_ids[5] = 0
    example, vectors, losses, stats = run(batch=BATCH._replace(tokens=tokens, segment_ids=segment_ids))
    first, second = (np.asarray(normalize(vectors[:, v])) for v in range(2))
    logits = 20 * first @ second.T
    for row, negatives in ((1, (0, 2, 3, 4, 6, 7)), (0, (1, 2, 4, 6, 7)), (3, (1, 2, 4, 6, 7))):
        want = np.log(np.exp(logits[row, [row, *negatives]]).sum()) - logits[row, row]
        assert losses[row] == pytest.approx(want, rel=1e-3, abs=1e-5)
    assert example.weights["contrastive"].tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert stats["vectors"] == 7


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_vectors_are_pooled_states(pooling):
    """In evaluation those of the Transformer itself; in training behind dense and tanh, which learn."""
    config = dataclasses.replace(CONFIG, pooling=pooling)
    judge = config.for_evaluation()
    assert judge.mlp == "none" and dataclasses.replace(config, mlp="always").for_evaluation().mlp == "always"
    example, vectors, *_ = run(judge)
    inputs = example.inputs
    text = Texts(*(inputs[name][:, 0] for name in Texts._fields))
    told = text.segment_ids, text.positions
    quiet = dataclasses.replace(ENCODER, dropout=0.0)
    apply = jax.jit(transformer(quiet, VOCAB.size).apply)
    hidden = apply(params()["trunk"], text.tokens, bidirectional(*told), told[1])
    size = told[0].sum(1)
    for row in range(8):
        text = np.asarray(hidden)[row, : size[row]]
        want = {"first": text[0], "mean": text.mean(0), "last": text[-1]}[pooling]
        np.testing.assert_allclose(vectors[row, 0], want, rtol=1e-4, atol=1e-5)
    if pooling == "first":
        assert "mlp" in config.build(VOCAB).specs
        assert "mlp" not in judge.build(VOCAB).specs


def test_the_mean_of_no_text_is_nothing():
    assert (pool("mean", jnp.ones((1, 3, 2)), jnp.zeros((1, 3), jnp.int32)) == 0).all()


def test_untrained_vectors_cost_the_log_of_the_batch():
    """Of a network whose vectors are all the same: ln 8, and others as near as oneself."""
    same = jax.tree.map(jnp.zeros_like, {name: params()[name] for name in ("trunk", "mlp")})
    same["mlp"]["transform"]["bias"] += 1.0
    losses, stats = jax.device_get(passes(CONFIG)(same, BATCH, jax.random.key(0)))[2:]
    np.testing.assert_allclose(losses, np.log(8), rtol=1e-5)
    metrics = vector_metrics(stats)
    assert metrics["cosine_of_others"] == pytest.approx(1, rel=1e-5)
    assert metrics["uniformity"] == pytest.approx(0, abs=1e-4) and metrics["spread"] < 1e-5


def test_evaluation_reads_the_parameters_of_training():
    step = jax.jit(make_eval_step(CONFIG.for_evaluation().build(VOCAB), seed=0))
    sums = step(params(), {}, jnp.int32(0), BATCH)
    assert sums.stats["pairs_apart"] == pytest.approx(0, abs=1e-4) and sums.stats["pairs_found"] == 8


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        dataclasses.replace(CONFIG, temperature=0.0).build(VOCAB)
    for changes, message in (
        ({"texts": 3, "form": "symmetric"}, 'form="one_way"'),
        ({"texts": 2, "views": (Perturbation(), Perturbation(shuffle=True))}, "set texts=1"),
        ({"texts": 0}, "at least 1 text"),
        ({"pooling": "mean_last_two"}, "depth of at least 2"),
        ({"pooling": "mean_last_two", "encoder": dataclasses.replace(ENCODER, depth=2)}, 'norm_placement="post"'),
        ({"texts": 2, "hard_bias": 0.7}, "set texts=3"),
        ({"encoder": BLIND, "views": (Perturbation(), Perturbation(shuffle=True))}, "set shuffle=False"),
        ({"masked": MaskedLM(z_loss=1e-4)}, "masked does without"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes).build(VOCAB)
    with pytest.raises(ValueError, match="raise batch_size"):
        run(batch=jax.tree.map(lambda leaf: leaf[:1], BATCH))
    with pytest.raises(ValueError, match=r"needs a \[CLS\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, cls=None))


# ------------------------------------------------------------------------------------- examples of several texts

STILL = dataclasses.replace(ENCODER, dropout=0.0)
TRIPLES = SimCSE(encoder=STILL, texts=3, mlp="always", hard_bias=0.7, masked=MaskedLM())
ROWS = packed_batch(TRIPLES.build(VOCAB).rows, VOCAB, length=16)


def test_hard_negatives_are_columns_for_all():
    """-log of e^cos(a_i, p_i) in the sum over all positives and all hard negatives, one's own with the bias."""
    example, vectors, losses, stats = run(TRIPLES, ROWS)
    inputs = example.inputs
    present = inputs["segment_ids"][..., 0]
    assert present[:, :2].all() and 0 < present[:, 2].sum() < 8, "some examples lack a hard negative"
    for row in range(8):  # [CLS] text [SEP], each in a row of its own
        for text in range(3):
            told = ROWS.tokens[row][(ROWS.segment_ids[row] == 1) & (ROWS.sentence_ids[row] == text)]
            read = inputs["tokens"][row, text][inputs["segment_ids"][row, text] == 1]
            assert read.tolist() == ([VOCAB.cls, *told, VOCAB.sep] if len(told) else [])
    first, second, hard = (unit(vectors[:, text]) for text in range(3))
    logits = 20 * first @ np.concatenate([second, hard[present[:, 2] == 1]]).T
    logits[:, 8:] += 0.7 * (np.flatnonzero(present[:, 2]) == np.arange(8)[:, None])
    want = optax.softmax_cross_entropy_with_integer_labels(logits, np.arange(8))
    np.testing.assert_allclose(losses, want, rtol=1e-3, atol=1e-4)
    assert stats["pairs"] == 8 and stats["texts"] == 16 + present[:, 2].sum() and stats["texts_cut"] == 0
    judge = TRIPLES.for_evaluation()
    assert judge.mlp == "always" and "mlp" in judge.build(VOCAB).specs


def test_long_texts_are_cut_and_half_examples_left_out():
    """Rows of 16 have room for 14 tokens of each text; row 1 lacks its positive, and is nobody's negative."""
    objective = dataclasses.replace(CONFIG, texts=2).build(VOCAB)
    assert objective.rows.tokens(16) == 28 and objective.rows.texts == 2
    sizes, place, snapshot = np.array([(20, 5), (6, 0), (14, 14)]), np.arange(28), Snapshot(params(), {}, jnp.int32(0))
    batch = jax.tree.map(lambda leaf: leaf[:3, :28] if leaf.ndim == 2 else leaf[:3], ROWS)._replace(
        tokens=np.tile(10 + place, (3, 1)).astype(np.int32),
        segment_ids=(place < sizes.sum(1, keepdims=True)).astype(np.int32),
        sentence_ids=(place >= sizes[:, :1]).astype(np.int32),
    )
    batch.tokens[:] += np.arange(3)[:, None]  # so that no text is another's
    example = jax.jit(functools.partial(make_example, objective))(snapshot, batch, jax.random.key(0))
    assert example.inputs["cut"].tolist() == [1, 0, 0]
    assert example.inputs["segment_ids"].sum(-1).tolist() == [[16, 7], [8, 0], [16, 16]]
    assert example.weights["contrastive"].tolist() == [1, 0, 1]
    vectors = run()[1][:3]
    losses, stats = jax.jit(objective.couple)(snapshot, {"vectors": vectors}, example)
    first, second = (unit(vectors[[0, 2], view]) for view in range(2))
    want = optax.softmax_cross_entropy_with_integer_labels(20 * first @ second.T, np.arange(2))
    np.testing.assert_allclose(losses["contrastive"][np.array([0, 2])], want, rtol=1e-3, atol=1e-5)
    assert stats["texts_cut"] == 1 and stats["texts"] == 4


def test_masked_lm_reads_the_same_texts_once_more():
    """Every text of an example has hidden tokens of its own, and they are predicted from a third pass."""
    example, _, _, stats = run(TRIPLES, ROWS)
    inputs, weights = example.inputs, example.weights["mlm"]
    shape = inputs["tokens"].shape
    targets, places = inputs["targets"], inputs["target_positions"]
    assert weights.shape == targets.shape == places.shape == (8, 3, weights.shape[-1])
    np.testing.assert_array_equal(targets, np.take_along_axis(inputs["tokens"], places, axis=-1))
    asked = np.zeros(shape)
    np.put_along_axis(asked, places, weights, axis=-1)
    assert (asked >= (inputs["masked_tokens"] != inputs["tokens"])).all()
    assert not asked[VOCAB.is_special[inputs["tokens"]]].any()
    assert 0.1 < weights.sum() / (~VOCAB.is_special[inputs["tokens"]]).sum() < 0.2

    @jax.jit
    def predict(params, texts):
        pattern = bidirectional(texts.segment_ids, texts.positions)
        hidden = transformer(STILL, VOCAB.size).apply(params["trunk"], texts.tokens, pattern, texts.positions)
        return logits_of(mlm_head(STILL, VOCAB.size).apply(params["head"], hidden, embedding_table(params["trunk"])))

    texts = Texts(inputs["masked_tokens"].reshape(24, -1), inputs["segment_ids"].reshape(24, -1))
    logits = predict(params(), texts)
    want = optax.softmax_cross_entropy_with_integer_labels(logits, inputs["tokens"].reshape(24, -1)).reshape(shape)
    want = np.take_along_axis(np.asarray(want), places, axis=-1)
    np.testing.assert_allclose(stats["mlm"][weights > 0], want[weights > 0], rtol=1e-4)
    assert stats["tokens"] == weights.sum()
    assert TRIPLES.build(VOCAB).scale == {"contrastive": 1.0, "mlm": 0.1}


@functools.cache
def gradient_of_an_example(microbatches: int):
    """example -> (losses, gradient, a metric), with dropout, of a compiled function."""
    objective = dataclasses.replace(TRIPLES, encoder=ENCODER, masked=None).build(VOCAB)
    snapshot = Snapshot({name: params()[name] for name in ("trunk", "mlp")}, {}, jnp.int32(0))

    @jax.jit
    def gradient(example: Example):
        told = {name: {"contrastive": getattr(example, name)["contrastive"]} for name in ("weights", "counts")}
        example = example._replace(**told)
        keys = row_keys(jax.random.key(1), example.row_ids)
        made = batch_gradient(objective, objective.specs, snapshot, example, keys, microbatches)
        return made.losses["contrastive"], made.grads, made.stats["pairs_apart"]

    return gradient


def check_same(got: tuple, want: tuple) -> None:
    got, want = jax.device_get((got, want))
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    scale = float(optax.tree.norm(want[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), got[1], want[1])
    assert got[2] == pytest.approx(want[2], rel=1e-4)


def test_the_order_of_the_batch_is_nothing():
    order, example = np.array([3, 1, 0, 2, 7, 6, 5, 4]), run(TRIPLES, ROWS)[0]
    shuffled = jax.tree.map(lambda leaf: leaf[order], example)
    check_same(gradient_of_an_example(1)(shuffled), gradient_of_an_example(1)(example))


@pytest.mark.parametrize("number", [8, *(pytest.param(few, marks=pytest.mark.slow) for few in (2, 4))])
def test_microbatches_are_one_batch(number):
    """Loss and gradient, with dropout, of one row at a time."""
    example = run(TRIPLES, ROWS)[0]
    check_same(gradient_of_an_example(number)(example), gradient_of_an_example(1)(example))


def test_memory_is_that_of_one_chunk():
    """Eight times the batch, in eight microbatches, takes no more than 1.3 times the memory."""

    def temporary(rows: int, microbatches: int) -> int:
        wide = dataclasses.replace(ENCODER, width=64)
        objective = dataclasses.replace(CONFIG, encoder=wide).build(VOCAB)
        shapes = jax.eval_shape(objective.init, jax.random.key(0))

        def gradient(params: dict, batch: Batch):
            snapshot = Snapshot(params, {}, jnp.int32(0))
            example = make_example(objective, snapshot, batch, jax.random.key(0))
            keys = row_keys(jax.random.key(1), example.row_ids)
            return batch_gradient(objective, objective.specs, snapshot, example, keys, microbatches).grads

        batch = packed_batch(objective.rows, VOCAB, length=128, size=rows)
        return jax.jit(gradient).lower(shapes, batch).compile().memory_analysis().temp_size_in_bytes

    chunk = temporary(8, 1)
    assert chunk > 2**23, "activations outweigh the 200 KiB of parameters"
    assert temporary(64, 8) < 1.3 * chunk


# ------------------------------------------------------------------------------------------------ ConSERT's views

VIEWS = (Perturbation(features=0.2), Perturbation(shuffle=True))
CALM = dataclasses.replace(ENCODER, dropout=0.0, depth=2, norm_placement="post")
CONSERT = SimCSE(encoder=CALM, views=VIEWS, pooling="mean_last_two", mlp="none", form="nt_xent", scale=0.3)


def test_views_are_of_embeddings():
    """The first loses floor(0.2 * 16) columns, the second has its positions mixed; both are other in the next step."""
    example, vectors, losses, *_ = run(CONSERT)
    positions, mask = (example.inputs[name] for name in ("positions", "embedding_mask"))
    assert mask.shape == (8, 2, 1, 16) and (mask.sum((2, 3)) == [13, 16]).all()
    size = example.inputs["segment_ids"][:, 0].sum(-1)
    assert (positions[:, 0] == np.arange(16)).all()
    for row in range(8):
        assert sorted(positions[row, 1, : size[row]]) == list(range(size[row]))
        assert (positions[row, 1, size[row] :] == np.arange(size[row], 16)).all()
    assert (positions[:, 1] != np.arange(16)).any(1).sum() >= 7
    again = run(CONSERT, seed=1)[0].inputs
    assert (again["embedding_mask"] != mask).any() and (again["positions"] != positions).any()
    both = unit(np.concatenate([vectors[:, 0], vectors[:, 1]]))
    want = optax.losses.ntxent(both, np.tile(np.arange(8), 2), temperature=0.05)
    assert losses.mean() == pytest.approx(float(want), rel=1e-3)
    assert CONSERT.build(VOCAB).scale == {"contrastive": 0.3}
    assert CONSERT.for_evaluation().views == (Perturbation(), Perturbation())


def test_what_the_views_do():
    """Taken columns are those of the table; with mixed positions a text reads as with mixed tokens."""
    example, vectors, *_ = run(CONSERT)
    text = Texts(*(example.inputs[name][:, 0] for name in Texts._fields))
    trunk, network = params(2)["trunk"], transformer(CALM, VOCAB.size)

    @jax.jit
    def mean_of_two(trunk, tokens):
        pattern = bidirectional(text.segment_ids, text.positions)
        hidden, layers = network.apply(trunk, tokens, pattern, text.positions, return_layers=True)
        return (pool("mean", hidden, text.segment_ids) + pool("mean", layers[0], text.segment_ids)) / 2

    plain = mean_of_two(trunk, text.tokens)
    for row in (0, 5):
        kept = example.inputs["embedding_mask"][row, 0, 0]
        narrow = mean_of_two(trunk | {"embed": {"tokens": trunk["embed"]["tokens"] * kept}}, text.tokens)
        np.testing.assert_allclose(vectors[row, 0], narrow[row], rtol=1e-4, atol=1e-5)
    mixed = np.zeros_like(text.tokens)
    np.put_along_axis(mixed, example.inputs["positions"][:, 1], text.tokens, axis=1)
    np.testing.assert_allclose(vectors[:, 1], mean_of_two(trunk, mixed), rtol=1e-4, atol=1e-5)
    assert min(np.abs(plain - vectors[:, view]).max() for view in range(2)) > 1e-2


def test_a_network_without_positions_does_not_notice_their_order():
    encoder = text_encoder(BLIND, VOCAB, "mean", mlp=False)
    example = run(CONSERT)[0]
    text = Texts(*(example.inputs[name][:, 0] for name in Texts._fields))
    apply = jax.jit(lambda positions: encoder(params(), text, positions=positions))
    vectors = [apply(example.inputs["positions"][:, view]) for view in range(2)]
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=1e-5, atol=1e-6)


def test_the_key_of_the_masking_is_no_rows_key(monkeypatch):
    """What is drawn for the views of row 1 has nothing to do with what is masked."""
    keys = {}

    def keep_rows(key: jax.Array, row_ids: jax.Array) -> jax.Array:
        keys["rows"] = row_keys(key, row_ids)
        return keys["rows"]

    def keep_mask(config, vocab, texts, row_ids, key: jax.Array, step):
        keys["mask"] = key
        raise InterruptedError

    monkeypatch.setattr(simcse, "row_keys", keep_rows)
    monkeypatch.setattr(simcse, "mask_texts", keep_mask)
    objective = dataclasses.replace(CONFIG, masked=MaskedLM()).build(VOCAB)
    key = jax.random.key(0)
    with pytest.raises(InterruptedError):
        objective.corrupt(Snapshot({}, {}, jnp.int32(0)), jax.tree.map(jnp.asarray, BATCH), key)
    rows, mask, given = (np.asarray(jax.random.key_data(made)) for made in (keys["rows"], keys["mask"], key))
    assert not (rows == mask).all(-1).any() and (mask != given).any()
