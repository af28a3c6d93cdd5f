import dataclasses
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from jaxpt.config import (
    PhaseConfig,
    RunConfig,
    config_types,
    load,
    load_config,
    override,
    resolve_phases,
    resume_differences,
    save,
    to_json,
    validate,
)
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import MaskedLM
from jaxpt.optimizer import OptimizerConfig, ParameterGroup
from jaxpt.sharding import MeshConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
ENCODER = TransformerConfig(depth=2, width=32, heads=2, max_length=512)
RUN = RunConfig(MaskedLM(encoder=ENCODER), out="runs/test")


@dataclass(frozen=True)
class OwnObjective:
    """An objective that is not jaxpt's."""

    encoder: TransformerConfig = field(default_factory=lambda: ENCODER)
    levels: tuple[tuple[int, float], ...] = ((1, 0.5), (2, 0.25))

    def build(self, vocab):
        raise NotImplementedError

    def for_evaluation(self):
        return self


# ----------------------------------------------------------------------------------------- config files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_survives_json(path, tmp_path):
    config = load_config(path)
    validate(config)
    save(config, tmp_path / "config.json")
    assert load(tmp_path / "config.json") == config
    assert resume_differences(load(tmp_path / "config.json"), config) == []
    documentation = path.read_text().split('"""')[1]
    assert f"jaxpt train configs/{path.name}" in documentation, "the docstring shows the command"


def test_there_is_a_config_for_every_published_family():
    families = {path.stem.split("_")[0] for path in CONFIGS}
    assert families >= {
        "quickstart",
        "bert",
        "roberta",
        "albert",
        "electra",
        "gpt2",
        "llama",
        "modernbert",
        "t5",
        "bart",
    }


def config_file(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"mine\.py does not work: it has no function `config\(\)`"),
        ("def config():\n    return 3\n", r"config\(\) of .*mine\.py returned int: it must return a jaxpt"),
        ("def config(:\n", r"mine\.py does not work.*SyntaxError"),
        (
            "import jaxpt\n\nimport no_such_package\n",
            r"mine\.py does not work \(line 3\): ModuleNotFoundError.*no_such",
        ),
        ("def config():\n    return 1 / 0\n", r"mine\.py does not work \(line 2\): ZeroDivisionError"),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file(tmp_path, text))


