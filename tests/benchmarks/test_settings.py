"""The curves of the sweep over widths: where a loss is least, in the units of a rule."""

import math
from typing import Any

import pytest

from benchmarks.report_settings import Curve, best, curves


def rows(rule: float | None, width: int, lowest: float) -> list[dict[str, Any]]:
    """A parabola in the logarithm of the rate, with its lowest point between the rates tried."""
    rates = [0.01 * 2**k for k in range(6)]
    return [
        {
            "consistent_rms": rule,
            "width": width,
            "rate": r,
            "validation_loss": 2 + math.log2(r / lowest) ** 2,
        }
        for r in rates
    ]


def test_the_lowest_point_of_a_parabola_is_found():
    found = best(curves(rows(None, 64, 0.05), None)[64])
    assert found.rate == pytest.approx(0.05)
    assert found.loss == pytest.approx(2)
    assert found.at_end == 0


def test_rules_are_kept_apart():
    measured = rows(None, 64, 0.08) + rows(0.2, 64, 0.05)
    assert best(curves(measured, None)[64]).rate == pytest.approx(0.08)
    assert best(curves(measured, 0.2)[64]).rate == pytest.approx(0.05)


def test_ends_and_divergence():
    assert best(Curve((1.0, 2.0, 4.0), (1.0, 2.0, 3.0))).at_end == -1
    assert best(Curve((1.0, 2.0, 4.0), (3.0, 2.0, math.inf))).rate == 2.0
    diverged = [row | {"validation_loss": None} for row in rows(0.2, 64, 0.05)[:2]]
    assert curves(diverged, 0.2)[64].losses == (math.inf, math.inf)
    assert Curve((1.0, 4.0), (1.0, 3.0)).at(2.0) == 2.0
    assert Curve((1.0, 4.0), (1.0, 3.0)).at(8.0) is None
