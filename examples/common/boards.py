"""Where metrics go besides their file: TensorBoard and Weights & Biases, both fed flat scalars."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from common.training import Record


class Board(Protocol):
    """Shows the scalars of steps somewhere."""

    def write(self, records: Sequence[Record]) -> None:
        """Adds every scalar of the records, each under its own name, at the record's step."""
        ...

    def close(self) -> None:
        """Writes what is still held back."""
        ...


class TensorBoard:
    """TensorBoard's event files.

    Args:
        folder: The run's own folder among those that TensorBoard is started with.
        step: The step that the run goes on from; later ones, which come again, are not shown twice.
    """

    def __init__(self, folder: Path, *, step: int = 0):
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, records: Sequence[Record]) -> None:
        """Adds the records to the event file."""
        for record in records:
            for name, value in scalars(record).items():
                self._writer.add_scalar(name, value, int(record["step"]))
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; a training that resumes goes on in the same one.

    Args:
        project: The project's name.
        name: The run's name in it.
        folder: The training's folder, which keeps the run's id.
        config: The training's settings.
    """

    def __init__(self, project: str, name: str, folder: Path, *, config: dict[str, Any]):
        known = folder / "wandb_id"
        self._run = import_wandb().init(
            project=project,
            name=name,
            dir=str(folder),
            config=config,
            id=known.read_text() if known.exists() else None,
            resume="allow",
        )
        known.write_text(self._run.id)

    def write(self, records: Sequence[Record]) -> None:
        """Logs the records; of a step that comes again after a kill the first one stays."""
        for record in records:
            self._run.log(scalars(record), step=int(record["step"]))

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


def scalars(record: Record) -> Record:
    """Returns a record without its step."""
    return {name: value for name, value in record.items() if name != "step"}


def import_wandb() -> Any:
    """Returns the package, which the examples do not bring along.

    Raises:
        ImportError: If it is not there, with what to write instead.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ImportError(
            f"--wandb needs the package wandb, which cannot be imported ({error}). Write "
            "pip install wandb first, or --tensorboard DIR, which needs nothing more."
        ) from error


def _project(name: str) -> str:
    """Checks while options are read, before anything is trained."""
    try:
        import_wandb()
    except ImportError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--tensorboard` and `--wandb` to a command line."""
    add = parser.add_argument
    add("--tensorboard", type=Path, metavar="DIR", help="write TensorBoard's files to DIR/NAME too")
    add("--wandb", type=_project, metavar="PROJECT", help="log to Weights & Biases too")


def open_boards(
    options: argparse.Namespace, folder: Path, config: dict[str, Any], *, step: int = 0
) -> list[Board]:
    """Returns the boards that were asked for.

    Args:
        options: What `add_options` read.
        folder: The training's folder.
        config: The training's settings.
        step: The step that the training goes on from.

    Returns:
        None, one or two boards.
    """
    boards: list[Board] = []
    name = folder.relative_to(options.runs)
    if options.tensorboard is not None:
        boards.append(TensorBoard(options.tensorboard / name, step=step))
    if options.wandb is not None:
        boards.append(WeightsAndBiases(options.wandb, str(name), folder, config=config))
    return boards
