"""The JAX contenders of tools/bench.py: a plain JAX + optax step without any abstraction, and jaxpt's own.

The plain step is our measure of "hand-written": BERT's masked LM and GPT-2's causal LM with everything that is known
to be fast on a CPU, each trick with a switch. tests/test_bench.py holds that it computes what jaxpt computes.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_torch import Contender, serve
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpt.config import RunConfig, load_config
from jaxpt.data.pipeline import Phase
from jaxpt.metrics import peak_flops
from jaxpt.models.config import TransformerConfig
from jaxpt.models.presets import bert, gpt2
from jaxpt.objectives import CausalLM, MaskedLM
from jaxpt.optimizer import OptimizerConfig
from jaxpt.process import calm_cpu
from jaxpt.sharding import MeshConfig, local_rows, make_mesh, put_batch
from jaxpt.step import make_example, make_train_step
from jaxpt.train import make_parts, step_flops
from jaxpt.types import Batch, Example, Snapshot, Vocab

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MASK, FIRST = 4, 5  # ids of [MASK] and of the first ordinary token
RATE = 0.15

# ------------------------------------------------------------------------------------- the plain step

TRICKS = {
    "gather": "BERT's loss on the masked positions only, not on every position",
    "operands": "gradients enter matrix products in bfloat16, not in float32",
    "rows": "weight gradients contract (rows, positions) as two axes, not as one",
    "bias": "bias gradients as a product with ones, not as a sum over columns",
    "loss": "the cross-entropy makes its gradient in the forward pass",
    "unroll": "layers written out, not scanned",
    "qkv": "one product for queries, keys and values",
    "nomask": "no attention mask where every row is one document",
}

Tree = Any


def product(spec: str, a: jax.Array, b: jax.Array, tricks: frozenset[str]) -> jax.Array:
    """Einsum of two arrays with float32 sums, whose gradients are products of the operands' dtype, too."""
    left, right, out = spec.replace("->", ",").split(",")
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if "operands" not in tricks:
        return einsum(spec, a, b)

    @jax.custom_vjp
    def run(a: jax.Array, b: jax.Array) -> jax.Array:
        return einsum(spec, a, b)

    def back(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = saved
        grad = grad.astype(a.dtype)
        da = einsum(f"{out},{right}->{left}", grad, b)
        first, second = (left, a), (out, grad)
        if next(letter for letter in right if (letter in left) != (letter in out)) in out:
            first, second = second, first  # XLA:CPU has no bfloat16 product whose result is transposed
        if "rows" not in tricks and len(right) == 2:
            first, second = (("t" + name[-1], x.reshape(-1, x.shape[-1])) for name, x in (first, second))
        db = einsum(f"{first[0]},{second[0]}->{right}", first[1], second[1])
        return da.astype(a.dtype), db.astype(b.dtype)

    run.defvjp(lambda a, b: (run(a, b), (a, b)), back)
    return run(a, b)


def add_bias(x: jax.Array, bias: jax.Array, dtype: Any, tricks: frozenset[str]) -> jax.Array:
    """Sum of [R, L, O] and [O]; the bias's gradient is a product of ``dtype`` with ones."""

    def back(saved: None, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = grad.reshape(-1, grad.shape[-1]).astype(dtype)
        return grad, jnp.dot(jnp.ones((1, len(flat)), dtype), flat, preferred_element_type=jnp.float32)[0]

    if "bias" not in tricks:
        return x + bias
    add = jax.custom_vjp(jnp.add)
    add.defvjp(lambda x, bias: (x + bias, None), back)
    return add(x, bias)


def dense(x: jax.Array, tree: Tree, tricks: frozenset[str]) -> jax.Array:
    y = product("rli,io->rlo", x, tree["kernel"].astype(x.dtype), tricks)
    return add_bias(y, tree["bias"], x.dtype, tricks).astype(x.dtype)


def norm(x: jax.Array, tree: Tree, epsilon: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y -= y.mean(-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * tree["scale"] + tree["bias"]).astype(x.dtype)


def attention(x: jax.Array, tree: Tree, heads: int, seen: jax.Array | None, tricks: frozenset[str]) -> jax.Array:
    if "qkv" in tree:
        parts = jnp.split(dense(x, tree["qkv"], tricks), 3, axis=-1)
    else:
        parts = [dense(x, tree[name], tricks) for name in ("query", "key", "value")]
    # Heads lead, since XLA:CPU lacks some products in bfloat16 of arrays that lie transposed.
    q, k, v = (part.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for part in parts)
    scores = product("rhqc,rhkc->rhqk", q, k, tricks) * q.shape[-1] ** -0.5
    if seen is not None:
        scores = jnp.where(seen, scores, -1e30)
    weights = jax.nn.softmax(scores).astype(x.dtype)
    out = product("rhqk,rhkc->rhqc", weights, v, tricks).astype(x.dtype)
    return dense(out.swapaxes(1, 2).reshape(x.shape), tree["out"], tricks)


def mean_nll(logits: jax.Array, targets: jax.Array, weights: jax.Array, tricks: frozenset[str]) -> jax.Array:
    """Weighted mean of the cross-entropy of [R, K, V] logits."""
    total = weights.sum()

    def plain(logits: jax.Array) -> jax.Array:
        hit = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, -1) - hit) * weights) / total

    def forward(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        top = logits.max(-1, keepdims=True)
        powers = jnp.exp(logits - top)
        sums = powers.sum(-1, keepdims=True)
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        nll = (jnp.log(sums) + top)[..., 0] - jnp.sum(jnp.where(hit, logits, 0), -1)
        grad = (powers / sums - hit) * (weights / total)[..., None]
        return jnp.sum(nll * weights) / total, grad

    if "loss" not in tricks:
        return plain(logits)
    own = jax.custom_vjp(plain)
    own.defvjp(forward, lambda grad, upper: (upper * grad,))
    return own(logits)


def plain_loss(params: Tree, batch: Tree, *, heads: int, dtype: str, tricks: frozenset[str]) -> jax.Array:
    """BERT's or GPT-2's loss; batch has tokens, targets, weights, for BERT positions, and may have segments."""
    is_bert = "positions" in batch
    epsilon, tokens = 1e-12 if is_bert else 1e-5, batch["tokens"]
    embed = params["embed"]
    x = embed["tokens"][tokens] + embed["positions"][: tokens.shape[1]]
    if is_bert:
        x = norm(x + embed["token_types"][0], embed["norm"], epsilon)
    x = x.astype(dtype)
    seen = None
    if "nomask" not in tricks:
        seen = (batch["segments"][:, :, None] == batch["segments"][:, None, :])[:, None]
    if not is_bert:
        causal = jnp.tri(tokens.shape[1], dtype=bool)
        seen = causal if seen is None else seen & causal

    def layer(x: jax.Array, tree: Tree) -> jax.Array:
        if is_bert:
            x = norm(x + attention(x, tree["attention"], heads, seen, tricks), tree["attention_norm"], epsilon)
            hidden = jax.nn.gelu(dense(x, tree["mlp"]["up"], tricks), approximate=False)
            return norm(x + dense(hidden, tree["mlp"]["down"], tricks), tree["mlp_norm"], epsilon)
        y = norm(x, tree["attention_norm"], epsilon)
        x = x + attention(y, tree["attention"], heads, seen, tricks)
        hidden = jax.nn.gelu(dense(norm(x, tree["mlp_norm"], epsilon), tree["mlp"]["up"], tricks), approximate=True)
        return x + dense(hidden, tree["mlp"]["down"], tricks)

    if isinstance(params["layers"], list):
        for tree in params["layers"]:
            x = layer(x, tree)
    else:
        x, _ = jax.lax.scan(lambda x, tree: (layer(x, tree), None), x, params["layers"])
    targets, weights = batch["targets"], batch["weights"]
    if is_bert:
        head, places = params["head"], batch["positions"]
        if "gather" in tricks:
            x = jnp.take_along_axis(x, places[..., None], axis=1)
        else:
            rows = jnp.arange(tokens.shape[0])[:, None]
            targets = jnp.zeros_like(tokens).at[rows, places].add(targets * (weights > 0))
            weights = jnp.zeros(tokens.shape).at[rows, places].add(weights)
        x = norm(jax.nn.gelu(dense(x, head["transform"], tricks), approximate=False), head["norm"], epsilon)
    else:
        x = norm(x, params["final_norm"], epsilon)
    logits = product("rkd,vd->rkv", x, embed["tokens"].astype(x.dtype), tricks)
    if is_bert:
        logits = add_bias(logits, params["head"]["bias"], x.dtype, tricks)
    return mean_nll(logits, targets, weights, tricks)


def plain_params(params: Tree, tricks: frozenset[str]) -> Tree:
    """The parameters of jaxpt's network in the plain step's form."""
    trunk = params["trunk"]
    layers = dict(trunk["layers"])
    if "qkv" in tricks:
        old = layers["attention"]
        fused = {k: jnp.concatenate([old[n][k] for n in ("query", "key", "value")], -1) for k in ("kernel", "bias")}
        layers["attention"] = {"qkv": fused, "out": old["out"]}
    if "unroll" in tricks:
        depth = layers["mlp_norm"]["scale"].shape[0]
        layers = [jax.tree.map(lambda leaf: leaf[i], layers) for i in range(depth)]  # noqa: B023
    return {**{name: trunk[name] for name in trunk if name != "layers"}, "layers": layers, "head": params["head"]}


def plain_masking(key: jax.Array, tokens: jax.Array, rate: float, mask_id: int, first_id: int, vocab: int) -> Tree:
    """BERT's 80/10/10 on a fixed share of every row: [CLS] and [SEP] at its ends stay."""
    rows, length = tokens.shape
    order, action, ids = jax.random.split(key, 3)
    noise = jax.random.uniform(order, tokens.shape).at[:, jnp.array([0, -1])].set(-1.0)
    _, places = jax.lax.top_k(noise, math.ceil(rate * length))
    targets = jnp.take_along_axis(tokens, places, 1)
    draw = jax.random.uniform(action, places.shape)
    other = jax.random.randint(ids, places.shape, first_id, vocab)
    there = jnp.where(draw < 0.8, mask_id, jnp.where(draw < 0.9, other, targets))
    inputs = tokens.at[jnp.arange(rows)[:, None], places].set(there)
    return {"tokens": inputs, "positions": places, "targets": targets, "weights": jnp.ones(places.shape)}


def plain_step(optimizer: optax.GradientTransformation, make: Callable[..., Tree], loss: Callable[..., jax.Array]):
    """(params, opt_state, step), tokens -> the same one step on, loss."""

    def step(state: Tree, tokens: jax.Array) -> tuple[Tree, jax.Array]:
        params, opt_state, count = state
        batch = make(jax.random.fold_in(jax.random.key(0), count), tokens)
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, count + 1), value

    return jax.jit(step, donate_argnums=0)


