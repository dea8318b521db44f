"""Loss over the rate, and where it is least, from the rows of `settings_width`."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from muonclip_jax.matrices.scales import SHAPE_RULES

#: Rules whose runs are those of another one at another rate (see `settings_width.py`).
SAME_RUNS = {
    "sqrt_max_fan": "sqrt_aspect",
    "match_rms_adamw": "sqrt_aspect",
    "gad_cell": "sqrt_aspect",
}


class Curve(NamedTuple):
    """Losses of one width under one rule.

    Attributes:
        rates: Rising, as one writes them under the rule.
        losses: After the last step; infinite where the run diverged.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    def at(self, rate: float) -> float | None:
        """The loss at a rate between those tried, linear in its logarithm; None outside."""
        if not self.rates[0] <= rate <= self.rates[-1]:
            return None
        return float(np.interp(np.log2(rate), np.log2(self.rates), self.losses))


class Best(NamedTuple):
    """Where a curve is lowest.

    Attributes:
        rate: The lowest point of the parabola through the best rate and its neighbours, in the
            logarithm of the rate; the best rate itself where it has no neighbour on one side.
        loss: The loss there.
        at_end: -1 where the lowest rate tried is the best, 1 where the highest is, else 0.
    """

    rate: float
    loss: float
    at_end: int


def rule_names() -> tuple[str, ...]:
    """All rules, in the order of the library's table."""
    return tuple(SHAPE_RULES)


def curves(rows: Iterable[Mapping[str, Any]], rule: str) -> dict[int, Curve]:
    """Returns the curve of each width, with the rates in the units of a rule."""
    runs = [row for row in rows if row["rule"] == SAME_RUNS.get(rule, rule)]
    found = {}
    for width in sorted({row["width"] for row in runs}):
        factor = SHAPE_RULES[rule][0](width, width)
        mine = sorted((row for row in runs if row["width"] == width), key=lambda row: row["rate"])
        losses = [math.inf if r["validation_loss"] is None else r["validation_loss"] for r in mine]
        found[width] = Curve(tuple(row["rate"] / factor for row in mine), tuple(losses))
    return found


def best(curve: Curve) -> Best:
    """Returns the lowest point of a curve.

    Example:
        >>> found = best(Curve((1.0, 2.0, 4.0), (3.0, 2.0, 3.0)))
        >>> round(found.rate, 6), found.at_end
        (2.0, 0)
        >>> best(Curve((1.0, 2.0), (3.0, 2.0))).at_end
        1
    """
    i = int(np.argmin(curve.losses))
    if i in (0, len(curve.rates) - 1):
        return Best(curve.rates[i], curve.losses[i], -1 if i == 0 else 1)
    x, y = np.log2(curve.rates[i - 1 : i + 2]), np.asarray(curve.losses[i - 1 : i + 2])
    if not np.isfinite(y).all():
        return Best(curve.rates[i], curve.losses[i], 0)
    a, b, c = np.polyfit(x - x[1], y, 2)
    shift = 0.0 if a <= 0 else -b / (2 * a)
    return Best(float(2 ** (x[1] + shift)), float(c + b * shift + a * shift**2), 0)
