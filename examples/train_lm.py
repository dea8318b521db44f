"""Trains a byte-level GPT with MuonClip on the source of Python's standard library.

    python examples/train_lm.py
    python examples/train_lm.py --optimizer adamw --name adamw
    python examples/train_lm.py --data my_project/ --steps 2000
    python examples/train_lm.py --resume            after a kill: goes on to the same numbers

Everything that a run leaves is in runs/NAME: settings, metrics (JSON lines), checkpoints, a sample
of generated text and two pictures.
"""

import argparse

from common import plots, program
from common.boards import open_boards
from common.data import load_corpus
from common.records import describe, open_folder
from common.sample import sample
from common.training import OPTIMIZERS, Record, Training

DEFAULT = program.DEFAULT


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = program.parser("train_lm", __doc__)
    add = parser.add_argument
    add("--optimizer", choices=tuple(OPTIMIZERS), default=DEFAULT.optimizer)
    add("--checkpoint-every", type=int, default=50, help="steps from one checkpoint to the next")
    add("--resume", action="store_true", help="go on from the run's last checkpoint")
    options = parser.parse_args(arguments)
    if options.checkpoint_every <= 0 or options.checkpoint_every % DEFAULT.score_every:
        parser.error(f"--checkpoint-every must be a positive multiple of {DEFAULT.score_every}.")
    return options


def train(options: argparse.Namespace) -> list[Record]:
    """Trains one model as the options say, and returns the metrics of all its steps."""
    settings = program.settings_of(options, optimizer=options.optimizer)
    folder = options.runs / options.name
    described = describe(settings) | {"data": [str(path) for path in options.data]}
    open_folder(folder, described, resume=options.resume)
    corpus = load_corpus(options.data)
    training = Training(settings, corpus)
    sizes = ", ".join(f"{len(corpus.part(p)) / 1e6:.2f} MB {p}" for p in ("train", "held_out"))
    print(f"{settings.optimizer}, peak rate {settings.rate:g}; {sizes}; writing {folder}")

    state, records = program.train_resumable(
        training,
        folder,
        resume=options.resume,
        checkpoint_every=options.checkpoint_every,
        boards=lambda step: open_boards(options, folder, described, step=step),
    )
    text = sample(
        training.model, state.params, prompt="def ", count=400, length=settings.length, seed=0
    )
    (folder / "sample.txt").write_text(text)
    score = f"{settings.score_on}_loss"
    pictures = plots.draw_run(folder, records, settings.threshold, score)
    print(f"\n{text}\n\n{program.summary(records, settings)}")
    print("pictures: " + ", ".join(map(str, pictures)))
    return records


if __name__ == "__main__":
    train(parse())
