"""Metrics on TensorBoard, read back from its file, and on a stand-in for Weights & Biases."""

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

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


def write(tmp_path: Path, folder: Path, *arguments: object, step: int = 0) -> None:
    parser = program.parser("own", "A program.")
    options = parser.parse_args(["--runs", str(tmp_path), *map(str, arguments)])
    folder.mkdir(parents=True, exist_ok=True)
    boards = open_boards(options, folder, {"seed": 3}, step=step)
    with Metrics(folder, step=step, boards=boards) as metrics:
        metrics.write(RECORDS[step:])


def test_a_run_goes_to_weights_and_biases_and_goes_on_there(tmp_path: Path, monkeypatch):
    run = mock.Mock(id="new")
    wandb = SimpleNamespace(init=mock.Mock(return_value=run))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "own"
    given = {"project": "muon", "name": "own", "dir": str(folder), "config": {"seed": 3}}
    for step, last in ((0, None), (1, "new")):
        write(tmp_path, folder, "--wandb", "muon", step=step)
        wandb.init.assert_called_with(**given, id=last, resume="allow")
        logged = [{k: v for k, v in x.items() if k != "step"} for x in RECORDS[step:]]
        calls = [mock.call(x, step=i) for i, x in enumerate(logged, start=step + 1)]
        assert run.log.call_args_list == calls
        run.reset_mock()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS


def test_without_the_package_it_says_what_to_write(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        write(tmp_path, tmp_path, "--wandb", "muon")
    assert "pip install wandb" in capsys.readouterr().err


def test_tensorboard_gets_every_scalar_in_the_run_s_own_folder(tmp_path: Path):
    folder = tmp_path / "runs" / "own" / "mesh"
    write(tmp_path / "runs", folder, "--tensorboard", tmp_path / "board")
    (file,) = (tmp_path / "board" / "own" / "mesh").glob("events.out.tfevents.*")
    data, seen = file.read_bytes(), set()
    while data:  # length, its checksum, the event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event = messages.Event.FromString(data[12 : 12 + size])
        seen |= {(event.step, value.tag, value.simple_value) for value in event.summary.value}
        data = data[16 + size :]
    assert seen == {(x["step"], k, v) for x in RECORDS for k, v in x.items() if k != "step"}
