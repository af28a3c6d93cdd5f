import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpt.losses.cross_entropy import logits_of
from jaxpt.models.heads import lm_head, mlm_head
from jaxpt.models.patterns import bidirectional, causal
from jaxpt.models.transformer import TransformerConfig, embedding_table, sinusoids, transformer
from jaxpt.types import AXIS_RULES, ParamSpec

VOCAB = 13
BASE = TransformerConfig(depth=2, width=8, heads=2, mlp_width=12, max_length=12, init_scale=0.3)
VARIED = dataclasses.replace(  # most of the options at once, and layers that do not divide into periods
    BASE,
    depth=4,
    kv_heads=1,
    norm="rms",
    first_norm=False,
    positions="rotary",
    local_rope_theta=50.0,
    activation="silu",
    gated=True,
    qk_norm=True,
    window=1,
    global_every=2,
    embed_width=6,
    embedding_norm=True,
)
ROW = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]])
PLACES = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]])
TOKENS = jax.random.randint(jax.random.key(7), ROW.shape, 0, VOCAB)
KEYS = jax.random.split(jax.random.key(8), 2)


def filled(network):
    """Random numbers everywhere: no bias is 0 and no norm is 1. (The real ``init`` takes seconds to compile.)"""
    leaves, structure = jax.tree.flatten(jax.eval_shape(network.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return structure.unflatten([jnp.float32(0.3 * rng.standard_normal(leaf.shape) + 0.1) for leaf in leaves])


QUICK = {"xla_backend_optimization_level": 0}  # compile fast, run slowly


@functools.cache
def params_of(config):
    return filled(transformer(config, VOCAB))


@functools.cache
def compiled(config, pattern, return_layers=False, gradient=False):
    """One compilation per configuration, whatever the arrays."""
    network = transformer(config, VOCAB)

    def apply(params, tokens, segments, places, options):
        seen = pattern(segments, places)
        return network.apply(params, tokens, seen, places, return_layers=return_layers, **options)

    def loss(*args):
        return jnp.square(apply(*args) - 0.3).sum()

    return jax.jit(jax.value_and_grad(loss) if gradient else apply, compiler_options=QUICK)


def run(
    config,
    params=None,
    tokens=TOKENS,
    segments=ROW,
    places=PLACES,
    pattern=bidirectional,
    return_layers=False,
    gradient=False,
    **options,
):
    params = params_of(config) if params is None else params
    return compiled(config, pattern, return_layers, gradient)(params, tokens, segments, places, options)


def loss_and_gradient(config, params, **options):
    return run(config, params, gradient=True, **options)


# ----------------------------------------------------------------------------------- how layers run


@pytest.mark.parametrize("name", ["dropout", "varied", "shared"])
def test_scan_is_unroll(name):
    config = {
        "dropout": dataclasses.replace(BASE, dropout=0.2),
        "varied": dataclasses.replace(VARIED, depth=6),
        "shared": dataclasses.replace(BASE, shared_layers=True, norm_placement="post"),
    }[name]
    params = params_of(config)
    unroll = dataclasses.replace(config, layers="unroll")
    hidden = [run(kind, params, keys=KEYS, return_layers=True) for kind in (config, unroll)]
    assert hidden[0][1].shape == (config.depth, *ROW.shape, config.width)
    chex.assert_trees_all_close(*hidden, rtol=1e-5, atol=1e-5)


def test_gradients_of_scan_unroll_and_remat_agree():
    config = dataclasses.replace(BASE, dropout=0.2)
    params = params_of(config)
    plain = loss_and_gradient(config, params, keys=KEYS)
    for changes in ({"layers": "unroll"}, {"remat": "dots"}, {"remat": "full"}):
        again = loss_and_gradient(dataclasses.replace(config, **changes), params, keys=KEYS)
        chex.assert_trees_all_close(plain, again, rtol=1e-4, atol=1e-4)


def test_remat_saves_less():
    def saved(remat):
        config = dataclasses.replace(BASE, depth=8, remat=remat)
        network = transformer(config, VOCAB)
        loss = lambda p: network.apply(p, TOKENS, causal(ROW, PLACES), PLACES).sum()  # noqa: E731
        _, pullback = jax.eval_shape(lambda p: jax.vjp(loss, p), params_of(dataclasses.replace(BASE, depth=8)))
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert saved("full") < saved("dots") < saved("none")


# ---------------------------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "relative", "disentangled", "none"])
@pytest.mark.parametrize("pattern", [bidirectional, causal])
def test_packed_is_separate(positions, pattern):
    config = dataclasses.replace(BASE, positions=positions, relative_causal=pattern is causal, relative_buckets=8)
    packed = run(config, pattern=pattern)
    separate = [(0, 0, 5), (0, 5, 8), (1, 0, 2), (1, 2, 6), (1, 6, 10)]
    for row, start, stop in separate:
        alone = np.zeros((1, 10), int), np.zeros((1, 10), int), np.zeros((1, 10), int)
        for array, source in zip(alone, (TOKENS, np.ones_like(ROW), PLACES), strict=True):
            array[0, : stop - start] = np.asarray(source)[row, start:stop]
        given = run(
            config,
            tokens=jnp.array(alone[0]),
            segments=jnp.array(alone[1]),
            places=jnp.array(alone[2]),
            pattern=pattern,
        )
        np.testing.assert_allclose(packed[row, start:stop], given[0, : stop - start], atol=1e-5)


def test_order_matters_unless_there_are_no_positions():
    swapped = TOKENS.at[0, 0].set(TOKENS[0, 1]).at[0, 1].set(TOKENS[0, 0])
    for positions in ("learned", "sinusoidal", "rotary", "relative", "disentangled", "none"):
        config = dataclasses.replace(BASE, positions=positions)
        change = float(jnp.abs(run(config)[0, 4] - run(config, tokens=swapped)[0, 4]).max())
        assert (change < 1e-5) == (positions == "none"), (positions, change)


@pytest.mark.parametrize("config", [BASE, VARIED], ids=["base", "varied"])
def test_a_later_token_changes_no_bit_before_it(config):
    before = run(config, pattern=causal)
    after = run(config, tokens=TOKENS.at[0, 3].add(1), pattern=causal)
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    np.testing.assert_array_equal(before[0, 5:], after[0, 5:])  # nor in other segments
    assert (before[0, 3:5] != after[0, 3:5]).any(-1).all()


def test_no_gradient_crosses_a_segment():
    embed = dataclasses.replace(BASE, positions="rotary")
    params = params_of(embed)
    network = transformer(embed, VOCAB)
    own = jnp.arange(10)[None]  # a token of its own at each place, so that rows of the table are places

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradient(params, weights):
        def loss(table):
            changed = params | {"embed": params["embed"] | {"tokens": table}}
            pattern = bidirectional(ROW[:1], PLACES[:1])
            return (jnp.square(network.apply(changed, own, pattern, PLACES[:1])) * weights[:, None]).sum()

        return jax.grad(loss)(params["embed"]["tokens"])

    reached = np.abs(gradient(params, jnp.float32(jnp.arange(10) < 5))).max(-1)
    assert (reached[:5] > 1e-6).all() and (reached[5:] == 0).all()


def test_a_window_reaches_depth_times_its_width():
    config = dataclasses.replace(BASE, depth=2, window=1, positions="none")
    one, places = jnp.ones((1, 10), int), jnp.arange(10)[None]
    changed = TOKENS[:1].at[0, 5].add(1)
    outputs = [run(config, tokens=tokens, segments=one, places=places) for tokens in (TOKENS[:1], changed)]
    assert np.flatnonzero((outputs[0] != outputs[1]).any(-1)[0]).tolist() == [3, 4, 5, 6, 7]
    config = dataclasses.replace(config, global_every=2)  # the first layer sees all
    outputs = [run(config, params_of(config), tokens, one, places) for tokens in (TOKENS[:1], changed)]
    assert (outputs[0] != outputs[1]).any(-1).all()


def test_windows_of_layers():
    config = dataclasses.replace(BASE, window=4, global_every=3)
    assert [config.window_of(i) for i in range(5)] == [None, 4, 4, None, 4]
    assert dataclasses.replace(config, global_every=0).window_of(0) == 4
    assert dataclasses.replace(config, window=None).window_of(1) is None


# ----------------------------------------------------------------------------------- equivalences


def test_grouped_queries_are_repeated_keys():
    grouped = dataclasses.replace(BASE, heads=4, kv_heads=2)
    params = params_of(grouped)
    repeated = jax.tree.map(lambda x: x, params)
    for name in ("key", "value"):
        part = params["layers"]["attention"][name]
        repeat = lambda x: jnp.repeat(x.reshape(*x.shape[:-1], 2, 2), 2, axis=-2).reshape(*x.shape[:-1], 8)  # noqa: E731
        repeated["layers"]["attention"][name] = jax.tree.map(repeat, part)
    full = run(dataclasses.replace(grouped, kv_heads=4), repeated)
    np.testing.assert_allclose(run(grouped, params), full, atol=1e-5)


def test_factorised_embeddings_are_a_product():
    thin = dataclasses.replace(BASE, embed_width=3, positions="none", depth=1)
    params = params_of(thin)
    project = params["embed"]["project"]
    table = params["embed"]["tokens"] @ project["kernel"] + project["bias"]
    full = run(dataclasses.replace(thin, embed_width=None), params | {"embed": {"tokens": table}})
    np.testing.assert_allclose(run(thin, params), full, atol=1e-5)


def test_shared_layers_are_equal_layers():
    shared = dataclasses.replace(BASE, shared_layers=True, depth=3)
    params = params_of(shared)
    copies = jax.tree.map(lambda x: jnp.stack([x] * 3), params["layers"])
    full = run(dataclasses.replace(shared, shared_layers=False), params | {"layers": copies})
    np.testing.assert_allclose(run(shared, params), full, atol=1e-6)


def test_query_key_norm_undoes_scale():
    for normed in (True, False):
        config = dataclasses.replace(BASE, qk_norm=normed, norm="rms", qkv_bias=False, norm_epsilon=1e-12, depth=1)
        params = params_of(config)
        louder = jax.tree.map(lambda x: x, params)
        kernel = params["layers"]["attention"]["query"]["kernel"]
        louder["layers"]["attention"]["query"]["kernel"] = 3 * kernel
        same = np.allclose(run(config, params), run(config, louder), atol=1e-5)
        assert same == normed


def test_token_types_add_a_row():
    config = dataclasses.replace(BASE, token_types=2)
    params = params_of(config)
    types = jnp.ones_like(TOKENS)
    table = params["embed"]["token_types"]
    swapped = params | {"embed": params["embed"] | {"token_types": table[::-1]}}
    np.testing.assert_array_equal(run(config, params, token_types=types), run(config, swapped))
    assert (run(config, params, token_types=types) != run(config, params)).any()


def test_embed_scale_and_offset():
    scaled = dataclasses.replace(BASE, embed_scale=True, positions="none")
    params = params_of(scaled)
    louder = params | {"embed": {"tokens": params["embed"]["tokens"] * 8**0.5}}
    np.testing.assert_allclose(
        run(scaled, params), run(dataclasses.replace(scaled, embed_scale=False), louder), atol=1e-5
    )
    shifted = dataclasses.replace(BASE, position_offset=2)
    params = params_of(shifted)
    assert params["embed"]["positions"].shape == (14, 8)
    moved = params | {"embed": params["embed"] | {"positions": params["embed"]["positions"][2:]}}
    np.testing.assert_array_equal(run(shifted, params), run(BASE, moved))


def test_sinusoids_are_those_of_the_paper():
    out = sinusoids(jnp.array([[0, 3, 200]]), 6)
    for place, position in enumerate([0, 3, 200]):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert float(out[0, place, 2 * i]) == pytest.approx(np.sin(angle), abs=1e-4)
            assert float(out[0, place, 2 * i + 1]) == pytest.approx(np.cos(angle), abs=1e-4)


# ------------------------------------------------------------------------------------------ heads


def test_tied_head_is_an_untied_one_with_the_table():
    hidden = jax.random.normal(jax.random.key(3), (2, 4, 8))
    table = params_of(BASE)["embed"]["tokens"]
    tied = lm_head(BASE, VOCAB)
    logits = logits_of(tied.apply(tied.init(jax.random.key(0)), hidden, table))
    assert tied.specs == {}
    np.testing.assert_allclose(logits, hidden @ table.T, atol=1e-5)
    untied = lm_head(dataclasses.replace(BASE, tie_embeddings=False), VOCAB)
    np.testing.assert_array_equal(logits_of(untied.apply({"table": table}, hidden, None)), logits)
    assert untied.specs == {"table": ParamSpec(("vocab", "embed"), "kernel")}
    scaled = lm_head(dataclasses.replace(BASE, scale_logits=True), VOCAB)
    np.testing.assert_allclose(logits_of(scaled.apply({}, hidden, table)), logits / 8**0.5, atol=1e-6)


def test_heads_of_factorised_embeddings_end_in_the_table():
    thin = dataclasses.replace(BASE, embed_width=3, logits_bias=True)
    table = embedding_table(params_of(dataclasses.replace(BASE, embed_width=3)))
    hidden = jax.random.normal(jax.random.key(3), (2, 4, 8))
    for make in (lm_head, mlm_head):
        head = make(thin, VOCAB)
        params = filled(head)
        logits = logits_of(head.apply(params, hidden, table))
        assert logits.shape == (2, 4, VOCAB) and logits.dtype == jnp.float32
        picked = logits_of(head.apply(params, hidden[:, 1:2], table))  # a position's logits are its own
        np.testing.assert_allclose(picked, logits[:, 1:2], atol=1e-6)


# ---------------------------------------------------------------------------------------- dropout


def test_dropout_of_a_row_is_its_own():
    config = dataclasses.replace(VARIED, dropout=0.3, attention_dropout=0.3, mlp_dropout=0.3)
    params = params_of(VARIED)
    whole = run(config, params, keys=KEYS)
    alone = run(config, params, TOKENS[1:], ROW[1:], PLACES[1:], keys=KEYS[1:])
    np.testing.assert_allclose(whole[1:], alone, atol=1e-5)
    assert np.abs(whole - run(config, params)).max() > 1e-2
    np.testing.assert_allclose(run(config, params), run(VARIED, params), atol=1e-6)
    twice = (jnp.tile(x[1:], (2, 1)) for x in (TOKENS, ROW, PLACES))
    same_text = run(config, params, *twice, keys=KEYS)
    assert np.abs(same_text[0] - same_text[1]).max() > 1e-2


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "mlp_dropout"])
def test_every_dropout_acts(name):
    config = dataclasses.replace(BASE, **{name: 0.5})
    assert np.abs(run(config, params_of(BASE), keys=KEYS) - run(BASE, keys=KEYS)).max() > 1e-2


