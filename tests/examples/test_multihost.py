"""The multi-host example in real processes on loopback, with one of them killed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from common.processes import NUMBER, environments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "train_multihost.py"
#: Long enough that a process is killed well before the end, and with a threshold that is reached.
STEPS, EVERY = 60, 20
OPTIONS = ("--layers", 1, "--width", 32, "--batch-size", 8, "--data", ROOT / "muonclip_jax")
OPTIONS += ("--steps", STEPS, "--checkpoint-every", EVERY)
#: A machine may be busy with other tests: what must end has this long, and takes seconds.
PATIENCE = 400
#: What a test machine may itself be part of, and would be found by `jax.distributed`.
LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_")
#: The program, but that the last process kills itself between two checkpoints. All wait until the
#: first is there: what is killed is the same on a busy machine and on an idle one.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import train_multihost as program
batch = program.ShardedTraining.batch
def held(self, now):
    if now == {step}:
        while not Path({first!r}).exists():
            time.sleep(0.01)
        if int(os.environ["JAX_PROCESS_ID"]) == {victim}:
            os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, now)
program.ShardedTraining.batch = held
sys.exit(program.main(sys.argv[1:]))
"""


class Cluster:
    """Processes of the program on this machine, each with one device, and what they print."""

    def __init__(self, logs: Path, environment: dict[str, str], words: Sequence[Any], count: int):
        logs.mkdir(parents=True)
        self.logs = [logs / f"{number}.txt" for number in range(count)]
        self.processes: list[subprocess.Popen[Any]] = []
        for log, place in zip(self.logs, environments(count, 1, environment), strict=True):
            with log.open("wb") as out:
                given: Any = {"stdout": out, "stderr": subprocess.STDOUT}
                command = [*map(str, words)]
                self.processes.append(subprocess.Popen(command, env=place, cwd=ROOT, **given))

    def wait(self, path: Path | None = None) -> list[int | None]:
        """The exit codes, None of what has not ended in time; or returns when `path` exists."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            codes = [process.poll() for process in self.processes]
            if path.exists() if path else None not in codes:
                break
            assert not path or set(codes) == {None}, self.printed()
            time.sleep(0.002)
        return [process.poll() for process in self.processes]

    def finish(self) -> list[str]:
        """What all processes said alike, without their numbers."""
        codes = self.wait()
        assert codes == [0] * len(self.processes), f"{codes}\n{self.printed()}"
        first, *others = (
            re.findall(rf"^\[{number}\] (.*)$", log.read_text(errors="replace"), re.MULTILINE)
            for number, log in enumerate(self.logs)
        )
        assert all(lines == first for lines in others)
        return first

    def printed(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self.logs)


@contextmanager
def cluster(
    logs: Path, environment: dict[str, str], words: Sequence[Any], count: int
) -> Iterator[Cluster]:
    """A cluster of which nothing is left afterwards, whatever happens."""
    started = Cluster(logs, environment, words, count)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, str]:
    """What every process gets: a compilation cache, as the same programs run many times."""
    own = {k: value for k, value in os.environ.items() if not k.startswith(LAUNCHERS)}
    return own | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def test_when_a_process_is_killed_the_others_end_and_a_restart_ends_with_the_same_bits(
    tmp_path: Path, shared: dict[str, str]
):
    # Heads are shared two by two, so that tensor parallelism crosses processes too.
    options = (*OPTIONS, "--tp", 2, "--folder")
    program, whole, folder = (sys.executable, PROGRAM), tmp_path / "whole", tmp_path / "killed"
    with cluster(tmp_path / "w", shared, (*program, *options, whole), count=4) as undisturbed:
        said = undisturbed.finish()
    assert "4 processes" in said[0]
    assert len(said) == 1 + STEPS // 10 + 1

    first = str(folder / "checkpoints" / str(EVERY))
    code = KILLED.format(first=first, step=EVERY + EVERY // 2, victim=3)
    words = (sys.executable, "-c", code, *options, folder)
    with cluster(tmp_path / "k", shared, words, count=4) as killed:
        *others, last = killed.wait()
        assert last == -signal.SIGKILL
        assert not {None, 0} & set(others), killed.printed()
    with cluster(tmp_path / "r", shared, (*program, *options, folder), count=4) as restarted:
        assert restarted.finish()[0].endswith(f"from step {EVERY}")
    # The losses of steps after the restart are those of the same parameters, bit for bit.
    found, record = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (folder, whole)
    )
    assert found == record
    assert [line["step"] for line in record] == list(range(1, STEPS + 1))
    assert record[-1]["train_loss"] < record[0]["train_loss"] - 1


PAGE = (ROOT / "docs" / "multihost.md").read_text()


def test_processes_that_are_told_to_end_save_the_same_step(tmp_path: Path, shared: dict[str, str]):
    """With the command that the page gives a container, whose first process is told."""
    (line,) = re.findall(r'command: \["sh", "-c"\].*?args:\n +- (.*?)\n +env:', PAGE, re.DOTALL)
    # A shell between would keep the signal to itself; not every one gives way by itself.
    assert line.startswith("exec ")
    line = " ".join(line.split()).replace("/shared/run", f'{tmp_path / "run"} "$@"')
    line = f"JOB_COMPLETION_INDEX=${NUMBER}; unset {NUMBER}; {line}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # More steps than there is time for.
    words = ("sh", "-c", line, "sh", *OPTIONS, "--steps", 10**6)
    saved = tmp_path / "run" / "checkpoints"
    with cluster(tmp_path / "logs", shared | {"PATH": path}, words, count=2) as told:
        told.wait(saved / str(EVERY))
        told.processes[1].send_signal(signal.SIGTERM)
        last = told.finish()[-1]
    step = int(re.findall(r"after step (\d+)$", last)[0])
    assert step > EVERY
    assert max(int(each.name) for each in saved.iterdir() if each.name.isdigit()) == step


def test_the_page_starts_two_processes(tmp_path: Path, shared: dict[str, str]):
    command = r"^python examples/train_multihost\.py (.*--smoke.*)$"
    (options,) = re.findall(command, PAGE, re.MULTILINE)
    words = [sys.executable, str(PROGRAM), *shlex.split(options), "--folder", str(tmp_path / "run")]
    own = {name: value for name, value in shared.items() if name != "XLA_FLAGS"}
    captured: Any = {"capture_output": True, "text": True, "timeout": PATIENCE, "check": False}
    done = subprocess.run(words, cwd=ROOT, env=own, **captured)
    assert done.returncode == 0, done.stderr
    for number in range(2):
        assert f"[{number}] held-out loss" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "20").exists()