# ------------------------------------------------------------------------------------------ what is trained


def network(spec: dict[str, Any]) -> TransformerConfig:
    """The published network, or one of DEPTHxWIDTH, without dropout unless it is asked for."""
    family, _, size = spec["model"].partition("-")
    changes: dict[str, Any] = {"dtype": spec["dtype"], "dropout": spec["dropout"], "attention_dropout": spec["dropout"]}
    changes |= {"layers": spec["layers"]} if spec["layers"] else {}
    if "x" in size and size.replace("x", "").isdigit():
        depth, width = map(int, size.split("x"))
        changes |= {"depth": depth, "width": width, "heads": max(width // 64, 1)}
        size = {"bert": "base", "gpt2": "small"}[family]
    return {"bert": bert, "gpt2": gpt2}[family](size, **changes)


def random_vocab(size: int) -> Vocab:
    """A tokenizer's summary without the tokenizer."""
    ids = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "eos": 3, "bos": 2, "mask": MASK}
    arrays = {"starts_word": np.ones(size, bool), "unigram_counts": np.ones(size, np.int64)}
    return Vocab(size, **ids, **arrays, is_special=np.arange(size) < FIRST, token_bytes=np.full(size, 4, np.int32))


def run_config(spec: dict[str, Any]) -> RunConfig:
    if spec["model"] == "quickstart":
        return load_config(str(CONFIGS / "quickstart.py"))
    is_bert = spec["model"].startswith("bert")
    objective = MaskedLM(encoder=network(spec), rate=RATE) if is_bert else CausalLM(decoder=network(spec))
    optimizer = OptimizerConfig(learning_rate=1e-4, schedule="constant", weight_decay=0.01, clip_norm=spec["clip"])
    rows, length = spec["tokens"] // spec["length"], spec["length"]
    return RunConfig(objective=objective, steps=1000, batch_size=rows, seq_len=length, optimizer=optimizer)


def random_batches(spec: dict[str, Any]) -> list[Batch]:
    """A few batches of full rows, each one document: [CLS] ... [SEP]."""
    length, rows = spec["length"], spec["tokens"] // spec["length"]
    tokens: Any = np.random.default_rng(0).integers(FIRST, spec["vocab"], (4, rows, length)).astype(np.int32)
    tokens[:, :, 0], tokens[:, :, -1] = 2, 3
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ids, zeros = np.arange(rows, dtype=np.uint32), np.zeros(rows, np.int32)
    ones = np.ones((rows, length), np.int32)
    others: Any = (ones, positions, 0 * ones, ids, zeros, np.ones(rows, np.float32))
    return [Batch(each, *others) for each in tokens]


# ------------------------------------------------------------------------------------------ JAX contenders


def device_bytes() -> int:
    stats = None if jax.default_backend() == "cpu" else jax.local_devices()[0].memory_stats()
    return int((stats or {}).get("peak_bytes_in_use", 0))


def contender(spec: dict[str, Any], run: Callable[[int], Any], read: Callable[[Any], float]) -> Contender:
    """Steps whose measurements are read at once on a CPU, one step late elsewhere, as the training loop does."""
    count, pending, loss = 0, None, 0.0

    def step() -> None:
        nonlocal count, pending, loss
        new = run(count)
        count += 1
        if pending is not None:
            loss = read(pending)
        pending = new
        if jax.default_backend() == "cpu":
            finish()

    def finish() -> float:
        nonlocal pending, loss
        if pending is not None:
            loss, pending = read(pending), None
        return loss

    return Contender(step, finish, spec["tokens"], device_bytes, {"version": jax.__version__})


def build_jaxpt(spec: dict[str, Any]) -> Contender:
    """The real thing: objective, parts and step as `jaxpt train` makes them; of ``corruption`` see that command."""
    calm_cpu()  # as the command line does
    config, batches = run_config(spec), random_batches(spec)
    mesh = make_mesh(MeshConfig())
    jax.set_mesh(mesh)
    parts = make_parts(config, random_vocab(spec["vocab"]), mesh)
    objective, whole = parts.objective, NamedSharding(mesh, P())
    snapshot = Snapshot({}, {}, jnp.int32(0))  # neither objective looks at parameters when it corrupts
    corrupt = jax.jit(lambda batch, key: make_example(objective, snapshot, batch, key))
    rows = config.batch_size
    if spec["corruption"] == "alone":
        placed = [put_batch(batch, local_rows(rows, mesh), rows, mesh) for batch in batches]
        alone = lambda count: corrupt(placed[count % len(placed)], jax.random.key(count))  # noqa: E731
        return contender(spec, alone, lambda example: float(jax.block_until_ready(example).row_ids[0]))
    if spec["corruption"] == "before":
        done = [jax.device_get(corrupt(batch, jax.random.key(i))) for i, batch in enumerate(batches)]
        batches = [batch._replace(extras=example._asdict()) for batch, example in zip(batches, done, strict=True)]
        objective = objective._replace(corrupt=lambda snapshot, batch, key: Example(**batch.extras))
    settings = {"seed": config.seed, "spike_factor": config.spike_factor}
    step = make_train_step(objective, parts.optimizer, parts.specs, **settings)
    train_step = jax.jit(step, donate_argnums=0, out_shardings=(parts.shardings, whole))
    state = parts.born()

    def run_step(count: int) -> Any:
        nonlocal state
        batch = put_batch(batches[count % len(batches)], local_rows(rows, mesh), rows, mesh)
        state, measured = train_step(state, batch)
        return measured

    return contender(spec, run_step, lambda measured: float(jax.device_get(measured).loss))


def build_plain(spec: dict[str, Any]) -> Contender:
    """The plain step, from jaxpt's initial parameters."""
    tricks = frozenset(TRICKS) - set(spec["without"])
    net, batches = network(spec), random_batches(spec)
    objective = run_config(spec).objective.build(random_vocab(spec["vocab"]))
    params = jax.jit(lambda key: plain_params(objective.init(key), tricks))(jax.random.key(0))

    def make(key: jax.Array, tokens: jax.Array) -> Tree:
        ones = jnp.ones_like(tokens)
        if spec["family"] == "bert":
            return plain_masking(key, tokens, RATE, MASK, FIRST, spec["vocab"]) | {"segments": ones}
        weights = ones.astype(jnp.float32).at[:, -1].set(0)
        return {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "weights": weights, "segments": ones}

    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    if spec["clip"]:
        optimizer = optax.chain(optax.clip_by_global_norm(spec["clip"]), optimizer)
    loss = functools.partial(plain_loss, heads=net.heads, dtype=spec["dtype"], tricks=tricks)
    train_step = plain_step(optimizer, make, loss)
    state = (params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def run_step(count: int) -> jax.Array:
        nonlocal state
        state, value = train_step(state, batches[count % len(batches)].tokens)
        return value

    return contender(spec, run_step, float)


def facts(spec: dict[str, Any]) -> dict[str, Any]:
    """The useful FLOPs of a step, the parameters, and the peak of the machine."""
    config = run_config(spec)
    parts = make_parts(config, random_vocab(spec["vocab"]), make_mesh(MeshConfig()))
    row = jax.tree.map(lambda leaf: leaf[:1], random_batches(spec)[0])
    count = sum(leaf.size for leaf in jax.tree.leaves(parts.abstract.params))
    flops = step_flops(parts, row, Phase(0, (), spec["length"], config.batch_size))
    return {"flops": flops, "parameters": count, "peak": peak_flops(), "device": jax.devices()[0].device_kind}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked["kind"] == "facts":
        print(json.dumps(facts(asked)))
    else:
        serve(lambda: {"jaxpt": build_jaxpt, "plain": build_plain}[asked["kind"]](asked))
