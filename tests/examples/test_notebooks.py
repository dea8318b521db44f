"""The notebooks run from top to bottom, and are committed as they ran."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from notebooks.execute import DIGEST, NOTEBOOKS, digest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "notebooks" / "execute.py"
#: A cell that has this tag prints what depends on the number of steps or on the machine.
MEASURED = "measured"
BYTES = 250_000


def execute(*options: object) -> subprocess.CompletedProcess[str]:
    """Runs the program that `make notebooks` runs; programs that run once compile quickly."""
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, options)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def kinds(cell: dict[str, Any]) -> list[str]:
    """What a cell returned, such as ["stdout", "image/png text/plain"]."""
    return [
        " ".join(sorted(output["data"])) if "data" in output else output.get("name", "error")
        for output in cell["outputs"]
    ]


def words(cell: dict[str, Any]) -> list[str]:
    """The text that a cell printed or returned; a picture's is its size, which is rounded."""
    outputs = [output for output in cell["outputs"] if "image/png" not in output.get("data", ())]
    return ["".join(x.get("text") or x["data"]["text/plain"]) for x in outputs]


def pictures(cell: dict[str, Any]) -> list[np.ndarray]:
    encoded = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
    return [imread(io.BytesIO(base64.b64decode("".join(x)))) for x in encoded if x]


def name(path: Path) -> str:
    return path.stem


def test_there_are_two():
    assert list(map(name, NOTEBOOKS)) == [
        "distributed_training_with_muonclip",
        "training_with_muonclip",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_what_is_committed_is_what_ran(path):
    notebook = json.loads(path.read_text())
    advice = "The code was changed after it ran: `make notebooks` runs it and saves its outputs."
    assert notebook["metadata"].get(DIGEST) == digest(notebook), advice
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert path.stat().st_size < BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_pictures_are_there_and_show_something(path):
    drawing = [cell for cell in code_cells(path) if "".join(cell["source"]).endswith("\ndrawn")]
    assert drawing
    for cell in drawing:
        (picture,) = pictures(cell)
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_links_lead_somewhere(path):
    cells = json.loads(path.read_text())["cells"]
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", prose)
    assert links
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_it_runs_again_to_the_same_outputs(path, tmp_path):
    done = execute(path, "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for saved, ran in zip(code_cells(path), code_cells(tmp_path / path.name), strict=True):
        assert kinds(ran) == kinds(saved), "".join(saved["source"])
        assert len(pictures(ran)) == len(pictures(saved))
        if MEASURED not in saved["metadata"].get("tags", ()):
            assert words(ran) == words(saved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('think twice')", "think twice"),
    ],
)
def test_a_cell_that_fails_or_warns_saves_nothing(source, message, tmp_path):
    cell = {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "id": "only"}
    content = {"cells": [cell | {"execution_count": None}], "metadata": {}}
    path = tmp_path / "bad.ipynb"
    path.write_text(json.dumps(content | {"nbformat": 4, "nbformat_minor": 5}))
    done = execute(path, "--out", tmp_path / "saved")
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "saved").exists()
