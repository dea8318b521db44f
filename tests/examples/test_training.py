"""The shared loop: checked settings, records for every step, and a state that is all there is."""

from typing import Any

import chex
import jax
import numpy as np
import pytest
from common.data import Corpus
from common.model import ModelConfig, next_byte_loss
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


def test_the_clip_scales_the_queries_of_the_plain_step(corpus):
    """One step of both from the same state: the same weights but for the queries."""
    threshold = 1e-4
    after = {}
    for optimizer in ("muon", "muonclip"):
        training = Training(tiny(optimizer=optimizer, threshold=threshold), corpus)
        tokens = training.batch(0)
        _, recorded = next_byte_loss(training.model, training.init().params, tokens)
        state, record = training.step(training.init(), tokens)
        after[optimizer] = state.params, record
    (maxima,) = recorded["block_0"]["attention"]["max_logits"]
    assert (maxima > threshold).all()
    plain, clipped = after["muon"][0], after["muonclip"][0]
    query = plain["block_0"]["attention"].pop("query")["kernel"]
    np.testing.assert_allclose(
        clipped["block_0"]["attention"].pop("query")["kernel"],
        query * (threshold / maxima)[None, :, None],
        rtol=1e-5,
        atol=1e-7 * float(abs(query).max()),  # `p + (clip(p + u) - p)` rounds as p does
    )
    chex.assert_trees_all_close(plain, clipped, rtol=0, atol=0)
    assert after["muon"][1]["clipped_heads"] == 0
    record = after["muonclip"][1]
    assert record["clipped_heads"] == TINY.query_heads
    assert record["smallest_gamma"] == pytest.approx(threshold / float(maxima.max()), rel=1e-5)


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
