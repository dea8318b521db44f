"""The shared loop: records, and a run that goes on from its state."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.data import Corpus
from common.model import GPT, ModelConfig
from common.training import OPTIMIZERS, Settings, Training
from fine_tune import saved_settings

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


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"optimizer": "muon"}))
    with pytest.raises(SystemExit, match="was trained with muon"):
        saved_settings(tmp_path)