def test_the_line_is_told_of_a_relative_path_too(tmp_path, monkeypatch):
    config_file(tmp_path, "\ndef config():\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"config file mine\.py does not work \(line 3\): ZeroDivisionError"):
        load_config("mine.py")


def test_an_absent_config_file_is_named_and_a_near_one_offered(tmp_path):
    config_file(tmp_path, "")
    with pytest.raises(ValueError, match=r"no config file .*mien\.py: did you mean .*mine\.py\?"):
        load_config(tmp_path / "mien.py")
    with pytest.raises(ValueError, match=r"no config file nowhere/x\.py: name a Python file"):
        load_config("nowhere/x.py")


def test_loading_a_config_leaves_the_import_path_alone(tmp_path):
    before = list(sys.path)
    text = "from jaxpt.config import RunConfig\nfrom jaxpt.objectives import MaskedLM\n"
    load_config(config_file(tmp_path, text + "def config():\n    return RunConfig(MaskedLM())\n"))
    assert sys.path == before


# ----------------------------------------------------------------------------------------------- flags


def test_every_flag_of_the_documentation_is_understood():
    flags = (
        "--steps 500 --batch-size 64 --seq-len 256 --microbatches 2 --log-every 10 --checkpoint-every 100 "
        "--eval-every 100 --seed 3 --data DIR --out RUN --objective.rate 0.3 --optimizer.learning-rate 1e-3 "
        "--mesh.data 1 --mesh.fsdp 4 --mesh.tensor 2 --init-from OTHER"
    )
    assert override(RUN, flags.split()) == replace(
        RUN,
        steps=500,
        batch_size=64,
        seq_len=256,
        microbatches=2,
        log_every=10,
        checkpoint_every=100,
        eval_every=100,
        seed=3,
        data=("DIR",),
        out="RUN",
        objective=replace(RUN.objective, rate=0.3),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        mesh=MeshConfig(data=1, fsdp=4, tensor=2),
        init_from="OTHER",
    )


def test_flags_reach_every_depth_and_other_objectives():
    flags = "--objective.encoder.depth 3 --objective.selection.minimum 2 --data a b=0.5 --mesh.data -1 --eval-rows None"
    config = override(RUN, flags.split())
    assert (config.objective.encoder.depth, config.objective.selection.minimum) == (3, 2)
    assert (config.data, config.mesh.data, config.eval_rows) == (("a", "b=0.5"), -1, None)
    own = override(replace(RUN, objective=OwnObjective()), ["--objective.encoder.width", "64"])
    assert own.objective == OwnObjective(encoder=replace(ENCODER, width=64))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--objectiv.rate 0.3", "--objective.rate"),
        ("--steps many", "--steps"),
        ("--optimizer.schedule cosin", "cosine"),
        ("--objective.encoder.heads 5", "not a multiple of heads"),
    ],
)
def test_a_wrong_flag_is_explained(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        override(RUN, flags.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- validate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"batch_size": 64, "microbatches": 3}, "batch_size 64 cannot be cut into 3 equal microbatches"),
        ({"seq_len": 1024}, r"seq_len 1024 is longer than the 512 positions .* raise objective\.encoder\.max_length"),
        ({"data": ("pros",)}, "data: pros holds no finished data build.*Built in are 'prose' and 'code'"),
        ({"data": ()}, "data is empty"),
        ({"data": ("prose=-1",)}, "data prose has weight -1.0"),
        ({"data": ("prose=nan",)}, "data prose has weight nan"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"eval_rows": 0}, "eval_rows is 0"),
        ({"diagnose_every": -1}, "diagnose_every is -1"),
        ({"spike_factor": 0.5}, "spike_factor is 0.5: it must be 0"),
        ({"preemption_exit_code": 300}, "preemption_exit_code"),
        ({"out": "gs://bucket/run"}, "local or mounted"),
        ({"optimizer": OptimizerConfig(warmup_steps=2000)}, "warmup_steps is 2000"),
        ({"phases": (PhaseConfig(0, seq_len=64),)}, "a phase begins at step 0"),
        ({"phases": (PhaseConfig(9, seq_len=64), PhaseConfig(5))}, "a phase begins at step 5"),
        ({"phases": (PhaseConfig(9, seq_len=4096),)}, "seq_len 4096 is longer"),
        ({"phases": (PhaseConfig(9, batch_size=33),), "microbatches": 2}, "batch_size 33 cannot be cut"),
        ({"phases": (PhaseConfig(9, data=("nowhere",)),)}, "nowhere holds no finished"),
        ({"phases": (PhaseConfig(9, learning_rate=-1.0),)}, "learning_rate of a phase is -1.0"),
        ({"profile": -1}, "profile is -1"),
        ({"objective": None}, "objective is None: it must be an objective's configuration"),
        ({"objective": MaskedLM}, r"objective is <class .*: it must be an objective's configuration"),
        ({"steps": 5.5}, "steps is 5.5: it must be int"),
        ({"batch_size": True}, "batch_size is True: it must be int"),
        ({"data": "prose"}, r"data is 'prose': it must be tuple\[str, \.\.\.\]; a tuple of one is written"),
        ({"data": ["prose"]}, r"data is \['prose'\]: it must be tuple"),
        ({"eval_rows": "all"}, "eval_rows is 'all': it must be int | None"),
        ({"optimizer": {"learning_rate": 1e-3}}, "optimizer is {.*: it must be OptimizerConfig"),
        ({"optimizer": OptimizerConfig(schedule="cosin")}, r"optimizer\.schedule is 'cosin': it must be Literal\['c"),
        ({"optimizer": OptimizerConfig(groups=(3,))}, r"optimizer\.groups is \(3,\): it must be tuple"),
        ({"objective": MaskedLM(encoder=replace(ENCODER, norm="rmsnorm"))}, r"objective\.encoder\.norm is 'rmsnorm'"),
    ],
)
def test_what_cannot_run_is_refused_with_the_fix(change, message):
    validate(RUN)
    with pytest.raises(ValueError, match=message):
        validate(replace(RUN, **change))


def test_types_that_an_objective_of_ones_own_has_are_left_to_it():
    validate(replace(RUN, objective=OwnObjective(), optimizer=OptimizerConfig(learning_rate=1)))  # an int is a float
    with pytest.raises(ValueError, match=r"objective\.levels is \(\(1, 'x'\),\): it must be tuple"):
        validate(replace(RUN, objective=OwnObjective(levels=((1, "x"),))))


def test_rotary_positions_have_no_longest_row():
    validate(replace(RUN, seq_len=4096, objective=MaskedLM(encoder=replace(ENCODER, positions="rotary"))))


def test_phases_inherit_what_they_leave_open():
    phases = (PhaseConfig(10, seq_len=512), PhaseConfig(20, data=("code",), batch_size=8))
    assert resolve_phases(replace(RUN, phases=phases)) == (
        PhaseConfig(0, ("prose",), 256, 64),
        PhaseConfig(10, ("prose",), 512, 64),
        PhaseConfig(20, ("code",), 512, 8),
    )


# ------------------------------------------------------------------------------------------------ json


def test_json_keeps_types_and_numbers_exactly(tmp_path):
    config = replace(
        RUN,
        optimizer=OptimizerConfig(learning_rate=0.1 + 0.2, groups=(ParameterGroup("head/*", 0.1, frozen=True),)),
        phases=(PhaseConfig(5, ("prose", "code=0.5"), 64),),
        init_from="über/λ",
    )
    save(config, tmp_path / "config.json")
    assert load(tmp_path / "config.json") == config
    assert not list(tmp_path.glob("*.tmp*"))


