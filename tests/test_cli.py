import os
import socket
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from jaxpt import cli
from jaxpt.config import load_config
from jaxpt.data.manifest import Manifest
from jaxpt.sharding import MeshConfig

CONFIG = str(Path(__file__).parent.parent / "configs" / "quickstart.py")


def said(capsys):
    """What a failed command said: one line on standard error, nothing else."""
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


# ------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["data", "--help"], ["help"]])
def test_help_teaches_by_examples(args, capsys):
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert "usage: jaxpt" in out
    assert "examples:\n  jaxpt " in out
    assert not err


@pytest.mark.parametrize("args", [[], ["train"], ["data"], ["data", "build"]])
def test_a_command_without_its_arguments_shows_its_help(args, capsys):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert "usage: jaxpt" in err
    assert not out


def test_help_of_a_config_lists_its_fields_with_their_values(capsys):
    assert cli.main(["train", CONFIG, "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("--steps INT", "--objective.decoder.depth INT", "--optimizer.learning-rate FLOAT", "--mesh.fsdp INT"):
        assert flag in out
    assert "(default: runs/quickstart)" in out


def test_help_of_evaluate_and_data_build(capsys):
    assert cli.main(["evaluate", "--help"]) == 0
    assert "--rows" in capsys.readouterr().out
    assert cli.main(["data", "build", "--help"]) == 0
    assert "--input" in capsys.readouterr().out


def test_the_version_is_the_package_s(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxpt 0.")


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["data", "build", "--help"]])
def test_help_and_data_building_never_load_jax(args):
    code = f"import sys; from jaxpt.cli import main; code = main({args!r}); sys.exit(code or 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_jaxpt_is_the_command():
    done = subprocess.run([sys.executable, "-m", "jaxpt", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "jaxpt: error: `jaxpt trian` is no command: did you mean `jaxpt train`? (`jaxpt --help`)\n"


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tokenize"], "the commands are train, evaluate, embed, show, plan, data"),
        (["data", "biuld"], "did you mean `jaxpt data build`?"),
        (["train", "--steps", "5"], "name the config file before --steps"),
        (["train", "nowhere.py"], "there is no config file nowhere.py"),
        (["train", CONFIG, "--data", "nowhere"], "nowhere holds no finished data build"),
        (["train", CONFIG, "--batch-size", "9", "--microbatches", "2"], "batch_size 9 cannot be cut into 2"),
        (["train", CONFIG, "--steps", "0"], "steps is 0"),
        (["evaluate", "--rows", "5"], "name the run directory before --rows"),
        (["evaluate", "RUN", "--rows", "0"], "--rows must be at least 1, not 0"),
        (["evaluate", "RUN", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["data", "build", "--corpus", "prose"], "name the folder of the build before --corpus"),
        (["data", "build", "OUT", "--input", "nowhere"], "--input nowhere"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_2(args, message, capsys):
    assert cli.main(args) == 2
    line = said(capsys)
    assert line.startswith("jaxpt: error: ")
    assert message in line


def test_a_mistyped_flag_is_corrected(capsys):
    assert cli.main(["train", CONFIG, "--optimizer.learning-rat", "1"]) == 2
    assert "--optimizer.learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "goes_on"), [("train", True), ("data", True), ("evaluate", False)])
def test_ctrl_c_says_whether_the_same_command_goes_on(command, goes_on, capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, f"_{command}", interrupted)
    assert cli.main([command]) == 130
    assert ("the same command goes on" in said(capsys)) == goes_on


def test_debug_shows_the_traceback(capsys, monkeypatch):
    assert cli.main(["--debug", "train", "nowhere.py"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("JAXPT_DEBUG", "1")
    assert cli.main(["train", "nowhere.py"]) == 1
    assert "Traceback" in capsys.readouterr().err


# ------------------------------------------------------------------------------ what commands are given


def test_data_build_builds(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"Line {n} says something else." for n in range(200)))
    out = tmp_path / "built"
    flags = ["--input", str(tmp_path / "text.txt"), "--document", "line", "--model", "byte", "--workers", "1"]
    assert cli.main(["data", "build", str(out), *flags]) == 0
    manifest = Manifest.load(out)
    assert sum(split.documents for split in manifest.splits.values()) == 200


@pytest.fixture
def spine(monkeypatch):
    """Stands for jaxpt.train, to see what the command line hands over."""
    module = types.SimpleNamespace(calls=[], result=0)

    def train(config):
        module.calls.append(config)
        return module.result

    def evaluate_run(run, **options):
        module.calls.append((run, options))
        return {"loss": 1.25, "unigram_loss": 2.5}

    module.train, module.evaluate_run = train, evaluate_run
    monkeypatch.setitem(sys.modules, "jaxpt.train", module)
    return module


def test_train_hands_over_the_overridden_config_and_returns_its_code(spine):
    spine.result = 75
    assert cli.main(["train", CONFIG, "--steps", "500", "--mesh.data", "1", "--mesh.fsdp", "4"]) == 75
    assert spine.calls == [
        replace(load_config(CONFIG), out="runs/quickstart", steps=500, mesh=MeshConfig(data=1, fsdp=4))
    ]
    cli.main(["train", CONFIG, "--out", "elsewhere"])
    assert spine.calls[1].out == "elsewhere"


def test_evaluate_hands_over_its_flags_and_prints_a_table_or_json(spine, capsys):
    assert cli.main(["evaluate", "runs/a", "--data", "x", "y=2", "--rows", "64", "--step", "100"]) == 0
    options = {"data": ("x", "y=2"), "step": 100, "rows": 64, "batch_size": None, "known": ()}
    assert spine.calls == [("runs/a", options)]
    assert capsys.readouterr().out == "loss          1.25\nunigram_loss  2.5\n"
    assert cli.main(["evaluate", "runs/a", "--json", "--config", CONFIG]) == 0
    assert capsys.readouterr().out == '{"loss": 1.25, "unigram_loss": 2.5}\n'
    assert type(load_config(CONFIG).objective) in spine.calls[1][1]["known"]


def test_errors_from_the_depths_of_a_library_keep_their_traceback(spine, capsys):
    def fails(config):
        return int("no number")

    def deeper(config):
        raise OSError(28, "No space left on device", "runs/full")

    spine.train = fails  # raised outside jaxpt: a bug, not a mistake of the user
    assert cli.main(["train", CONFIG]) == 1
    assert "Traceback" in capsys.readouterr().err
    spine.train = deeper  # names its path: the user can mend it
    assert cli.main(["train", CONFIG]) == 2
    assert "runs/full" in said(capsys)


# ------------------------------------------------------------------------------------- several processes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_distributed_joins_the_processes_before_the_run():
    code = (
        "import sys, types\n"
        "def train(config):\n"
        "    import jax\n"
        "    return 10 * jax.process_count() + jax.process_index()\n"
        "sys.modules['jaxpt.train'] = types.SimpleNamespace(train=train)\n"
        "from jaxpt.cli import main\n"
        f"sys.exit(main(['train', {CONFIG!r}, '--distributed', '--steps', '100']))"
    )
    where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | where | {"JAX_PROCESS_ID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [20, 21], said


def test_distributed_without_others_says_what_to_set(capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert cli.main(["train", CONFIG, "--distributed"]) == 2
    assert "set JAX_COORDINATOR_ADDRESS" in said(capsys)


def test_a_reader_that_goes_away_is_no_error():
    help_text = [sys.executable, "-m", "jaxpt", "train", CONFIG, "--help"]
    with subprocess.Popen(help_text, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == b""
        assert process.wait(100) == 0
