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


@pytest.mark.parametrize("way", ["adamw", "estimate", "cold"])
def test_each_way_begins_with_its_moments_and_the_same_rate(comparison, way: str):
    """The rate is read off an update of nothing but decay: gradients and moments are zero."""
    training = comparison.training(way, 0.01, "held_out")
    state, saved = comparison.state(way, training.tx), comparison.saved
    jax.tree.map(np.testing.assert_array_equal, state.params, saved.params)
    start = 0 if way == "cold" else SETTINGS.steps
    counts = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 0]
    assert {int(count) for count in counts} == {start}
    if way == "estimate":
        for label, moment, path in (
            ("muon", "mu", ("block_0", "gate", "kernel")),
            ("adamw", "mu", ("embed", "embedding")),
            ("adamw", "nu", ("embed", "embedding")),
        ):
            # The first transformation of each of the two groups of `muonclip` keeps the moments.
            found: Any = state.optimizer.inner_states[label].inner_state[0]
            found, was = getattr(found, moment), getattr(saved.optimizer[0], moment)
            for name in path:
                found, was = found[name], was[name]
            np.testing.assert_array_equal(found, was)
            assert np.any(np.asarray(was))
    elif way == "cold":
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))
    assert int(state.step) == 0
    zero, empty = jax.tree.map(jnp.zeros_like, state.params), training.tx.init(state.params)
    shifted = jax.tree.map(lambda leaf: jnp.int32(start) if leaf.ndim == 0 else leaf, empty)
    updates, _ = jax.jit(training.tx.update)(zero, shifted, state.params)
    kernel, change = (tree["block_0"]["gate"]["kernel"] for tree in (state.params, updates))
    np.testing.assert_allclose(change, -0.01 * training.settings.decay * kernel, rtol=1e-5)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"optimizer": "muon"}))
    with pytest.raises(SystemExit, match="was trained with muon"):
        saved_settings(tmp_path)
