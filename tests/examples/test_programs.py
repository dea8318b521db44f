"""The programs as users start them: each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--smoke", "--layers", "1", "--steps", "60", "--checkpoint-every", "10")


def command(program: str, *options: object) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / program), *map(str, options)]


def environment(*, optimized: bool = False) -> dict[str, str]:
    # The tests' eight devices would slow down a program that uses one. Quick compiling is welcome
    # to a program that is short.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags = [] if optimized else flags
    changed = {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return os.environ | changed


def run(
    program: str, *options: object, optimized: bool = False
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(program, *options),
        env=environment(optimized=optimized),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def records(folder: Path) -> list[dict[str, float]]:
    """The metrics without the one that measures time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
        for line in lines
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One run without a break, with a threshold that it reaches and a TensorBoard."""
    runs = tmp_path_factory.mktemp("runs")
    done = run(
        "train_lm.py", *SMALL, "--threshold", "2", "--runs", runs, "--tensorboard", runs / "t"
    )
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    return runs / "train_lm"


def test_a_run_leaves_what_it_says(whole):
    lines = records(whole)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[-1]["held_out_loss"] < lines[9]["held_out_loss"]
    assert max(line["clipped_heads"] for line in lines) > 0
    assert min(line["smallest_gamma"] for line in lines) < 1
    assert (whole / "sample.txt").read_text().startswith("def ")
    for picture in ("loss.png", "largest_logit.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")
    assert list((whole.parent / "t" / "train_lm").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(whole, tmp_path):
    options = (*SMALL, "--threshold", "2", "--runs", tmp_path)
    folder = tmp_path / "train_lm"
    process = subprocess.Popen(
        command("train_lm.py", *options),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Past the checkpoint of step 20, so that lines without a checkpoint may be there too.
    while process.poll() is None and not (folder / "checkpoints" / "20").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "sample.txt").exists()

    other = run("train_lm.py", *options, "--resume", "--seed", "5")
    assert other.returncode != 0
    assert "seed: 0 became 5" in other.stderr

    resumed = run("train_lm.py", *options, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step" in resumed.stdout
    assert "resuming after step 0" not in resumed.stdout
    assert records(folder) == records(whole)
    assert (folder / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()


@pytest.mark.slow
def test_own_files_and_another_optimizer(tmp_path):
    (tmp_path / "own.txt").write_text("the quick brown fox jumps over the lazy dog. " * 1000)
    done = run(
        "train_lm.py",
        *("--data", tmp_path / "own.txt", "--optimizer", "adamw", "--smoke", "--layers", 1),
        *("--steps", 10, "--runs", tmp_path / "runs", "--name", "own"),
    )
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path / "runs" / "own")) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "run_folder", "said"),
    [
        ("train_nnx", "", "picture: "),
        ("train_linen_trainstate", "", "| nn.scan and nn.remat | 1 |"),
        ("train_sharded", "mesh", "| block_0/attention/query/kernel | (32, 4, 8) | fsdp, tp,"),
    ],
)
def test_other_programs_train_and_draw(name, run_folder, said, tmp_path):
    smoke = ("--smoke", "--layers", 1, "--steps", 10, "--threshold", 2)
    done = run(f"{name}.py", *smoke, "--runs", tmp_path, "--tensorboard", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    lines = records(tmp_path / name / run_folder)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert max(line["clipped_heads"] for line in lines) > 0
    assert (tmp_path / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "t" / name / run_folder).glob("events.out.tfevents.*"))
    if name == "train_sharded":
        expected = [line["train_loss"] for line in records(tmp_path / name / "one_device")]
        assert [line["train_loss"] for line in lines] == pytest.approx(expected, rel=1e-4)


def test_default_settings_are_those_that_the_comparison_found():
    from common.training import OPTIMIZERS

    stored = json.loads((ROOT / "benchmarks" / "results" / "comparison.json").read_text())
    for name, optimizer in OPTIMIZERS.items():
        best = stored["winners"][name]
        found = (optimizer.best_rate, optimizer.best_decay, optimizer.best_warmup)
        assert found == (best["rate"], best["decay"], best["warmup"])
