"""A run's folder: its settings, and its metrics as JSON lines and on the boards asked for."""

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from common.boards import Board
from common.training import Record


def describe(settings: Any) -> dict[str, Any]:
    """Returns a settings dataclass as what JSON gives back for it."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def machine() -> dict[str, Any]:
    """Returns what a stored number must be read with."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": {name: version(name) for name in packages},
    }


def open_folder(folder: Path, described: dict[str, Any], *, resume: bool) -> None:
    """Prepares a run's folder: empty, or one whose settings are those that are resumed.

    Raises:
        ValueError: If there is nothing to resume, or it was trained with other settings.
    """
    file = folder / "settings.json"
    if not resume:
        if folder.exists() and not file.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds files that are no run's; give another --name or empty it yourself."
            )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        file.write_text(json.dumps(described, indent=2) + "\n")
        return
    if not file.exists():
        raise ValueError(f"{folder} holds no run to resume; leave --resume out to begin one.")
    before = json.loads(file.read_text())
    changed = [
        f"{name}: {before.get(name)!r} became {described.get(name)!r}"
        for name in sorted(before | described)
        if before.get(name) != described.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings ({'; '.join(changed)}). A run resumes only as "
            "itself: give the options it began with, or another --name."
        )


def read_records(folder: Path) -> list[Record]:
    """Returns every whole line of a run's metrics; a kill may have cut the last one short."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Metrics:
    """Appends records to `metrics.jsonl`, one JSON object a line and a step.

    Args:
        folder: The run's folder.
        step: The step that the run goes on from; lines of later steps, which were written between
            the last checkpoint and the end, are dropped, for those steps come again.
        boards: Where the records go as well.
    """

    def __init__(self, folder: Path, *, step: int = 0, boards: Sequence[Board] = ()):
        self._file = folder / "metrics.jsonl"
        kept = [record for record in self.read() if record["step"] <= step]
        self._file.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._boards = boards

    def write(self, records: Sequence[Record]) -> None:
        """Adds records, flat scalars of any name beside their step, to the file and the boards."""
        with self._file.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        for board in self._boards:
            board.write(records)

    def read(self) -> list[Record]:
        """Returns every whole line."""
        return read_records(self._file.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for board in self._boards:
            board.close()
