"""`python -m tests.fuzz --seconds 600`: random cases until the time is over."""

import argparse
import importlib
import itertools
import sys
import time
from collections import defaultdict

importlib.import_module("conftest")  # eight CPU devices, before JAX starts

import jax  # noqa: E402

from tests.fuzz.check import run, signature  # noqa: E402
from tests.fuzz.draw import draw_case  # noqa: E402


def main() -> int:
    """Runs seeds one after another; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw new cases")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    found: defaultdict[str, list[int]] = defaultdict(list)
    start = time.monotonic()
    for seed in itertools.count(arguments.seed):
        case = draw_case(seed)
        wrong = run(case)
        kind = signature(wrong) or "ok"
        found[kind].append(seed)
        if len(found[kind]) == 1 and wrong and not wrong.startswith("refused"):
            print(f"\n==== seed {seed}: {wrong[:600]}\n{case}", flush=True)
        if time.monotonic() - start > arguments.seconds:
            break
        if seed % 100 == 0:
            jax.clear_caches()  # compiled programs of earlier cases are of no use to later ones
    print(f"\n{sum(map(len, found.values()))} cases in {time.monotonic() - start:.0f} s")
    for kind, seeds in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"  {len(seeds):4d} {seeds[:8]} {kind}")
    return int(not all(kind == "ok" or kind.startswith("refused") for kind in found))


if __name__ == "__main__":
    sys.exit(main())