# ------------------------------------------------------------------------------------- parameters


def test_specs_match_parameters():
    for config in (BASE, VARIED, dataclasses.replace(BASE, positions="relative", token_types=2, shared_layers=True)):
        network = transformer(config, VOCAB, cross_attention=True)
        params = jax.eval_shape(network.init, jax.random.key(0))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        is_spec = lambda leaf: isinstance(leaf, ParamSpec)  # noqa: E731
        ranks = jax.tree.map(lambda leaf: leaf.ndim, params)
        assert ranks == jax.tree.map(lambda spec: len(spec.axes), network.specs, is_leaf=is_spec)
        named = {name for spec in jax.tree.leaves(network.specs, is_leaf=is_spec) for name in spec.axes if name}
        assert named <= {*AXIS_RULES, "layers"}


def test_adding_a_parameter_reshuffles_no_other():
    key = jax.random.key(0)
    bigger = dataclasses.replace(BASE, depth=3, gated=True, token_types=2)
    small, large = (jax.jit(transformer(c, VOCAB).init, compiler_options=QUICK)(key) for c in (BASE, bigger))
    np.testing.assert_array_equal(small["embed"]["tokens"], large["embed"]["tokens"])
    kernels = [tree["layers"]["mlp"]["up"]["kernel"] for tree in (small, large)]
    np.testing.assert_array_equal(kernels[0], kernels[1][:2])
    assert (kernels[1][0] != kernels[1][1]).all()
    assert (large["layers"]["mlp"]["gate"]["kernel"] != kernels[1]).all()


