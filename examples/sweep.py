"""Finds each optimizer's best peak learning rate, on files that the comparison never sees.

Every optimizer gets the same grid, half an octave between rates. Where the best rate is the
first or the last of those tried, the grid grows there, so that the best one always has worse
neighbours on both sides. `examples/compare.py` reads the result.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.jobs import machine, run_all
from common.model import ModelConfig
from common.records import describe
from common.training import Record, Settings

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "sweep.json"

#: The seed is none of the comparison's.
SETTINGS = Settings(seed=100, score_on="validation", score_every=50, score_windows=256)

#: Rates are 0.001 * 2 ** (k / 2); these are the k to begin with.
STARTS = {"adamw": (4, 5, 6), "muon": (7, 8, 9), "muonclip": (7, 8, 9)}


def rate(k: int) -> float:
    """Returns the k-th rate of the grid that all optimizers share."""
    return round(0.001 * 2 ** (k / 2), 6)


def next_k(losses: dict[int, float]) -> int | None:
    """Returns where to grow the grid, or None where the best rate has neighbours on both sides.

    Example:
        >>> next_k({1: 2.0, 2: 1.5, 3: 1.6}), next_k({1: 2.0, 2: 1.5})
        (None, 3)
    """
    best = min(losses, key=losses.__getitem__)
    if best == min(losses):
        return best - 1
    return best + 1 if best == max(losses) else None


def sweep(
    optimizers: list[str], settings: Settings, folder: Path, *, grow: bool = True
) -> dict[str, Any]:
    """Trains until every optimizer's best rate lies inside its grid, or once with `grow=False`."""
    tried: dict[str, dict[int, list[Record]]] = {name: {} for name in optimizers}
    wanted = {name: set(STARTS[name]) for name in optimizers}
    while any(wanted.values()):
        jobs = {
            f"{name}-{k}": replace(settings, optimizer=name, learning_rate=rate(k))
            for name, ks in wanted.items()
            for k in sorted(ks)
        }
        for job, records in run_all(jobs, folder).items():
            name, _, k = job.rpartition("-")
            tried[name][int(k)] = records
        for name, runs in tried.items():
            k = next_k({k: final_loss(records) for k, records in runs.items()})
            wanted[name] = {k} if grow and k is not None else set()
    return {name: row(runs) for name, runs in tried.items()}


def final_loss(records: list[Record]) -> float:
    """Returns the validation loss after the last step; no number counts as the worst."""
    loss = records[-1]["validation_loss"]
    return loss if loss == loss else float("inf")


def row(runs: dict[int, list[Record]]) -> dict[str, Any]:
    """Returns one optimizer's part of the result."""
    best = min(runs, key=lambda k: final_loss(runs[k]))
    return {
        "best_rate": rate(best),
        "rates": [rate(k) for k in sorted(runs)],
        "validation_losses": [round(final_loss(runs[k]), 4) for k in sorted(runs)],
        "largest_logits": [
            round(max(record["largest_logit"] for record in runs[k]), 2) for k in sorted(runs)
        ],
    }


def main() -> None:
    """Sweeps, prints a table and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", choices=tuple(STARTS), default=list(STARTS))
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep"), help="finished runs")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file to write")
    parser.add_argument("--smoke", action="store_true", help="a few narrow, short runs")
    options = parser.parse_args()
    settings, folder, result = SETTINGS, options.runs, options.result
    if options.smoke:
        model = ModelConfig(layers=1, width=16, hidden=32)
        settings = replace(settings, steps=20, batch_size=2, score_windows=8, model=model)
        folder, result = folder / "smoke", folder / "smoke" / "sweep.json"
    found = sweep(options.optimizers, settings, folder, grow=not options.smoke)
    for name, values in found.items():
        print(f"\n{name}: best rate {values['best_rate']:g}\n  rate     validation  largest logit")
        columns = ("rates", "validation_losses", "largest_logits")
        for line in zip(*(values[column] for column in columns), strict=True):
            print("  {:<8g} {:<11g} {:g}".format(*line))
    kept = json.loads(result.read_text())["optimizers"] if result.exists() else {}
    result.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": describe(settings), **machine(), "optimizers": kept | found}
    result.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nwritten to {result}")


if __name__ == "__main__":
    main()
