"""Record tiny random models of Hugging Face Transformers, for tests/models/test_parity.py.

    pip install torch transformers && python tools/record_transformers.py tests/models

Writes one .npz per family (weights, token rows with padding, hidden states of every layer, logits, the
configuration and the versions that made them) and parameter_counts.json (sizes of the published models).
Runs in float32, eager attention, evaluation mode. Weights are random throughout, norms and biases too, so that
no part can hide behind ones and zeros; they are stored as float16 and were rounded to it before the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers as hf  # pyright: ignore[reportMissingImports]

VOCAB, ROWS, LENGTH, TARGET = 61, 3, 12, 9
LENGTHS = (12, 7, 10)  # tokens of each row, the rest is padding
TARGETS = (9, 4, 6)

BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
}
DEBERTA = {name: value for name, value in BERT.items() if name != "type_vocab_size"} | {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 4,  # few, so that rows of 12 tokens reach the logarithmic ones and the last
    "max_relative_positions": 9,
    "pos_att_type": "p2c|c2p",
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "layer_norm_eps": 1e-2,  # large enough to show where it is added
    "legacy": False,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
}


def t5_v1_1(**settings: Any) -> hf.T5Config:
    """T5 1.1: a gated MLP and an output of its own, which Transformers 5 ties unless told otherwise afterwards."""
    config = hf.T5Config(**settings, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    config.tie_word_embeddings = False
    return config


def build(make: Any, config: Any) -> Any:
    """The model; T5's two stacks share one token table in either version."""
    model = make(config)
    if isinstance(model, hf.T5ForConditionalGeneration):
        model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    return model


FAMILIES: dict[str, tuple[Any, Any]] = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig(**BERT)),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**(BERT | {"type_vocab_size": 1}), layer_norm_eps=1e-5)),
    "albert": (hf.AlbertForMaskedLM, hf.AlbertConfig(**BERT, embedding_size=16, hidden_act="gelu_new")),
    "electra": (hf.ElectraForMaskedLM, hf.ElectraConfig(**BERT, embedding_size=16)),
    "electra_detection": (hf.ElectraForPreTraining, hf.ElectraConfig(**BERT, embedding_size=16)),
    "deberta_v3": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config(**DEBERTA, share_att_key=True)),
    "deberta_apart": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config(**DEBERTA, share_att_key=False)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=20)),
    "llama": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=20,
            rms_norm_eps=1e-2,  # large enough to show where it is added
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=False,
        ),
    ),
    "modernbert": (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=5,
            num_attention_heads=4,
            intermediate_size=24,
            max_position_embeddings=20,
            local_attention=4,
            global_attn_every_n_layers=3,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 160_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    ),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5)),
    "t5_v1_1": (hf.T5ForConditionalGeneration, t5_v1_1(**T5)),
    "bart": (
        hf.BartForConditionalGeneration,
        hf.BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=40,
            max_position_embeddings=20,
        ),
    ),
}


def randomise(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Fill every parameter, and BART's bias buffer, with random float16 numbers; return them by name."""
    tensors = dict(model.named_parameters())  # tied ones once
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name == "final_logits_bias"}
    weights = {}
    for name, tensor in tensors.items():
        values = 0.2 * rng.standard_normal(tuple(tensor.shape))
        if tensor.ndim == 1 and name.endswith("weight"):  # the scale of a norm
            values += 1
        weights[name] = values.astype(np.float16)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(weights[name].astype(np.float32)))
    return weights


