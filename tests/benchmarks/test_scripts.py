"""Every script as users start it, on tiny shapes, and the report made of what they say."""

import doctest
import json
import shutil
import sys
from importlib import import_module, util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import comparison
from benchmarks.gpu import SHARES
from benchmarks.optimizers import OPTAX, OPTIMIZERS, optax_at
from benchmarks.report import PAGES, PICTURE, RESULTS, load, written
from benchmarks.report_training import clip_table, coefficients_table, comparison_table
from tests.helpers import ROOT, finished

SCRIPTS = (
    "step_time",
    "compile_time",
    "polar_quality",
    "clip_cost",
    "attention_recording",
)


def run(script: str, *options: object) -> Any:
    return finished(
        sys.executable, f"benchmarks/{script}.py", *options, env={"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with what every script says about tiny shapes."""
    folder = tmp_path_factory.mktemp("results")
    for script in SCRIPTS:
        done = run(script, "--smoke", "--out", folder)
        assert done.returncode == 0, done.stderr
        stored = json.loads((folder / f"{script}.json").read_text())
        assert {"jax", "jaxlib", "optax"} <= set(stored["machine"]["versions"])
        assert script in stored["command"]
    return folder


@pytest.mark.slow
def test_the_step_is_checked_against_optax(results):
    stored = json.loads((results / "step_time.json").read_text())
    rows = {row["contender"]: row for row in stored["rows"]}
    assert rows["ours"]["difference_from_optax"] < 1e-4
    # Another polynomial: the comparison would see a difference.
    assert rows["ours, minimax4"]["difference_from_optax"] > 1e-2
    if util.find_spec("torch"):
        assert rows["torch.optim.Muon, float32"]["difference_from_optax"] < 1e-4
        assert 1e-4 < rows["torch.optim.Muon, bfloat16"]["difference_from_optax"] < 0.2
    for row in rows.values():
        assert row["seconds"]["median"] > 0


def test_another_checkout_of_optax_is_imported_beside_the_installed_one(tmp_path):
    folder = Path(optax.__file__).parent
    shutil.copytree(folder, tmp_path / "optax", ignore=shutil.ignore_patterns("*_test.py"))
    muon = tmp_path / "optax" / "contrib" / "_muon.py"
    muon.write_text(
        muon.read_text() + "\nmuon_here, muon = muon, lambda *a, **k: muon_here(*a, **k)\n"
    )
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    numbers = {"w": optax.contrib.MuonDimensionNumbers((0,), (1,)), "b": None}
    updates = {}
    for name, make in (("ours", OPTIMIZERS[OPTAX]), ("beside", optax_at(tmp_path))):
        tx = make(numbers)
        updates[name] = tx.update(params, tx.init(params), params)[0]
    jax.tree.map(np.testing.assert_array_equal, updates["ours"], updates["beside"])
    assert sys.modules["optax"] is optax


@pytest.mark.slow
def test_the_report_writes_pages(results, tmp_path):
    for name in PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for stored in ("pods", "comparison", "training_runs"):
        shutil.copy(RESULTS / f"{stored}.json", results)
    options = ("--results", results, "--root", tmp_path)
    done = run("report", *options, "--plot")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert run("report", *options, "--check").returncode == 0
    page = tmp_path / "docs/scaling.md"
    page.write_text(page.read_text().replace("| Kimi K2", "| theirs"))
    assert run("report", *options, "--check").returncode != 0


@pytest.mark.slow
def test_a_comparison_is_run_and_replayed(tmp_path):
    done = run("comparison", "--smoke", "--at-once", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not finished" not in done.stdout
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert set(stored["winners"]) == set(comparison.COMPARED)
    results = load(tmp_path)
    both = results["training_runs"], results["comparison"]
    for table in (comparison_table, coefficients_table, clip_table):
        assert "not measured" not in table(*both)
    assert run("comparison", "--smoke", "--seconds", -1, "--out", tmp_path).returncode == 0
    assert json.loads((tmp_path / "comparison.json").read_text()) == stored


def test_stored_runs_lead_to_the_stored_winners(tmp_path, monkeypatch):
    shutil.copy(RESULTS / "training_runs.json", tmp_path)
    monkeypatch.setattr(sys, "argv", ["comparison", "--seconds", "-1", "--out", str(tmp_path)])
    comparison.main()
    assert load(tmp_path)["comparison"] == load(RESULTS)["comparison"]


@pytest.mark.slow
def test_all_that_a_gpu_answers_is_rehearsed(tmp_path):
    done = run("gpu", "--smoke", "--seconds", 600, "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = load(tmp_path)
    assert set(found) == {f"gpu_{part}" for part in SHARES}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_stored_results_say(name):
    page = (ROOT / name).read_text()
    assert written(page, load(RESULTS), PAGES[name]) == page


@pytest.mark.parametrize(
    "module", ["matrices", "replica_groups", "report_tables", "report_training"]
)
def test_doctests(module):
    assert doctest.testmod(import_module(f"benchmarks.{module}")).failed == 0
