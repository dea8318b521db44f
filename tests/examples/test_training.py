"""The shared loop, and going on from AdamW's checkpoint: settings, records, state, moments."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.data import Corpus
from common.model import GPT, ModelConfig
from common.training import OPTIMIZERS, Settings, State, Training
from fine_tune import Comparison, saved_settings

TINY = ModelConfig(layers=1, width=16, query_heads=2, key_heads=1, hidden=16)
STEPS = 7


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    random = np.random.default_rng(0)
    return Corpus(*(random.integers(97, 123, size).astype(np.uint8) for size in (4000, 500, 500)))


def tiny(**changes: Any) -> Settings:
    values: dict[str, Any] = {"steps": STEPS, "batch_size": 2, "length": 8}
    values |= {"score_every": 3, "score_windows": 4, "model": TINY, "optimizer": "muonclip"}
    return Settings(**(values | changes))


def test_a_later_byte_changes_no_earlier_logit():
    model = GPT(TINY)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 256).astype(jnp.uint8)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    before, after = (jax.jit(model.apply)(params, x) for x in (tokens, tokens.at[:, 7].add(1)))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_step_has_a_record_and_a_run_goes_on_from_any_state_to_the_same_bits(
    corpus, optimizer
):
    """Bitwise: the copied state of the middle, in a second `Training`, against the whole run."""
    settings = tiny(optimizer=optimizer, score_on="validation")
    training, middle, chunks = Training(settings, corpus), None, []
    for state, records in training.run(training.init()):
        chunks.append(records)
        middle = jax.tree.map(np.array, state) if middle is None else middle
    assert [len(records) for records in chunks] == [3, 3, 1]
    records = [record for chunk in chunks for record in chunk]
    assert [record["step"] for record in records] == list(range(1, 8))
    scored = [record["step"] for record in records if "validation_loss" in record]
    assert scored == [3, 6, 7]
    assert all(np.isfinite(list(record.values())).all() for record in records)
    if optimizer == "muonclip":
        again = Training(settings, corpus).run(jax.tree.map(jnp.asarray, middle))
        rest = [record for _, records in again for record in records]
        for record in records + rest:
            record.pop("tokens_per_second")
        assert records[3:] == rest


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (tiny, {"optimizer": "sgd"}, "muonclip, muon, adamw"),
        (tiny, {"score_on": "train_and_test"}, "held_out"),
        (tiny, {"steps": 0}, "steps must be positive"),
        (ModelConfig, {"width": 98}, "width must be a multiple of 8"),
        (ModelConfig, {"key_heads": 3}, "query_heads must be a multiple of key_heads"),
    ],
)
def test_bad_settings_are_refused_at_construction(make: Any, changes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.fixture(scope="module")
def comparison(corpus) -> Comparison:
    training = Training(tiny(optimizer="adamw", learning_rate=0.01), corpus)
    state, update = jax.jit(training.init)(), jax.jit(training.tx.update)
    optimizer = state.optimizer
    for _ in range(STEPS):  # the parameters serve as gradients: no model is compiled
        _, optimizer = update(state.params, optimizer, state.params)
    saved = State(jnp.int32(STEPS), state.params, optimizer)
    return Comparison(saved, training.settings, corpus, steps=4)


@pytest.mark.parametrize("way", ["adamw", "estimate", "cold"])
def test_each_way_begins_with_its_moments_and_the_same_rate(comparison, way: str):
    """The rate is read off an update of nothing but decay: gradients and moments are zero."""
    training = comparison.training(way, 0.01, "held_out")
    state, saved = comparison.state(way, training.tx), comparison.saved
    jax.tree.map(np.testing.assert_array_equal, state.params, saved.params)
    start = 0 if way == "cold" else STEPS
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
