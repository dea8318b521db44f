"""The parts of the sweep and the comparison that decide what is reported."""

import compare
import pytest
import sweep
from common.training import Settings


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({3: 2.0, 4: 1.0, 5: 2.0}, None),
        ({3: 2.0, 4: 1.5, 5: 1.0}, 6),
        ({3: 1.0, 4: 1.5, 5: 2.0}, 2),
        ({3: 1.0}, 2),
        ({3: 2.0, 4: 1.0, 5: float("inf")}, None),
    ],
)
def test_the_grid_grows_where_the_best_rate_is_at_its_edge(losses, expected):
    assert sweep.next_k(losses) == expected


def test_all_optimizers_share_one_grid():
    assert sweep.rate(10) == pytest.approx(2 * sweep.rate(8), rel=1e-5)
    assert sweep.rate(9) / sweep.rate(8) == pytest.approx(2**0.5, rel=1e-4)
    assert sweep.SETTINGS.score_on == "validation"
    assert compare.SETTINGS.score_on == "held_out"
    assert sweep.SETTINGS.seed not in compare.SEEDS


def test_a_run_that_broke_down_counts_as_the_worst():
    assert sweep.final_loss([{"step": 1, "validation_loss": float("nan")}]) == float("inf")


def record(step: int, loss: float | None, logit: float, rate: float) -> dict[str, float]:
    base = {"step": step, "largest_logit": logit, "learning_rate": rate}
    return base if loss is None else base | {"held_out_loss": loss}


def test_outcome_reads_the_curves():
    rates = [1.0, 0.9, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0] * 2
    logits = [float(i) for i in range(20)]
    muon = [record(i + 1, 3.0 - i * 0.1 if i % 2 else None, logits[i], rates[i]) for i in range(20)]
    adamw = [record(20, 2.05, 3.0, 0.0)]
    found = compare.outcome([muon], [adamw], rate=1.0)
    assert found.steps_to_adamw == [12]
    assert found.largest_logit == [19.0]
    assert found.largest_logit_rate_high == [12.0]
    assert found.largest_logit_at_end == [19.0]
    assert compare.outcome([muon], [[record(20, 0.1, 3.0, 0.0)]], 1.0).steps_to_adamw == [None]
    text = compare.table({"adamw": found, "muon": found}, Settings(steps=20))
    assert "| Muon | 1 | 1.100 (1.100 - 1.100) | 12 (12 - 12), 1/1.67 |" in text
