"""What every benchmark shares: interleaved timing, ratios with their spread, machine, versions.

Contenders are interleaved in one process, so machine noise affects all of them equally; a ratio is
taken between runs of the same round, and its median and range are kept.
"""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Fewest rounds behind a number that is published.
ROUNDS = 5
_PACKAGES = ("jax", "jaxlib", "optax", "numpy", "flax", "torch")


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Describes what a number must be read with."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "processor": _processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    return found[1].strip() if found else platform.processor()


def interleave(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, *, warmup: int = 1, in_a_row: int = 1
) -> dict[str, list[float]]:
    """Times interleaved contenders, every second round in the opposite order.

    Args:
        contenders: Functions by name; each returns when its work is done, or returns JAX arrays,
            which are then waited for.
        rounds: How often each is timed.
        warmup: How often each runs before, untimed.
        in_a_row: Calls of one timing, which hide what launching costs; the last one is waited for.

    Returns:
        Seconds a call by name, one for each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    for turn in range(-warmup, rounds):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            for _ in range(in_a_row - 1):
                contenders[name]()
            jax.block_until_ready(contenders[name]())
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / in_a_row)
    return seconds


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Returns median and extremes."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """Returns median and range of the ratios between runs of the same round."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])


def in_a_process(*command: str, timeout: float | None = None) -> Any:
    """Runs a module of the benchmarks in a new process, and returns the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=timeout,
    )
    if done.returncode:
        said = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", done.stderr, re.MULTILINE)
        raise RuntimeError(said[-1] if said else f"exit {done.returncode}: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Returns a command line with what all scripts understand: `--smoke`, `--rounds`, `--out`."""
    made = argparse.ArgumentParser(
        description=(description or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    made.add_argument("--rounds", type=int, default=ROUNDS, help="timings of every contender")
    made.add_argument(
        "--out", type=Path, help=f"where {name}.json goes; default {RESULTS}, nowhere for --smoke"
    )
    return made


def compact(content: Mapping[str, Any]) -> str:
    """Returns JSON with one line for every row of a table, numbers to eight digits."""

    def line(value: Any) -> str:
        return json.dumps(_rounded(value))

    parts = []
    for name, value in content.items():
        text = line(value)
        if value and isinstance(value, list):
            text = "[\n  " + ",\n  ".join(map(line, value)) + "\n ]"
        elif isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values()):
            rows = (f"{json.dumps(key)}: {line(row)}" for key, row in value.items())
            text = "{\n  " + ",\n  ".join(rows) + "\n }"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON; a file that is there is replaced at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(compact(content) + "\n")
    path.with_suffix(".new").replace(path)


def store(name: str, content: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Writes `NAME.json`, off the CPU `NAME_PLATFORM.json`, with machine, versions and command.

    `--smoke` writes only where `--out` says so.
    """
    folder = options.out or (None if options.smoke else RESULTS)
    if folder is None:
        return
    described = {
        "machine": machine(),
        "command": " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        **content,
    }
    platform_name = jax.default_backend()
    path = folder / (f"{name}.json" if platform_name == "cpu" else f"{name}_{platform_name}.json")
    write(path, described)
    print(f"written to {path}", flush=True)
