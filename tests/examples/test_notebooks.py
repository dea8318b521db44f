"""The notebooks run from top to bottom, and are committed as they ran."""

import base64
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
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


def pictures(cell: dict[str, Any]) -> list[np.ndarray]:
    encoded = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
    return [imread(io.BytesIO(base64.b64decode("".join(x)))) for x in encoded if x]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_what_ran(path: Path):
    notebook = json.loads(path.read_text())
    advice = "The code was changed after it ran: `make notebooks` runs it and saves its outputs."
    assert notebook["metadata"].get(DIGEST) == digest(notebook), advice
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    drawing = [cell for cell in cells if "".join(cell["source"]).endswith("\ndrawn")]
    assert drawing
    for cell in drawing:
        (picture,) = pictures(cell)
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50
    prose = [x["source"] for x in notebook["cells"] if x["cell_type"] == "markdown"]
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", "".join(map("".join, prose)))
    assert links
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_again_to_the_same_outputs(path, tmp_path):
    done = finished(sys.executable, PROGRAM, path, "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for saved, ran in zip(code_cells(path), code_cells(tmp_path / path.name), strict=True):
        measured = MEASURED in saved["metadata"].get("tags", ())
        assert words(ran, measured) == words(saved, measured), "".join(saved["source"])
        assert len(pictures(ran)) == len(pictures(saved))
