"""Contrastive losses: golden values, closed forms, optax; duplicates and fillers; blocks; devices; memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.losses import contrastive
from jaxpt.losses.contrastive import Contrast, in_batch, info_nce, normalize, sigmoid_pairs
from jaxpt.sharding import MeshConfig, constrain_rows, make_mesh

FORMS = ("one_way", "symmetric", "nt_xent")
FIRST = np.array([(1, 0), (0, 1), (0.6, 0.8)], np.float32)
SECOND = np.array([(0.8, 0.6), (-0.6, 0.8), (0, 1)], np.float32)
RNG = np.random.default_rng(0)
A, B, HARD = (RNG.normal(size=shape).astype(np.float32) for shape in ((7, 5), (7, 5), (7, 2, 5)))

compiled = jax.jit(
    in_batch, static_argnums=2, static_argnames=("scale", "similarity", "hard_bias", "blocks")
)  # one compilation for each form and shape
pairwise = jax.jit(sigmoid_pairs, static_argnames=("blocks",))


def unit(x: np.ndarray) -> np.ndarray:
    x = np.float64(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "temperature, one_way, backward, symmetric, nt_xent",
    [
        (1.0, 0.886089, 0.896249, 0.891169, 1.375590),
        (0.5, 0.796341, 0.817279, 0.806810, 1.252459),
        (0.05, 2.419478, 2.419617, 2.419547, 2.550727),
    ],
)
def test_golden_values(temperature, one_way, backward, symmetric, nt_xent):
    found = [compiled(FIRST, SECOND, form, scale=1 / temperature).loss.mean() for form in FORMS]
    np.testing.assert_allclose(found, [one_way, symmetric, nt_xent], atol=2e-6)
    np.testing.assert_allclose(
        compiled(SECOND, FIRST, "one_way", scale=1 / temperature).loss.mean(), backward, atol=2e-6
    )


def test_siglip_golden_values():
    assert pairwise(FIRST, SECOND, scale=1.0, bias=0.0).loss.mean() == pytest.approx(2.240593, abs=2e-6)
    assert pairwise(FIRST, SECOND).loss.mean() == pytest.approx(2.535296, abs=2e-6)
    same = jnp.ones((64, 4))
    assert pairwise(same, same).loss.mean() == pytest.approx(44.361420, rel=1e-6)  # 64 ln 2
    assert pairwise(jnp.eye(64), jnp.eye(64)).loss.mean() == pytest.approx(0.696007, rel=1e-5)
    nothing = pairwise(jnp.eye(128)[:64], jnp.eye(128)[64:])
    assert nothing.loss.mean() == pytest.approx(10.002906, rel=1e-6)


@pytest.mark.parametrize(
    "count, scale, want", [(64, 20.0, 1.2985e-7), (64, 1 / 0.07, 3.9366e-5), (512, 20.0, 1.0532e-6)]
)
def test_perfect_pairs_keep_their_digits(count, scale, want):
    """ln(1 + (N - 1) e^-s), where the difference of two logits of size s would be rounding."""
    made = compiled(jnp.eye(count), jnp.eye(count), "one_way", scale=scale)
    np.testing.assert_allclose(made.loss, want, rtol=1e-4)
    assert made.correct.all()


@pytest.mark.parametrize("form, candidates", [("one_way", 7), ("symmetric", 7), ("nt_xent", 13)])
def test_collapsed_vectors_cost_the_log_of_the_candidates(form, candidates):
    made = compiled(jnp.ones((7, 4)), 2 * jnp.ones((7, 4)), form)
    np.testing.assert_allclose(made.loss, np.log(candidates), rtol=1e-6)
    np.testing.assert_array_equal(made.correct, 0.5)  # none is told from the others


def test_every_form_is_a_cross_entropy():
    a, b = unit(A), unit(B)
    index = np.arange(7)
    np.testing.assert_allclose(compiled(A, B).loss, rows_of(20 * a @ b.T, index), rtol=1e-4, atol=1e-5)
    back = rows_of(20 * b @ a.T, index)
    want = (rows_of(20 * a @ b.T, index) + back) / 2
    np.testing.assert_allclose(compiled(A, B, "symmetric").loss, want, rtol=1e-4, atol=1e-5)
    dots = compiled(A, B, scale=1.0, similarity="dot")
    np.testing.assert_allclose(dots.loss, rows_of(np.float64(A) @ np.float64(B).T, index), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(dots.correct, (A @ B.T).argmax(1) == index)
    both = np.concatenate([a, b])
    want = optax.losses.ntxent(both.astype(np.float32), np.tile(index, 2), temperature=0.05)
    np.testing.assert_allclose(compiled(A, B, "nt_xent").loss.mean(), want, rtol=1e-5)


def test_siglip_is_a_binary_cross_entropy_of_every_combination():
    logits = 5 * unit(A) @ unit(B).T - 2
    want = optax.sigmoid_binary_cross_entropy(logits.astype(np.float32), np.eye(7)).sum(1)
    np.testing.assert_allclose(pairwise(A, B, scale=5.0, bias=-2.0).loss, want, rtol=1e-5)


def test_hard_negatives():
    """All anchors have them; the bias is on one's own, and ln 2 counts them twice."""
    hard, index = unit(HARD), np.arange(7)
    logits = 20 * unit(A) @ np.concatenate([unit(B), hard.reshape(14, 5)]).T
    own = np.arange(14) // 2 == index[:, None]
    found = compiled(A, B, hard_RKE=HARD)
    np.testing.assert_allclose(found.loss, rows_of(logits, index), rtol=1e-4, atol=1e-5)
    biased = compiled(A, B, hard_RKE=HARD, hard_bias=float(np.log(2)))
    twice = np.concatenate([logits, np.where(own, logits[:, 7:], -1e9)], 1)
    np.testing.assert_allclose(biased.loss, rows_of(twice, index), rtol=1e-4, atol=1e-5)
    assert (biased.loss > found.loss + 1e-6).any()
    nobody = compiled(A, B, hard_RKE=HARD, valid_R=np.zeros(7))
    np.testing.assert_array_equal(nobody.loss, np.zeros(7))  # no negative is left


