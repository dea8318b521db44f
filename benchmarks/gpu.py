"""Everything that only a GPU can answer, in one command that stops in time.

    PYTHONPATH=. python benchmarks/gpu.py --seconds 480 --out DIR

Each part runs in a process of its own, most valuable first, so that a part that fails or hangs
costs no other part; every row is written when it is measured. Where packages are missing (torch,
gram_newton_schulz) their rows are left out. `--smoke` runs all parts at toy sizes on any machine.
"""

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Contenders of two libraries share the GPU; neither may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.append(str(Path(__file__).parents[1] / "examples"))

#: Parts and the share of the time that is left that each may take.
SHARES = {"right": 0.15, "steps": 0.55, "kernels": 0.45, "recording": 0.5, "run": 1.0}


def run_part(name: str, seconds: float, out: Path, smoke: bool) -> None:
    """Runs one part and writes its rows as they come, until they end or the time is over."""
    from benchmarks import gpu_parts
    from benchmarks.harness import machine, write

    deadline = time.monotonic() + seconds
    part: Callable[..., Iterator[dict[str, Any]]] = getattr(gpu_parts, name)
    rows: list[dict[str, Any]] = []
    stopped = "the end"
    try:
        for row in part(smoke, lambda: deadline - time.monotonic()):
            rows.append(row)
            print(name, row, flush=True)
            write(out / f"gpu_{name}.json", {"machine": machine(), "rows": rows})
            if time.monotonic() > deadline:
                stopped = "its time was over"
                break
    except Exception:
        traceback.print_exc()
        stopped = "an error"
        if smoke:
            raise
    print(f"{name}: {len(rows)} rows; stopped by {stopped}", flush=True)


def main() -> None:
    """Runs all parts, or one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.inside:
        run_part(options.parts[0], options.seconds, options.out, options.smoke)
        return
    end = time.monotonic() + options.seconds
    failed = []
    for part in options.parts:
        left = end - time.monotonic()
        share = 1.0 if part == options.parts[-1] else SHARES[part]
        command = [sys.executable, __file__, "--inside", "--parts", part, "--out", options.out]
        command += ["--seconds", f"{left * share - 10:.0f}", *(["--smoke"] * options.smoke)]
        try:
            code = subprocess.run(list(map(str, command)), timeout=left * share, check=False)
            failed += [part] * bool(code.returncode)
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped after {left * share:.0f} s", flush=True)
            failed.append(part)
    if failed:
        raise SystemExit(f"not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
