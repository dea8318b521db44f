"""`python -m tests.fuzz --seconds 600`: random cases until the time is over."""

import argparse
import importlib
import importlib.metadata
import os
import sys
import time
from collections import Counter

# Eight CPU devices and a compiler that does not optimise, before JAX starts. The older emitters
# compile in half the time; a later XLA may not know the flag, and an unknown one ends the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    )
importlib.import_module("conftest")

import jax  # noqa: E402

from tests.fuzz.checks import Outcome  # noqa: E402
from tests.fuzz.draw import draw_case  # noqa: E402
from tests.fuzz.programs import standalone  # noqa: E402
from tests.fuzz.run import run  # noqa: E402
from tests.fuzz.simplify import simplified  # noqa: E402

#: Compiled programs of earlier cases are of no use to later ones.
_CLEAR_EVERY = 100


def main() -> int:
    """Runs seeds one after another; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw new cases")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--cases", type=int, help="stop after this many cases")
    parser.add_argument("--show", type=int, help="print the program of one seed and stop")
    parser.add_argument("--whole", action="store_true", help="print failing cases as drawn")
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(standalone(draw_case(arguments.show)))
        return 0
    drawn: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    refusals: dict[str, list[int]] = {}
    faults: dict[str, list[int]] = {}
    statuses: Counter[str] = Counter()
    start, seed = time.monotonic(), arguments.seed
    while time.monotonic() - start < arguments.seconds:
        if arguments.cases is not None and seed - arguments.seed >= arguments.cases:
            break
        case = draw_case(seed)
        outcome = run(case)
        statuses[outcome.status] += 1
        drawn.update(case.drawn())
        if outcome.status == "refused":
            refused.update(case.drawn())
            refusals.setdefault(outcome.signature, []).append(seed)
        if outcome.status == "failed":
            faults.setdefault(outcome.signature, []).append(seed)
            if len(faults[outcome.signature]) == 1:
                _report(seed, outcome, arguments.whole)
        seed += 1
        if seed % _CLEAR_EVERY == 0:
            jax.clear_caches()
    _summarise(time.monotonic() - start, statuses, drawn, refused, refusals, faults)
    return int(bool(faults))


def _report(seed: int, outcome: Outcome, whole: bool) -> None:
    case = draw_case(seed)
    print(f"\n==== seed {seed} failed: {outcome.kind}: {outcome.detail[:600]}\n")
    case = case if whole else simplified(case, outcome)
    print(standalone(case, outcome.kind == "crash"), flush=True)


def _summarise(
    seconds: float,
    statuses: Counter[str],
    drawn: Counter[str],
    refused: Counter[str],
    refusals: dict[str, list[int]],
    faults: dict[str, list[int]],
) -> None:
    total = sum(statuses.values())
    print(f"\n{total} cases in {seconds:.0f} s: {dict(statuses)}\n\noption: drawn (refused)")
    for name, count in sorted(drawn.items()):
        print(f"  {name}: {count} ({refused[name]})")
    for title, table in (("Refusals", refusals), ("Failures", faults)):
        print(f"\n{title}, by message: count, first seeds")
        for signature, seeds in sorted(table.items(), key=lambda item: -len(item[1])):
            print(f"  {len(seeds):4d} {seeds[:8]} {signature}")


if __name__ == "__main__":
    sys.exit(main())
