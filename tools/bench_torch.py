"""Hugging Face Transformers on PyTorch as a contender of tools/bench.py, and the protocol that all contenders speak.

Started by `tools/bench.py` with an interpreter that has torch and transformers; it needs neither JAX nor jaxpt.
BERT is used as people use it: `labels` of -100 where nothing is predicted, logits at every position. bfloat16 is
`torch.autocast`, parameters stay float32; the optimizer is `torch.optim.AdamW(fused=True)`. Masking is done before
the clock starts.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Contender(NamedTuple):
    """What a worker runs: ``step()`` starts one step, ``finish()`` waits for all and returns the last loss."""

    step: Callable[[], None]
    finish: Callable[[], float]
    tokens: int  # per step
    device_bytes: Callable[[], int]  # peak memory of the accelerator so far; 0 on a CPU
    info: dict[str, Any]


def serve(build: Callable[[], Contender]) -> None:
    """Build a contender, run its first step, then answer every line "seconds X" or "steps N" with a JSON line."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    contender = build()
    start = time.perf_counter()
    contender.step()
    contender.finish()
    first = time.perf_counter() - start
    start = time.perf_counter()
    contender.step()
    contender.finish()
    second = time.perf_counter() - start
    print(json.dumps({"compile": max(first - second, 0.0), **contender.info}), file=replies)
    for line in sys.stdin:
        unit, amount = line.split()
        steps, start, cpu = 0, time.perf_counter(), time.process_time()
        while (steps if unit == "steps" else time.perf_counter() - start) < float(amount):
            contender.step()
            steps += 1
        loss = contender.finish()
        turn = {"steps": steps, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "loss": loss}
        turn |= {"tokens": steps * contender.tokens, "memory": peak_memory(), "device": contender.device_bytes()}
        print(json.dumps(turn), file=replies)


def peak_memory() -> int:
    """The most bytes of this process that were ever resident."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also counts what was inherited before exec
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:6] == "VmHWM:") << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def build(spec: dict[str, Any]) -> Contender:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
    )

    torch.manual_seed(0)
    where = "cuda" if spec["device"] == "gpu" or (spec["device"] is None and torch.cuda.is_available()) else "cpu"
    torch.set_float32_matmul_precision("high" if where == "cuda" else "highest")  # JAX's default on each
    rows, length, vocab, drop = spec["tokens"] // spec["length"], spec["length"], spec["vocab"], spec["dropout"]
    depth, width, heads = spec["depth"], spec["width"], spec["heads"]
    is_bert = spec["family"] == "bert"
    if is_bert:
        sizes = {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": heads}
        drops = {"hidden_dropout_prob": drop, "attention_probs_dropout_prob": drop}
        model = BertForMaskedLM(BertConfig(vocab_size=vocab, intermediate_size=4 * width, **sizes, **drops))
    else:
        sizes = {"n_layer": depth, "n_embd": width, "n_head": heads, "n_positions": 1024}
        drops = {"resid_pdrop": drop, "embd_pdrop": drop, "attn_pdrop": drop}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **sizes, **drops))
    model.to(where).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    batches = []
    for _ in range(4):
        tokens = torch.randint(5, vocab, (rows, length))
        labels = tokens.clone()
        if is_bert:
            chosen = torch.zeros(rows, length, dtype=torch.bool)
            places = torch.rand(rows, length).argsort(1)[:, : -(-length * 15 // 100)]
            chosen.scatter_(1, places, True)
            labels[~chosen] = -100
            draw = torch.rand(rows, length)
            tokens = torch.where(chosen & (draw < 0.8), 4, tokens)
            tokens = torch.where(chosen & (draw >= 0.9), torch.randint(5, vocab, (rows, length)), tokens)
        batches.append((tokens.to(where), labels.to(where)))

    def forward(tokens: Any, labels: Any) -> Any:
        with torch.autocast(where, torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            return model(input_ids=tokens, labels=labels).loss

    run = torch.compile(forward) if spec["compiled"] else forward
    count, last = 0, torch.zeros(())

    def step() -> None:
        nonlocal count, last
        last = run(*batches[count % len(batches)])
        last.backward()
        if spec["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        count += 1

    def finish() -> float:
        if where == "cuda":
            torch.cuda.synchronize()
        return float(last)

    def product(dtype: Any) -> float:
        matrix, best = torch.ones(1024, 1024, dtype=dtype, device=where), 0.0
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            finish()
            best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
        return best

    info = {"matmul": max(product(torch.float32), product(torch.bfloat16)), "version": torch.__version__}
    peak = (lambda: torch.cuda.max_memory_allocated()) if where == "cuda" else (lambda: 0)
    return Contender(step, finish, rows * length, peak, info)


if __name__ == "__main__":
    serve(lambda: build(json.loads(sys.argv[1])))