def padded(rng: np.random.Generator, lengths: tuple[int, ...], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.arange(length) < np.array(lengths)[:, None]
    tokens = rng.integers(4, VOCAB, mask.shape)
    return np.where(mask, tokens, pad), mask.astype(np.int64)


def record(family: str) -> dict[str, Any]:
    """Run one tiny model and collect what the test needs."""
    rng = np.random.default_rng(abs(hash_of(family)))
    make, config = FAMILIES[family]
    config._attn_implementation = "eager"
    model = build(make, config).float().eval()
    weights = randomise(model, rng)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    tokens, mask = padded(rng, LENGTHS, LENGTH, pad)
    arrays = {"tokens": tokens, "mask": mask}
    if BERT.items() <= config.to_dict().items():
        arrays["token_types"] = rng.integers(0, 2, tokens.shape)
    if config.is_encoder_decoder:
        arrays["decoder_tokens"], arrays["decoder_mask"] = padded(rng, TARGETS, TARGET, pad)
    names = {"tokens": "input_ids", "mask": "attention_mask", "token_types": "token_type_ids"}
    names |= {"decoder_tokens": "decoder_input_ids", "decoder_mask": "decoder_attention_mask"}
    with torch.no_grad():
        inputs = {names[name]: torch.from_numpy(array) for name, array in arrays.items()}
        out = model(**inputs, output_hidden_states=True)
    if config.is_encoder_decoder:
        states = {"encoder_hidden": out.encoder_hidden_states, "hidden": out.decoder_hidden_states}
    else:
        states = {"hidden": out.hidden_states}
    results = {name: torch.stack(tensors).numpy() for name, tensors in states.items()}
    versions = {"transformers": hf.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {
        **{f"weights/{name}": values for name, values in weights.items()},
        **{name: array.astype(np.int32) for name, array in arrays.items()},
        **results,
        "logits": out.logits.numpy(),
        "versions": np.array(json.dumps(versions)),
        "config": np.array(config.to_json_string(use_diff=True)),
    }


def xlnet() -> dict[str, Any]:
    """Both streams of XLNet for a random order, with a memory: four targets in each row, their ranks recorded."""
    rng = np.random.default_rng(abs(hash_of("xlnet")))
    sizes = {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48, "ff_activation": "gelu_new", "mem_len": 5}
    config = hf.XLNetConfig(vocab_size=VOCAB, **sizes)
    model = hf.XLNetLMHeadModel(config).float().eval()
    weights = randomise(model, rng)
    tokens = rng.integers(7, VOCAB, (ROWS, LENGTH))
    memory = rng.standard_normal((3, ROWS, 5, 32)).astype(np.float32)
    targets = np.sort(rng.permuted(np.tile(np.arange(LENGTH), (ROWS, 1)), axis=1)[:, :4])
    ranks = np.zeros((ROWS, LENGTH), int)
    np.put_along_axis(ranks, targets, rng.permuted(np.tile(np.arange(1, 5), (ROWS, 1)), axis=1), axis=1)
    blocked = ranks[:, None, :] >= np.maximum(ranks, 1)[:, :, None]  # a target itself, too; what is no target sees none
    with torch.no_grad():
        out = model(
            torch.from_numpy(tokens),
            perm_mask=torch.from_numpy(blocked.astype(np.float32)),
            target_mapping=torch.from_numpy(np.eye(LENGTH, dtype=np.float32)[targets]),
            mems=[torch.from_numpy(layer).transpose(0, 1).contiguous() for layer in memory],
            output_hidden_states=True,
        )
    versions = {"transformers": hf.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {
        **{f"weights/{name}": values for name, values in weights.items()},
        "tokens": tokens.astype(np.int32),
        "targets": targets.astype(np.int32),
        "ranks": ranks.astype(np.int32),
        "memory": memory,
        "content": torch.stack(out.hidden_states[0::2]).numpy(),
        "queries": torch.stack(out.hidden_states[1::2]).numpy(),
        "logits": out.logits.numpy(),
        "versions": np.array(json.dumps(versions)),
        "config": np.array(config.to_json_string(use_diff=True)),
    }


def tsdae() -> dict[str, Any]:
    """The losses of a decoder whose parameters are its encoder's, and that attends to one vector, of fewer tokens."""
    rng = np.random.default_rng(abs(hash_of("tsdae")))
    sizes = BERT | {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    decoder = hf.BertLMHeadModel(hf.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)).float().eval()
    encoder = hf.BertModel(hf.BertConfig(**sizes), add_pooling_layer=False).float().eval()
    weights = randomise(decoder, rng)
    encoder.load_state_dict(decoder.bert.state_dict(), strict=False)
    damaged, damaged_mask = padded(rng, (7, 3, 5), LENGTH, 0)
    tokens, mask = padded(rng, LENGTHS, LENGTH, 0)
    hidden = encoder(torch.from_numpy(damaged), attention_mask=torch.from_numpy(damaged_mask)).last_hidden_state
    logits = decoder(torch.from_numpy(tokens)[:, :-1], encoder_hidden_states=hidden[:, :1]).logits
    targets = torch.from_numpy(np.where(mask, tokens, -100))[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.swapaxes(1, 2), targets, reduction="none")
    losses.sum().backward()
    for layer in decoder.bert.encoder.layer:  # so jaxpt leaves them out
        asked = layer.crossattention.self
        assert not any(tensor.grad.any() for part in (asked.query, asked.key) for tensor in part.parameters())
    versions = {"transformers": hf.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {
        **{f"weights/{name}": values for name, values in weights.items()},
        "damaged": damaged.astype(np.int32),
        "damaged_mask": damaged_mask.astype(np.int32),
        "tokens": tokens.astype(np.int32),
        "mask": mask.astype(np.int32),
        "vectors": hidden[:, 0].detach().numpy(),
        "losses": losses.detach().numpy(),
        "versions": np.array(json.dumps(versions)),
    }


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31


def buckets() -> dict[str, Any]:
    """T5's relative position buckets for distances -300 ... 300, and DeBERTa's for -600 ... 600."""
    from transformers.models.t5.modeling_t5 import T5Attention  # pyright: ignore[reportMissingImports]

    distance = torch.arange(-300, 301)
    tables: dict[str, Any] = {"distance": distance.numpy().astype(np.int32)}
    for name, both in (("bidirectional", True), ("causal", False)):
        for count, far in ((32, 128), (8, 20)):
            table = T5Attention._relative_position_bucket(distance, both, count, far)
            tables[f"{name}_{count}_{far}"] = table.numpy().astype(np.int32)
    from transformers.models.deberta_v2.modeling_deberta_v2 import (  # pyright: ignore[reportMissingImports]
        make_log_bucket_position,
    )

    for count, far in ((256, 512), (4, 9), (32, 128)):
        table = make_log_bucket_position(torch.arange(-600, 601), count, far).to(torch.long)
        tables[f"deberta_{count}_{far}"] = torch.clamp(table + count, 0, 2 * count - 1).numpy().astype(np.int32)
    return tables


# ------------------------------------------------------------------------------------------- sizes


def bert_like(width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return sizes | {"intermediate_size": 4 * width} | more


def published() -> dict[str, tuple[Any, Any]]:
    """The published models by name: class and configuration."""
    roberta = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    models: dict[str, tuple[Any, Any]] = {}
    for size, shape in {"tiny": (128, 2, 2), "mini": (256, 4, 4), "small": (256, 12, 4)}.items():
        models[f"bert/{size}"] = hf.BertForMaskedLM, hf.BertConfig(**bert_like(*shape))
    for size, shape in {"base": (768, 12, 12), "large": (1024, 24, 16)}.items():
        models[f"bert/{size}"] = hf.BertForMaskedLM, hf.BertConfig(**bert_like(*shape))
        models[f"roberta/{size}"] = hf.RobertaForMaskedLM, hf.RobertaConfig(**bert_like(*shape), **roberta)
        models[f"electra/{size}"] = (
            hf.ElectraModel,
            hf.ElectraConfig(**bert_like(*shape), embedding_size=shape[0]),
        )
    models["electra/small"] = hf.ElectraModel, hf.ElectraConfig(**bert_like(256, 12, 4), embedding_size=128)
    deberta = {"xsmall": (384, 12, 6), "small": (768, 6, 12), "base": (768, 12, 12), "large": (1024, 24, 16)}
    for size, shape in deberta.items():
        settings = DEBERTA | bert_like(*shape, position_buckets=256, max_relative_positions=-1, share_att_key=True)
        del settings["max_position_embeddings"]
        config = hf.DebertaV2Config(**(settings | {"vocab_size": 128_100}))
        models[f"deberta_v3/{size}"] = hf.DebertaV2ForMaskedLM, config
    albert = {"base": (768, 12, 12), "large": (1024, 24, 16), "xlarge": (2048, 24, 16), "xxlarge": (4096, 12, 64)}
    for size, shape in albert.items():
        models[f"albert/{size}"] = hf.AlbertForMaskedLM, hf.AlbertConfig(**bert_like(*shape), embedding_size=128)
    gpt2 = {"small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20), "xl": (1600, 48, 25)}
    for size, (width, depth, heads) in gpt2.items():
        models[f"gpt2/{size}"] = hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=width, n_layer=depth, n_head=heads)
    llama = {
        "1b": (2048, 16, 32, 8, 8192, 128256, True),
        "7b": (4096, 32, 32, 32, 11008, 32000, False),
        "8b": (4096, 32, 32, 8, 14336, 128256, False),
    }
    for size, (width, depth, heads, kv_heads, mlp, vocab, tied) in llama.items():
        shape = bert_like(width, depth, heads, num_key_value_heads=kv_heads, intermediate_size=mlp)
        config = hf.LlamaConfig(**shape, vocab_size=vocab, tie_word_embeddings=tied)
        models[f"llama/{size}"] = hf.LlamaForCausalLM, config
    for size, shape, mlp in (("base", (768, 22, 12), 1152), ("large", (1024, 28, 16), 2624)):
        config = hf.ModernBertConfig(**bert_like(*shape, intermediate_size=mlp))
        models[f"modernbert/{size}"] = hf.ModernBertForMaskedLM, config
    t5 = {"small": (512, 6, 8, 2048, 1024), "base": (768, 12, 12, 3072, 2048), "large": (1024, 24, 16, 4096, 2816)}
    for size, (width, depth, heads, mlp, gated) in t5.items():
        shape = {"d_model": width, "num_layers": depth, "num_heads": heads}
        models[f"t5/{size}"] = hf.T5ForConditionalGeneration, hf.T5Config(**shape, d_ff=mlp)
        if size == "small":
            shape = {"d_model": 512, "num_layers": 8, "num_heads": 6}
        models[f"t5_v1_1/{size}"] = hf.T5ForConditionalGeneration, t5_v1_1(**shape, d_ff=gated)
    for size, (width, depth, heads) in {"base": (768, 6, 12), "large": (1024, 12, 16)}.items():
        stacks = {"encoder_layers": depth, "decoder_layers": depth}
        stacks |= {"encoder_attention_heads": heads, "decoder_attention_heads": heads}
        stacks |= {"encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width}
        config = hf.BartConfig(d_model=width, **stacks, vocab_size=50265)
        models[f"bart/{size}"] = hf.BartForConditionalGeneration, config
    return models


def count(make: Any, config: Any) -> dict[str, int]:
    with torch.device("meta"):
        model = build(make, config)
    embeddings = model.get_input_embeddings().num_embeddings
    return {"parameters": sum(p.numel() for p in model.parameters()), "vocab": embeddings}


def main() -> None:
    """Write everything into the folder that the command line names."""
    folder = Path(sys.argv[1])
    for family in FAMILIES:
        path = folder / f"{family}.npz"
        np.savez_compressed(path, **record(family))
        print(path, path.stat().st_size)
    np.savez_compressed(folder / "xlnet.npz", **xlnet())
    np.savez_compressed(folder / "tsdae.npz", **tsdae())
    np.savez_compressed(folder / "relative_buckets.npz", **buckets())
    counts = {name: count(make, config) for name, (make, config) in published().items()}
    text = json.dumps({"transformers": hf.__version__, "counts": counts}, indent=1)
    (folder / "parameter_counts.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
