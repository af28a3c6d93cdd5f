"""Every form of attention against the dense one, in values and gradients; on one device and on a mesh."""

import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from jaxpt.models.attention import attend, choose, dense, spell_out
from jaxpt.models.blockwise import blockwise
from jaxpt.models.config import TransformerConfig
from jaxpt.models.fused import fused
from jaxpt.models.patterns import bidirectional, causal, cross, key_side, prefix, query_side, tile_bounds, visible
from jaxpt.models.spread import places_of, split_of
from jaxpt.models.transformer import transformer
from jaxpt.sharding import MeshConfig, make_mesh
from jaxpt.types import AttentionPattern

ROWS, LENGTH, HEADS, GROUPS, WIDTH, REACH = 2, 150, 4, 2, 8, 6


def packed(length: int, *, rows: int = ROWS, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Segments and positions of rows with documents of odd lengths and padding at the end."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        cuts = np.unique([0, *rng.integers(1, length - length // 8, 3), length - length // 9])
        for number, (begin, end) in enumerate(itertools.pairwise(cuts), 1):
            segments[row, begin:end], positions[row, begin:end] = number, np.arange(end - begin)
    return jnp.asarray(segments), jnp.asarray(positions)


def query_stream(segments: jax.Array, positions: jax.Array) -> AttentionPattern:
    """Strictly earlier in a random order (XLNet): some queries see nothing."""
    order = jnp.asarray(np.random.default_rng(1).permuted(np.tile(np.arange(LENGTH), (ROWS, 1)), axis=1), jnp.int32)
    return AttentionPattern(segments, segments, order - 1, order, positions, positions)


def block_diffusion(segments: jax.Array, positions: jax.Array) -> AttentionPattern:
    """Blocks of 7 that see earlier blocks by rank and themselves by group."""
    ranks = positions // 7
    return AttentionPattern(segments, segments, ranks, ranks + 1, positions, positions, ranks + 1, ranks + 1)


SEGMENTS, POSITIONS = packed(LENGTH)
PATTERNS = {
    "bidirectional": bidirectional(SEGMENTS, POSITIONS),
    "causal": causal(SEGMENTS, POSITIONS),
    "prefix": prefix(SEGMENTS, POSITIONS, POSITIONS < 11),
    "query stream": query_stream(SEGMENTS, POSITIONS),
    "groups": block_diffusion(SEGMENTS, POSITIONS),
    "cross": cross(SEGMENTS[:, 20:71], POSITIONS[:, 20:71], SEGMENTS, POSITIONS),
}


def operands(
    pattern: AttentionPattern, heads: int = HEADS, groups: int = GROUPS, width: int = WIDTH
) -> list[jax.Array]:
    """Queries, keys, values and what flows back."""
    rng = np.random.default_rng(2)
    queries, keys = pattern.query_segments.shape, pattern.key_segments.shape
    shapes = [(*queries, heads), (*keys, groups), (*keys, groups), (*queries, heads)]
    return [jnp.float32(rng.standard_normal((*shape, width))) for shape in shapes]


TABLE = jnp.float32(np.random.default_rng(3).standard_normal((2 * REACH + 1, HEADS)))


@functools.partial(jax.jit, static_argnames=("form", "window"))
def gradients(form, pattern, query, key, value, d_out, table=None, *, window=None):
    """The output and the gradients of queries, keys, values and the table."""

    def run(query, key, value, table):
        if form == "dense":
            bias = None if table is None else spell_out(table, pattern)
            return dense(query, key, value, pattern, scale=0.4, window=window, bias=bias)
        if form == "fused":
            return fused(query, key, value, pattern, scale=0.4, window=window, interpret=True)
        if form == "tiles":
            return blockwise(query, key, value, pattern, scale=0.4, window=window, bias=table, tile=32)
        return attend(query, key, value, pattern, scale=0.4, window=window, bias=table, form=form)

    out, pull = jax.vjp(run, query, key, value, table)
    return out, *pull(d_out)


def assert_equal(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("form", ["tiles", "fused"])
def test_forms_equal_dense(form: str, name: str, window: int | None):
    table = TABLE if form == "tiles" else None
    arguments = PATTERNS[name], *operands(PATTERNS[name]), table
    assert_equal(gradients(form, *arguments, window=window), gradients("dense", *arguments, window=window))


@pytest.mark.parametrize("length", [1, 7, 20])
def test_short_rows_and_lengths_that_no_tile_divides(length: int):
    pattern = causal(SEGMENTS[:, :length], POSITIONS[:, :length])
    arguments = operands(pattern, 2, 1)
    run = jax.jit(functools.partial(blockwise, pattern=pattern, scale=0.4, tile=3))
    want = dense(*arguments[:3], pattern, scale=0.4)
    np.testing.assert_allclose(run(*arguments[:3]), want, atol=1e-5)


integers = st.integers(0, 2**32 - 1)


@settings(max_examples=25, deadline=None)
@given(integers, st.booleans())
def test_blockwise_equals_dense_on_any_integers(seed: int, grouped: bool):
    rng = np.random.default_rng(seed)
    draw = lambda size, low=0, high=4: jnp.asarray(rng.integers(low, high, (2, size)), jnp.int32)  # noqa: E731
    groups = (draw(70, 0, 3), draw(90, 0, 3)) if grouped else (None, None)
    pattern = AttentionPattern(draw(70), draw(90), draw(70), draw(90), draw(70, 0, 20), draw(90, 0, 20), *groups)
    arguments = pattern, *operands(pattern), TABLE
    assert_equal(gradients("tiles", *arguments, window=3), gradients("dense", *arguments, window=3))


@settings(max_examples=25, deadline=None)
@given(integers, st.sampled_from([None, 2]))
def test_no_tile_is_skipped_that_somebody_sees(seed: int, window: int | None):
    rng = np.random.default_rng(seed)
    fields = [jnp.asarray(np.sort(rng.integers(0, 5, (2, size)), 1), jnp.int32) for _ in range(4) for size in (12, 8)]
    pattern = AttentionPattern(*fields)
    seen = np.asarray(visible(pattern, window)).reshape(2, 3, 4, 2, 4).any((2, 4))
    bound = np.asarray(tile_bounds(query_side(pattern), key_side(pattern), (4, 4), window))
    assert not (seen & ~bound).any()


def test_tiles_of_other_documents_and_of_the_future_are_skipped():
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], 4)[None], jnp.int32)
    places = jnp.arange(16)[None]
    one = jnp.ones((1, 16), jnp.int32)

    def bound(pattern, window=None):
        return np.asarray(tile_bounds(query_side(pattern), key_side(pattern), (4, 4), window))[0]

    np.testing.assert_array_equal(bound(bidirectional(segments, places)), np.eye(4, dtype=bool))
    np.testing.assert_array_equal(bound(causal(one, places)), np.tri(4, dtype=bool))
    np.testing.assert_array_equal(bound(causal(one, places), 4), np.tri(4, dtype=bool) & ~np.tri(4, k=-2, dtype=bool))


