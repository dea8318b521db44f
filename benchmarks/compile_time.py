"""How long an optimizer's step takes to trace, lower and compile, by the number of layers.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --full      every contender at every depth: 25 minutes

A layer has six matrices of width 256. Every measurement is a process of its own, so that nothing is
in any cache; contenders take turns. Beside the seconds: the instructions of the optimised program
and its temporary memory.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from typing import Any

import jax

from benchmarks.harness import ROOT, parser, ratio, store, summary
from benchmarks.models import layers_of_256
from benchmarks.optimizers import OPTAX, OPTIMIZERS, OURS, jitted_step

ADAMW = "optax.adamw"
#: Contenders and the depths at which they are measured, and what `--full` adds.
DEPTHS = {OURS: (12, 48, 96), OPTAX: (48,), ADAMW: (12, 48, 96)}
FULL_DEPTHS = {
    OURS: (12, 24, 48, 96),
    "ours, scale_by_muon": (12, 24, 48, 96),
    OPTAX: (12, 24, 48, 96),
    ADAMW: (12, 24, 48, 96),
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = ", re.MULTILINE)
PHASES = ("trace", "lower", "compile")


def measure(contender: str, layers: int) -> dict[str, Any]:
    """Compiles one step in this process, on shapes alone."""
    jax.jit(lambda x: x + 1)(1.0).block_until_ready()  # the backend starts outside of the times
    model = layers_of_256(layers)
    params, tx = model.tree(), OPTIMIZERS[contender](model.dimension_numbers())
    state = jax.eval_shape(tx.init, params)
    step = jitted_step(tx)
    times = [time.perf_counter()]
    traced = step.trace(params, state, params)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    memory = compiled.memory_analysis()
    return {
        **{name: times[i + 1] - times[i] for i, name in enumerate(PHASES)},
        "total": times[-1] - times[0],
        "instructions": len(_INSTRUCTION.findall(compiled.as_text())),
        "temporary_bytes": memory.temp_size_in_bytes,
        "matrix_bytes": 4 * model.entries(),
    }


def measure_apart(contender: str, layers: int) -> dict[str, Any]:
    """Does the same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.compile_time", "--measure", contender, str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{contender} at {layers} layers failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(depths: dict[str, tuple[int, ...]], rounds: int) -> list[dict[str, Any]]:
    """Measures every contender at its depths, `rounds` times, contenders taking turns."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for layers in sorted({depth for some in depths.values() for depth in some}):
        names = [name for name, some in depths.items() if layers in some]
        for turn in range(rounds):
            for name in names[:: 1 if turn % 2 == 0 else -1]:
                found.setdefault((layers, name), []).append(measure_apart(name, layers))
        for name in names:
            median = summary([one["total"] for one in found[layers, name]])["median"]
            print(f"{layers} layers, {name}: {median:.2f} s", flush=True)
    return [
        {
            "layers": layers,
            "contender": name,
            "seconds": {p: summary([one[p] for one in all_]) for p in (*PHASES, "total")},
            **{k: all_[0][k] for k in ("instructions", "temporary_bytes", "matrix_bytes")},
        }
        for (layers, name), all_ in found.items()
    ]


def ratios_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compares every contender with ours at the same depth, and each with its own first depth."""
    rounds = {(row["layers"], row["contender"]): row["seconds"]["total"]["rounds"] for row in rows}
    ratios = []
    for (layers, name), seconds in rounds.items():
        against_ours = ratio(seconds, rounds[layers, OURS])
        first = min(depth for depth, other in rounds if other == name)
        growth = ratio(seconds, rounds[first, name])
        ratios.append(
            {"layers": layers, "contender": name, "over_ours": against_ours, "from": first}
            | {"growth": growth}
        )
    return ratios


def main() -> None:
    """Measures, prints and stores."""
    made = parser(__doc__, "compile_time")
    made.add_argument("--full", action="store_true", help="every contender at every depth")
    made.add_argument("--measure", nargs=2, metavar=("NAME", "LAYERS"), help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return
    depths = FULL_DEPTHS if options.full else DEPTHS
    if options.smoke:
        depths = {OURS: (1, 2), OPTAX: (1,), ADAMW: (1, 2)}
    rows = rows_of(depths, 1 if options.smoke else options.rounds)
    store("compile_time", {"rows": rows, "ratios": ratios_of(rows)}, options)


if __name__ == "__main__":
    main()
