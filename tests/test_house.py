"""The house: files import only from lower floors, only models/ knows flax, data/ never imports jax."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxpt

ROOT = Path(jaxpt.__file__).parent
FLOORS = {
    "types": 0,
    "corruption": 1, "losses": 1, "models": 1, "data": 1, "optimizer": 1, "sharding": 1, "checkpoint": 1, "metrics": 1,
    "tracing": 1, "process": 1,
    "objectives": 2, "step": 2,
    "evaluate": 3, "diagnostics": 3, "tasks": 3,
    "config": 4,
    "train": 5,
    "plan": 6, "show": 6, "embed": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 9,
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path: Path):
    room = room_of(path)
    for name in imports(path):
        package, _, rest = name.partition(".")
        assert package != "flax" or room == "models", f"{path} imports flax"
        assert package not in ("jax", "jaxlib", "optax") or room != "data", f"{path} imports jax"
        if package == "jaxpt" and rest:
            other = rest.split(".")[0]
            assert other == room or FLOORS[other] < FLOORS[room], f"{path} imports {name}"
    assert room in FLOORS


def test_rooms_have_no_cycles():
    graph = {}
    for path in FILES:
        name = "jaxpt." + str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        graph[name.removesuffix(".__init__")] = {n for n in imports(path) if n.startswith("jaxpt.")}

    def targets(name: str) -> set[str]:
        found = {n if n in graph else n.rpartition(".")[0] for n in graph[name]}
        return (found & graph.keys()) - {name}

    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in targets(name):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        if name != "jaxpt":
            visit(name, ())


def test_the_step_and_the_trunk_name_no_objective():
    from jaxpt.objectives import OBJECTIVES

    for name in ("step.py", "train.py", "evaluate.py"):
        text = (ROOT / name).read_text()
        for objective, config in OBJECTIVES.items():
            assert objective not in text
            assert config.__name__ not in text


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"]])
def test_help_and_host_code_load_no_jax(command: list[str]):
    code = (
        "import sys, contextlib, io; from jaxpt.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): main({command!r})\n"
        "import jaxpt.types\n"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_readme_names_what_exists():
    text = (ROOT.parent / "README.md").read_text()
    assert "pip install -e . && jaxpt train configs/quickstart.py" in text
    assert 'pip install -e ".[test]" && pytest' in text
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    compile(block, "README.md", "exec")
    for name in set(re.findall(r"jaxpt\.([A-Za-z_]+)", block)):
        assert hasattr(jaxpt, name), name
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (ROOT.parent / link).exists(), link


def test_public_names_are_there():
    for name in jaxpt.__all__:
        assert getattr(jaxpt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        jaxpt.Nonsense  # noqa: B018
