"""Many runs on one machine: a process for each core, and finished runs are not repeated."""

import json
import multiprocessing
import os
import platform
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.data import load_corpus
from common.records import describe
from common.training import Record, Settings, Training

Cores = "multiprocessing.Queue[int]"


def machine() -> dict[str, Any]:
    """Returns what a stored number must be read with."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": {name: version(name) for name in packages},
    }


def run_all(jobs: Mapping[str, Settings], folder: Path) -> dict[str, list[Record]]:
    """Trains every job and returns its records by the job's name.

    A model of this size gains little from a second core, so each process keeps to one: twice as
    many runs an hour. A job whose file in `folder` was written with the same settings is read, not
    run, so that an interrupted sweep goes on.

    Args:
        jobs: Settings by name; the names become file names.
        folder: Where each job's settings and records go, as `NAME.json`.

    Returns:
        The records of each job.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {name: _stored(folder / f"{name}.json", settings) for name, settings in jobs.items()}
    waiting = {name: settings for name, settings in jobs.items() if done[name] is None}
    spawn = multiprocessing.get_context("spawn")
    cores: Cores = spawn.Queue()
    usable = _usable_cores()
    for core in usable:
        cores.put(core)
    with (
        ProcessPoolExecutor(
            len(usable), mp_context=spawn, initializer=_keep_to_one_core, initargs=(cores,)
        ) as pool,
        tqdm(total=len(waiting), unit="run", disable=not waiting) as bar,
    ):
        running = {
            pool.submit(_train, settings, folder / f"{name}.json"): name
            for name, settings in waiting.items()
        }
        for future in as_completed(running):
            done[running[future]] = future.result()
            bar.update()
    return {name: records for name, records in done.items() if records is not None}


def _stored(file: Path, settings: Settings) -> list[Record] | None:
    if not file.exists():
        return None
    stored = json.loads(file.read_text())
    return stored["records"] if stored["settings"] == describe(settings) else None


def _usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _keep_to_one_core(cores: Cores) -> None:
    """Runs in a new process before JAX counts the cores that it may use."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def _train(settings: Settings, file: Path) -> list[Record]:
    training = Training(settings, load_corpus())
    records = [record for _, new in training.run(training.init()) for record in new]
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps({"settings": describe(settings), "records": records}))
    unfinished.replace(file)
    return records
