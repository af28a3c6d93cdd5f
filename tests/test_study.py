"""tools/study.py: the probe, the tasks that it reads, and the table and plot of what is done."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import study


def test_the_probe_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1200)
    noise = rng.normal(size=(1200, 20))
    assert study.classify(noise + 4 * np.eye(20)[labels], labels) > 0.9
    chance = study.classify(noise, labels)
    assert abs(chance - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 400)


def test_tasks_are_read_from_columns_and_from_json_lines(tmp_path: Path):
    with lzma.open(tmp_path / "task.tsv.xz", "wt", encoding="utf-8") as file:
        file.write("a text\twith a tab\tone\nanother\ttwo\n")
    (tmp_path / "task.jsonl").write_text('{"text": "a text", "label": 1}\n')
    assert sorted(study.read_task(tmp_path / "task.tsv.xz")) == [("a text\twith a tab", "one"), ("another", "two")]
    assert study.read_task(tmp_path / "task.jsonl") == [("a text", "1")]


def test_the_table_has_means_and_ranges_and_a_plot(tmp_path: Path):
    (tmp_path / "results").mkdir()
    for arm, seed, accuracy in [("causal_lm", 0, 0.5), ("causal_lm", 1, 0.7), ("untrained", 0, 0.25)]:
        found = {"arm": arm, "seed": seed, "steps": 1000, "flops": 1e9, "accuracy": {"article": accuracy}}
        (tmp_path / "results" / f"{arm}-{seed}.json").write_text(json.dumps(found))
    assert len(study.table(tmp_path)) == 3
    lines = (tmp_path / "study.md").read_text().splitlines()
    assert lines[2] == "| untrained | 1,000 | 25.0 (25.0 to 25.0) | 25.0 (25.0 to 25.0) |"
    assert lines[3] == "| causal_lm | 1,000 | 60.0 (50.0 to 70.0) | 60.0 (50.0 to 70.0) |"
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"
