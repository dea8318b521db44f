"""Tables and a picture of the training runs: the comparison, and what else they answer."""

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from common import plots

from benchmarks.report_tables import Stored, table
from benchmarks.training_runs import CHUNK, TUNED_WITH, Run, key

Result = Mapping[str, Any]
Groups = Mapping[Run, Sequence[Result]]
MISSING = "not measured: `make comparison`"
#: Optimizers and coefficient sets as the tables name them.
NAMES = plots.NAMES | {"muon": "Muon", "width rule": "Muon, width rule"}


def run_of(settings: Mapping[str, Any]) -> Run:
    """Returns the run that `comparison.json` describes."""
    start = settings["start"]
    return Run(**{**settings, "start": run_of(start) if start else None})


def groups(runs: Iterable[Run], stored: Stored) -> Groups | None:
    """Returns the results of each setting, one a seed; None where a run has not been made."""
    found: dict[Run, list[Result]] = {}
    for run in runs:
        result = stored["runs"].get(key(run))
        if result is None:
            return None
        found.setdefault(replace(run, seed=0, start=None), []).append(result)
    return found


def of_part(name: str, stored: Stored, comparison: Stored) -> Groups | None:
    """Returns the results of a part of the comparison, or None where it is not finished."""
    return groups(map(run_of, comparison[name]), stored) if name in comparison else None


def winners(stored: Stored, comparison: Stored) -> Groups | None:
    """Returns the results of every optimizer at its best settings, over three seeds."""
    best = map(run_of, comparison["winners"].values())
    return groups((replace(run, seed=seed) for run in best for seed in range(3)), stored)


def spread(values: Sequence[float], digits: int) -> str:
    """Returns the mean, and the smallest and largest value in brackets."""
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def step_at(losses: Sequence[float], target: float) -> float | None:
    """Returns where a loss first reaches a target, linear between scores `CHUNK` steps apart.

    Example:
        >>> step_at([3.0, 2.0, 1.0], 1.5), step_at([3.0, 2.0], 1.5)
        (50.0, None)
    """
    for number, loss in enumerate(losses):
        if loss <= target:
            before = losses[number - 1] if number else loss
            share = (target - loss) / (before - loss) if before > loss else 0.0
            return CHUNK * (number + 1 - share)
    return None


def final_losses(results: Sequence[Result]) -> list[float]:
    """Returns the held-out loss after the last step, for each seed."""
    return [result["held_out"][-1] for result in results]


