import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jaxpt.metrics import BASELINE, Meter, MetricsWriter, matmul_flops, peak_flops

S = jax.ShapeDtypeStruct


def f32(*shape: int) -> S:
    return S(shape, jnp.float32)


# ------------------------------------------------------------------------------------------------- FLOPs

LAYERS, ROWS, WIDTH = 5, 4, 8
ONE = 2 * ROWS * WIDTH * WIDTH  # x[4, 8] @ w[8, 8]


def loop(x, w_NDD, block=lambda x, w: (jnp.tanh(x @ w), None)):
    return jax.lax.scan(block, x, w_NDD)[0]


@jax.custom_vjp
def doubled(x, w):
    return x @ w


doubled.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@pytest.mark.parametrize(
    ("fn", "flops"),
    [
        (lambda x, w: x @ w[0], ONE),
        (loop, LAYERS * ONE),
        (lambda x, w: jax.jit(loop)(x, w), LAYERS * ONE),
        (lambda x, w: loop(x, w, jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))), LAYERS * ONE),
        (lambda x, w: loop(x, w, lambda x, _: (loop(x, w), None)), LAYERS * LAYERS * ONE),
        (lambda x, w: jax.vmap(lambda row: row @ w[0])(x), ONE),
        (lambda x, w: jax.vmap(lambda m: x @ m)(w), LAYERS * ONE),
        (lambda x, w: jnp.einsum("rd,nde->nre", x, w), LAYERS * ONE),
        (lambda x, w: jax.lax.fori_loop(0, 3, lambda i, x: x @ w[i], x), 3 * ONE),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0]), 2 * ONE),
        (lambda x, w: doubled(x, w[0]), ONE),
        (jax.grad(lambda x, w: doubled(x, w[0]).sum(), argnums=(0, 1)), 3 * ONE),
        (jax.grad(lambda x, w: loop(x, w).sum(), argnums=(0, 1)), 3 * LAYERS * ONE),
        (lambda x, w: x + w[0, :4], 0),
    ],
)
def test_matmul_flops_closed_forms(fn, flops):
    assert matmul_flops(fn, f32(ROWS, WIDTH), f32(LAYERS, WIDTH, WIDTH)) == flops


def test_rematerialised_gradient_counts_its_recomputation():
    block = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    grad = jax.grad(lambda x, w: loop(x, w, block).sum(), argnums=(0, 1))
    assert matmul_flops(grad, f32(ROWS, WIDTH), f32(LAYERS, WIDTH, WIDTH)) == 4 * LAYERS * ONE


def test_matmul_flops_of_a_convolution():
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", feature_group_count=2)  # noqa: E731
    # output [2, 6, 6, 6]: each number takes 4 / 2 input features under a 3 x 3 window
    assert matmul_flops(conv, f32(2, 4, 8, 8), f32(6, 2, 3, 3)) == 2 * (2 * 6 * 6 * 6) * (2 * 3 * 3)


def test_matmul_flops_counts_every_shard():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    fn = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P(None, "tensor")), out_specs=P("data", "tensor"))
    assert matmul_flops(fn, f32(8, 16), f32(16, 6)) == 2 * 8 * 16 * 6


def test_matmul_flops_of_a_transformer_equals_the_sum_by_hand():
    rows, length, width, heads, hidden, vocab, depth = 2, 16, 8, 2, 32, 50, 3

    def forward(params, x):
        def block(x, p):
            q, k, v = (x @ p[name] for name in "qkv")
            q, k, v = (t.reshape(rows, length, heads, -1) for t in (q, k, v))
            scores = jax.nn.softmax(jnp.einsum("rqhc,rkhc->rhqk", q, k))
            x = x + jnp.einsum("rhqk,rkhc->rqhc", scores, v).reshape(rows, length, width) @ p["o"]
            return x + jax.nn.gelu(x @ p["up"]) @ p["down"], None

        return jax.lax.scan(jax.checkpoint(block), x, params["blocks"])[0] @ params["table"].T

    blocks = {name: f32(depth, width, width) for name in "qkvo"}
    blocks |= {"up": f32(depth, width, hidden), "down": f32(depth, hidden, width)}
    params = {"blocks": blocks, "table": f32(vocab, width)}
    tokens = rows * length
    # PaLM's count: 2 FLOPs per parameter and token, and 4 per token, key and unit of width for attention
    per_layer = 2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * length * width
    assert matmul_flops(forward, params, f32(rows, length, width)) == depth * per_layer + 2 * tokens * width * vocab


def test_peak_flops_of_this_cpu_and_of_data_sheets(monkeypatch):
    here = peak_flops()
    assert 1e8 < here < 1e15
    assert peak_flops() == here  # measured once

    class Device:
        platform = "gpu"

        def __init__(self, kind):
            self.device_kind = kind

    for kind, peak in {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA B200": 2250e12,
    }.items():
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [Device(kind)])
        assert peak_flops() == peak * jax.device_count(), kind


