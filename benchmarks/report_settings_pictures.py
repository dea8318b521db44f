"""The pictures of docs/settings.md, drawn without a display."""

import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.settings_curves import best, curves

mpl.use("Agg")

#: From narrow to wide, and from no clip to a tight one; also told apart without colours.
COLORS = ("#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7")
#: Thresholds whose largest logits are drawn over the steps.
DRAWN = (None, 30.0, 10.0, 3.5)


def _figure(columns: int) -> tuple[Figure, Any]:
    drawn = Figure(figsize=(4.6 * columns, 3.6), dpi=100, layout="constrained")
    axes = drawn.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def draw_width(stored: Mapping[str, Any]) -> Figure:
    """Loss over the rate, a line a width, in the units of two rules."""
    drawn, axes = _figure(2)
    for axis, rule in zip(axes, ("width_transfer", "match_rms_adamw"), strict=True):
        for (width, curve), color in zip(
            curves(stored["rows"], rule).items(), COLORS, strict=False
        ):
            axis.plot(curve.rates, curve.losses, marker=".", color=color, label=f"width {width}")
            lowest = best(curve)
            axis.plot(lowest.rate, lowest.loss, marker="v", color=color, markersize=9)
        axis.set_xscale("log", base=2)
        ticks = [t for t in 2.0 ** np.arange(-14, 2) if _inside(axis.get_xlim(), t)]
        axis.set_xticks(ticks[::2], [f"{t:.2g}" for t in ticks[::2]])
        axis.set(xlabel=f"Muon's learning rate under {rule}", ylabel="validation loss, nats a byte")
    axes[0].legend()
    return drawn


def _inside(limits: tuple[float, float], value: float) -> bool:
    return limits[0] <= value <= limits[1]


def draw_clip(stored: Mapping[str, Any]) -> Figure:
    """The largest logit over the steps, and the loss over the threshold."""
    drawn, (left, right) = _figure(2)
    rows = [row for row in stored["rows"] if row["alpha"] == 0.5]
    for threshold, color in zip(DRAWN, COLORS, strict=False):
        for row in rows:
            if row["threshold"] != threshold or row["seed"] != rows[0]["seed"]:
                continue
            label = "no clip" if threshold is None else f"threshold {threshold:g}"
            steps = range(1, len(row["largest_logits"]) + 1)
            left.plot(steps, row["largest_logits"], color=color, label=label, linewidth=1.2)
            if threshold is not None:
                left.axhline(threshold, color=color, linestyle=":", linewidth=1)
    left.set(xlabel="step", ylabel="largest attention logit", yscale="log", ylim=(2, 600))
    ticks = [2, 5, 10, 20, 50, 100]
    left.set_yticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    left.legend(ncols=2, loc="upper left")
    without = {row["seed"]: row["validation_loss"] for row in rows if row["threshold"] is None}
    differences: dict[float, list[float]] = {}
    for row in rows:
        base, loss = without.get(row["seed"]), row["validation_loss"]
        if row["threshold"] is not None and base is not None and loss is not None:
            differences.setdefault(row["threshold"], []).append(loss - base)
    for threshold, values in differences.items():
        right.plot([threshold] * len(values), values, ".", color="0.6")
    xs = sorted(differences)
    means = [statistics.mean(differences[x]) for x in xs]
    right.plot(xs, means, marker="o", color=COLORS[2], label="mean; dots are seeds")
    right.axhline(0.0, color=COLORS[0], linestyle="--", label="no clip")
    right.set(xlabel="threshold", ylabel="validation loss minus that without a clip", xscale="log")
    right.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=8)
    right.minorticks_off()
    right.legend()
    return drawn
