"""The examples' pictures, drawn without a display."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from common.training import Record

mpl.use("Agg")

#: One colour an optimizer in every picture; told apart by people who do not see all colours.
COLORS = {
    "adamw": "#0072b2",
    "muon": "#d55e00",
    "muonclip": "#009e73",
    "normuon": "#cc79a7",
    "hyperball": "#e69f00",
    "cautious": "#999999",
    "sgd": "#56b4e9",
}
NAMES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "muonclip": "MuonClip",
    "normuon": "NorMuon",
    "hyperball": "Hyperball",
    "cautious": "Muon, cautious decay",
    "sgd": "SGD with momentum",
}

#: Colours for what is no optimizer.
SEQUENCE = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")


def series(records: Iterable[Record], name: str) -> tuple[list[float], list[float]]:
    """Returns the steps that have a value of this name, and the values."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]


def figure(columns: int = 1) -> tuple[Figure, Any]:
    """Returns an empty figure with that many axes beside each other."""
    drawn = Figure(figsize=(6.4 * columns, 4.0), dpi=110, layout="constrained")
    axes = drawn.subplots(1, columns)
    for axis in [axes] if columns == 1 else axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def save(drawn: Figure, path: Path) -> None:
    """Writes a PNG of 64 colours, a third as large as one of all, and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(64).save(path, optimize=True)


def draw_threshold(axis: Axes, threshold: float) -> None:
    """Draws the line that QK-Clip holds the logits to."""
    axis.axhline(threshold, color="0.3", linestyle="--", linewidth=1, label="threshold")


def draw_loss(axis: Axes, records: Sequence[Record], score: str) -> None:
    """Draws the loss of every step's batch, and the scored one."""
    axis.plot(*series(records, "train_loss"), color="0.75", linewidth=1, label="training batch")
    axis.plot(*series(records, score), color=COLORS["muonclip"], label=score.replace("_", " "))
    axis.set_ylabel("nats per byte")
    axis.legend()


def draw_run(folder: Path, records: Sequence[Record], threshold: float, score: str) -> list[Path]:
    """Draws one run's two pictures: its losses, and its largest logit against the threshold.

    Args:
        folder: Where `loss.png` and `largest_logit.png` go.
        records: The run's metrics.
        threshold: QK-Clip's.
        score: The name of the scored loss, such as "held_out_loss".

    Returns:
        The pictures' paths.
    """
    loss, axis = figure()
    draw_loss(axis, records, score)
    logit, axis = figure()
    axis.plot(*series(records, "largest_logit"), color=COLORS["muonclip"], label="largest logit")
    draw_threshold(axis, threshold)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("largest attention logit of the step")
    axis.legend()
    paths = [folder / "loss.png", folder / "largest_logit.png"]
    for drawn, path in zip((loss, logit), paths, strict=True):
        drawn.savefig(path)
    return paths