def largest_logits(results: Sequence[Result], steps: int | None = None) -> list[float]:
    """Returns the largest logit of all steps, or of the last ones, for each seed."""
    last = 0 if steps is None else -(steps // CHUNK)
    return [max(result["largest_logit"][last:]) for result in results]


def against_adamw(found: Groups | None) -> str:
    """Every optimizer at its settings: loss, steps to AdamW's loss of the same seed, logits."""
    if found is None:
        return MISSING
    (adamw,) = (results for run, results in found.items() if run.optimizer == "adamw")
    lines = []
    for run, results in found.items():
        reached = [
            step_at(result["held_out"], target)
            for result, target in zip(results, final_losses(adamw), strict=True)
        ]
        known = [step for step in reached if step is not None]
        steps = f"not reached by {len(reached) - len(known)} of {len(reached)}"
        if len(known) == len(reached):
            steps = f"{spread(known, 0)}, 1/{run.steps / statistics.mean(known):.2f}"
        rate = f"{run.rate:g}"
        if run.adam_rate is not None:
            rate += f", AdamW's group {run.adam_rate:g}"
        settings = [rate, f"{run.decay:g}", f"{run.b2:g}", f"{run.warmup}"]
        loss, logit = spread(final_losses(results), 3), spread(largest_logits(results), 1)
        lines.append([NAMES[run.optimizer], *settings, loss, steps, logit])
    head = ["", "rate", "decay", "b2", "warm-up", "held-out loss", "steps to AdamW's loss"]
    return table([*head, "largest logit"], lines)


def comparison_table(stored: Stored, comparison: Stored) -> str:
    """The optimizers on the text that they were tuned on."""
    return against_adamw(winners(stored, comparison))


def second_text_table(stored: Stored, comparison: Stored, *, part: str) -> str:
    """The same settings on a text that they were not tuned on."""
    return against_adamw(of_part(part, stored, comparison))


def coefficients_table(stored: Stored, comparison: Stored) -> str:
    """Coefficient sets at the settings tuned for Muon with `TUNED_WITH`."""
    found = of_part("coefficients", stored, comparison)
    if found is None:
        return MISSING
    by_name = {run.optimizer: final_losses(results) for run, results in found.items()}
    tuned = by_name.get("muon", [])
    lines = []
    for name, losses in by_name.items():
        differences = [a - b for a, b in zip(losses, tuned, strict=False)]
        shown = "" if name == "muon" else ", ".join(f"{x:+.3f}" for x in differences)
        lines.append([TUNED_WITH if name == "muon" else name, spread(losses[:3], 3), shown])
    return table(["", "held-out loss, seeds 0 - 2", f"minus {TUNED_WITH}'s, by seed"], lines)


def clip_table(stored: Stored, comparison: Stored) -> str:
    """The clip at several thresholds, normalised queries and keys, and neither."""
    parts = [of_part(name, stored, comparison) for name in ("thresholds", "qk_norm")]
    best, (thresholds, qk_norm) = winners(stored, comparison), parts
    if best is None or thresholds is None or qk_norm is None:
        return MISSING
    clipped = {**thresholds, **{r: x for r, x in best.items() if r.optimizer == "muonclip"}}
    named = [("neither", r, x) for r, x in best.items() if r.optimizer == "muon"]
    for run in sorted(clipped, key=lambda run: -run.threshold):
        named.append((f"QK-Clip, threshold {run.threshold:g}", run, clipped[run]))
    named += [("QK-norm", run, results) for run, results in qk_norm.items()]
    lines = [
        [
            *(name, f"{run.rate:g}", f"{run.decay:g}", spread(final_losses(results), 3)),
            *(spread(largest_logits(results, steps), 1) for steps in (None, 20)),
        ]
        for name, run, results in named
    ]
    head = ["", "rate", "decay", "held-out loss", "largest logit", "of the last 20 steps"]
    return table(head, lines)


def part_table(stored: Stored, comparison: Stored, *, part: str) -> str:
    """Any other part: a line for each setting; of the transfer the best rate at each size."""
    found = of_part(part, stored, comparison)
    if found is None:
        return MISSING
    best: dict[Any, Run] = {}
    for run in found:
        size = (run.optimizer, run.width, run.layers, run.decay, part == "transfer" or run.rate)
        if size not in best or _mean_loss(found[run]) < _mean_loss(found[best[size]]):
            best[size] = run
    lines = []
    for run in best.values():
        settings = [NAMES.get(run.optimizer, run.optimizer), f"{run.width} x {run.layers}"]
        settings += [f"{run.steps}", f"{run.rate:g}", f"{run.decay:g}"]
        other = [result["other_texts"][0] for result in found[run] if result["other_texts"]]
        losses = [spread(final_losses(found[run]), 3), spread(other, 3) if other else ""]
        lines.append([*settings, *losses, spread(largest_logits(found[run]), 1)])
    head = ["", "width x layers", "steps", "rate", "decay", "held-out loss", "other text"]
    return table([*head, "largest logit"], lines)


def _mean_loss(results: Sequence[Result]) -> float:
    return statistics.mean(final_losses(results))


def draw(stored: Stored, comparison: Stored, path: Path) -> None:
    """Draws held-out loss and largest logit of the winners, means over the seeds."""
    found = winners(stored, comparison)
    if found is None:
        raise SystemExit(MISSING)
    drawn, (left, right) = plots.figure(2)
    for run, results in found.items():
        style = {"color": plots.COLORS[run.optimizer], "label": NAMES[run.optimizer]}
        steps = range(CHUNK, run.steps + 1, CHUNK)
        for axis, name in ((left, "held_out"), (right, "largest_logit")):
            curves = zip(*(result[name] for result in results), strict=True)
            axis.plot(steps, [statistics.mean(values) for values in curves], **style)
    left.set_ylim(top=2.6)
    left.set_ylabel("held-out loss, nats a byte")
    plots.draw_threshold(right, Run("muonclip", 1.0, 1.0).threshold)
    right.set_ylim(bottom=0)
    right.set_ylabel("largest logit of 20 steps")
    right.legend(ncols=2, fontsize="small")
    plots.save(drawn, path)
