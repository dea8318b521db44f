"""The shared loop: checked settings, records for every step, and a state that is all there is."""

from typing import Any

import jax
import numpy as np
import pytest
from common.data import Corpus
from common.model import ModelConfig
from common.training import OPTIMIZERS, Settings, Training

TINY = ModelConfig(layers=1, width=16, query_heads=2, key_heads=1, hidden=16)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    random = np.random.default_rng(0)
    return Corpus(*(random.integers(97, 123, size).astype(np.uint8) for size in (4000, 500, 500)))


def tiny(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "steps": 7,
        "batch_size": 2,
        "length": 8,
        "score_every": 3,
        "score_windows": 4,
    }
    return Settings(**(values | {"model": TINY, "optimizer": "muonclip"} | changes))


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
        again = Training(settings, corpus).run(jax.tree.map(jax.numpy.asarray, middle))
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
