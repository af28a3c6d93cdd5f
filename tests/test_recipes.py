"""tools/recipes.py: what it makes of a recipe, and what it says of a run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import recipes  # noqa: E402

from jaxpt.config import load_config, validate  # noqa: E402


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_every_recipe_has_a_mini_size(name: str):
    published = load_config(ROOT / "configs" / f"{name}.py")
    config = recipes.mini_run(published, None, 200, "run")
    validate(replace(config, out="run"))
    assert type(config.objective) is type(published.objective)
    assert max(network.width for network in recipes.networks_of(config)) == recipes.WIDTH
    assert len(recipes.networks_of(config)) == len(recipes.networks_of(published))


def test_a_line_of_the_table_holds_what_was_measured():
    losses = [8.0, 8.2] * 10 + [7.0] * 160 + [6.0, 6.2] * 10
    found = {
        "vocab": 4096, "first_terms": {"mlm": 8.3, "pair/next": 0.69}, "losses": losses, "speed": [0.5, 0.7, 0.6],
        "corruption": [0.01, 0.02, 0.03],
    }  # fmt: skip
    line = recipes.row("bert_base", found)
    assert line[1:5] == ["mlm 8.300, pair/next 0.690", "ln V = 8.318, ln 2 = 0.693", "8.000", "6.100"]
    # two means of 20 values 0.1 away from each: standard error 0.1 * sqrt(20 / 19) * sqrt(2 / 20) = 0.0324
    assert line[5:] == ["62", "0.60 (0.50 to 0.70)", "2.0% (1.0% to 3.0%)"]


def test_a_recipe_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        recipes.main(["bert_huge"])
    assert "bert_huge: no such recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("simcse_base", "equal: ln 8 = 2.079"),
        ("simcse_supervised", "equal: ln 16 = 2.773"),  # a hard negative for each
        ("consert_base", "equal: ln 15 = 2.708"),  # both views of the others, and one's own other view
        ("declutr_base", "equal: ln 31 = 3.434"),  # two anchors of each document
        ("contrastive_lm", "equal: ln 8 = 2.079"),  # eight negatives asked for, seven other rows
        ("siglip_text", "equal: 5.545"),  # 8 ln 2
    ],
)
def test_vectors_are_compared_with_equal_ones(name: str, guess: str):
    found = {
        "vocab": 9,
        "first_terms": {"contrastive": 2.0},
        "losses": [2.0, 2.1] * 20,
        "speed": [1],
        "corruption": [0],
    }
    assert recipes.row(name, found)[2] == guess
