"""Metrics on TensorBoard, read back from its file, and on a stand-in for Weights & Biases."""

import json
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from common import program
from common.boards import open_boards
from common.records import Metrics
from tensorboardX.proto import event_pb2

messages: Any = event_pb2  # its classes are made at run time

RECORDS: list[dict[str, float | int]] = [
    {"step": 1, "train_loss": 5.5, "update/rms": 0.25},
    {"step": 2, "train_loss": 4.5, "held_out_loss": 4.75},
]


class FakeRun:
    def __init__(self, **given: Any):
        self.given, self.logged, self.finished = given, [], False
        self.id = given["id"] or "new"

    def log(self, scalars: dict[str, Any], step: int) -> None:
        self.logged.append((step, scalars))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch) -> list[FakeRun]:
    """The runs that a stand-in for the package was asked for."""
    begun: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        begun.append(FakeRun(**given))
        return begun[-1]

    fake = ModuleType("wandb")
    fake.__dict__["init"] = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return begun


def write(options: Any, folder: Path, step: int = 0) -> None:
    boards = open_boards(options, folder, {"seed": 3}, step=step)
    with Metrics(folder, step=step, boards=boards) as metrics:
        metrics.write(RECORDS[step:])


def parse(folder: Path, *arguments: object) -> Any:
    parser = program.parser("own", "A program.")
    return parser.parse_args(["--runs", str(folder), *map(str, arguments)])


def test_a_run_goes_to_weights_and_biases_and_goes_on_there(tmp_path, runs):
    folder = tmp_path / "own"
    folder.mkdir()
    options = parse(tmp_path, "--wandb", "muon")
    write(options, folder)
    write(options, folder, step=1)
    first, second = runs
    assert first.given == {
        "project": "muon",
        "name": "own",
        "dir": str(folder),
        "config": {"seed": 3},
        "id": None,
        "resume": "allow",
    }
    assert first.logged == [
        (1, {"train_loss": 5.5, "update/rms": 0.25}),
        (2, {"train_loss": 4.5, "held_out_loss": 4.75}),
    ]
    assert second.given["id"] == "new"
    assert [step for step, _ in second.logged] == [2]
    assert first.finished
    assert second.finished
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS


def test_without_the_package_it_says_what_to_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        parse(tmp_path, "--wandb", "muon")
    error = capsys.readouterr().err
    assert "pip install wandb" in error
    assert "--tensorboard DIR" in error
    assert parse(tmp_path).wandb is None


def test_tensorboard_gets_every_scalar_in_the_run_s_own_folder(tmp_path):
    folder = tmp_path / "runs" / "own" / "mesh"
    folder.mkdir(parents=True)
    write(parse(tmp_path / "runs", "--tensorboard", tmp_path / "board"), folder)
    (file,) = (tmp_path / "board" / "own" / "mesh").glob("events.out.tfevents.*")
    data, events = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        events.append(messages.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    seen = {
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
    }
    assert seen == {
        (record["step"], name, value)
        for record in RECORDS
        for name, value in record.items()
        if name != "step"
    }
