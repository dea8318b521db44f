"""The multi-host example in real processes on loopback, with one of them killed."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "train_multihost.py"
#: Long enough that a process is killed well before the end, and with a threshold that is reached.
STEPS, EVERY = 60, 20
OPTIONS = ("--layers", 1, "--width", 32, "--batch-size", 8)
OPTIONS += ("--steps", STEPS, "--checkpoint-every", EVERY)
#: A machine may be busy with other tests: what must end has this long, and takes seconds.
PATIENCE = 400

_tried = itertools.count(os.getpid() * 7)


def free_port() -> int:
    """A port below those that the system gives to outgoing connections."""
    for number in _tried:
        port = 20_000 + number % 10_000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, str]:
    """What every process gets: a compilation cache, as the same programs run many times."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return kept | {
        "PYTHONPATH": str(ROOT),
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


class Cluster:
    """Processes of the program on this machine, and what they print."""

    def __init__(
        self,
        count: int,
        logs: Path,
        environment: dict[str, str],
        options: Sequence[Any],
        devices: int = 1,
    ):
        logs.mkdir(parents=True)
        flags = " ".join(
            flag for flag in environment.get("XLA_FLAGS", "").split() if "device_count" not in flag
        )
        place = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(count),
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        }
        self.logs = [logs / f"{number}.txt" for number in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for number, log in enumerate(self.logs):
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(PROGRAM), *map(str, options)],
                        env=environment | place | {"JAX_PROCESS_ID": str(number)},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, patience: float = PATIENCE) -> list[int | None]:
        """The exit codes; None of what has not ended in time."""
        end = time.monotonic() + patience
        while any(p.poll() is None for p in self.processes) and time.monotonic() < end:
            time.sleep(0.05)
        return [process.poll() for process in self.processes]

    def wait_for(self, path: Path) -> None:
        """Returns when `path` exists; fails when it cannot any more."""
        end = time.monotonic() + PATIENCE
        while not path.exists():
            ended = [process.poll() for process in self.processes]
            assert set(ended) == {None}, self.printed()
            assert time.monotonic() < end, self.printed()
            time.sleep(0.002)

    def finish(self) -> None:
        codes = self.wait()
        assert codes == [0] * len(self.processes), f"{codes}\n{self.printed()}"

    def lines(self, number: int) -> list[str]:
        """What a process said, without its number."""
        said = self.logs[number].read_text(errors="replace").splitlines()
        return [
            line.removeprefix(f"[{number}] ") for line in said if line.startswith(f"[{number}]")
        ]

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
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        assert metadata is not None
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), metadata.tree
        )
        restored = checkpointer.restore(path, target)
    leaves = jax.tree_util.tree_flatten_with_path(restored)[0]
    return {jax.tree_util.keystr(key_path): np.asarray(leaf) for key_path, leaf in leaves}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request: Any, tmp_path_factory: Any, shared: dict[str, str], text: Path) -> dict[str, Any]:
    """One run without a break, and one whose last process was killed, as it lies there."""
    count = request.param
    base = tmp_path_factory.mktemp("runs")
    # Four processes share heads two by two, so that tensor parallelism crosses processes too.
    options = (*OPTIONS, "--data", text, "--tp", count // 2)
    with cluster(count, base / "w", shared, (*options, "--folder", base / "whole")) as whole:
        whole.finish()
    said = [whole.lines(number) for number in range(count)]
    with cluster(count, base / "k", shared, (*options, "--folder", base / "killed")) as killed:
        killed.wait_for(base / "killed" / "checkpoints" / str(EVERY))
        killed.processes[-1].send_signal(signal.SIGKILL)
        codes = killed.wait()
    return {
        "count": count,
        "options": options,
        "base": base,
        "said": said,
        "codes": codes,
        "killed": killed.printed(),
    }


def test_all_processes_see_the_same_losses(runs: dict[str, Any]):
    said = runs["said"]
    assert f"{runs['count']} processes" in said[0][0]
    assert len(said[0]) == 1 + STEPS // 10 + 1
    assert all(lines == said[0] for lines in said)
    record = metrics(runs["base"] / "whole")
    assert [line["step"] for line in record] == list(range(1, STEPS + 1))
    assert record[-1]["train_loss"] < record[0]["train_loss"] - 1


def test_the_others_end_when_one_is_killed(runs: dict[str, Any]):
    *others, killed = runs["codes"]
    assert killed == -signal.SIGKILL
    assert None not in others, runs["killed"]
    assert 0 not in others, runs["killed"]


def test_a_restart_ends_with_the_same_bits(runs: dict[str, Any], shared: dict[str, str]):
    base, count = runs["base"], runs["count"]
    folder = base / "restarted"
    shutil.copytree(base / "killed", folder)
    with cluster(count, base / "r", shared, (*runs["options"], "--folder", folder)) as restarted:
        restarted.finish()
    assert re.search(r"from step (2|4)0$", restarted.lines(0)[0])
    expected = saved_state(base / "whole")
    actual = saved_state(folder)
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert metrics(folder) == metrics(base / "whole")


def test_one_process_goes_on_from_the_checkpoint_of_many(
    runs: dict[str, Any], shared: dict[str, str]
):
    base, count = runs["base"], runs["count"]
    folder = base / "alone"
    shutil.copytree(base / "killed", folder)
    options = (*runs["options"], "--folder", folder, "--processes", 1)
    with cluster(1, base / "o", shared, options, count) as alone:
        alone.finish()
    assert "1 processes" in alone.lines(0)[0]
    # The same devices in one process add in another order, and 40 steps carry that on.
    expected = saved_state(base / "whole")
    for path, leaf in saved_state(folder).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-5, err_msg=path)


def test_the_page_starts_two_processes(tmp_path: Path, shared: dict[str, str]):
    page = (ROOT / "docs" / "multihost.md").read_text()
    (command,) = re.findall(
        r"^python (examples/train_multihost\.py .*--smoke.*)$", page, re.MULTILINE
    )
    done = subprocess.run(
        [sys.executable, *shlex.split(command), "--folder", str(tmp_path / "run")],
        cwd=ROOT,
        env={name: value for name, value in shared.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for number in range(2):
        assert f"[{number}] held-out loss" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "20").exists()


def test_the_code_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/multihost.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "multihost.md", "exec"), {})


def test_without_a_cluster_it_says_what_to_write(shared: dict[str, str]):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--smoke"],
        env=shared,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert "--processes 1 to train in this process alone" in done.stderr