def test_few_bits_are_made_many():
    half = (x.astype(jnp.bfloat16) for x in (A, B))
    made = in_batch(*half)
    exact = in_batch(*(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32) for x in (A, B)))
    assert made.loss.dtype == jnp.float32
    np.testing.assert_array_equal(made.loss, exact.loss)


# ---------------------------------------------------------------------------------- who is a negative


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.sampled_from(FORMS), st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_the_order_of_the_batch_is_nothing(order, form, texts):
    order, texts = np.array(order), np.array(texts, np.int32)
    straight = compiled(A, B, form, texts_R=texts)
    shuffled = compiled(A[order], B[order], form, texts_R=texts[order])
    np.testing.assert_allclose(shuffled.loss, straight.loss[order], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(shuffled.correct, straight.correct[order])


@pytest.mark.parametrize("form", FORMS)
def test_copies_of_a_text_are_no_negatives_of_each_other(form):
    """Rows 0 and 3 share a text: each is as it would be in a batch without the other."""
    texts = np.array([0, 1, 2, 0, 4, 5, 6], np.int32)
    found = compiled(A, B, form, texts_R=texts)
    for row, other in ((0, 3), (3, 0)):
        without = np.delete(np.arange(7), other)
        alone = compiled(A[without], B[without], form)
        np.testing.assert_allclose(found.loss[row], alone.loss[without == row][0], rtol=1e-5)
        assert abs(found.loss[row] - compiled(A, B, form).loss[row]) > 1e-6
    pairs = pairwise(A, B, texts_R=texts).loss[0]
    assert pairs == pytest.approx(float(pairwise(np.delete(A, 3, 0), np.delete(B, 3, 0)).loss[0]), rel=1e-5)


def losses_among(row, candidates):
    """InfoNCE of anchor ``row`` whose own partner comes first."""
    logits = 20 * unit(np.stack(candidates)) @ unit(A[row])
    return np.log(np.exp(logits).sum()) - logits[0]


def test_absent_hard_negatives_and_those_that_are_no_negatives():
    """Row 2 has one hard negative, row 3 none; row 0's first one is row 1's positive, and row 5's second its anchor."""
    present = np.ones((7, 2), np.float32)
    present[2, 1], present[3] = 0, 0
    texts, hard_texts = np.arange(14).reshape(7, 2), 100 + np.arange(14).reshape(7, 2)
    hard_texts[0, 0], hard_texts[5, 1] = texts[1, 1], texts[5, 0]
    told = {"hard_RKE": HARD, "hard_valid_RK": present, "hard_texts_RK": hard_texts, "texts_R": texts}
    made = compiled(A, B, **told)
    for row in range(7):
        others = [B[other] for other in range(7) if other != row]
        hard = [HARD[i, k] for i, k in np.argwhere(present > 0) if (row, i, k) not in ((1, 0, 0), (5, 5, 1))]
        assert made.loss[row] == pytest.approx(losses_among(row, [B[row], *others, *hard]), rel=1e-4)
    without = compiled(A, B, hard_RKE=HARD, hard_valid_RK=np.zeros((7, 2)), hard_bias=3.0)
    np.testing.assert_allclose(without.loss, compiled(A, B).loss, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_pairs_that_share_a_text_are_no_negatives(form):
    """Of a row's anchor or its positive: the same query twice, the same answer twice, an answer that is a query."""
    texts = np.arange(14).reshape(7, 2)
    for row, other, mine, its in ((0, 3, 0, 0), (1, 4, 1, 1), (2, 6, 0, 1)):
        shared = texts.copy()
        shared[other, its] = texts[row, mine]
        found = compiled(A, B, form, texts_R=shared)
        for one, another in ((row, other), (other, row)):
            without = np.delete(np.arange(7), another)
            alone = compiled(A[without], B[without], form)
            np.testing.assert_allclose(found.loss[one], alone.loss[without == one][0], rtol=1e-5)
        rest = np.setdiff1d(np.arange(7), (row, other))
        np.testing.assert_allclose(found.loss[rest], compiled(A, B, form).loss[rest], rtol=1e-5)


def weighed(function, valid):
    return lambda a, b: jnp.vdot(valid, function(a, b, valid_R=valid).loss)


@pytest.mark.parametrize("function", [*(functools.partial(in_batch, form=form) for form in FORMS), sigmoid_pairs])
def test_filler_rows_are_nobodys_negative(function):
    """The first five rows learn what they would alone; rows of zeros get gradients that are 0 and finite."""
    valid = np.array([1, 1, 1, 1, 1, 0, 0], np.float32)
    a, b = A * valid[:, None], B * valid[:, None]
    value, grads = jax.jit(jax.value_and_grad(weighed(function, valid), argnums=(0, 1)))(a, b)
    few = jax.value_and_grad(lambda a, b: function(a, b).loss.sum(), argnums=(0, 1))
    alone, want = jax.jit(few)(A[:5], B[:5])
    assert value == pytest.approx(float(alone), rel=1e-5)
    for grad, part in zip(grads, want, strict=True):
        np.testing.assert_allclose(grad[:5], part, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(grad[5:], np.zeros((2, 5)))


def test_vectors_of_zeros_have_finite_gradients():
    zeros = jnp.zeros((3, 4))
    np.testing.assert_array_equal(normalize(zeros), zeros)
    for function in (in_batch, sigmoid_pairs):
        pull = jax.jit(jax.grad(lambda a, b: function(a, b).loss.sum(), argnums=(0, 1)))  # noqa: B023
        grads = pull(zeros, zeros.at[0].set(1.0))
        assert all(np.isfinite(grad).all() for grad in grads)
    alone, grad = jax.jit(jax.value_and_grad(lambda a: in_batch(a, a).loss.sum()))(jnp.ones((1, 4)))
    assert alone == 0 and (grad == 0).all()


# ------------------------------------------------------------------------------------- blocks, devices


@pytest.mark.parametrize("form", ["nt_xent", "hard", "siglip"])
def test_blocks_change_neither_values_nor_gradients(form):
    """Of 14, 21 and 7 candidates in 4 blocks, some of which have to be filled up."""
    texts, valid = np.array([0, 1, 2, 0, 4, 5, 6], np.int32), np.array([1, 1, 1, 1, 1, 1, 0], np.float32)
    function = {
        "nt_xent": functools.partial(in_batch, form="nt_xent"),
        "hard": functools.partial(in_batch, hard_RKE=jnp.asarray(HARD), hard_bias=0.5),
        "siglip": sigmoid_pairs,
    }[form]

    def total(a, b, scale, blocks):
        made: Contrast = function(a, b, scale=scale, texts_R=texts, valid_R=valid, blocks=blocks)
        return jnp.vdot(valid * (1 + jnp.arange(7)), made.loss), made

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    (_, made), grads = run(A, B, 20.0, 4)
    (_, want), whole = run(A, B, 20.0, 1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), (made, grads), (want, whole))
    assert all(np.abs(grad).max() > 1e-3 for grad in whole)


def gradient_of(form, pairs):
    def total(a, b):
        a, b = constrain_rows((a, b))
        return in_batch(a, b, form).loss.mean()

    shape = jax.ShapeDtypeStruct((pairs, 64), jnp.float32)
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(shape, shape).compile()


def test_the_batch_is_one_batch_on_eight_devices():
    """Other devices' rows are negatives, too, with their gradients: nothing is scaled by the number of devices."""
    a, b = RNG.normal(size=(2, 64, 64)).astype(np.float32)
    want, gradient = jax.jit(jax.value_and_grad(lambda a, b: in_batch(a, b, "symmetric").loss.mean(), argnums=(0, 1)))(
        a, b
    )
    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=2))):
        value, got = jax.device_get(gradient_of("symmetric", 64)(a, b))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), got, gradient)