@pytest.mark.parametrize("form", ["tiles", "fused"])
def test_no_gradient_crosses_a_segment_and_nothing_seen_gives_nothing(form: str):
    pattern = PATTERNS["query stream"]
    query, key, value, d_out = operands(pattern)
    inside = np.asarray(SEGMENTS == 2)
    _, d_query, d_key, d_value, _ = gradients(form, pattern, query, key, value, d_out * inside[..., None, None])
    for gradient in (d_query, d_key, d_value):
        assert (np.asarray(gradient)[~inside] == 0).all() and np.isfinite(gradient).all()
        assert (np.asarray(gradient)[inside] != 0).any()
    out, d_query, *_ = gradients(form, pattern, query, key, value, d_out)
    blind = ~np.asarray(visible(pattern)).any(-1)
    assert blind.sum() >= 2  # the first of each order
    assert (np.asarray(out)[blind] == 0).all() and (np.asarray(d_query)[blind] == 0).all()


def test_bfloat16_tiles_keep_float32_sums():
    pattern = PATTERNS["causal"]
    exact = operands(pattern)
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    got = gradients("tiles", pattern, *rounded)
    assert all(x.dtype == jnp.bfloat16 for x in got[:4])
    for x, y in zip(got[:4], gradients("dense", pattern, *exact)[:4], strict=True):
        np.testing.assert_allclose(jnp.float32(x), y, atol=0.08)


