"""What a plan says is what the compiled program and closed forms say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpt.cli import main
from jaxpt.config import PhaseConfig, RunConfig
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import CausalLM
from jaxpt.plan import make_plan
from jaxpt.plan.advice import advise, remark, remedies
from jaxpt.plan.collectives import Instruction, axis_of, collectives, groups_of, parse, trip_count
from jaxpt.plan.estimate import abstract_batch, stand_in_vocab
from jaxpt.plan.hardware import CHIPS
from jaxpt.plan.memory import bytes_needed, measure_memory
from jaxpt.plan.traffic import Traffic, purpose_of
from jaxpt.sharding import MeshConfig, make_mesh
from jaxpt.train import make_parts

CONFIGS = Path(__file__).parent.parent / "configs"

# A ring of permutes as the TPU compiler makes it of a gather: an outer loop over 24 layers, an inner one of stride 2.
RING = """\
HloModule jit_step

FileNames
1 "/home/you/jaxpt/models/blocks.py"

FunctionNames
1 "MLP.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%inner_cond (p: (u32[], bf16[1,64,1024])) -> pred[] {
  %p = (u32[], bf16[1,64,1024]{2,1,0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %bound = u32[] constant(8)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%windowed_dot_general_body_ag (q: (u32[], bf16[1,64,1024])) -> (u32[], bf16[1,64,1024]) {
  %q = (u32[], bf16[1,64,1024]{2,1,0}) parameter(0)
  %j = u32[] get-tuple-element(%q), index=0
  %x = bf16[1,64,1024]{2,1,0} get-tuple-element(%q), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%j, %two)
  %permute-start = (bf16[1,64,1024]{2,1,0:T(8,128)(2,1)}, bf16[1,64,1024]{2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, \
metadata={op_name="jit(step)/jvp()/while/body/dot_general" stack_frame_id=1}
  %permute-done = bf16[1,64,1024]{2,1,0} collective-permute-done(%permute-start)
  ROOT %out = (u32[], bf16[1,64,1024]{2,1,0}) tuple(%next, %permute-done)
}

%layer_cond (p.1: (s32[], bf16[1,64,1024])) -> pred[] {
  %p.1 = (s32[], bf16[1,64,1024]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %bound.1 = s32[] constant(24)
  ROOT %lt.1 = pred[] compare(%i.1, %bound.1), direction=LT
}

%layer_body (q.1: (s32[], bf16[1,64,1024])) -> (s32[], bf16[1,64,1024]) {
  %q.1 = (s32[], bf16[1,64,1024]{2,1,0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%q.1), index=0
  %x.1 = bf16[1,64,1024]{2,1,0} get-tuple-element(%q.1), index=1
  %one = s32[] constant(1)
  %next.1 = s32[] add(%j.1, %one)
  %zero = u32[] constant(0)
  %begin = (u32[], bf16[1,64,1024]{2,1,0}) tuple(%zero, %x.1)
  %loop = (u32[], bf16[1,64,1024]{2,1,0}) while(%begin), condition=%inner_cond, body=%windowed_dot_general_body_ag
  %y = bf16[1,64,1024]{2,1,0} get-tuple-element(%loop), index=1
  ROOT %out.1 = (s32[], bf16[1,64,1024]{2,1,0}) tuple(%next.1, %y)
}

ENTRY %main (a: bf16[1,64,1024]) -> bf16[1,64,1024] {
  %a = bf16[1,64,1024]{2,1,0} parameter(0)
  %start = s32[] constant(0)
  %begin.1 = (s32[], bf16[1,64,1024]{2,1,0}) tuple(%start, %a)
  %layers = (s32[], bf16[1,64,1024]{2,1,0}) while(%begin.1), condition=%layer_cond, body=%layer_body
  %fused = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %z = bf16[1,64,1024]{2,1,0} get-tuple-element(%layers), index=1
}
"""


def test_a_ring_inside_the_layers_is_counted_as_often_as_it_runs():
    (ring,) = collectives(RING, {"data": 1, "fsdp": 4})
    assert (ring.kind, ring.axis, ring.dtype) == ("collective-permute (gather ring)", "fsdp", "bf16")
    assert (ring.times, ring.received) == (24 * 4, 64 * 1024 * 2)
    assert ring.frames == ("blocks.py:MLP.__call__",)
    assert purpose_of(ring, {(256, 1024)}) == "parameters, forward"
    assert purpose_of(ring, {(256, 512)}) == "activations, forward: blocks.py:MLP.__call__"


def test_trips_without_a_hint():
    computations, entry = parse(RING)
    (loop,) = [each for each in computations[entry] if each.op == "while"]
    assert trip_count(loop, computations, computations[entry]) == 24
    later = RING.replace("%start = s32[] constant(0)", "%start = s32[] constant(3)")
    computations, entry = parse(later)
    assert trip_count(loop, computations, computations[entry]) == 21


@pytest.mark.parametrize(
    ("text", "groups", "axis"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x", [[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), x", [[0, 2], [1, 3], [4, 6], [5, 7]], "fsdp"),
        ("replica_groups=[1,8]<=[8], x", [[0, 1, 2, 3, 4, 5, 6, 7]], "data+fsdp+tensor"),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x", [[0, 1, 4, 5], [2, 3, 6, 7]], "data+tensor"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x",
         [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]], "data+fsdp+tensor"),
    ],
)  # fmt: skip
def test_groups_and_axes(text: str, groups: list[list[int]], axis: str):
    found = groups_of(Instruction("x", "all-gather", [], f"%a), {text}", False), 8)
    assert found == groups
    assert axis_of(found, {"data": 2, "fsdp": 2, "tensor": 2}) == axis


def test_a_compiled_program_with_known_collectives():
    """Six layers of [32, 32] split over fsdp 4: each is gathered twice and its gradient reduced once."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))

    def loss(kernels: jax.Array, x: jax.Array) -> jax.Array:
        return (jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0] ** 2).sum()

    def given(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))

    step = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, P(None, "fsdp")))
    compiled = step.lower(given((6, 32, 32), P(None, "fsdp")), given((16, 32), P(("data", "fsdp")))).compile()
    found = collectives(compiled.as_text() or "", dict(mesh.shape))
    gathers = [each for each in found if each.kind == "all-gather"]
    assert {(each.axis, each.times, each.received) for each in gathers} == {("fsdp", 6, 32 * 32 * 4 * 3 // 4)}
    assert len(gathers) == 2  # forward and backward
    reduced = [each for each in found if each.kind in ("all-reduce", "reduce-scatter")]
    assert {each.times for each in reduced} == {6}
    assert {axis for each in reduced for axis in each.axis.split("+")} == {"data", "fsdp"}


def test_fused_pieces_of_one_gather_are_one_collective():
    gather = (
        "  %g{0} = bf16[64,32]{{1,0}} all-gather(%a), channel_id=7, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, "
        'frontend_attributes={{chain_id="1"}}, metadata={{op_name="jit(step)/jvp()/x"}}\n'
    )
    text = (
        "%piece.1 (a: bf16[16,32]) -> bf16[64,32] {\n" + gather.format(1) + "}\n"
        "%piece.2 (a: bf16[16,32]) -> bf16[64,32] {\n" + gather.format(2) + "}\n"
        "ENTRY %main (a: bf16[16,32]) -> bf16[64,32] {\n"
        "  %a = bf16[16,32]{1,0} parameter(0)\n"
        "  %f1 = bf16[64,32]{1,0} fusion(%a), kind=kCustom, calls=%piece.1\n"
        "  ROOT %f2 = bf16[64,32]{1,0} fusion(%a), kind=kCustom, calls=%piece.2\n"
        "}\n"
    )
    (one,) = collectives(text, {"fsdp": 4})
    assert one.total == 64 * 32 * 2 * 3 // 4


def run(**changes: object) -> RunConfig:
    decoder = TransformerConfig(depth=2, width=64, heads=2, positions="rotary", tie_embeddings=True)
    values = {"data": ("nowhere",), "batch_size": 16, "seq_len": 32, "vocab_size": 512}
    return RunConfig(CausalLM(decoder=decoder), **(values | {"mesh": MeshConfig(data=2, fsdp=4)} | changes))  # type: ignore[arg-type]


def test_the_plan_of_a_real_step():
    plan = make_plan(run(), "cpu:8")
    layer = 4 * 64 * 64 + 2 * 64 * 256
    kernels = 512 * 64 + 2 * layer
    rest = plan.parameters - kernels  # norms and biases
    assert 0 < rest < 0.1 * kernels
    # kernels are split over fsdp 4; Adam keeps two numbers per parameter
    assert 4 * kernels / 4 <= plan.memory.params <= 4 * (kernels / 4 + rest)
    assert plan.memory.optimizer == pytest.approx(2 * plan.memory.params, abs=64)
    assert plan.memory.peak == pytest.approx(
        plan.memory.params + plan.memory.optimizer + plan.memory.other + plan.memory.temporaries
    )
    tokens = 16 * 32
    products = 6 * tokens * kernels + 3 * 2 * 2 * 2 * tokens * 32 * 64  # kernels, and scores and sums of two layers
    assert plan.flops == pytest.approx(products, rel=0.01)
    assert plan.flops <= plan.executed_flops < 1.5 * plan.flops
    gathered = sum(line.bytes for line in plan.traffic if line.purpose.startswith("parameters"))
    assert gathered >= 0.75 * 2 * layer * 4  # each layer at least once, three quarters of it from other devices
    assert all(line.wanted for line in plan.traffic if "activations" in line.purpose)
    assert plan.vocabulary.startswith("512 tokens, a stand-in")
    assert plan.memory.fits and not plan.advice and plan.roofline is None


def test_what_cannot_be_planned_says_why():
    with pytest.raises(ValueError, match="product is 8"):
        make_plan(run(mesh=MeshConfig(data=3, fsdp=4)), "cpu:8")
    with pytest.raises(ValueError, match="multiple of 8"):
        make_plan(run(batch_size=12), "cpu:8")
    with pytest.raises(ValueError, match="KIND one of v4, v5e, v5p, v6e"):
        make_plan(run(), "h100:8")
    with pytest.raises(ValueError, match="write cpu:8"):
        make_plan(run(), "cpu:many")


def test_remedies_build_on_each_other():
    plan = make_plan(run(), "cpu:8")
    tried = list(remedies(run(), plan.mesh, plan.batch_size))
    assert [flag for flag, _ in tried] == [
        "--mesh.data 1 --mesh.fsdp 8", "--objective.decoder.remat full", "--microbatches 2",
    ]  # fmt: skip
    last = tried[-1][1]
    assert last.mesh == MeshConfig(data=1, fsdp=8) and last.microbatches == 2
    assert isinstance(last.objective, CausalLM) and last.objective.decoder.remat == "full"


def test_refusal_of_the_compiler():
    message = "RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G."
    assert bytes_needed(message) == (20 * 2**30, 15.75 * 2**30)
    assert bytes_needed("something else") is None


def test_memory_of_a_program_that_was_refused():
    """The compiler's number holds everything: on v5e, 18 GiB of donated arguments alone made it say 18.02G."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    parts = make_parts(run(), stand_in_vocab(512), mesh)
    batch = abstract_batch(parts.objective.rows, 32, 16, mesh)
    memory = measure_memory(parts, batch, None, (20 * 2**30, 15.75 * 2**30), CHIPS["v5e"])
    assert (memory.peak, memory.capacity, memory.fits) == (20 * 2**30, 15.75 * 2**30, False)
    assert memory.params + memory.optimizer + memory.other + memory.temporaries == memory.peak
    assert "needs 20.0 of 15.8 GiB" in next(
        advise(run(), memory, mesh.shape, PhaseConfig(0, seq_len=32, batch_size=16))
    )


def test_a_gradient_reduced_whole_over_several_sides_is_explained():
    line = Traffic("all-reduce", "fsdp", "f32", "gradients", 8, 10**9, wanted=False)
    assert "--mesh.fsdp 16" in next(remark([line], {"fsdp": (16, 16, 1)}))
    assert not list(remark([line], {"fsdp": (1, 16, 1)}))
    assert not list(remark([replace(line, wanted=True)], {"fsdp": (16, 16, 1)}))


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["plan", "--help"]) == 0
    assert "--topology v5p:4x4x8" in capsys.readouterr().out
    config = str(CONFIGS / "bert_tiny.py")
    assert main(["plan", config]) == 2
    assert "--topology v5p:4x4x4" in capsys.readouterr().err
    small = ["--mesh.fsdp", "2", "--batch-size", "16", "--seq-len", "16", "--objective.encoder.depth", "1"]
    assert main(["plan", config, "--topology", "cpu:8", "--json", *small]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    assert said["chips"] == 8 and said["memory"]["fits"] and said["changes"] == []


has_libtpu = importlib.util.find_spec("libtpu") is not None


@pytest.mark.skipif(has_libtpu, reason="libtpu is installed")
def test_without_libtpu_the_fix_is_named():
    with pytest.raises(ValueError, match=r'pip install -e "\.\[tpu\]"'):
        make_plan(run(), "v5e:4x4")


TPU = """
import json, sys
from dataclasses import replace
sys.path.insert(0, {tests!r})
from test_plan import run
from jaxpt.plan import make_plan, to_json
from jaxpt.plan.hardware import CHIPS, axis_bandwidth, open_topology
from jaxpt.sharding import MeshConfig, make_mesh
devices, chip = open_topology("v5p:4x4x4")
mesh = make_mesh(MeshConfig(data=4, fsdp=16), devices)
speeds = [axis_bandwidth(mesh, axis, chip) for axis in ("data", "fsdp")]
print(json.dumps([to_json(make_plan(run(mesh=MeshConfig(data=2, fsdp=2)), "v5e:2x2")), speeds]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu, reason="needs libtpu: pip install -e '.[tpu]'")
def test_for_a_tpu():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    code = TPU.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    plan, speeds = json.loads(done.stdout.splitlines()[-1])
    assert speeds == [2 * CHIPS["v5p"].link_bandwidth, 4 * CHIPS["v5p"].link_bandwidth]
    assert plan["memory"]["fits"] and plan["roofline"]["overlapped"] <= plan["roofline"]["serial"]
    assert {line["axis"] for line in plan["traffic"]} >= {"fsdp"}
    # the token table's gradient is reduced whole, once (docs/scaling.md); nothing else is
    unwanted = [line for line in plan["traffic"] if not line["wanted"]]
    assert [(line["kind"], line["purpose"], line["count"]) for line in unwanted] == [("all-reduce", "gradients", 1)]