def temporary(form, pairs):
    return gradient_of(form, pairs).memory_analysis().temp_size_in_bytes


def test_memory_of_8192_pairs(monkeypatch):
    """Similarities of 256 MiB are made in two blocks, or in as many as fit into what is allowed."""
    matrix = 4 * 8192**2
    assert temporary("one_way", 8192) < 3 * contrastive.SIMILARITY_BYTES < 2 * matrix
    monkeypatch.setattr(contrastive, "SIMILARITY_BYTES", 2**24)
    assert temporary("one_way", 8192) < 3 * 2**24 + 2**25  # vectors and their gradients beside it
    monkeypatch.setattr(contrastive, "SIMILARITY_BYTES", 2**40)
    assert temporary("one_way", 8192) > matrix


def test_similarities_are_spread_over_devices():
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        assert temporary("one_way", 2048) < 4 * 2048**2


def test_blocks_follow_from_the_bytes(monkeypatch):
    monkeypatch.setattr(contrastive, "SIMILARITY_BYTES", 4 * 7 * 3)
    jaxpr = str(jax.make_jaxpr(lambda a, b: info_nce(a, b, jnp.arange(7)).loss)(A, B))
    assert "length=3" in jaxpr, "seven candidates, three at a time"
    assert contrastive._blocks(7, 3) == 1


