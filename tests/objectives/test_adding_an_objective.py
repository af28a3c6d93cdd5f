"""docs/adding_an_objective.md is run as it stands: its file is executed, held to the contract and trained."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny, tiny_vocab

from jaxpt.step import batch_gradient, finish, make_example
from jaxpt.types import ObjectiveConfig, Snapshot, Sums

PAGE = Path(__file__).parents[2] / "docs" / "adding_an_objective.md"


@pytest.fixture(scope="module")
def page_module():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    module = types.ModuleType("random_token_substitution")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def test_the_page_is_an_objective_that_learns(page_module):
    vocab = tiny_vocab()
    config = tiny(page_module.RandomTokenSubstitution(rate=0.3)).for_evaluation()
    assert isinstance(config, ObjectiveConfig)
    objective = config.build(vocab)
    params = jax.jit(objective.init)(jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(jax.tree.map(lambda spec: 0, objective.specs))
    batch = packed_batch(objective.rows, vocab)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, microbatches_key):
        snapshot = Snapshot(params, {}, jnp.int32(0))
        example = make_example(objective, snapshot, batch, microbatches_key)
        keys = jax.random.split(jax.random.key(1), 8)
        gradient = batch_gradient(objective, objective.specs, snapshot, example, keys, 2)
        updates, state = optimizer.update(gradient.grads, state)
        return optax.apply_updates(params, updates), state, example, gradient

    state, losses = optimizer.init(params), []
    for _ in range(40):
        params, state, example, gradient = step(params, state, jax.random.key(2))
        losses.append(float(gradient.losses["rts"] / example.counts["rts"].sum()))
    replaced = np.asarray(example.inputs["replaced"])
    scored = np.asarray(example.weights["rts"]) > 0
    np.testing.assert_array_equal(scored, ~vocab.is_special[batch.tokens])
    assert not replaced[~scored].any()
    assert 0.2 < replaced[scored].mean() < 0.4
    assert losses[0] == pytest.approx(np.log(2), abs=0.1)
    assert losses[-1] < losses[0] - 0.2  # one batch by heart
    metrics = finish(objective, Sums(gradient.losses, {"rts": example.counts["rts"].sum()}, gradient.stats))
    assert 0.7 < float(metrics["accuracy"]) <= 1
    assert float(metrics["loss/rts"]) == pytest.approx(losses[-1], rel=1e-5)


def test_the_line_of_the_page_is_that_of_the_table():
    """The diff must apply: its context lines stand in the real file."""
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    table = (PAGE.parents[1] / "jaxpt" / "objectives" / "__init__.py").read_text(encoding="utf-8")
    context = [line[1:] for line in diff.splitlines() if line.startswith(" ")]
    assert "\n".join(context) in table
