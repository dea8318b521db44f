"""What the training programs share around their step: options, the run's folder, a progress bar."""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from common.boards import Board, add_options, open_boards
from common.checkpoints import Checkpoints
from common.data import load_corpus
from common.model import ModelConfig
from common.records import Metrics, describe, open_folder
from common.training import Record, Settings, State, Training, run, scored_windows, step_windows

DEFAULT = Settings()
_State = TypeVar("_State")


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Returns the options of every training program.

    Args:
        name: The program's, which its run has unless told otherwise.
        doc: The program's docstring, whose first line describes it.
    """
    made = argparse.ArgumentParser(
        description=(doc or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--learning-rate", type=float, help="the peak; None takes what `make comparison` found")
    add("--weight-decay", type=float, help="None takes what `make comparison` found")
    add("--steps", type=int, default=DEFAULT.steps)
    add("--threshold", type=float, default=DEFAULT.threshold, help="QK-Clip's, for each head")
    add("--seed", type=int, default=DEFAULT.seed)
    add("--batch-size", type=int, default=DEFAULT.batch_size)
    add("--length", type=int, default=DEFAULT.length, help="bytes in a training window")
    add("--layers", type=int, default=DEFAULT.model.layers)
    add("--width", type=int, default=DEFAULT.model.width)
    add("--data", nargs="+", type=Path, default=(), help="files or folders instead of the stdlib")
    add("--name", default=name, help="the run's folder inside --runs")
    add("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    add_options(made)
    add("--smoke", action="store_true", help="a short run, to see that everything works")
    return made


def add_picture(made: argparse.ArgumentParser) -> None:
    """Adds where a program puts its one picture."""
    made.add_argument("--picture", type=Path, help="a PNG; None puts it into the run's folder")


def picture_of(options: argparse.Namespace) -> Path:
    """Returns where the picture goes."""
    return options.picture or options.runs / options.name / f"{options.name}.png"


def settings_of(options: argparse.Namespace, *, optimizer: str = DEFAULT.optimizer) -> Settings:
    """Turns options into settings; `--smoke` makes the same run short and narrow."""
    settings = Settings(
        optimizer=optimizer,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        steps=options.steps,
        threshold=options.threshold,
        seed=options.seed,
        batch_size=options.batch_size,
        length=options.length,
        model=ModelConfig(
            layers=options.layers, width=options.width, hidden=8 * options.width // 3
        ),
    )
    settings = replace(settings, learning_rate=settings.rate, weight_decay=settings.decay)
    if options.smoke:
        model = replace(settings.model, width=32, hidden=64)
        settings = replace(settings, steps=min(settings.steps, 60), batch_size=4, model=model)
    return settings


def train(
    options: argparse.Namespace,
    settings: Settings,
    state: _State,
    *,
    step: Callable[[_State, Any], tuple[_State, dict[str, jax.Array]]],
    score: Callable[[_State, Any], jax.Array],
    place: Callable[[Any], Any] = lambda windows: windows,
    name: str = "",
) -> tuple[_State, list[Record]]:
    """Trains from the first step to the last, and writes the run's folder.

    Args:
        options: What `parser` read.
        settings: The run's.
        state: What the first step gets.
        step: The compiled step: state and windows in, state and flat scalars out. Every scalar is
            written to the metrics and to the boards, whatever its name.
        score: The compiled held-out loss of a state on windows.
        place: Puts windows where the step wants them.
        name: A folder inside the run's, for programs that train more than once.

    Returns:
        The last state, and the records of all steps.
    """
    corpus = load_corpus(options.data)
    folder = options.runs / options.name / name
    described = describe(settings) | {"data": [str(path) for path in options.data]}
    open_folder(folder, described, resume=False)
    print(f"{options.name}: peak rate {settings.rate:g}; writing {folder}")
    scored = place(scored_windows(settings, corpus))
    trained = run(
        settings,
        state,
        step=step,
        score=lambda state: score(state, scored),
        batch=lambda number: place(step_windows(settings, corpus.train, number)),
    )
    metrics = Metrics(folder, boards=open_boards(options, folder, described))
    ((state, _),) = deque(follow(trained, settings, metrics), maxlen=1)
    records = metrics.read()
    print(summary(records, settings))
    return state, records


def train_resumable(
    training: Training,
    folder: Path,
    *,
    resume: bool,
    checkpoint_every: int,
    boards: Callable[[int], Sequence[Board]] = lambda step: (),
) -> tuple[State, list[Record]]:
    """Trains with checkpoints, from the first step or from the last checkpoint.

    Args:
        training: The run.
        folder: The run's, which `open_folder` has prepared.
        resume: Whether to go on from the folder's last checkpoint.
        checkpoint_every: Steps from one checkpoint to the next, a multiple of `score_every`.
        boards: Returns where metrics go as well, given the step that the run goes on from.

    Returns:
        The last state, and the records of all steps.
    """
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = start = training.init()
        if resume:
            state = start = checkpoints.restore(like=start)
            print(f"resuming after step {int(start.step)}")
        begin, steps = int(start.step), training.settings.steps
        metrics = Metrics(folder, step=begin, boards=boards(begin))
        for state, _ in follow(training.run(start), training.settings, metrics, begin=begin):
            if int(state.step) % checkpoint_every == 0 or state.step == steps:
                checkpoints.save(state)
        return state, metrics.read()


def follow(
    trained: Iterator[tuple[_State, list[Record]]],
    settings: Settings,
    metrics: Metrics,
    *,
    begin: int = 0,
) -> Iterator[tuple[_State, list[Record]]]:
    """Passes a run on, and on the way writes its metrics and moves a bar."""
    bar = tqdm(
        total=settings.steps,
        initial=begin,
        unit="step",
        mininterval=0.2 if sys.stderr.isatty() else 20,
    )
    with metrics, bar:
        for state, records in trained:
            metrics.write(records)
            bar.set_postfix(bar_values(records[-1], settings), refresh=False)
            bar.update(len(records))
            yield state, records


def bar_values(record: Record, settings: Settings) -> dict[str, str]:
    """Returns what the bar shows beside its count."""
    heads = settings.model.layers * settings.model.query_heads
    return {
        "loss": f"{record['train_loss']:.3f}",
        "held_out": f"{record[f'{settings.score_on}_loss']:.3f}",
        "bytes/s": f"{record['tokens_per_second']:.0f}",
        "logit": f"{record['largest_logit']:.1f}",
        "clipped": f"{record['clipped_heads']:.0f}/{heads}",
    }


def summary(records: list[Record], settings: Settings) -> str:
    """Returns the run in one sentence."""
    steps_clipped = sum(record["clipped_heads"] > 0 for record in records)
    return (
        f"{settings.optimizer}: held-out loss {records[-1][f'{settings.score_on}_loss']:.3f} nats "
        f"a byte after {len(records)} steps; largest logit "
        f"{max(record['largest_logit'] for record in records):.1f} (threshold "
        f"{settings.threshold:g}), clipped in {steps_clipped} steps{without_effect(records)}"
    )


def without_effect(records: list[Record]) -> str:
    """Returns what the summary adds where the clip of a block lowered no maximum for long."""
    longest = max(record.get("clips_without_effect", 0) for record in records)
    if longest < 20:
        return ""
    return (
        f"; the clip had no effect in {longest:.0f} steps in a row, see 'A clip without effect' in "
        "docs/qk-clip.md"
    )
