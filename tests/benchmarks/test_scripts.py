"""Every script as users start it, on tiny shapes, and the report made of what they say."""

import doctest
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest

from benchmarks.report import BLOCKS, PAGE, RESULTS, load, written

ROOT = Path(__file__).parents[2]
SCRIPTS = ("step_time", "polar_time", "compile_time", "polar_quality")


def run(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    # One device, as users have; what runs once is not worth optimising.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *map(str, options)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with what every script says about tiny shapes."""
    folder = tmp_path_factory.mktemp("results")
    momentum = tmp_path_factory.mktemp("momentum") / "momentum.npz"
    runs: list[tuple[object, ...]] = [("momentum", "--smoke", "--out", momentum)]
    for script in SCRIPTS:
        options = ("--momentum", momentum) if script in ("step_time", "polar_quality") else ()
        runs.append((script, "--smoke", "--out", folder, *options))
    for command in runs:
        done = run(str(command[0]), *command[1:])
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_results_say_where_they_come_from(results):
    for script in SCRIPTS:
        stored = json.loads((results / f"{script}.json").read_text())
        assert stored["machine"]["cores"] >= 1
        assert {"jax", "jaxlib", "optax"} <= set(stored["machine"]["versions"])
        assert script in stored["command"]


@pytest.mark.slow
def test_the_step_is_checked_against_optax(results):
    stored = json.loads((results / "step_time.json").read_text())
    rows = {row["contender"]: row for row in stored["rows"]}
    assert rows["ours"]["difference_from_optax"] < 1e-4
    # Another polynomial: the comparison would see a difference.
    assert rows["ours, minimax4"]["difference_from_optax"] > 1e-2
    assert set(stored["momentum_quality"]) >= {"ours", "ours, minimax4", "optax.contrib.muon"}
    if util.find_spec("torch"):
        assert rows["torch.optim.Muon, float32"]["difference_from_optax"] < 1e-4
        assert 1e-4 < rows["torch.optim.Muon, bfloat16"]["difference_from_optax"] < 0.2
    for row in rows.values():
        assert len(row["seconds"]["rounds"]) == 1


@pytest.mark.slow
def test_compile_times_count_instructions_and_memory(results):
    rows = json.loads((results / "compile_time.json").read_text())["rows"]
    found = {(row["layers"], row["contender"]): row for row in rows}
    assert found[2, "ours"]["instructions"] > 0
    assert found[1, "optax.contrib.muon"]["temporary_bytes"] > 0
    assert found[2, "ours"]["matrix_bytes"] == 2 * found[1, "ours"]["matrix_bytes"]


@pytest.mark.slow
def test_quality_covers_every_family_form_and_dtype(results):
    stored = json.loads((results / "polar_quality.json").read_text())
    assert {"gaussian", "low rank + 1 % noise", "cond 1e3", "cond 1e6", "momentum"} <= set(
        stored["families"]
    )
    forms = {(record["method"], record["dtype"]) for record in stored["records"]}
    assert forms == {("standard", "float32"), ("standard", "bfloat16"), ("gram", "float16")}
    assert not any(record["diverges_on"] for record in stored["records"] if record["auto"])


@pytest.mark.slow
def test_the_report_writes_page_and_pictures(results, tmp_path):
    page = tmp_path / "performance.md"
    shutil.copy(PAGE, page)
    options = ("--results", results, "--page", page, "--images", tmp_path / "images")
    done = run("report", *options)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text == written(text, load(results))
    assert "| ours, minimax4 |" in text
    for name in ("step_time", "compile_time", "polar_quality"):
        assert (tmp_path / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert run("report", *options, "--check").returncode == 0
    page.write_text(text.replace("| ours, minimax4 |", "| theirs |"))
    failed = run("report", *options, "--check")
    assert failed.returncode != 0
    assert "run this script" in failed.stderr


def test_the_page_is_what_the_stored_results_say():
    page = PAGE.read_text()
    assert written(page, load(RESULTS)) == page
    for name in BLOCKS:
        assert page.count(f"<!-- {name} -->") == 1


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="<!-- machine -->"):
        written("nothing", {})


@pytest.mark.parametrize(
    "module", ["harness", "counting", "report_text", "polar_time", "report_targets"]
)
def test_doctests(module):
    assert doctest.testmod(import_module(f"benchmarks.{module}")).failed == 0
