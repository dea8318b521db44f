"""Every script as users start it, on tiny shapes, and the report made of what they say."""

import doctest
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.optimizers import OPTAX, OPTIMIZERS, optax_at
from benchmarks.report import DOCS, PAGES, RESULTS, load, written

ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "step_time",
    "polar_time",
    "compile_time",
    "polar_quality",
    "clip_cost",
    "attention_recording",
    "settings_width",
    "settings_clip",
)


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
        options: tuple[object, ...] = ()
        if script == "polar_quality":
            options = ("--momentum", momentum)
        elif script == "clip_cost":
            options = ("--dtypes", "float32")
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
    if util.find_spec("torch"):
        assert rows["torch.optim.Muon, float32"]["difference_from_optax"] < 1e-4
        assert 1e-4 < rows["torch.optim.Muon, bfloat16"]["difference_from_optax"] < 0.2
    for row in rows.values():
        assert row["seconds"]["median"] > 0


@pytest.mark.slow
def test_compile_times_count_instructions_and_memory(results):
    rows = json.loads((results / "compile_time.json").read_text())["rows"]
    found = {(row["layers"], row["contender"]): row for row in rows}
    assert found[2, "ours"]["instructions"] > 0
    assert found[1, "optax.contrib.muon"]["temporary_bytes"] > 0
    assert found[2, "ours"]["growth"]["median"] > 0


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
def test_a_sweep_has_a_loss_for_every_case(results):
    stored = [results / f"settings_{name}.json" for name in ("width", "clip")]
    width, clip = (json.loads(path.read_text())["rows"] for path in stored)
    assert [row["consistent_rms"] for row in width] == [None] * 3 + [0.2] * 3
    assert all(2 < row["validation_loss"] < 6 for row in width + clip)
    free, tight = clip[:2]
    assert free["threshold"] is None
    assert free["clipped_share"] == 0 < tight["clipped_share"]
    assert tight["query_norm"] < free["query_norm"]


def test_another_checkout_of_optax_is_imported_beside_the_installed_one(tmp_path):
    folder = Path(optax.__file__).parent
    shutil.copytree(folder, tmp_path / "optax", ignore=shutil.ignore_patterns("*_test.py"))
    muon = tmp_path / "optax" / "contrib" / "_muon.py"
    muon.write_text(
        muon.read_text() + "\nmuon_here, muon = muon, lambda *a, **k: muon_here(*a, **k)\n"
    )
    before = dict(sys.modules)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    numbers = {"w": optax.contrib.MuonDimensionNumbers((0,), (1,)), "b": None}
    updates = {}
    for name, make in (("ours", OPTIMIZERS[OPTAX]), ("beside", optax_at(tmp_path))):
        tx = make(numbers)
        updates[name] = tx.update(params, tx.init(params), params)[0]
    jax.tree.map(np.testing.assert_array_equal, updates["ours"], updates["beside"])
    optax_modules = {name for name in before if name.split(".")[0] == "optax"}
    assert all(sys.modules[name] is before[name] for name in optax_modules)
    with pytest.raises(ImportError, match="no package optax"):
        optax_at(tmp_path / "nothing")


@pytest.mark.slow
def test_the_report_writes_pages(results, tmp_path):
    for name in PAGES:
        shutil.copy(DOCS / name, tmp_path / name)
    shutil.copy(RESULTS / "pods.json", results)
    options = ("--results", results, "--docs", tmp_path)
    done = run("report", *options)
    assert done.returncode == 0, done.stderr
    text = {name: (tmp_path / name).read_text() for name in PAGES}
    for name, blocks in PAGES.items():
        assert text[name] == written(text[name], load(results), blocks)
    for said in ("| ours, minimax4 |", "| fused q k v |", "T = 256"):
        assert said in text["performance.md"]
    # What is stored is what is published: the page of the repository.
    assert text["scaling.md"] == (DOCS / "scaling.md").read_text()
    assert "| `consistent_rms=0.2` |" in text["settings.md"]
    assert run("report", *options, "--check").returncode == 0
    for page, said in (("performance.md", "| ours, minimax4 |"), ("scaling.md", "| Kimi K2 |")):
        (tmp_path / page).write_text(text[page].replace(said, "| theirs |"))
        failed = run("report", *options, "--check")
        assert failed.returncode != 0
        assert page in failed.stderr
        assert "run this script" in failed.stderr
        (tmp_path / page).write_text(text[page])


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_stored_results_say(name):
    page = (DOCS / name).read_text()
    assert written(page, load(RESULTS), PAGES[name]) == page
    for block in PAGES[name]:
        assert page.count(f"<!-- {block} -->") == 1


def test_a_result_that_is_not_there_is_said_to_be_missing():
    page = (DOCS / "scaling.md").read_text()
    assert "not measured: `python -m benchmarks.pods`" in written(page, {}, PAGES["scaling.md"])


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="<!-- machine -->"):
        written("nothing", {}, PAGES["performance.md"])


#: Scripts that measure nothing or that make no file of their own: what they print.
PRINTED = {
    ("scaling",): "| Kimi K2 | 8192 |",
    ("pods", "--only", "nothing"): "| 7B dense, v5p:8x8x8 | fsdp x tp | `muonclip_jax.muonclip` |",
}


@pytest.mark.parametrize(("command", "said"), PRINTED.items(), ids=map(" ".join, PRINTED))
def test_scripts_print_their_tables(command, said):
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "harness",
        "counting",
        "hlo",
        "replica_groups",
        "report_tables",
        "polar_time",
        "report_settings",
        "settings_runs",
    ],
)
def test_doctests(module):
    assert doctest.testmod(import_module(f"benchmarks.{module}")).failed == 0
