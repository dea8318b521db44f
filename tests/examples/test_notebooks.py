"""The notebooks run from top to bottom, and are committed as they ran."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from notebooks.execute import DIGEST, NOTEBOOKS, digest

from tests.helpers import ROOT, finished

PROGRAM = ROOT / "examples" / "notebooks" / "execute.py"
#: A cell that has this tag prints what depends on the number of steps or on the machine.
MEASURED = "measured"


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def words(cell: dict[str, Any], measured: bool) -> list[str]:
    """The text that a cell printed or returned, or "" where it is a picture or was measured."""
    outputs = [(output, output.get("data", {})) for output in cell["outputs"]]
    return [
        "".join(x.get("text") or data["text/plain"])
        if "image/png" not in data and not measured
        else ""
        for x, data in outputs
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_what_ran(path: Path):
    notebook = json.loads(path.read_text())
    advice = "The code was changed after it ran: `make notebooks` runs it and saves its outputs."
    assert notebook["metadata"].get(DIGEST) == digest(notebook), advice
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_again_to_the_same_outputs(path, tmp_path):
    done = finished(sys.executable, PROGRAM, path, "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for saved, ran in zip(code_cells(path), code_cells(tmp_path / path.name), strict=True):
        measured = MEASURED in saved["metadata"].get("tags", ())
        assert words(ran, measured) == words(saved, measured), "".join(saved["source"])