# ------------------------------------------------------------------------------------------ memory


def temporary(length: int, make, form: str, window: int | None) -> int:
    """Bytes that value and gradients of one row need besides arguments and results."""

    def run(query, key, value, segments, positions):
        pattern = make(segments, positions)
        attention = functools.partial(attend, pattern=pattern, scale=0.4, window=window, form=form)
        out, pull = jax.vjp(attention, query, key, value)
        return pull(out)

    x = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
    integers = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.jit(run).lower(x, x, x, integers, integers).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "make, window",
    [
        pytest.param(bidirectional, None, marks=pytest.mark.slow),
        pytest.param(causal, None, marks=pytest.mark.slow),
        (lambda segments, positions: prefix(segments, positions, positions < 9), None),
        (causal, 100),
    ],
    ids=["bidirectional", "causal", "prefix", "windowed"],
)
def test_memory_grows_with_the_length_and_not_with_its_square(make, window: int | None):
    short, long = (temporary(length, make, "blockwise", window) for length in (1024, 2048))
    assert long < 2.3 * short
    assert 8 * long < temporary(2048, make, "dense", window)


# ------------------------------------------------------------------------------------------ choice


def test_the_automatic_choice(monkeypatch: pytest.MonkeyPatch):
    def chosen(where: str, length: int, make=causal, works: bool = True, window: int | None = None, **asks: bool):
        monkeypatch.setattr("jaxpt.models.attention.platform", lambda: where)
        monkeypatch.setattr("jaxpt.models.attention.works_here", lambda reference: works)
        one = jnp.ones((1, length), int)
        query = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        asks = {"has_bias": False, "has_dropout": False} | asks
        return choose("auto", query, query, make(one, one), window, **asks)

    prefixed = lambda segments, positions: prefix(segments, positions, positions > 1)  # noqa: E731
    for where in ("cpu", "gpu", "tpu"):
        assert chosen(where, 128) == "dense"
        assert chosen(where, 2048, has_dropout=True) == "dense"
        assert chosen(where, 2048, has_bias=True) == "blockwise"
    assert chosen("cpu", 2048) == "blockwise"
    assert chosen("tpu", 2048) == chosen("tpu", 2048, bidirectional, window=9) == "splash"
    assert chosen("tpu", 2048, prefixed) == chosen("tpu", 2000) == "blockwise"
    assert chosen("gpu", 2048, prefixed) == "fused"
    assert chosen("gpu", 2048, works=False) == "blockwise"


@pytest.mark.parametrize(
    "form, name, table, dropout, message",
    [
        ("splash", "prefix", None, None, "neither bidirectional nor causal"),
        ("splash", "causal", None, None, "no multiple of 128"),
        ("fused", "causal", TABLE, None, "a relative bias: set attention"),
        ("blockwise", "causal", None, lambda weights: weights, "set attention_dropout=0"),
    ],
)
def test_a_form_that_cannot_says_so(form, name, table, dropout, message: str):
    arguments = operands(PATTERNS[name])[:3]
    with pytest.raises(ValueError, match=message):
        attend(*arguments, PATTERNS[name], scale=1.0, bias=table, dropout=dropout, form=form)


@pytest.mark.parametrize("positions", ["relative", pytest.param("rotary", marks=pytest.mark.slow)])
def test_a_network_is_the_same_in_every_form(positions: str):
    rng = np.random.default_rng(4)
    tokens = jnp.asarray(rng.integers(0, 11, SEGMENTS.shape))
    pull = jnp.float32(rng.standard_normal((*SEGMENTS.shape, 16)))

    def run(form):
        config = TransformerConfig(
            depth=1, width=16, heads=4, positions=positions, relative_distance=16, attention=form
        )
        network = transformer(config, vocab_size=11)
        loss = lambda p: (network.apply(p, tokens, PATTERNS["prefix"], POSITIONS) * pull).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(jax.jit(network.init)(jax.random.key(0)))

    (loss, gradient), (want, want_gradient) = run("blockwise"), run("dense")
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-3)
    top = max(abs(leaf).max() for leaf in jax.tree.leaves(want_gradient))
    for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * top)


# ------------------------------------------------------------------------- kernels of other machines


