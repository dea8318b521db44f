"""The report's pictures, drawn without a display."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.matrices import MOMENTUM
from benchmarks.optimizers import FAST, OPTAX, OURS
from benchmarks.report_quality import auto_records, cost, diverging, names, rms_and_cosine
from benchmarks.report_text import Results

mpl.use("Agg")

#: Told apart by people who do not see all colours.
COLORS = {
    OURS: "#009e73",
    FAST: "#56b4e9",
    OPTAX: "#d55e00",
    "optax.adamw": "#0072b2",
}
OTHER = "0.6"


def _figure() -> tuple[Figure, Axes]:
    drawn = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    axis: Any = drawn.subplots()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return drawn, axis


def draw_compile(results: Results) -> Figure:
    """Compile time by depth, both logarithmic."""
    drawn, axis = _figure()
    rows = results["compile_time"]["rows"]
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = sorted((r for r in rows if r["contender"] == name), key=lambda r: r["layers"])
        axis.plot(
            [r["layers"] for r in mine],
            [r["seconds"]["total"]["median"] for r in mine],
            marker="o",
            color=COLORS.get(name, OTHER),
            label=name,
        )
    axis.set(xscale="log", yscale="log", xlabel="layers", ylabel="trace + lower + compile, seconds")
    depths = sorted({row["layers"] for row in rows})
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.minorticks_off()
    axis.legend()
    return drawn


def draw_step(results: Results) -> Figure:
    """Seconds of a step, a bar a contender, with its range."""
    drawn, axis = _figure()
    stored = results["step_time"]
    for place, row in enumerate(reversed(stored["rows"])):
        seconds, (low, high) = row["seconds"]["median"], row["seconds"]["range"]
        axis.barh(
            place,
            seconds,
            xerr=[[seconds - low], [high - seconds]],
            color=COLORS.get(row["contender"], OTHER),
        )
        axis.annotate(f" {seconds:.2f}", (high, place), va="center")
    axis.set_yticks(
        range(len(stored["rows"])), [row["contender"] for row in reversed(stored["rows"])]
    )
    axis.set_xlabel(f"seconds of a step, {stored['model']}")
    axis.margins(x=0.12)
    return drawn


def draw_quality(results: Results) -> Figure:
    """What each set costs and how near it comes; hollow where some form diverges."""
    drawn, axis = _figure()
    stored = results["polar_quality"]
    family = MOMENTUM if MOMENTUM in stored["families"] else "gaussian"
    for name in names(stored):
        records = auto_records(stored, name, "float32")
        found = rms_and_cosine(records, family) if records else None
        if found is None:
            continue
        is_hollow = bool(diverging(stored, name))
        axis.plot(
            cost(records),
            found[0],
            marker="o",
            color=COLORS[OURS],
            markerfacecolor="none" if is_hollow else COLORS[OURS],
        )
        axis.annotate(
            name, (cost(records), found[0]), xytext=(4, 3), textcoords="offset points", fontsize=6
        )
    axis.set(
        xlabel="FLOPs relative to five plain Keller-Jordan steps",
        ylabel=f"RMS of (singular value - 1), {family}",
    )
    return drawn


PICTURES: dict[str, tuple[str, Callable[[Results], Figure]]] = {
    "compile_time": ("compile_time", draw_compile),
    "step_time": ("step_time", draw_step),
    "polar_quality": ("polar_quality", draw_quality),
}


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draws every picture whose results are there, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (needs, draw) in PICTURES.items():
        if needs in results:
            paths.append(folder / f"{name}.png")
            draw(results).savefig(paths[-1])
    return paths