def test_what_is_no_run_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{path.name} is not the directory of a run"):
            load(path / "config.json")


def test_an_objective_of_ones_own_is_read_when_it_is_known_and_only_then(tmp_path):
    path, config = tmp_path / "config.json", replace(RUN, objective=OwnObjective())
    save(config, path)
    assert load(path, known=config_types(config)) == config
    with pytest.raises(ValueError, match=r"config\.json: .*OwnObjective is not a configuration of this jaxpt"):
        load(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os.system", "os.system is not a configuration"),
        ("jaxpt.config.load", "jaxpt.config.load is not a configuration"),
        ("jaxpt.config.Path", "jaxpt.config.Path is not a configuration"),
        ("jaxpt.nowhere.Thing", "is not a configuration"),
        ("jaxpt_other.Thing", "is not a configuration"),
    ],
)
def test_only_configurations_are_rebuilt(tmp_path, monkeypatch, name, message):
    (tmp_path / "jaxpt_other.py").write_text("import dataclasses\n@dataclasses.dataclass\nclass Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    record = to_json(RUN)
    record["objective"]["@type"] = name
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "config.json")


def test_a_younger_field_takes_its_default_and_an_unknown_one_is_named(tmp_path):
    path, record = tmp_path / "config.json", to_json(RUN)
    del record["spike_factor"]
    path.write_text(json.dumps(record))
    assert load(path) == RUN
    path.write_text(json.dumps(record | {"speed": 3}))
    with pytest.raises(ValueError, match="RunConfig has no field speed"):
        load(path)
    del record["objective"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="objective"):
        load(path)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*config\.json: .* is not the directory of a run"):
        load(tmp_path / "config.json")
    for text, message in {"{": "is damaged", "[1]": "not the configuration of a run"}.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "config.json")
    with pytest.raises(ValueError, match="a configuration holds numbers"):
        to_json(replace(RUN, data=(object(),)))


# ---------------------------------------------------------------------------------------------- resume


def test_the_same_run_and_what_may_change_resume():
    changed = replace(
        RUN,
        steps=2000,
        microbatches=4,
        mesh=MeshConfig(fsdp=4, tensor=2),
        objective=replace(RUN.objective, encoder=replace(ENCODER, remat="full")),
        data=("elsewhere/prose",),
        log_every=1,
        eval_every=7,
        eval_rows=None,
        diagnose_every=5,
        checkpoint_every=3,
        keep=9,
        keep_best=0,
        max_failing=3,
        profile=5,
        preemption_exit_code=75,
        out="runs/moved",
        tasks=("sts=FILE",),
        phases=(PhaseConfig(50, seq_len=512),),
    )
    assert resume_differences(RUN, RUN) == []
    assert resume_differences(RUN, changed, step=50) == []


# every field is either allowed above or refused here, so that a new one is decided
REFUSED = {
    "objective": MaskedLM(encoder=ENCODER, rate=0.3),
    "data": ("prose=0.5",),
    "batch_size": 32,
    "seq_len": 128,
    "seed": 1,
    "optimizer": OptimizerConfig(learning_rate=2e-3),
    "init_from": "runs/other",
    "spike_factor": 10.0,
    "vocab_size": 4096,
    "phases": (PhaseConfig(10, seq_len=64),),
}
ALLOWED = {"steps", "microbatches", "mesh", "log_every", "eval_every", "eval_rows", "checkpoint_every", "keep"}
ALLOWED |= {"keep_best", "max_failing", "profile", "preemption_exit_code", "out", "diagnose_every", "tasks"}


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_difference_is_refused_and_shown(name):
    (line,) = resume_differences(RUN, replace(RUN, **{name: REFUSED[name]}), step=50)
    assert line.startswith(name)


def test_every_field_is_decided():
    assert {field.name for field in dataclasses.fields(RunConfig)} == REFUSED.keys() | ALLOWED


def test_differences_are_shown_by_their_path_and_phases_are_append_only():
    other = replace(RUN, objective=replace(RUN.objective, encoder=replace(ENCODER, width=64)), data=("prose", "code"))
    assert resume_differences(RUN, other) == [
        "objective.encoder.width: 32 in the run, 64 now",
        "data: weights [1.0] in the run, weights [1.0, 1.0] now",
    ]
    old = replace(RUN, phases=(PhaseConfig(10, seq_len=64),))
    assert "phases" in resume_differences(old, RUN)[0]
    changed = replace(RUN, phases=(PhaseConfig(10, seq_len=32),))
    assert resume_differences(old, changed) == ["phases.0.seq_len: 64 in the run, 32 now"]
    early = replace(RUN, phases=(*old.phases, PhaseConfig(20)))
    assert resume_differences(old, early, step=21) == [
        "phases: a new phase begins at step 20, before the restored step 21"
    ]


def test_another_objective_is_a_difference():
    differences = resume_differences(replace(RUN, objective=OwnObjective()), RUN)
    assert any(line.startswith("objective.@type") for line in differences)
