"""`python -m tests.fuzz --seconds 600`: random cases until the time is over."""

import argparse
import importlib
import sys
import time
from collections import Counter

importlib.import_module("conftest")  # eight CPU devices, before JAX starts

import jax  # noqa: E402

from tests.fuzz.check import run, simplified  # noqa: E402
from tests.fuzz.draw import draw_case  # noqa: E402
from tests.fuzz.program import standalone  # noqa: E402


def main() -> int:
    """Runs seeds one after another; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw new cases")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--cases", type=int, default=10**9, help="stop after this many cases")
    parser.add_argument("--show", type=int, help="print the program of one seed and stop")
    parser.add_argument("--whole", action="store_true", help="print failing cases as drawn")
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(standalone(draw_case(arguments.show)))
        return 0
    statuses: Counter[str] = Counter()
    found: dict[str, list[int]] = {}
    start, seed = time.monotonic(), arguments.seed
    while time.monotonic() - start < arguments.seconds and seed < arguments.seed + arguments.cases:
        case = draw_case(seed)
        outcome = run(case)
        statuses[outcome.status] += 1
        if outcome.status != "ok":
            seeds = found.setdefault(f"{outcome.status}: {outcome.signature}", [])
            seeds.append(seed)
            if outcome.status == "failed" and len(seeds) == 1:
                print(f"\n==== seed {seed}: {outcome.kind}: {outcome.detail[:600]}\n")
                case = case if arguments.whole else simplified(case, outcome)
                print(standalone(case, outcome.kind == "crash"), flush=True)
        seed += 1
        if seed % 100 == 0:
            jax.clear_caches()  # compiled programs of earlier cases are of no use to later ones
    print(f"\n{seed - arguments.seed} cases in {time.monotonic() - start:.0f} s: {dict(statuses)}")
    for signature, seeds in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"  {len(seeds):4d} {seeds[:8]} {signature}")
    return int(statuses["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
