"""The multi-host example in real processes on loopback, with one of them killed."""

import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common.processes import NUMBER, free_port

from tests.examples.cluster import (
    EVERY,
    KILLED,
    OPTIONS,
    PATIENCE,
    PROGRAM,
    ROOT,
    STEPS,
    alone,
    cluster,
    metrics,
    saved_state,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, str]:
    """What every process gets: a compilation cache, as the same programs run many times."""
    return alone(os.environ) | {
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


@pytest.fixture(scope="module", params=[2, 4])
def runs(request: Any, tmp_path_factory: Any, shared: dict[str, str], text: Path) -> dict[str, Any]:
    """One run without a break, and one whose last process was killed, as it lies there."""
    count = request.param
    base = tmp_path_factory.mktemp("runs")
    # Four processes share heads two by two, so that tensor parallelism crosses processes too.
    options = (*OPTIONS, "--data", text, "--tp", count // 2)
    with cluster(count, base / "w", shared, (*options, "--folder", base / "whole")) as whole:
        whole.finish()
    said = [whole.lines(number) for number in range(count)]
    # Between two checkpoints, so that there is something to do again.
    first = base / "killed" / "checkpoints" / str(EVERY)
    step = EVERY + EVERY // 2
    code = KILLED.format(base=str(base), first=str(first), step=step, victim=count - 1)
    command = (sys.executable, "-c", code)
    options_killed = (*options, "--folder", base / "killed")
    with cluster(count, base / "k", shared, options_killed, 1, command) as killed:
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
    assert restarted.lines(0)[0].endswith(f"from step {EVERY}")
    expected = saved_state(base / "whole")
    actual = saved_state(folder)
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert metrics(folder) == metrics(base / "whole")


def check_same_run(folder: Path, base: Path) -> None:
    """Compares what a run ends with to the run without a break, in units of what it moved.

    Other devices add float32 gradients in another order. A difference of the last bit, 6e-8, grows
    up to the slope of Newton-Schulz's polynomial at zero (hundreds) in the directions of small
    singular values, and 40 steps carry it on: 5e-5 of what the parameters move was measured.
    """
    begun, expected = saved_state(base / "killed", EVERY), saved_state(base / "whole")
    for path, leaf in saved_state(folder).items():
        moved = np.linalg.norm(expected[path] - begun[path])
        assert np.linalg.norm(leaf - expected[path]) <= 1e-4 * moved, path


def test_one_process_goes_on_from_the_checkpoint_of_many(
    runs: dict[str, Any], shared: dict[str, str]
):
    base, count = runs["base"], runs["count"]
    folder = base / "alone"
    shutil.copytree(base / "killed", folder)
    options = (*runs["options"], "--folder", folder, "--processes", 1)
    with cluster(1, base / "o", shared, options, count) as single:
        single.finish()
    assert single.lines(0)[0].endswith(f"from step {EVERY}")
    assert "1 processes" in single.lines(0)[0]
    check_same_run(folder, base)


@pytest.mark.parametrize("devices", [1, 8])
def test_one_process_restores_the_bits_that_many_held(runs: dict[str, Any], devices: int):
    restored = saved_state(runs["base"] / "killed", EVERY, devices)
    compared = dict.fromkeys(restored, 0)
    for number in range(runs["count"]):
        for path, index, data in pickle.loads((runs["base"] / f"shards-{number}").read_bytes()):
            np.testing.assert_array_equal(restored[path][index], data, err_msg=path)
            compared[path] += data.size
    for path, leaf in restored.items():
        assert compared[path] >= leaf.size, path


def test_a_run_goes_on_where_the_devices_do_not_divide_the_batch(
    runs: dict[str, Any], shared: dict[str, str]
):
    """Two or four devices become three, and the batch of 8 is no multiple of that."""
    base = runs["base"]
    folder = base / "three"
    shutil.copytree(base / "killed", folder)
    options = (*runs["options"], "--folder", folder, "--processes", 1, "--tp", 1)
    with cluster(1, base / "3", shared, options, 3) as three:
        three.finish()
    said = three.lines(0)
    assert said[0].endswith(f"mesh {{'fsdp': 3, 'tp': 1}}, from step {EVERY}")
    assert "3 devices along fsdp do not divide --batch-size 8" in said[1]
    check_same_run(folder, base)


def test_devices_that_would_do_nothing_are_refused(tmp_path: Path, shared: dict[str, str]):
    options = (*OPTIONS, "--processes", 1, "--tp", 3, "--folder", tmp_path / "run")
    with cluster(1, tmp_path / "logs", shared, options, 4) as refused:
        assert refused.wait() == [1]
    assert "--tp 3 does not divide the 4 devices" in refused.printed()
    assert "--tp 1, 2, 4." in refused.printed()
    assert not (tmp_path / "run").exists()


def test_processes_that_are_told_to_end_save_the_same_step(
    tmp_path: Path, shared: dict[str, str], text: Path
):
    """With the command that the page gives a container, whose first process is told."""
    page = (ROOT / "docs" / "multihost.md").read_text()
    assert 'command: ["sh", "-c"]' in page
    (line,) = re.findall(r"args:\n +- (.*?)\n +env:", page, re.DOTALL)
    # A shell between would keep the signal to itself; not every one gives way by itself.
    assert line.startswith("exec ")
    line = " ".join(line.split()).replace("/shared/run", f'{tmp_path / "run"} "$@"')
    line = f"JOB_COMPLETION_INDEX=${NUMBER}; unset {NUMBER}; {line}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # More steps than there is time for.
    options = (*OPTIONS, "--data", text, "--steps", 10**6)
    command = ("sh", "-c", line, "sh")
    with cluster(2, tmp_path / "logs", shared | {"PATH": path}, options, 1, command) as told:
        told.wait_for(tmp_path / "run" / "checkpoints" / str(EVERY))
        told.processes[1].send_signal(signal.SIGTERM)
        told.finish()
    (last,) = {lines[-1] for lines in map(told.lines, range(2))}
    step = int(re.findall(r"after step (\d+)$", last)[0])
    assert step > EVERY
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) == step
    assert int(saved_state(tmp_path / "run", step)["step"]) == step


def test_ports_are_not_those_of_outgoing_connections():
    """Linux gives those from 32768 on, others from 49152 on; and nobody gets the same twice."""
    ports = [free_port() for _ in range(3)]
    assert len(set(ports)) == 3
    assert all(20_000 <= port < 30_000 for port in ports)


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