@pytest.mark.parametrize(
    "init, scaled, up, down, out",
    [
        ("normal", False, 0.5, 0.5, 0.5),
        ("normal", True, 0.5, 0.25, 0.25),
        ("fan_in", False, 0.5 / 8, 0.5 / 16, 0.5 / 8),
        ("truncated_normal", False, 0.5 * 0.8796, 0.5 * 0.8796, 0.5 * 0.8796),
    ],
)
def test_init_scales(init, scaled, up, down, out):
    config = TransformerConfig(
        depth=2, width=64, heads=4, init=init, scale_residual_init=scaled, init_scale=0.5, max_length=8
    )
    layers = jax.jit(transformer(config, VOCAB).init, compiler_options=QUICK)(jax.random.key(0))["layers"]
    for kernel, expected in (
        (layers["mlp"]["up"], up),
        (layers["mlp"]["down"], down),
        (layers["attention"]["out"], out),
    ):
        assert float(kernel["kernel"].std()) == pytest.approx(expected, rel=0.05)
        assert not kernel["bias"].any()


def test_bfloat16_activations_float32_parameters():
    config = dataclasses.replace(VARIED, dtype="bfloat16")
    params = params_of(VARIED)
    hidden = run(config, params)
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.float32(hidden), run(VARIED, params), atol=0.25)
    network = transformer(config, VOCAB)
    gradient = jax.grad(lambda p: network.apply(p, TOKENS, causal(ROW, PLACES), PLACES).astype(jnp.float32).sum())
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.jit(gradient, compiler_options=QUICK)(params))} == {
        jnp.dtype("float32")
    }


