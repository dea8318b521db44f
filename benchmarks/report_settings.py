"""The tables of docs/settings.md, as Markdown, and where a loss is least over the rate."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report_tables import table


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


def curves(rows: Iterable[Mapping[str, Any]], rule: float | None) -> dict[int, Curve]:
    """Returns the curve of each width under a `consistent_rms`."""
    runs = [row for row in rows if row["consistent_rms"] == rule]
    found = {}
    for width in sorted({row["width"] for row in runs}):
        mine = sorted((row for row in runs if row["width"] == width), key=lambda row: row["rate"])
        losses = [math.inf if r["validation_loss"] is None else r["validation_loss"] for r in mine]
        found[width] = Curve(tuple(row["rate"] for row in mine), tuple(losses))
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


def _rate(rate: float) -> str:
    return f"{rate:.2g}"


def _bounded(curve: Curve) -> str:
    """The best rate; with a sign where it is at the end of those tried."""
    found = best(curve)
    return {-1: "at most ", 0: "", 1: "at least "}[found.at_end] + _rate(found.rate)


def width_table(stored: Mapping[str, Any]) -> str:
    """Best rates by rule and width, how far they move, and what that costs."""
    widths = sorted({row["width"] for row in stored["rows"]})
    lines = []
    for rule in (None, 0.2):
        by_width = curves(stored["rows"], rule)
        found = [by_width.get(width, Curve((), ())) for width in widths]
        cells = [_bounded(curve) if len(curve.rates) >= 3 else "not finished" for curve in found]
        moved, lost = "", ""
        if "not finished" not in cells:
            narrow, wide = best(found[0]), best(found[-1])
            moved = f"{np.log2(wide.rate / narrow.rate):+.1f}"
            carried = found[-1].at(narrow.rate)
            lost = "outside of what was tried" if carried is None else f"{carried - wide.loss:.3f}"
        lines.append([f"`consistent_rms={rule}`", *cells, moved, lost])
    head = ["rule", *(f"width {width}" for width in widths), "octaves"]
    return table([*head, f"nats lost at {widths[-1]} with the best rate of {widths[0]}"], lines)


def losses_table(stored: Mapping[str, Any]) -> str:
    """The losses behind it, under the width rule."""
    by_width = curves(stored["rows"], None)
    rates = sorted({rate for curve in by_width.values() for rate in curve.rates})
    lines = []
    for width, curve in sorted(by_width.items()):
        losses = dict(zip(curve.rates, curve.losses, strict=True))
        least = min(losses.values())
        cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        cells = [f"**{c}**" if c == f"{least:.3f}" else c for c in cells]
        lines.append([str(width), *cells])
    return table(["width", *map(_rate, rates)], lines)


def _over_seeds(rows: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if len(values) < len(rows):
        return "no number"
    low, high = min(values), max(values)
    middle = f"{statistics.mean(values):.{digits}f}"
    return middle if low == high else f"{middle} ({low:.{digits}f} - {high:.{digits}f})"


def _clip_rows(
    stored: Mapping[str, Any], chosen: Callable[[Mapping[str, Any]], bool], key: str
) -> dict[Any, list[Mapping[str, Any]]]:
    grouped: dict[Any, list[Mapping[str, Any]]] = {}
    for row in stored["rows"]:
        if chosen(row):
            grouped.setdefault(row[key], []).append(row)
    return grouped


def _against(
    rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Rows with the difference of their loss from the run of the same seed in `base`."""
    by_seed = {row["seed"]: row["validation_loss"] for row in base}
    found = []
    for row in rows:
        loss, other = row["validation_loss"], by_seed.get(row["seed"])
        difference = None if loss is None or other is None else loss - other
        found.append({**row, "difference": difference})
    return found


def threshold_table(stored: Mapping[str, Any]) -> str:
    """What each threshold does."""
    grouped = _clip_rows(stored, lambda row: row["alpha"] == 0.5, "threshold")
    lines = []
    for threshold, rows in grouped.items():
        share = 100 * statistics.mean(row["clipped_share"] for row in rows)
        against = _over_seeds(_against(rows, grouped[None]), "difference", 3)
        lines.append(
            [
                "none" if threshold is None else f"{threshold:g}",
                _over_seeds(rows, "validation_loss", 3),
                "" if threshold is None else against,
                f"{share:.1f} %",
                _over_seeds(rows, "largest_logit", 1),
                _over_seeds(rows, "largest_logit_at_end", 1),
            ]
        )
    head = ["threshold", "validation loss", "minus that without a clip", "heads clipped in a step"]
    return table([*head, "largest logit of all steps", "of the last step"], lines)


def alpha_table(stored: Mapping[str, Any]) -> str:
    """What each alpha does, at one threshold."""
    swept = {row["threshold"] for row in stored["rows"] if row["alpha"] != 0.5}
    grouped = _clip_rows(stored, lambda row: row["threshold"] in swept, "alpha")
    lines = []
    for alpha, rows in sorted(grouped.items()):
        against = _over_seeds(_against(rows, grouped.get(0.5, ())), "difference", 3)
        lines.append(
            [
                f"{alpha:g}",
                _over_seeds(rows, "validation_loss", 3),
                "" if alpha == 0.5 else against,
                _over_seeds(rows, "largest_logit", 1),
                _over_seeds(rows, "query_norm", 1),
                _over_seeds(rows, "key_norm", 1),
            ]
        )
    head = ["alpha", "validation loss", "minus that at 0.5", "largest logit of all steps"]
    return table([*head, "norm of the query kernels", "of the key kernels"], lines)
