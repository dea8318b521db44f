"""AdamW, Muon and MuonClip at their own best rates, over three seeds: one picture and one table.

The rates come from `examples/sweep.py`, which found them on other files. An optimizer's count of
steps is where its held-out loss first reaches what AdamW has at its end with the same seed.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import plots
from common.jobs import machine, run_all
from common.model import ModelConfig
from common.records import describe
from common.training import Record, Settings
from sweep import RESULT as SWEEP

ROOT = Path(__file__).parents[1]
#: What is compared: the optimizer, and what its threshold is multiplied by. The clip sees the
#: maxima from before the update, so logits overshoot; the last one leaves room for that.
COMPARED = {
    "adamw": ("adamw", 1.0),
    "muon": ("muon", 1.0),
    "muonclip": ("muonclip", 1.0),
    "muonclip_lower": ("muonclip", 0.85),
}
SEEDS = (0, 1, 2)
SETTINGS = Settings(score_on="held_out", score_every=10, score_windows=128)
SCORE = "held_out_loss"

#: The rate counts as high until it has fallen to half of its peak; the end is the last twentieth.
HIGH, END = 0.5, 0.95

Runs = dict[str, list[list[Record]]]


@dataclass(frozen=True)
class Outcome:
    """One optimizer's numbers, a value for each seed."""

    rate: float
    final_loss: list[float]
    steps_to_adamw: list[int | None]
    largest_logit: list[float]
    largest_logit_rate_high: list[float]
    largest_logit_at_end: list[float]


def outcome(runs: Sequence[list[Record]], adamw: Sequence[list[Record]], rate: float) -> Outcome:
    """Returns what one optimizer's runs came to, against AdamW's of the same seeds."""
    return Outcome(
        rate=rate,
        final_loss=[records[-1][SCORE] for records in runs],
        steps_to_adamw=[
            first_step(records, other[-1][SCORE])
            for records, other in zip(runs, adamw, strict=True)
        ],
        largest_logit=[largest(records, 0.0, 1.0) for records in runs],
        largest_logit_rate_high=[
            max(
                record["largest_logit"]
                for record in records
                if record["learning_rate"] >= HIGH * rate
            )
            for records in runs
        ],
        largest_logit_at_end=[largest(records, END, 1.0) for records in runs],
    )


def first_step(records: list[Record], loss: float) -> int | None:
    """Returns the first scored step whose held-out loss is no greater, or None."""
    steps, losses = plots.series(records, SCORE)
    return next((int(s) for s, value in zip(steps, losses, strict=True) if value <= loss), None)


def largest(records: list[Record], first: float, last: float) -> float:
    """Returns the largest logit between two fractions of the run."""
    count = len(records)
    part = records[int(first * count) : int(last * count)]
    return max(record["largest_logit"] for record in part)


def spread(values: Sequence[float | int | None], digits: int) -> str:
    """Returns the mean, and the smallest and largest value in brackets.

    Example:
        >>> spread([1.0, 2.0, 3.0], 1), spread([4, None], 0)
        ('2.0 (1.0 - 3.0)', 'not reached by 1 of 2')
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"not reached by {len(values) - len(known)} of {len(values)}"
    low, high = min(known), max(known)
    return f"{statistics.mean(known):.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def table(outcomes: dict[str, Outcome], settings: Settings) -> str:
    """Returns the outcomes as a Markdown table."""
    lines = [
        "| | rate | final held-out loss | steps to AdamW's final loss "
        "| largest logit: all steps | rate high | end |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in outcomes.items():
        steps = spread(found.steps_to_adamw, 0)
        if name != "adamw" and None not in found.steps_to_adamw:
            mean = statistics.mean(step for step in found.steps_to_adamw if step is not None)
            steps += f", 1/{settings.steps / mean:.2f}"
        lines.append(
            f"| {plots.NAMES[name]} | {found.rate:g} | {spread(found.final_loss, 3)} | {steps} | "
            f"{spread(found.largest_logit, 1)} | {spread(found.largest_logit_rate_high, 1)} | "
            f"{spread(found.largest_logit_at_end, 1)} |"
        )
    return "\n".join(lines)


def draw(runs: Runs, settings: Settings, path: Path) -> None:
    """Draws held-out loss and largest logit: a thin line a seed, the first one's thicker."""
    drawn, (left, right) = plots.figure(2)
    for name, seeds in runs.items():
        for index, records in enumerate(seeds):
            style: dict[str, Any] = {"color": plots.COLORS[name], "alpha": 1 if index == 0 else 0.4}
            style["linewidth"] = 1.4 if index == 0 else 0.7
            label = plots.NAMES[name] if index == 0 else None
            left.plot(*plots.series(records, SCORE), label=label, **style)
            right.plot(*plots.series(records, "largest_logit"), label=label, **style)
    if "adamw" in runs:
        final = statistics.mean(records[-1][SCORE] for records in runs["adamw"])
        left.axhline(final, color=plots.COLORS["adamw"], linestyle=":", linewidth=1)
        ends = [records[-1][SCORE] for seeds in runs.values() for records in seeds]
        left.set_ylim(min(ends) - 0.1, max(ends) + 1.2)
    left.set_ylabel("held-out loss, nats a byte")
    plots.draw_threshold(right, settings.threshold)
    right.set_ylim(bottom=0)
    right.set_ylabel("largest attention logit of the step")
    for axis in (left, right):
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)


def main() -> None:
    """Runs what has not been run, then draws and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", type=Path, default=SWEEP, help="the rates, from sweep.py")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="finished runs")
    parser.add_argument("--smoke", action="store_true", help="one narrow, short run of each")
    options = parser.parse_args()
    settings, folder, seeds = SETTINGS, options.runs, SEEDS
    result, picture = ROOT / "benchmarks/results/compare.json", ROOT / "docs/images/compare.png"
    if options.smoke:
        model = ModelConfig(layers=1, width=16, hidden=32)
        settings = replace(settings, steps=20, batch_size=2, score_windows=8, model=model)
        folder, seeds = folder / "smoke", SEEDS[:1]
        result, picture = folder / "compare.json", folder / "compare.png"

    swept = json.loads(options.sweep.read_text())["optimizers"]
    missing = {optimizer for optimizer, _ in COMPARED.values()} - set(swept)
    if missing:
        raise SystemExit(
            f"{options.sweep} has no rate for {', '.join(missing)}; run `make sweep` first."
        )
    rates = {name: swept[optimizer]["best_rate"] for name, (optimizer, _) in COMPARED.items()}
    jobs = {
        f"{name}-{seed}": replace(
            settings,
            optimizer=optimizer,
            learning_rate=rates[name],
            threshold=factor * settings.threshold,
            seed=seed,
        )
        for seed in seeds
        for name, (optimizer, factor) in COMPARED.items()
    }
    records = run_all(jobs, folder)
    runs = {name: [records[f"{name}-{seed}"] for seed in seeds] for name in COMPARED}
    outcomes = {name: outcome(runs[name], runs["adamw"], rate) for name, rate in rates.items()}
    draw(runs, settings, picture)
    text = table(outcomes, settings)
    content = {
        "settings": describe(settings),
        "seeds": seeds,
        **machine(),
        "outcomes": {name: describe(found) for name, found in outcomes.items()},
        "table": text.splitlines(),
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{text}\n\nwritten to {result} and {picture}")


if __name__ == "__main__":
    main()
