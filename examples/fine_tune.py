"""Goes on with Muon where AdamW left a checkpoint: with AdamW's moments, and without.

    python examples/fine_tune.py                          trains a checkpoint with AdamW first
    python examples/fine_tune.py --checkpoint runs/mine   takes a run of train_lm.py

A run of `train_lm.py --optimizer adamw` is tuned on a text of another kind, the reference that
Python's `help()` shows, in three ways: AdamW goes on; Muon begins with the state that
`from_optax_state` makes of AdamW's; Muon begins with an empty state. AdamW and Muon have each the
rate that is best on validation text, with a seed that is none of the comparison's.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import train_lm
from common import plots
from common.checkpoints import Checkpoints
from common.data import Corpus, load_corpus
from common.model import ModelConfig
from common.training import OPTIMIZERS, Record, Settings, State, Training, step_windows

from muonclip_jax.checkpoint import from_optax_state

SEEDS, SWEEP_SEED = (0, 1, 2), 100
#: Way on -> the optimizer, its name in the table and its line.
WAYS = {
    "adamw": ("adamw", "AdamW", {"color": plots.COLORS["adamw"]}),
    "estimate": ("muon", "Muon, converted state", {"color": plots.COLORS["muon"]}),
    "cold": ("muon", "Muon, empty state", {"color": plots.COLORS["muon"], "linestyle": ":"}),
}


@dataclass(frozen=True)
class Tuning(Settings):
    """Settings of a run whose optimizer has made `start` updates before."""

    start: int = 0

    def schedule(self) -> Any:
        """The peak at once, then a straight line to zero, by the optimizer's own count."""
        return lambda count: self.rate * (1 - (count - self.start) / self.steps)


class FineTuning(Training):
    """The training of the other examples, with an optimizer that has counted some steps already.

    Steps and batches are counted from the checkpoint, the same for every way on. A state that is
    carried over has counted its updates, and so the schedule inside begins where they end.
    """

    seed = 0

    def __init__(self, settings: Tuning, corpus: Corpus):
        super().__init__(replace(settings, start=0), corpus)
        self.tx = OPTIMIZERS[settings.optimizer].build(settings)

    def batch(self, step: int) -> Any:
        """The windows of a step, of a seed that may change between runs of one compiled step."""
        return step_windows(replace(self.settings, seed=self.seed), self.text, step)


def saved_settings(folder: Path) -> Settings:
    """Returns the settings that a run of train_lm.py has written."""
    described = json.loads((folder / "settings.json").read_text())
    if described["optimizer"] != "adamw":
        raise SystemExit(
            f"{folder} was trained with {described['optimizer']}. This example begins with AdamW's "
            "state: give a run of `train_lm.py --optimizer adamw`, or no --checkpoint at all."
        )
    plain = {field.name for field in fields(Settings)} - {"model"}
    values = {name: value for name, value in described.items() if name in plain}
    return Settings(**values, model=ModelConfig(**described["model"]))


