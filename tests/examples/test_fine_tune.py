"""Going on from AdamW's checkpoint: what each way begins with."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.data import Corpus
from common.model import ModelConfig
from common.training import Settings, State, Training
from fine_tune import Comparison, saved_settings

TINY = ModelConfig(layers=1, width=16, query_heads=2, key_heads=1, hidden=16)
SETTINGS = Settings("adamw", 0.01, steps=6, batch_size=2, length=8, score_windows=4, model=TINY)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    random = np.random.default_rng(0)
    corpus = Corpus(*(random.integers(97, 123, size).astype(np.uint8) for size in (900, 300, 300)))
    training = Training(SETTINGS, corpus)
    state, update = jax.jit(training.init)(), jax.jit(training.tx.update)
    optimizer = state.optimizer
    for _ in range(SETTINGS.steps):  # the parameters serve as gradients: no model is compiled
        _, optimizer = update(state.params, optimizer, state.params)
    saved = State(jnp.int32(SETTINGS.steps), state.params, optimizer)
    return Comparison(saved, SETTINGS, corpus, steps=4)


def moments(state: State, label: str) -> Any:
    """The first transformation of one of the two groups of `muonclip`, which keeps the moments."""
    return state.optimizer.inner_states[label].inner_state[0]


def test_the_estimate_takes_momentum_and_counts_and_cold_takes_none(comparison):
    saved = comparison.saved
    adam = saved.optimizer[0]
    states = {}
    for way in ("estimate", "cold"):
        training = comparison.training(way, 0.01, "held_out")
        states[way] = comparison.state(way, training.tx)
    warm = states["estimate"]
    assert int(moments(warm, "muon").count) == int(adam.count) == 6
    kernel = ("block_0", "gate", "kernel")
    for label, moment, path in (
        ("muon", "mu", kernel),
        ("adamw", "mu", ("embed", "embedding")),
        ("adamw", "nu", ("embed", "embedding")),
    ):
        found, was = getattr(moments(warm, label), moment), getattr(adam, moment)
        for name in path:
            found, was = found[name], was[name]
        np.testing.assert_array_equal(found, was)
        assert np.any(np.asarray(was))
    cold = states["cold"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(cold.optimizer))
    for state in states.values():
        jax.tree.map(np.testing.assert_array_equal, state.params, saved.params)


def test_all_ways_see_the_same_rates_whatever_their_counts(comparison):
    """The rate is read off an update of nothing but decay: gradients and moments are zero."""
    for way in ("adamw", "estimate", "cold"):
        training = comparison.training(way, 0.01, "held_out")
        state = comparison.state(way, training.tx)
        assert int(state.step) == 0
        assert float(training.settings.schedule()(state.step)) == pytest.approx(0.01)
        counts = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 0]
        start = 0 if way == "cold" else SETTINGS.steps
        assert {int(count) for count in counts} == {start}
        zero = jax.tree.map(jnp.zeros_like, state.params)
        empty = training.tx.init(state.params)
        shifted = jax.tree.map(
            lambda leaf, start=start: jnp.int32(start) if leaf.ndim == 0 else leaf, empty
        )
        updates, _ = jax.jit(training.tx.update)(zero, shifted, state.params)
        kernel, change = (tree["block_0"]["gate"]["kernel"] for tree in (state.params, updates))
        np.testing.assert_allclose(change, -0.01 * training.settings.decay * kernel, rtol=1e-5)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"optimizer": "muon"}))
    with pytest.raises(SystemExit, match="was trained with muon"):
        saved_settings(tmp_path)
