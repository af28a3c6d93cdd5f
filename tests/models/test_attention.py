import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.models.attention import attend
from jaxpt.models.patterns import bidirectional, causal, cross, prefix, visible
from jaxpt.models.positions import rotary_angles, rotate
from jaxpt.types import AttentionPattern

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0]])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 0]])


def table(text):
    return np.array([[letter == "1" for letter in row] for row in text.split()])


@pytest.mark.parametrize(
    "pattern, window, expected",
    [
        (bidirectional(SEGMENTS, POSITIONS), None, "111000 111000 111000 000110 000110 000001"),
        (causal(SEGMENTS, POSITIONS), None, "100000 110000 111000 000100 000110 000001"),
        (bidirectional(SEGMENTS, POSITIONS), 1, "110000 111000 011000 000110 000110 000001"),
        (causal(SEGMENTS, POSITIONS), 1, "100000 110000 011000 000100 000110 000001"),
        (causal(SEGMENTS, POSITIONS), 0, "100000 010000 001000 000100 000010 000001"),
        (
            prefix(SEGMENTS, POSITIONS, jnp.array([[1, 1, 0, 0, 0, 0]], bool)),
            None,
            "110000 110000 111000 000100 000110 000001",
        ),
    ],
)
def test_patterns(pattern, window, expected):
    np.testing.assert_array_equal(visible(pattern, window)[0], table(expected))


def test_cross_pattern_by_segment():
    queries = jnp.array([[1, 2, 0]]), jnp.array([[0, 0, 0]])
    keys = jnp.array([[1, 1, 2, 0]]), jnp.array([[0, 1, 0, 0]])
    np.testing.assert_array_equal(visible(cross(*queries, *keys))[0], table("1100 0010 0001"))


def test_block_diffusion_by_groups():
    # [noisy ; clean], two blocks of two: noisy tokens see their block and the clean blocks before it.
    one = jnp.ones((1, 8), int)
    ranks = jnp.array([[0, 0, 1, 1, 1, 1, 2, 2]])
    key_ranks = jnp.array([[9, 9, 9, 9, 1, 1, 2, 2]])
    groups = jnp.array([[1, 1, 2, 2, 0, 0, 0, 0]])
    pattern = AttentionPattern(one, one, ranks, key_ranks, 0 * one, 0 * one, groups, groups)
    expected = "11000000 11000000 00111100 00111100 00001100 00001100 00001111 00001111"
    np.testing.assert_array_equal(visible(pattern)[0], table(expected))


def test_visible_is_the_rule_of_the_plan():
    rng = np.random.default_rng(0)
    fields = [rng.integers(0, 3, (2, size)) for _ in range(4) for size in (5, 7)]
    pattern = AttentionPattern(*map(jnp.asarray, fields))
    qs, ks, qr, kr, qp, kp, qg, kg = fields
    for window in (None, 0, 1):
        seen = visible(pattern, window)
        for r, q, k in np.ndindex(2, 5, 7):
            rule = qs[r, q] == ks[r, k] and (kr[r, k] <= qr[r, q] or qg[r, q] == kg[r, k] != 0)
            rule = rule and (window is None or abs(qp[r, q] - kp[r, k]) <= window)
            assert seen[r, q, k] == rule


def naive(query, key, value, seen, scale, bias):
    """Attention one query and head at a time, in float64."""
    rows, queries, heads, width = query.shape
    out = np.zeros((rows, queries, heads, width))
    for r, q, h in np.ndindex(rows, queries, heads):
        g = h * key.shape[2] // heads
        ks = np.flatnonzero(seen[r, q])
        if len(ks):
            scores = scale * key[r, ks, g] @ query[r, q, h] + bias[r, h, q, ks]
            weights = np.exp(scores - scores.max())
            out[r, q, h] = weights / weights.sum() @ value[r, ks, g]
    return out


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attend_is_attention(groups):
    rng = np.random.default_rng(1)
    query, key, value = (rng.standard_normal((1, 6, heads, 2)) for heads in (4, groups, groups))
    bias = rng.standard_normal((1, 4, 6, 6))
    pattern = causal(SEGMENTS, POSITIONS)
    out = attend(*map(jnp.float32, (query, key, value)), pattern, scale=0.7, window=1, bias=jnp.float32(bias))
    expected = naive(query, key, value, np.asarray(visible(pattern, 1)), 0.7, bias)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_a_query_that_sees_nothing_gets_zero():
    ranks = jnp.arange(3)[None]
    one = jnp.ones((1, 3), int)
    pattern = AttentionPattern(one, one, ranks - 1, ranks, ranks, ranks)  # strictly earlier tokens
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, 1, 2)), jnp.float32)

    def run(query, key, value):
        return attend(query, key, value, pattern, scale=1.0)

    out = run(x, x, x)
    np.testing.assert_array_equal(out[0, 0], 0)
    np.testing.assert_allclose(out[0, 1], x[0, 0])
    gradients = jax.grad(lambda *args: jnp.square(run(*args)).sum(), (0, 1, 2))(x, x, x)
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[0][0, 0], 0)
    np.testing.assert_array_equal(gradients[2][0, 2], 0)


def test_bfloat16_operands_keep_float32_softmax():
    rng = np.random.default_rng(3)
    query, key, value = (jnp.bfloat16(rng.standard_normal((1, 6, 2, 4))) for _ in range(3))
    pattern = bidirectional(SEGMENTS, POSITIONS)
    weights = []
    out = attend(query, key, value, pattern, scale=0.5, dropout=lambda w: weights.append(w) or w)
    assert out.dtype == jnp.bfloat16 and weights[0].dtype == jnp.float32
    np.testing.assert_allclose(weights[0].sum(-1), 1, atol=1e-6)
    expected = attend(*map(jnp.float32, (query, key, value)), pattern, scale=0.5)
    np.testing.assert_allclose(jnp.float32(out), expected, atol=0.03)


def test_rotary_is_a_turn_in_the_complex_plane():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((1, 5, 2, 6))
    positions = np.array([[0, 1, 5, 7, 300]])
    turned = rotate(jnp.float32(x), rotary_angles(jnp.asarray(positions), 6, 100.0))
    angle = positions[..., None, None] * 100.0 ** (-np.arange(3) / 3)
    expected = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=2e-4)


def test_rotary_scores_depend_on_distance_alone():
    rng = np.random.default_rng(5)
    query, key = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def score(i, j):
        angles = [rotary_angles(jnp.array([[p]]), 8, 10_000.0) for p in (i, j)]
        return float((rotate(query, angles[0]) * rotate(key, angles[1])).sum())

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-2
