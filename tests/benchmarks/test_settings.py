"""The sweeps of docs/settings.md: each script as users start it, and the page made of results."""

import doctest
import json
import math
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import DOCS, RESULTS, load, written
from benchmarks.report_settings import BLOCKS, PAGE, PICTURES
from benchmarks.settings_curves import Curve, best, curves
from tests.benchmarks.test_scripts import run


def stored(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with what both sweeps say about a tiny model."""
    folder = tmp_path_factory.mktemp("settings")
    for script in ("settings_width", "settings_clip"):
        done = run(script, "--smoke", "--out", folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_sweep_has_a_loss_for_every_case(results):
    width, clip = (stored(results, f"settings_{name}") for name in ("width", "clip"))
    assert {row["rule"] for row in width["rows"]} == {"width_transfer", "sqrt_aspect", "rms_to_rms"}
    assert len(width["rows"]) == 9
    for row in width["rows"] + clip["rows"]:
        assert 2 < row["validation_loss"] < 6
    free, tight = clip["rows"][:2]
    assert free["threshold"] is None
    assert free["clipped_share"] == 0 < tight["clipped_share"]
    assert tight["query_norm"] < free["query_norm"]


@pytest.mark.slow
def test_what_is_there_is_not_run_again(results):
    before = (results / "settings_clip.json").read_text()
    done = run("settings_clip", "--smoke", "--out", results)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert (results / "settings_clip.json").read_text() == before


@pytest.mark.slow
def test_the_report_writes_page_and_pictures(results, tmp_path):
    page = tmp_path / "settings.md"
    shutil.copy(PAGE, page)
    options = ("--results", results, "--page", page, "--images", tmp_path / "images")
    done = run("report_settings", *options)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "| `match_rms_adamw` |" in text
    assert "| none |" in text
    for name in PICTURES:
        assert (tmp_path / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert run("report_settings", *options, "--check").returncode == 0
    page.write_text(text.replace("| none |", "| 1 |"))
    failed = run("report_settings", *options, "--check")
    assert failed.returncode != 0
    assert "run this script" in failed.stderr


def test_the_page_is_what_the_stored_results_say():
    page = PAGE.read_text()
    assert written(page, load(RESULTS), BLOCKS) == page
    for name in PICTURES:
        assert f"images/{name}.png" in page
        assert (DOCS / "images" / f"{name}.png").stat().st_size <= 120_000


def rows(rule: str, width: int, lowest: float) -> list[dict[str, Any]]:
    """A parabola in the logarithm of the rate, with its lowest point between the rates tried."""
    rates = [0.01 * 2**k for k in range(6)]
    return [
        {"rule": rule, "width": width, "rate": r, "validation_loss": 2 + math.log2(r / lowest) ** 2}
        for r in rates
    ]


def test_the_lowest_point_of_a_parabola_is_found():
    found = best(curves(rows("width_transfer", 64, 0.05), "width_transfer")[64])
    assert found.rate == pytest.approx(0.05)
    assert found.loss == pytest.approx(2)
    assert found.at_end == 0


def test_rates_are_in_the_units_of_the_rule():
    measured = rows("sqrt_aspect", 64, 0.08) + rows("sqrt_aspect", 256, 0.08)
    by_width = curves(measured, "match_rms_adamw")
    # 0.2 sqrt(64) = 1.6 and 0.2 sqrt(256) = 3.2 are what the rate is multiplied by.
    assert best(by_width[64]).rate == pytest.approx(0.08 / 1.6)
    assert best(by_width[256]).rate == pytest.approx(0.08 / 3.2)


def test_ends_and_divergence():
    assert best(Curve((1.0, 2.0, 4.0), (1.0, 2.0, 3.0))).at_end == -1
    assert best(Curve((1.0, 2.0, 4.0), (3.0, 2.0, math.inf))).rate == 2.0
    diverged = [row | {"validation_loss": None} for row in rows("rms_to_rms", 64, 0.05)[:2]]
    assert curves(diverged, "rms_to_rms")[64].losses == (math.inf, math.inf)
    assert Curve((1.0, 4.0), (1.0, 3.0)).at(2.0) == 2.0
    assert Curve((1.0, 4.0), (1.0, 3.0)).at(8.0) is None


@pytest.mark.parametrize("module", ["settings_curves", "settings_runs"])
def test_doctests(module):
    assert doctest.testmod(import_module(f"benchmarks.{module}")).failed == 0
