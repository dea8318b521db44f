"""Trains a byte-level GPT with MuonClip on the source of Python's standard library.

    python examples/train_lm.py
    python examples/train_lm.py --optimizer adamw --name adamw
    python examples/train_lm.py --data my_project/ --steps 2000
    python examples/train_lm.py --resume            after a kill: goes on to the same numbers

Everything that a run leaves is in runs/NAME: settings, metrics (JSON lines), checkpoints, a sample
of generated text and two pictures.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from common import plots
from common.checkpoints import Checkpoints
from common.data import load_corpus
from common.model import ModelConfig
from common.records import Metrics, describe, open_folder
from common.sample import sample
from common.training import OPTIMIZERS, Record, Settings, Training
from tqdm import tqdm

DEFAULT = Settings()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", choices=tuple(OPTIMIZERS), default=DEFAULT.optimizer)
    add("--learning-rate", type=float, help="the peak; None takes what `make sweep` found best")
    add("--steps", type=int, default=DEFAULT.steps)
    add("--threshold", type=float, default=DEFAULT.threshold, help="QK-Clip's, for each head")
    add("--seed", type=int, default=DEFAULT.seed)
    add("--batch-size", type=int, default=DEFAULT.batch_size)
    add("--length", type=int, default=DEFAULT.length, help="bytes in a training window")
    add("--layers", type=int, default=DEFAULT.model.layers)
    add("--width", type=int, default=DEFAULT.model.width)
    add("--data", nargs="+", type=Path, default=(), help="files or folders instead of the stdlib")
    add("--name", default="train_lm", help="the run's folder inside --runs")
    add("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    add("--checkpoint-every", type=int, default=50, help="steps from one checkpoint to the next")
    add("--resume", action="store_true", help="go on from the run's last checkpoint")
    add("--tensorboard", type=Path, metavar="DIR", help="write TensorBoard event files too")
    add("--smoke", action="store_true", help="a short run, to see that everything works")
    options = parser.parse_args(arguments)
    if options.checkpoint_every <= 0 or options.checkpoint_every % DEFAULT.score_every:
        parser.error(f"--checkpoint-every must be a positive multiple of {DEFAULT.score_every}.")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """Turns options into settings; `--smoke` makes the same run short and narrow."""
    settings = Settings(
        optimizer=options.optimizer,
        learning_rate=options.learning_rate,
        steps=options.steps,
        threshold=options.threshold,
        seed=options.seed,
        batch_size=options.batch_size,
        length=options.length,
        model=ModelConfig(
            layers=options.layers, width=options.width, hidden=8 * options.width // 3
        ),
    )
    settings = replace(settings, learning_rate=settings.rate)
    if options.smoke:
        model = replace(settings.model, width=32, hidden=64)
        settings = replace(settings, steps=min(settings.steps, 60), batch_size=4, model=model)
    return settings


def train(options: argparse.Namespace) -> list[Record]:
    """Trains one model as the options say, and returns the metrics of all its steps."""
    settings = settings_of(options)
    folder = options.runs / options.name
    described = describe(settings) | {"data": [str(path) for path in options.data]}
    open_folder(folder, described, resume=options.resume)
    corpus = load_corpus(options.data)
    training = Training(settings, corpus)
    sizes = ", ".join(f"{len(corpus.part(p)) / 1e6:.2f} MB {p}" for p in ("train", "held_out"))
    print(f"{settings.optimizer}, peak rate {settings.rate:g}; {sizes}; writing {folder}")

    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = start = training.init()
        if options.resume:
            state = start = checkpoints.restore(like=start)
            print(f"resuming after step {int(start.step)}")
        metrics = Metrics(folder, step=int(start.step), tensorboard=options.tensorboard)
        bar = tqdm(
            total=settings.steps,
            initial=int(start.step),
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )
        with metrics, bar:
            for state, records in training.run(start):
                metrics.write(records)
                bar.set_postfix(bar_values(records[-1], settings), refresh=False)
                bar.update(len(records))
                if int(state.step) % options.checkpoint_every == 0 or bar.n == settings.steps:
                    checkpoints.save(state)
        records = metrics.read()

    text = sample(
        training.model, state.params, prompt="def ", count=400, length=settings.length, seed=0
    )
    (folder / "sample.txt").write_text(text)
    score = f"{settings.score_on}_loss"
    pictures = plots.draw_run(folder, records, settings.threshold, score)
    print(f"\n{text}\n\n{summary(records, settings, score)}")
    print("pictures: " + ", ".join(map(str, pictures)))
    return records


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


def summary(records: list[Record], settings: Settings, score: str) -> str:
    """Returns the run in one sentence."""
    steps_clipped = sum(record["clipped_heads"] > 0 for record in records)
    return (
        f"{settings.optimizer}: held-out loss {records[-1][score]:.3f} nats a byte after "
        f"{len(records)} steps; largest logit {max(r['largest_logit'] for r in records):.1f} "
        f"(threshold {settings.threshold:g}), clipped in {steps_clipped} steps"
    )


if __name__ == "__main__":
    train(parse())