def test_every_parameter_gets_a_gradient():
    config = dataclasses.replace(VARIED, positions="relative", qkv_bias=True)
    _, gradient = loss_and_gradient(config, params_of(config))
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, path


def test_sharded_is_whole():
    config = dataclasses.replace(VARIED, kv_heads=2, dropout=0.2)
    network = transformer(config, VOCAB)
    params = params_of(config)
    tokens, rows, places = (jnp.tile(x, (2, 1)) for x in (TOKENS, ROW, PLACES))
    keys = jax.random.split(jax.random.key(8), 4)
    whole = run(config, params, tokens, rows, places, keys=keys)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def place(spec, leaf):
        axes = [AXIS_RULES.get(name, (None,))[0] for name in spec.axes]
        fits = [a if a is None or n % mesh.shape[a] == 0 else None for a, n in zip(axes, leaf.shape, strict=True)]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*fits)))

    placed = jax.tree.map(place, network.specs, params, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    with jax.set_mesh(mesh):
        out = run(config, placed, tokens, rows, places, keys=keys)
    assert out.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(out, whole, atol=1e-5)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3}, "not a multiple of heads"),
        ({"heads": 4, "kv_heads": 3}, "must divide heads"),
        ({"positions": "rotary", "head_width": 3}, "even head width"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"depth": 0}, "depth is 0"),
        ({"first_norm": False, "norm_placement": "post"}, "first_norm"),
        ({"first_norm": False, "shared_layers": True}, "shared layers"),
        ({"window": -1}, "negative"),
        ({"positions": "relative", "relative_buckets": 2}, "at least 4"),
        ({"positions": "disentangled", "attention": "blockwise"}, "cannot do disentangled positions"),
        ({"positions": "disentangled", "kv_heads": 1}, "kv_heads=None"),
        ({"positions": "disentangled", "relative_buckets": 256}, "relative_buckets < relative_distance"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_rows_longer_than_the_position_table():
    with pytest.raises(ValueError, match="raise max_length"):
        run(dataclasses.replace(BASE, max_length=9))