# --------------------------------------------------------------------------- what gathers make of a gradient


def test_only_the_gradient_of_the_whole_batch_is_right():
    """Four workers average their gradients. What they gather, with or without its gradient, and whose losses each of
    them adds up, decides what that average is of the truth: all of it, a quarter, or another direction."""
    workers, each = 4, 4
    weights = RNG.normal(size=(12, 6)).astype(np.float32)
    x = RNG.normal(size=(2, workers * each, 12)).astype(np.float32)
    x[1] += 2 * x[0]
    mesh = make_mesh(MeshConfig(data=workers), jax.devices()[:workers])

    def encode(w, x):
        return jnp.tanh(x @ w)

    def batch_loss(w):
        return in_batch(*constrain_rows((encode(w, x[0]), encode(w, x[1])))).loss.mean()

    def average(w, x, *, with_gradient, all_rows):
        place = each * jax.lax.axis_index("data")

        def gather(z):
            found = jax.lax.all_gather(z, "data", tiled=True)
            if with_gradient:
                return found
            return jax.lax.dynamic_update_slice(jax.lax.stop_gradient(found), z, (place, 0))  # one's own put back

        def loss(w):
            first, second = encode(w, x[0]), encode(w, x[1])
            if all_rows:
                return in_batch(gather(first), gather(second)).loss.mean()
            return info_nce(first, gather(second), place + jnp.arange(each)).loss.mean()

        return jax.lax.pmean(jax.grad(loss)(w), "data")

    spec = jax.sharding.PartitionSpec
    ways = [(False, True), (True, False), (True, True), (False, False)]

    @jax.jit
    def run(w, x):
        made = [
            jax.shard_map(
                functools.partial(average, with_gradient=with_gradient, all_rows=all_rows),
                mesh=mesh, in_specs=(spec(), spec(None, "data")), out_specs=spec(), check_vma=False,
            )(w, x)
            for with_gradient, all_rows in ways
        ]  # fmt: skip
        return jax.grad(batch_loss)(w), made

    truth, (no_gradient, own_rows, both, wrong) = jax.device_get(run(weights, x))
    with jax.set_mesh(mesh):
        ours = jax.jit(jax.grad(batch_loss))(weights)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * np.abs(truth).max())
    close(ours, truth)
    close(no_gradient * workers, truth)
    close(own_rows, truth)
    close(both, truth)
    cosine = np.vdot(wrong, truth) / np.linalg.norm(wrong) / np.linalg.norm(truth)
    assert cosine < 0.97 and np.linalg.norm(wrong - truth) > 0.2 * np.linalg.norm(truth)
