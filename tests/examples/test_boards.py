"""Metrics on a stand-in for Weights & Biases."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from common import program
from common.boards import open_boards
from common.records import Metrics

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
