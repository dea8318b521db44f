"""The multi-host example in real processes on loopback, with one of them killed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from common.processes import NUMBER, environments, free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "train_multihost.py"
#: Long enough that a process is killed well before the end, and with a threshold that is reached.
STEPS, EVERY = 60, 20
OPTIONS = ("--layers", 1, "--width", 32, "--batch-size", 8)
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
    """Processes of the program on this machine, and what they print."""

    def __init__(
        self,
        count: int,
        logs: Path,
        environment: dict[str, str],
        options: Sequence[Any],
        devices: int = 1,
        command: Sequence[str] = (sys.executable, str(PROGRAM)),
    ):
        logs.mkdir(parents=True)
        self.logs = [logs / f"{number}.txt" for number in range(count)]
        self.processes: list[subprocess.Popen[Any]] = []
        words = [*command, *map(str, options)]
        for log, place in zip(self.logs, environments(count, devices, environment), strict=True):
            with log.open("wb") as out:
                given: Any = {"stdout": out, "stderr": subprocess.STDOUT}
                self.processes.append(subprocess.Popen(words, env=place, cwd=ROOT, **given))

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
        """What the first process said."""
        codes = self.wait()
        assert codes == [0] * len(self.processes), f"{codes}\n{self.printed()}"
        return self.lines(0)

    def lines(self, number: int) -> list[str]:
        """What a process said, without its number."""
        said = self.logs[number].read_text(errors="replace").splitlines()
        start = f"[{number}]"
        return [x.removeprefix(f"{start} ") for x in said if x.startswith(start)]

    def printed(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self.logs)


@contextmanager
def cluster(*args: Any) -> Iterator[Cluster]:
    """A cluster of which nothing is left afterwards, whatever happens."""
    started = Cluster(*args)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


def saved_state(folder: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """The leaves of a checkpoint, read by this process on one of its devices."""
    path = (folder / "checkpoints" / str(step) / "default").resolve()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        assert metadata is not None
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), metadata.tree
        )
        leaves = jax.tree.leaves_with_path(checkpointer.restore(path, like))
    return {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in leaves}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Bytes with something to learn, so that steps move the parameters."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 9, 200)]
    file = tmp_path_factory.mktemp("text") / "own.txt"
    file.write_text(" ".join(rng.choice(words, 12_000)))
    return file


class Runs(NamedTuple):
    """A run without a break in `base / "whole"`, and one whose last process was killed."""

    base: Path
    options: tuple[Any, ...]
    said: list[list[str]]
    codes: list[int | None]
    printed: str


#: Heads are shared two by two, so that tensor parallelism crosses processes too.
COUNT = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any, shared: dict[str, str], text: Path) -> Runs:
    base = tmp_path_factory.mktemp("runs")
    options = (*OPTIONS, "--data", text, "--tp", COUNT // 2)
    with cluster(COUNT, base / "w", shared, (*options, "--folder", base / "whole")) as whole:
        whole.finish()
    said = [whole.lines(number) for number in range(COUNT)]
    first = str(base / "killed" / "checkpoints" / str(EVERY))
    code = KILLED.format(first=first, step=EVERY + EVERY // 2, victim=COUNT - 1)
    command, folder = (sys.executable, "-c", code), ("--folder", base / "killed")
    with cluster(COUNT, base / "k", shared, (*options, *folder), 1, command) as killed:
        return Runs(base, options, said, killed.wait(), killed.printed())


def test_all_processes_see_the_same_losses_and_the_others_end_when_one_is_killed(runs: Runs):
    first = runs.said[0]
    assert f"{COUNT} processes" in first[0]
    assert len(first) == 1 + STEPS // 10 + 1
    assert all(lines == first for lines in runs.said)
    record = metrics(runs.base / "whole")
    assert [line["step"] for line in record] == list(range(1, STEPS + 1))
    assert record[-1]["train_loss"] < record[0]["train_loss"] - 1
    *others, killed = runs.codes
    assert killed == -signal.SIGKILL
    assert not {None, 0} & set(others), runs.printed


def test_a_restart_ends_with_the_same_bits(runs: Runs, shared: dict[str, str]):
    folder = runs.base / "restarted"
    shutil.copytree(runs.base / "killed", folder)
    options = (*runs.options, "--folder", folder)
    with cluster(COUNT, runs.base / "r", shared, options) as restarted:
        assert restarted.finish()[0].endswith(f"from step {EVERY}")
    actual, expected = saved_state(folder), saved_state(runs.base / "whole")
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert metrics(folder) == metrics(runs.base / "whole")


def test_one_process_goes_on_where_its_devices_do_not_divide_the_batch(
    runs: Runs, shared: dict[str, str]
):
    """Four devices of as many processes become three of one; the batch of 8 is no multiple.

    Other devices add float32 gradients in another order. A difference of the last bit, 6e-8, grows
    up to the slope of Newton-Schulz's polynomial at zero (hundreds) in the directions of small
    singular values, and 40 steps carry it on: 5e-5 of what the parameters move was measured.
    """
    folder = runs.base / "three"
    shutil.copytree(runs.base / "killed", folder)
    options = (*runs.options, "--folder", folder, "--processes", 1, "--tp", 1)
    with cluster(1, runs.base / "3", shared, options, 3) as three:
        said = three.finish()
    assert said[0].endswith(f"mesh {{'fsdp': 3, 'tp': 1}}, from step {EVERY}")
    assert "3 devices along fsdp do not divide --batch-size 8" in said[1]
    begun, expected = saved_state(runs.base / "killed", EVERY), saved_state(runs.base / "whole")
    for path, leaf in saved_state(folder).items():
        moved = np.linalg.norm(expected[path] - begun[path])
        assert np.linalg.norm(leaf - expected[path]) <= 1e-4 * moved, path


def test_devices_that_would_do_nothing_are_refused(tmp_path: Path, shared: dict[str, str]):
    options = (*OPTIONS, "--processes", 1, "--tp", 3, "--folder", tmp_path / "run")
    with cluster(1, tmp_path / "logs", shared, options, 4) as refused:
        assert refused.wait() == [1]
    assert "--tp 3 does not divide the 4 devices" in refused.printed()
    assert "--tp 1, 2, 4." in refused.printed()
    assert not (tmp_path / "run").exists()


PAGE = (ROOT / "docs" / "multihost.md").read_text()


def test_processes_that_are_told_to_end_save_the_same_step(
    tmp_path: Path, shared: dict[str, str], text: Path
):
    """With the command that the page gives a container, whose first process is told."""
    (line,) = re.findall(r'command: \["sh", "-c"\].*?args:\n +- (.*?)\n +env:', PAGE, re.DOTALL)
    # A shell between would keep the signal to itself; not every one gives way by itself.
    assert line.startswith("exec ")
    line = " ".join(line.split()).replace("/shared/run", f'{tmp_path / "run"} "$@"')
    line = f"JOB_COMPLETION_INDEX=${NUMBER}; unset {NUMBER}; {line}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # More steps than there is time for.
    options, saved = (*OPTIONS, "--data", text, "--steps", 10**6), tmp_path / "run" / "checkpoints"
    command = ("sh", "-c", line, "sh")
    with cluster(2, tmp_path / "logs", shared | {"PATH": path}, options, 1, command) as told:
        told.wait(saved / str(EVERY))
        told.processes[1].send_signal(signal.SIGTERM)
        told.finish()
    (last,) = {lines[-1] for lines in map(told.lines, range(2))}
    step = int(re.findall(r"after step (\d+)$", last)[0])
    assert step > EVERY
    assert max(int(each.name) for each in saved.iterdir() if each.name.isdigit()) == step
    assert int(saved_state(tmp_path / "run", step)["['step']"]) == step


def test_ports_are_not_those_of_outgoing_connections():
    """Linux gives those from 32768 on, others from 49152 on; and nobody gets the same twice."""
    ports = {free_port() for _ in range(3)}
    assert len(ports) == 3
    assert all(20_000 <= port < 30_000 for port in ports)


def started(environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(PROGRAM), *options]
    captured: Any = {"capture_output": True, "text": True, "timeout": PATIENCE, "check": False}
    return subprocess.run(words, cwd=ROOT, env=environment, **captured)


def test_the_page_starts_two_processes(tmp_path: Path, shared: dict[str, str]):
    command = r"^python examples/train_multihost\.py (.*--smoke.*)$"
    (options,) = re.findall(command, PAGE, re.MULTILINE)
    own = {name: value for name, value in shared.items() if name != "XLA_FLAGS"}
    done = started(own, *shlex.split(options), "--folder", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    for number in range(2):
        assert f"[{number}] held-out loss" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "20").exists()


def test_without_a_cluster_it_says_what_to_write(shared: dict[str, str]):
    done = started(shared, "--smoke")
    assert done.returncode == 1
    assert "--processes 1 to train in this process alone" in done.stderr