def restore(folder: Path, settings: Settings, corpus: Corpus) -> State:
    """Returns the newest state of a run of train_lm.py."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = checkpoints.restore(like=Training(settings, corpus).init())
    if not int(state.step):
        raise SystemExit(f"{folder} holds no checkpoint; let the run come to its first one.")
    return state


class Comparison:
    """One checkpoint, one text, and the runs that go on from there."""

    def __init__(self, saved: State, settings: Settings, corpus: Corpus, steps: int):
        self.saved, self.settings, self.corpus, self.steps = saved, settings, corpus, steps

    def training(self, way: str, rate: float, score_on: str) -> FineTuning:
        """Compiles one way on."""
        start = 0 if way == "cold" else int(self.saved.step)
        values = {field.name: getattr(self.settings, field.name) for field in fields(Settings)}
        values |= {"optimizer": WAYS[way][0], "learning_rate": rate, "score_on": score_on}
        values |= {"steps": self.steps, "score_every": 4, "start": start}
        return FineTuning(Tuning(**values), self.corpus)

    def state(self, way: str, tx: Any) -> State:
        """Returns what a way begins with; a copy, for training gives its memory up."""
        _, params, optimizer = jax.tree.map(jnp.array, self.saved)
        if way == "estimate":
            # Of what Muon trains, Adam's first moment is the momentum; the rest stays Adam's.
            optimizer = from_optax_state(optimizer, tx, params, rerouted="estimate")
        elif way == "cold":
            optimizer = tx.init(params)
        return State(jnp.int32(0), params, optimizer)

    def run(self, training: FineTuning, way: str, seed: int) -> list[Record]:
        """Trains once; the score of the checkpoint itself is the first record."""
        training.seed = seed
        state = self.state(way, training.tx)
        score = f"{training.settings.score_on}_loss"
        records = [{"step": 0, score: float(training.score(state.params, training.scored))}]
        for _, new in training.run(state):
            records += new
        print(
            f"{way}, rate {training.settings.rate:g}: {score} {records[-1][score]:.4f}", flush=True
        )
        return records

    def best_rate(self, way: str, rates: Sequence[float]) -> float:
        """Returns the rate with the lowest validation loss at the end; one needs no trying."""
        if len(rates) == 1:
            return rates[0]
        ends = {
            rate: self.run(self.training(way, rate, "validation"), way, SWEEP_SEED)[-1]
            for rate in rates
        }
        return min(ends, key=lambda rate: ends[rate]["validation_loss"])


Runs = dict[str, list[list[Record]]]


def first_step(records: list[Record], loss: float) -> int | None:
    """Returns the first scored step whose held-out loss is no greater, or None."""
    steps, losses = plots.series(records, "held_out_loss")
    return next((int(s) for s, value in zip(steps, losses, strict=True) if value <= loss), None)


def spread(values: Sequence[float | int | None], digits: int) -> str:
    """Returns the mean, and the smallest and largest value in brackets."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"not reached by {len(values) - len(known)} of {len(values)}"
    low, high = min(known), max(known)
    return f"{statistics.mean(known):.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def table(runs: Runs, rates: dict[str, float], steps: int) -> str:
    """Returns losses early and at the end, and steps to AdamW's final loss, in Markdown."""
    early = [step for step in (4, 12, 40) if step < steps]
    columns = [f"after {step} steps" for step in (*early, steps)]
    lines = [
        f"| | rate | {' | '.join(columns)} | steps to AdamW's final loss |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for way, seeded in runs.items():
        by_step = [dict(zip(*plots.series(one, "held_out_loss"), strict=True)) for one in seeded]
        cells = [spread([one[step] for one in by_step], 3) for step in (*early, steps)]
        reached = [
            first_step(one, other[-1]["held_out_loss"])
            for one, other in zip(seeded, runs["adamw"], strict=True)
        ]
        lines.append(
            f"| {WAYS[way][1]} | {rates[WAYS[way][0]]:g} | {' | '.join(cells)} "
            f"| {spread(reached, 0)} |"
        )
    return "\n".join(lines)


def draw(runs: Runs, path: Path) -> None:
    """Draws the mean held-out loss over all steps, and over the first ones."""
    drawn, axes = plots.figure(2)
    for way, seeded in runs.items():
        _, name, style = WAYS[way]
        series = [plots.series(records, "held_out_loss") for records in seeded]
        means = [statistics.mean(values) for values in zip(*(y for _, y in series), strict=True)]
        steps = series[0][0]
        for axis, count in zip(axes, (len(steps), 1 + len(steps) // 4), strict=True):
            axis.plot(steps[:count], means[:count], marker=".", label=name, **style)
    axes[0].set_ylabel("held-out loss, nats per byte, mean over seeds")
    axes[1].set_title("the first steps")
    axes[0].legend()
    plots.save(drawn, path)


def main() -> None:
    """Makes or reads the checkpoint, finds the rates, goes on in three ways, prints and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, help="the folder of a run of train_lm.py --optimizer adamw")
    add("--data", nargs="+", type=Path, default=(), help="files to tune on, not the reference")
    add("--steps", type=int, default=120, help="steps after the checkpoint")
    add("--rates", nargs="+", type=float, default=(0.001, 0.002, 0.004))
    add("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    add("--picture", type=Path, help="a PNG; None puts it into runs/fine_tune")
    add("--smoke", action="store_true", help="a few steps of a narrow model, one rate, one seed")
    options = parser.parse_args()
    rates, steps, seeds = options.rates, options.steps, SEEDS
    small: list[str] = []
    if options.smoke:
        rates, steps, seeds = rates[:1], 8, SEEDS[:1]
        small = ["--smoke", "--layers", "1", "--length", "16", "--steps", "10"]
    folder = options.runs / "fine_tune"
    folder.mkdir(parents=True, exist_ok=True)
    data = list(options.data)
    if not data:
        data = [folder / "reference.txt"]
        data[0].write_text("\n\n".join(text for _, text in sorted(topics.topics.items())))
    checkpoint = options.checkpoint
    if checkpoint is None:
        checkpoint = folder / "adamw"
        named = ["--optimizer", "adamw", "--runs", str(folder), "--name", "adamw"]
        train_lm.train(train_lm.parse([*named, *small]))

    settings, corpus = saved_settings(checkpoint), load_corpus(data)
    saved = restore(checkpoint, settings, corpus)
    comparison = Comparison(saved, settings, corpus, steps)
    best = {
        optimizer: comparison.best_rate(way, rates)
        for way, optimizer in (("adamw", "adamw"), ("estimate", "muon"))
    }
    runs: Runs = {}
    for way, (optimizer, *_) in WAYS.items():
        training = comparison.training(way, best[optimizer], "held_out")
        runs[way] = [comparison.run(training, way, seed) for seed in seeds]
    picture = options.picture or folder / "fine_tune.png"
    draw(runs, picture)
    print(f"\n{table(runs, best, steps)}\n\npicture: {picture}")


if __name__ == "__main__":
    main()