def test_meter_counts_tokens_flops_and_waiting(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def tick(seconds):
        clock[0] += seconds

    meter = Meter(peak=100.0, seconds=7.0)
    for _ in range(4):
        with meter.waiting():
            tick(0.5)
        tick(1.5)
        meter.step(tokens=100, flops=50.0)
    with meter.paused():
        tick(30.0)
    assert meter.read() == {"tokens_per_second": 50.0, "mfu": 0.25, "data_wait": 0.25, "seconds": 45.0}
    tick(2.0)
    meter.step(tokens=10, flops=50.0)
    assert meter.read() == {"tokens_per_second": 5.0, "mfu": 0.25, "data_wait": 0.0, "seconds": 47.0}


# ----------------------------------------------------------------------------------------------- writing


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def quiet():
    return Console(quiet=True)


def fill(directory, steps, resume_step=None):
    with MetricsWriter(directory, 40, resume_step=resume_step, console=quiet()) as writer:
        for step in steps:
            writer.train(step, {"loss": 9.0 / step, "seconds": 0.5 * step, "skipped_steps": 0})
            if step % 20 == 0:
                writer.evaluation(step, {"loss": 10.0 / step, BASELINE: 6.5})


def test_lines_hold_floats_in_full_null_and_integers(tmp_path):
    values = {"loss": 1 / 3, "grad_norm": math.inf, "mfu": math.nan, "skipped_steps": np.int32(2)}
    with MetricsWriter(tmp_path, 10, console=quiet()) as writer:
        writer.train(np.int64(3), values | {"accuracy": np.float32(0.1), "learning_rate": jnp.float32(1e-3)})
        lines = lines_of(tmp_path)  # flushed before the file is closed
        writer.evaluation(3, {"loss": 2.5, BASELINE: 3.5})
    assert lines == [
        {
            "step": 3,
            "loss": 1 / 3,
            "grad_norm": None,
            "mfu": None,
            "skipped_steps": 2,
            "accuracy": float(np.float32(0.1)),
            "learning_rate": float(np.float32(1e-3)),
        }
    ]
    assert isinstance(lines[0]["skipped_steps"], int)
    assert lines_of(tmp_path)[1] == {"step": 3, "eval/loss": 2.5, f"eval/{BASELINE}": 3.5}


def test_a_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fill(whole, range(5, 41, 5))
    fill(broken, range(5, 31, 5))
    path = broken / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 35, "lo')  # killed while it wrote
    fill(broken, range(25, 41, 5), resume_step=20)
    assert path.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_resume_keeps_a_whole_last_line_and_goes_on_with_the_seconds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.1, "seconds": 4.5}\nrubbish\n\n{"step": 2, "loss": 0.30000000000000004}')
    with MetricsWriter(tmp_path, 10, resume_step=2, console=quiet()) as writer:
        assert writer.seconds == 4.5
        writer.train(3, {"loss": 1.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    assert path.read_text().splitlines()[1] == '{"step": 2, "loss": 0.30000000000000004}'


def test_a_new_run_starts_empty_and_other_processes_write_nothing(tmp_path):
    fill(tmp_path, [5, 10])
    fill(tmp_path, [5])
    assert [line["step"] for line in lines_of(tmp_path)] == [5]
    with MetricsWriter(tmp_path / "other", 10, write=False) as writer:
        writer.train(1, {"loss": 1.0})
        writer.evaluation(1, {"loss": 1.0})
        writer.say("nothing")
    assert not (tmp_path / "other").exists()


def test_the_picture_is_drawn_and_never_stops_a_run(tmp_path, monkeypatch):
    fill(tmp_path, [10, 20])
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with MetricsWriter(tmp_path / "nothing", 10, console=quiet()) as writer:
        writer.train(1, {"loss": math.nan})
        writer.evaluation(1, {"loss": 0.0})  # nothing that a log axis could show
    assert (tmp_path / "nothing" / "loss.png").exists()
    said = Console(record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with MetricsWriter(tmp_path / "full", 10, console=said) as writer:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        writer.evaluation(1, {"loss": 1.0})
        writer.train(2, {"loss": 1.0})
    assert "could not draw loss.png: disk full" in said.export_text()
    assert len(lines_of(tmp_path / "full")) == 2


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    fill(tmp_path, [10, 20])
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # a record: u64 length, u32 checksum, the event, u32 checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert found[(10, "loss")] == pytest.approx(0.9)
    assert found[(20, "eval/loss")] == pytest.approx(0.5)


def test_plain_lines_without_a_terminal_and_a_live_line_with_one(tmp_path, capsys):
    values = {"loss": 5.4321, "tokens_per_second": 12345.6, "mfu": 0.314, "data_wait": 0.02, "skipped_steps": 1}
    with MetricsWriter(tmp_path / "plain", 40) as writer:
        writer.train(10, values)
        writer.evaluation(10, {"loss": 5.5, BASELINE: 6.5})
        writer.say("saved a checkpoint")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 10/40  loss 5.432  12.3k tokens/s  MFU 31.4%  data wait 2.0%  skipped 1  ETA 0:00:0")
    assert out[1:] == [f"evaluation at step 10/40  loss 5.5  {BASELINE} 6.5", "saved a checkpoint"]
    with MetricsWriter(tmp_path / "live", 40, console=Console(force_terminal=True, width=200)) as writer:
        writer.say("before the first line")
        writer.train(10, values)
        writer.tick(13)
        writer.say("saved a checkpoint")
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "step 0/40  compiling" in out
    assert "step 13/40  loss 5.432" in out
    assert "saved a checkpoint\n" in out.replace("\x1b[2K", "").replace("\r", "")