@pytest.mark.parametrize(
    "make, window, step",
    [(causal, None, 1), (bidirectional, 40, 1), pytest.param(causal, 40, 2, marks=pytest.mark.slow)],
    ids=["causal", "windowed", "odd positions"],
)
def test_splash_equals_dense(make, window: int | None, step: int):
    segments, positions = packed(256)
    pattern = make(segments, positions * step)  # positions that skip: a window is then not one of places
    arguments = operands(pattern, width=16)
    real = (segments != 0)[..., None, None]  # padding reads no further than the window in places
    arguments[3] *= real
    got, want = (gradients(form, pattern, *arguments, window=window) for form in ("splash", "dense"))
    assert_equal((got[0] * real, got[1:]), (want[0] * real, want[1:]))


def test_the_fused_kernel_lowers_for_cuda():
    pattern = PATTERNS["groups"]
    arguments = [x.astype(jnp.bfloat16) for x in operands(pattern)]

    def run(query, key, value, d_out):
        return jax.vjp(lambda *x: fused(*x, pattern, scale=0.4, window=5), query, key, value)[1](d_out)

    gpu = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton") == 3  # forward, queries, keys


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4, 4, 1), (1, 4, 1, 4)])
def test_splash_compiles_for_a_tpu(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices

    def run(query, key, segments, positions):
        return jax.vjp(lambda *x: attend(*x, causal(segments, positions), scale=0.4), query, key, key)[1](query)

    x = jax.ShapeDtypeStruct((8, 2048, 8, 64), jnp.bfloat16)
    integers = jax.ShapeDtypeStruct((8, 2048), jnp.int32)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), devices)):
        text = jax.jit(run).lower(x, x, integers, integers).compile().as_text()
    assert text.count("tpu_custom_call") >= 3


# -------------------------------------------------------------------------------------------- mesh


@pytest.mark.parametrize(
    "sizes, name, form",
    [
        ((1, 2, 2, 2), "causal", "blockwise"),
        pytest.param((1, 1, 2, 4), "bidirectional", "blockwise", marks=pytest.mark.slow),
        ((2, 1, 4, 1), "prefix", "blockwise"),  # more devices than key heads
        pytest.param((1, 1, 2, 4), "causal", "blockwise", marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 8), "groups", "blockwise", marks=pytest.mark.slow),  # which divides no row
        pytest.param((2, 1, 2, 2), "query stream", "fused", marks=pytest.mark.slow),
        pytest.param((1, 2, 2, 2), "causal", "splash", marks=pytest.mark.slow),
        pytest.param((1, 2, 2, 2), "bidirectional", "splash", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing(sizes: tuple[int, ...], name: str, form: str):
    whole = form == "splash"
    pattern = {"causal": causal, "bidirectional": bidirectional}[name](*packed(512)) if whole else PATTERNS[name]
    length = pattern.key_segments.shape[1]
    if not whole and sizes != (1, 1, 1, 8):  # to a length that the mesh divides
        length = 144
        pattern = jax.tree.map(lambda x: x[:, :length], pattern)
    arguments = pattern, *operands(pattern), None if form != "blockwise" else TABLE
    want = gradients("dense", *arguments)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        got = gradients(form, *arguments)
    assert_equal(got, want)


@pytest.mark.parametrize("context", [2, 4, 8])
def test_context_is_balanced_under_a_causal_pattern(context: int):
    query = jax.ShapeDtypeStruct((1, 64, 2, 4), jnp.float32)
    with jax.set_mesh(make_mesh(MeshConfig(data=-1, context=context))):
        split = split_of(query, query, None, None)
    places = places_of(split, 64)
    np.testing.assert_array_equal(np.sort(places), np.arange(64))
    work = (places + 1).reshape(context, -1).sum(1)  # keys that a causal query sees
    assert (work == work[0]).all()


WITHOUT_KERNELS = """
import sys

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("jax.experimental.pallas.triton", "jax.experimental.pallas.ops")):
            raise ImportError(name)

sys.meta_path.insert(0, Gone())
import jaxpt.train
"""


def test_no_experimental_kernel_is_imported_before_it_is_used():
    """A JAX that has moved one of them harms those alone whom it serves."""
    subprocess.run([sys.executable, "-c", WITHOUT_KERNELS], check=True)
