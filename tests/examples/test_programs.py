"""The programs as users start them, in short runs: each in a process of its own."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--smoke", "--layers", 1, "--threshold", 2)  # some heads reach the threshold
#: The options of a short run.
PROGRAMS: dict[str, tuple[object, ...]] = {
    "train_lm": (*SMALL, "--steps", 60, "--checkpoint-every", 10),
    "train_nnx": (*SMALL, "--steps", 10),
    "train_linen_trainstate": (*SMALL, "--steps", 10),
    "train_sharded": (*SMALL, "--steps", 10),
    "train_moe": ("--smoke",),
    "fine_tune": ("--smoke",),
}


def start(program: str, *options: object, optimized: bool = False) -> subprocess.Popen[str]:
    """Starts an example."""
    # The tests' eight devices would slow down a program that uses one. Quick compiling is welcome
    # to a program that is short.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    changed = {"XLA_FLAGS": " ".join([] if optimized else flags), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / program), *map(str, options)],
        env=os.environ | changed | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program: str, *options: object, optimized: bool = False) -> str:
    """Runs an example and returns what it prints."""
    process = start(program, *options, optimized=optimized)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    return said


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Callable[[str], Path]:
    """Where a program's short run left its files; each runs once."""

    @functools.cache
    def once(name: str) -> Path:
        runs = tmp_path_factory.mktemp(name)
        boards = () if name == "fine_tune" else ("--tensorboard", runs / "board")
        run(f"{name}.py", *PROGRAMS[name], "--runs", runs, *boards)
        return runs / name

    return once


def records(folder: Path) -> list[dict[str, float]]:
    """The metrics without the one that measures time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
        for line in lines
    ]


@pytest.mark.parametrize(
    "name",
    [x if x == "train_lm" else pytest.param(x, marks=pytest.mark.slow) for x in PROGRAMS],
)
def test_a_short_run_learns_clips_and_leaves_its_files(name: str, short_run):
    folder = short_run(name)
    # Of several optimizers each has a folder of its own.
    (file, *_) = sorted(folder.rglob("metrics.jsonl"))
    lines = records(file.parent)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    curve = [line["train_loss"] for line in lines]
    assert curve[-1] < curve[0]
    if "--threshold" in PROGRAMS[name]:
        assert max(line["clipped_heads"] for line in lines) > 0
        assert min(line["smallest_gamma"] for line in lines) < 1
        assert name == "train_nnx" or all("clips_without_effect" in line for line in lines)
    if name != "fine_tune":
        assert list((folder.parent / "board" / name).rglob("events.out.tfevents.*"))
    pictures = [*folder.rglob("*.png")]
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path, short_run):
    whole = short_run("train_lm")
    assert (whole / "sample.txt").read_text().startswith("def ")
    options = (*PROGRAMS["train_lm"], "--runs", tmp_path)
    folder = tmp_path / "train_lm"
    process = start("train_lm.py", *options)
    # Past the checkpoint of step 20, so that lines without a checkpoint may be there too.
    while process.poll() is None and not (folder / "checkpoints" / "20").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "sample.txt").exists()

    with pytest.raises(AssertionError, match="seed: 0 became 5"):
        run("train_lm.py", *options, "--resume", "--seed", "5")
    resumed = run("train_lm.py", *options, "--resume")
    assert re.search(r"resuming after step [1-9]", resumed)
    assert records(folder) == records(whole)
    assert (folder / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()


@pytest.mark.slow
def test_rates_are_carried_over_to_a_larger_model_and_nothing_is_trained_twice(tmp_path: Path):
    said = run("scale_up.py", "--smoke", "--runs", tmp_path)
    assert "resuming" not in run("scale_up.py", "--smoke", "--runs", tmp_path)
    stored = json.loads((tmp_path / "scale_up" / "scale_up.json").read_text())
    for row, power in zip(stored["rows"][1:], (1.0, 0.5), strict=True):
        tried = re.findall(rf"{row['optimizer']}, rate (\S+): validation loss (\S+)", said)
        rate = float(min(tried, key=lambda found: float(found[1]))[0])
        assert row["rate"] == pytest.approx(rate * 0.5**power * 0.5, rel=0.01)
        assert row["held_out_loss"][-1] < row["held_out_loss"][0]


@pytest.mark.slow
@pytest.mark.parametrize("smoke", [True, False])
def test_muon_trains_the_convolutions_in_fewer_steps_than_adamw(smoke: bool, tmp_path: Path):
    picture = tmp_path / "convnet.png"
    chosen = ("--optimizers", "muon", "adamw", "--picture", picture)
    printed = run("train_convnet.py", *["--smoke"][:smoke], *chosen, optimized=not smoke)
    assert picture.read_bytes().startswith(b"\x89PNG")
    labels = dict(re.findall(r"^(\S+) +\(.*\) +(muon|adamw)", printed, re.MULTILINE))
    muon = [path for path, label in labels.items() if label == "muon"]
    assert muon == ["conv_0/kernel", "conv_1/kernel", "conv_2/kernel"]
    assert labels["first_conv/kernel"] == labels["head/kernel"] == "adamw"
    table = re.findall(r"^\| (Muon|AdamW) \| [\d.]+ \| ([^|]*) \|", printed, re.MULTILINE)
    steps = {
        name: [float(x.replace("never", "inf")) for x in cell.split(", ")] for name, cell in table
    }
    assert len(steps["Muon"]) == len(steps["AdamW"]) == (1 if smoke else 3)
    if not smoke:
        assert all(muon < adamw for muon, adamw in zip(steps["Muon"], steps["AdamW"], strict=True))


def test_default_settings_are_those_that_the_measurements_found():
    from common.training import OPTIMIZERS
    from train_convnet import next_k

    stored = json.loads((ROOT / "benchmarks" / "results" / "comparison.json").read_text())
    for name, optimizer in OPTIMIZERS.items():
        best = stored["winners"][name]
        found = (optimizer.best_rate, optimizer.best_decay, optimizer.best_warmup)
        assert found == (best["rate"], best["decay"], best["warmup"])
    assert next_k({3: 2.0, 4: 1.0, 5: 2.0}) is None
    assert next_k({3: 2.0, 4: 1.5}) == 5
    assert next_k({3: 1.0, 4: float("inf")}) == 2
    stored = json.loads((ROOT / "benchmarks" / "results" / "train_convnet.json").read_text())
    for found in stored["optimizers"].values():
        steps = dict(zip(found["rates"], found["steps"], strict=True))
        assert steps[found["best_rate"]] == min(steps.values())
        assert found["rates"][0] < found["best_rate"] < found["rates"][-1]
