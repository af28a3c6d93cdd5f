"""Hidden states and logits equal those of Hugging Face Transformers, recorded by tools/record_transformers.py."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_vocab

from jaxpt.losses.cross_entropy import linear_cross_entropy, logits_of
from jaxpt.models import presets
from jaxpt.models.encoder_decoder import encoder_decoder
from jaxpt.models.heads import detection_head, lm_head, mlm_head
from jaxpt.models.patterns import bidirectional, causal, cross
from jaxpt.models.positions import log_buckets, relative_buckets
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives import TSDAE
from jaxpt.objectives.parts import without_dropout
from jaxpt.types import Example, Snapshot

HERE = Path(__file__).parent
VOCAB = 61
TINY = {"depth": 3, "width": 32, "heads": 4, "mlp_width": 48, "max_length": 20}
DEBERTA = TINY | {"relative_buckets": 4, "relative_distance": 9, "norm_epsilon": 1e-2}
T5 = {"width": 32, "heads": 4, "head_width": 6, "mlp_width": 40, "relative_buckets": 8, "relative_distance": 9}
DENSE = {"weight": "kernel", "bias": "bias"}
NORM = {"weight": "scale", "bias": "bias"}

# The tiny models, as changes of the published ones: what is not named here is tested too.
ENCODERS = {
    "bert": presets.bert("base", **TINY),
    "roberta": presets.roberta("base", **(TINY | {"max_length": 18})),
    "albert": presets.albert("base", **TINY, embed_width=16),
    "electra": presets.electra("base", **TINY, embed_width=16),
    "electra_detection": presets.electra("base", **TINY, embed_width=16),
    "deberta_v3": presets.deberta_v3("base", **DEBERTA),
    "deberta_apart": presets.deberta_v3("base", **DEBERTA, relative_projections=True),
    "modernbert": presets.modernbert(
        "base", **(TINY | {"depth": 5, "mlp_width": 24}), window=2, local_rope_theta=100.0
    ),
}
DECODERS = {
    "gpt2": presets.gpt2("small", **(TINY | {"mlp_width": None})),
    "llama": presets.llama("8b", **TINY, kv_heads=2, norm_epsilon=1e-2, rope_theta=500.0),
}


def _t5(version):
    config = presets.t5("base", version, **T5)
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, depth=2),
        decoder=dataclasses.replace(config.decoder, depth=3),
    )


def _bart():
    config = presets.bart("base", **(TINY | {"depth": 2}), logits_bias=True)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, mlp_width=40))


BOTH = {"t5": _t5("1.0"), "t5_v1_1": _t5("1.1"), "bart": _bart()}

# Their names -> ours. "#" is the number of a layer; a tuple of names splits the outputs of one matrix.
BERT_LAYER = {
    "attention.self.query": "attention/query",
    "attention.self.key": "attention/key",
    "attention.self.value": "attention/value",
    "attention.output.dense": "attention/out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp/up",
    "output.dense": "mlp/down",
    "output.LayerNorm": "mlp_norm",
}
EMBEDDINGS = {
    "word_embeddings": "embed/tokens",
    "position_embeddings": "embed/positions",
    "token_type_embeddings": "embed/token_types",
    "LayerNorm": "embed/norm",
}


def _bert_names(prefix, head):
    return (
        {f"{prefix}.embeddings.{a}": b for a, b in EMBEDDINGS.items()}
        | {f"{prefix}.encoder.layer.#.{a}": f"layers/{b}" for a, b in BERT_LAYER.items()}
        | {a: f"head/{b}" for a, b in head.items()}
    )


def _t5_names():
    names = {"shared": "encoder/embed/tokens", "lm_head": "head/table"}
    for side, cross_layer, last in (("encoder", None, 1), ("decoder", 1, 2)):
        names |= {
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias": f"{side}/relative",
            f"{side}.final_layer_norm": f"{side}/final_norm",
            f"{side}.block.#.layer.0.layer_norm": f"{side}/layers/attention_norm",
            f"{side}.block.#.layer.{last}.layer_norm": f"{side}/layers/mlp_norm",
            f"{side}.block.#.layer.{last}.DenseReluDense.wi": f"{side}/layers/mlp/up",
            f"{side}.block.#.layer.{last}.DenseReluDense.wi_0": f"{side}/layers/mlp/gate",
            f"{side}.block.#.layer.{last}.DenseReluDense.wi_1": f"{side}/layers/mlp/up",
            f"{side}.block.#.layer.{last}.DenseReluDense.wo": f"{side}/layers/mlp/down",
        }
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "out": "o"}.items():
            names[f"{side}.block.#.layer.0.SelfAttention.{theirs}"] = f"{side}/layers/attention/{ours}"
            names[f"{side}.block.#.layer.1.EncDecAttention.{theirs}"] = f"{side}/layers/cross_attention/{ours}"
        if cross_layer:
            names[f"{side}.block.#.layer.1.layer_norm"] = f"{side}/layers/cross_attention_norm"
    return names


def _bart_names():
    names = {"model.shared": "encoder/embed/tokens", "final_logits_bias": "head/bias"}
    for side in ("encoder", "decoder"):
        names |= {
            f"model.{side}.embed_positions": f"{side}/embed/positions",
            f"model.{side}.layernorm_embedding": f"{side}/embed/norm",
            f"model.{side}.layers.#.self_attn_layer_norm": f"{side}/layers/attention_norm",
            f"model.{side}.layers.#.encoder_attn_layer_norm": f"{side}/layers/cross_attention_norm",
            f"model.{side}.layers.#.final_layer_norm": f"{side}/layers/mlp_norm",
            f"model.{side}.layers.#.fc1": f"{side}/layers/mlp/up",
            f"model.{side}.layers.#.fc2": f"{side}/layers/mlp/down",
        }
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "out": "out"}.items():
            names[f"model.{side}.layers.#.self_attn.{theirs}_proj"] = f"{side}/layers/attention/{ours}"
            names[f"model.{side}.layers.#.encoder_attn.{theirs}_proj"] = f"{side}/layers/cross_attention/{ours}"
    return names


ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"


def _deberta_names():
    names = {
        "deberta.embeddings.word_embeddings": "embed/tokens",
        "deberta.embeddings.LayerNorm": "embed/norm",
        "deberta.encoder.rel_embeddings": "distances",
        "deberta.encoder.LayerNorm": "distances_norm",
        "lm_predictions.lm_head.dense": "head/transform",
        "lm_predictions.lm_head.LayerNorm": "head/norm",
        "lm_predictions.lm_head.bias": "head/bias",
    }
    theirs = {"query_proj": "query", "key_proj": "key", "value_proj": "value"}
    theirs |= {"pos_query_proj": "distance_query", "pos_key_proj": "distance_key"}
    names |= {f"deberta.encoder.layer.#.attention.self.{a}": f"layers/attention/{b}" for a, b in theirs.items()}
    rest = {a: b for a, b in BERT_LAYER.items() if ".self." not in a}
    return names | {f"deberta.encoder.layer.#.{a}": f"layers/{b}" for a, b in rest.items()}


QKV = tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))
NAMES = {
    "bert": _bert_names(
        "bert",
        {
            "cls.predictions.transform.dense": "transform",
            "cls.predictions.transform.LayerNorm": "norm",
            "cls.predictions.bias": "bias",
        },
    ),
    "roberta": _bert_names(
        "roberta", {"lm_head.dense": "transform", "lm_head.layer_norm": "norm", "lm_head.bias": "bias"}
    ),
    "electra": _bert_names(
        "electra",
        {
            "generator_predictions.dense": "transform",
            "generator_predictions.LayerNorm": "norm",
            "generator_lm_head.bias": "bias",
        },
    )
    | {"electra.embeddings_project": "embed/project"},
    "electra_detection": _bert_names(
        "electra",
        {
            "discriminator_predictions.dense": "transform",
            "discriminator_predictions.dense_prediction": "score",
        },
    )
    | {"electra.embeddings_project": "embed/project"},
    "deberta_v3": _deberta_names(),
    "deberta_apart": _deberta_names(),
    "albert": {
        **{f"albert.embeddings.{a}": b for a, b in EMBEDDINGS.items()},
        "albert.encoder.embedding_hidden_mapping_in": "embed/project",
        **{f"{ALBERT}.attention.{name}": f"layers/attention/{name}" for name in ("query", "key", "value")},
        f"{ALBERT}.attention.dense": "layers/attention/out",
        f"{ALBERT}.attention.LayerNorm": "layers/attention_norm",
        f"{ALBERT}.ffn": "layers/mlp/up",
        f"{ALBERT}.ffn_output": "layers/mlp/down",
        f"{ALBERT}.full_layer_layer_norm": "layers/mlp_norm",
        "predictions.dense": "head/transform",
        "predictions.LayerNorm": "head/norm",
        "predictions.bias": "head/bias",
    },
    "modernbert": {
        "model.embeddings.tok_embeddings": "embed/tokens",
        "model.embeddings.norm": "embed/norm",
        "model.layers.#.attn_norm": "layers/attention_norm",
        "model.layers.#.attn.Wqkv": QKV,
        "model.layers.#.attn.Wo": "layers/attention/out",
        "model.layers.#.mlp_norm": "layers/mlp_norm",
        "model.layers.#.mlp.Wi": ("layers/mlp/gate", "layers/mlp/up"),
        "model.layers.#.mlp.Wo": "layers/mlp/down",
        "model.final_norm": "final_norm",
        "head.dense": "head/transform",
        "head.norm": "head/norm",
        "decoder.bias": "head/bias",
    },
    "gpt2": {
        "transformer.wte": "embed/tokens",
        "transformer.wpe": "embed/positions",
        "transformer.h.#.ln_1": "layers/attention_norm",
        "transformer.h.#.attn.c_attn": QKV,
        "transformer.h.#.attn.c_proj": "layers/attention/out",
        "transformer.h.#.ln_2": "layers/mlp_norm",
        "transformer.h.#.mlp.c_fc": "layers/mlp/up",
        "transformer.h.#.mlp.c_proj": "layers/mlp/down",
        "transformer.ln_f": "final_norm",
    },
    "llama": {
        "model.embed_tokens": "embed/tokens",
        "model.layers.#.input_layernorm": "layers/attention_norm",
        **{f"model.layers.#.self_attn.{n[0]}_proj": f"layers/attention/{n}" for n in ("query", "key", "value")},
        "model.layers.#.self_attn.o_proj": "layers/attention/out",
        "model.layers.#.post_attention_layernorm": "layers/mlp_norm",
        **{f"model.layers.#.mlp.{n}_proj": f"layers/mlp/{n}" for n in ("gate", "up", "down")},
        "model.norm": "final_norm",
        "lm_head": "head/table",
    },
    "t5": _t5_names(),
    "t5_v1_1": _t5_names(),
    "bart": _bart_names(),
}
NAMES["tsdae"] = NAMES["bert"] | {
    f"bert.encoder.layer.#.crossattention.{theirs}": f"layers/cross_attention{ours}"
    for theirs, ours in {
        **{f"self.{name}": f"/{name}" for name in ("query", "key", "value")},
        "output.dense": "/out",
        "output.LayerNorm": "_norm",
    }.items()
}
TABLES = ("embed/tokens", "embed/positions", "embed/token_types", "distances", "relative", "head/table", "head/bias")


def put(params, path, values, layer):
    *folders, name = path.split("/")
    for folder in folders:
        params = params[folder]
    if layer is None:
        assert params[name].shape == values.shape, path
        params[name] = values
    else:
        if params[name].shape[0] == layer.count - 1:  # the norm that the first layer has not
            layer = dataclasses.replace(layer, index=layer.index - 1)
        assert params[name].shape[1:] == values.shape, path
        params[name][layer.index] = values


@dataclasses.dataclass
class Layer:
    index: int
    count: int


def load(family, recorded, skeleton, depths):
    """Their weights in our tree; every one of theirs is used and every one of ours is filled."""
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), skeleton)
    for full_name in recorded.files:
        if not full_name.startswith("weights/"):
            continue
        values = recorded[full_name].astype(np.float32)
        name, layer = full_name.removeprefix("weights/"), None
        if name not in NAMES[family] and name.rpartition(".")[0] not in NAMES[family]:
            found = re.search(r"\.(\d+)\.", name)
            side = "decoder" if ".decoder." in f".{name}" and family not in DECODERS else "encoder"
            layer = Layer(int(found[1]), depths[side])
            name = f"{name[: found.start()]}.#.{name[found.end() :]}"
        stem, _, kind = name.rpartition(".")
        if name in NAMES[family]:  # a bias without a module of its own
            stem, kind = name, None
        targets = NAMES[family][stem]
        targets = targets if isinstance(targets, tuple) else (targets,)
        if not targets[0].endswith(TABLES):
            if values.ndim == 2 and family != "gpt2":  # torch's Linear holds [outputs, inputs]
                values = values.T
            is_norm = targets[0].endswith("norm")
            targets = tuple(f"{target}/{(NORM if is_norm else DENSE)[kind]}" for target in targets)
        elif targets[0] == "head/bias":
            values = values.reshape(-1)
        for target, part in zip(targets, np.split(values, len(targets), axis=-1), strict=True):
            put(params, target, part, layer)
    for path, leaf in jax.tree.leaves_with_path(params):
        assert not np.isnan(leaf).any(), path
    return jax.tree.map(jnp.asarray, params)


def rows(mask):
    """Segment ids and positions of padded rows."""
    return jnp.asarray(mask), jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)


def close(ours, theirs, mask, name):
    seen = np.asarray(mask, bool)
    np.testing.assert_allclose(np.asarray(ours)[seen], theirs[seen], rtol=2e-5, atol=2e-5, err_msg=name)


def close_layers(ours, theirs, mask, final, name):
    """All layers; their last state is already normed where there is a final norm."""
    assert len(ours) == len(theirs) - 1
    for i, (our, their) in enumerate(zip(ours[:-1], theirs[1:-1], strict=True)):
        close(our, their, mask, f"{name} layer {i}")
    close(final, theirs[-1], mask, f"{name} final")


@pytest.mark.parametrize(
    "family, layers", [*((family, "scan") for family in ENCODERS | DECODERS), ("modernbert", "unroll")]
)
def test_one_stack(family, layers):
    recorded = np.load(HERE / f"{family}.npz")
    config = dataclasses.replace((ENCODERS | DECODERS)[family], layers=layers)
    vocab = VOCAB
    network = transformer(config, vocab)
    detects = family == "electra_detection"
    head = (mlm_head if family in ENCODERS else lm_head)(config, vocab)
    head = detection_head(config) if detects else head
    skeleton = jax.eval_shape(lambda key: network.init(key) | {"head": head.init(key)}, jax.random.key(0))
    params = load(family, recorded, skeleton, {"encoder": config.depth})
    segments, positions = rows(recorded["mask"])
    pattern = (bidirectional if family in ENCODERS else causal)(segments, positions)
    types = jnp.asarray(recorded["token_types"]) if "token_types" in recorded.files else None

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compile fast
    def run(params):
        body = {name: tree for name, tree in params.items() if name != "head"}
        hidden, given = network.apply(
            body, jnp.asarray(recorded["tokens"]), pattern, positions, token_types=types, return_layers=True
        )
        if detects:
            return hidden, given, head.apply(params["head"], hidden, positions)
        return hidden, given, logits_of(head.apply(params["head"], hidden, embedding_table(body)))

    hidden, given, logits = run(params)
    close_layers(given, recorded["hidden"], recorded["mask"], hidden, family)
    close(logits, recorded["logits"], recorded["mask"], f"{family} logits")


@pytest.mark.parametrize("family", BOTH)
def test_encoder_decoder(family):
    recorded = np.load(HERE / f"{family}.npz")
    config = BOTH[family]
    vocab = recorded["logits"].shape[-1]
    network, head = encoder_decoder(config, vocab), lm_head(config.decoder, vocab)
    skeleton = jax.eval_shape(lambda key: network.init(key) | {"head": head.init(key)}, jax.random.key(0))
    depths = {"encoder": config.encoder.depth, "decoder": config.decoder.depth}
    params = load(family, recorded, skeleton, depths)
    source, target = rows(recorded["mask"]), rows(recorded["decoder_mask"])

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compile fast
    def run(params):
        hidden, given = network.apply(
            params,
            jnp.asarray(recorded["tokens"]),
            bidirectional(*source),
            source[1],
            jnp.asarray(recorded["decoder_tokens"]),
            causal(*target),
            target[1],
            cross(*target, *source),
            return_layers=True,
        )
        return hidden, given, logits_of(head.apply(params["head"], hidden, embedding_table(params)))

    hidden, (encoded, decoded), logits = run(params)
    close_layers(encoded[:-1], recorded["encoder_hidden"][:-1], recorded["mask"], encoded[-2], f"{family} encoder")
    close_layers(decoded, recorded["hidden"], recorded["decoder_mask"], hidden, f"{family} decoder")
    close(logits, recorded["logits"], recorded["decoder_mask"], f"{family} logits")


def test_a_decoder_that_is_its_encoder_and_sees_one_vector():
    """TSDAE: the vector, the loss of every token, and the same with the queries and keys that change nothing."""
    recorded = np.load(HERE / "tsdae.npz")
    config = presets.bert("base", **(TINY | {"depth": 2, "width": 16, "mlp_width": 24}))
    vocab = dataclasses.replace(tiny_vocab(VOCAB), token_bytes=np.ones(VOCAB, np.int32))
    decoder, head = transformer(config, VOCAB, cross_attention=True), mlm_head(config, VOCAB)
    skeleton = jax.eval_shape(lambda key: decoder.init(key) | {"head": head.init(key)}, jax.random.key(0))
    whole = load("tsdae", recorded, skeleton, {"encoder": 2})
    layers = dict(whole["layers"])
    given = {name: layers.pop(name) for name in ("cross_attention", "cross_attention_norm")}
    asked = {name: given["cross_attention"][name] for name in ("value", "out")}
    params = {
        "trunk": {"embed": whole["embed"], "layers": layers},
        "cross": given | {"cross_attention": asked},
        "head": whole["head"],
    }
    objective = TSDAE(encoder=without_dropout(config), gap=True).build(vocab)
    (tokens, damaged), (told, damaged_told) = (
        [make(recorded[name]) for name in names]
        for make, names in ((jnp.asarray, ("tokens", "damaged")), (rows, ("mask", "damaged_mask")))
    )
    inputs = {"tokens": damaged, "segment_ids": damaged_told[0], "decoder_tokens": tokens}
    inputs |= {"decoder_segment_ids": told[0], "targets": jnp.roll(tokens, -1, axis=1)}
    weights = jnp.pad(told[0][:, 1:], ((0, 0), (0, 1))).astype(jnp.float32)
    example = Example(inputs, jnp.arange(3), {"lm": weights})

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compile fast
    def run(params, full):
        out = objective.loss(Snapshot(params, {}, jnp.int32(0)), example, jax.random.split(jax.random.key(0), 3))
        one = jnp.ones((3, 1), jnp.int32)
        hidden = decoder.apply(
            full, tokens, causal(*told), told[1], context=out.features["vectors"][:, None],
            context_pattern=cross(*told, one, one - 1),
        )  # fmt: skip
        readout = head.apply(params["head"], hidden, embedding_table(full))
        return out, linear_cross_entropy(readout, inputs["targets"]).loss

    full = {"embed": whole["embed"], "layers": whole["layers"]}
    out, losses = run(params, full)
    close(out.features["vectors"], recorded["vectors"], np.ones(3), "vectors")
    for ours in (out.losses["lm"], losses):
        close(ours[:, :-1], recorded["losses"], weights[:, :-1], "losses")


@pytest.mark.parametrize("count, far", [(32, 128), (8, 20)])
@pytest.mark.parametrize("rule", ["bidirectional", "causal"])
def test_relative_buckets(rule, count, far):
    recorded = np.load(HERE / "relative_buckets.npz")
    ours = relative_buckets(
        jnp.asarray(recorded["distance"]), is_causal=rule == "causal", buckets=count, max_distance=far
    )
    np.testing.assert_array_equal(ours, recorded[f"{rule}_{count}_{far}"])


@pytest.mark.parametrize("count, far", [(256, 512), (4, 9), (32, 128)])
def test_log_buckets(count, far):
    recorded = np.load(HERE / "relative_buckets.npz")[f"deberta_{count}_{far}"]
    reached = np.clip(np.arange(-600, 601), -far, far) + far
    np.testing.assert_array_equal(log_buckets(count, far)[reached], recorded)


COUNTS = json.loads((HERE / "parameter_counts.json").read_text())["counts"]


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    family, size = name.split("/")
    vocab = COUNTS[name]["vocab"]
    key = jax.random.key(0)
    if family in ("t5", "t5_v1_1", "bart"):
        config = presets.bart(size) if family == "bart" else presets.t5(size, "1.0" if family == "t5" else "1.1")
        network, head = encoder_decoder(config, vocab), lm_head(config.decoder, vocab)
    else:
        config = getattr(presets, family)(size)
        network = transformer(config, vocab)
        head = (lm_head if family in DECODERS else mlm_head)(config, vocab)
    trees = [jax.eval_shape(network.init, key)]
    if family != "electra":  # recorded without its head
        trees.append(jax.eval_shape(head.init, key))
    assert sum(leaf.size for leaf in jax.tree.leaves(trees)) == COUNTS[name]["parameters"]
