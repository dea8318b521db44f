"""How long an optimizer's step takes to trace, lower and compile, by the number of layers.

    python benchmarks/compile_time.py

A layer has six matrices of width 256. Every measurement is a process of its own, so that nothing is
in any cache; contenders are interleaved. Beside the seconds: the temporary memory of a training
step, whose gradients are temporaries too.
"""

import argparse
import json
import time
from typing import Any

import jax

from benchmarks.harness import in_a_process, parser, ratio, store, summary
from benchmarks.models import layers_of_256
from benchmarks.optimizers import OPTAX, OPTIMIZERS, OURS, jitted_step, training_memory

ADAMW = "optax.adamw"
#: Contenders and the depths at which they are measured.
DEPTHS = {OURS: (12, 48, 96), OPTAX: (48,), ADAMW: (12, 48, 96)}
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
    lowered.compile()
    times.append(time.perf_counter())
    return {
        **{name: times[i + 1] - times[i] for i, name in enumerate(PHASES)},
        "total": times[-1] - times[0],
        "temporary_bytes": training_memory(tx, params, state),
    }


def rows_of(depths: dict[str, tuple[int, ...]], rounds: int) -> list[dict[str, Any]]:
    """Measures every contender at its depths, `rounds` times, contenders interleaved.

    Each is compared with ours at the same depth, and with itself at its first depth.
    """
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for layers in sorted({depth for some in depths.values() for depth in some}):
        names = [name for name, some in depths.items() if layers in some]
        for turn in range(rounds):
            for name in names[:: 1 if turn % 2 == 0 else -1]:
                found.setdefault((layers, name), []).append(
                    in_a_process("benchmarks.compile_time", "--measure", name, str(layers))
                )
        for name in names:
            median = summary([one["total"] for one in found[layers, name]])["median"]
            print(f"{layers} layers, {name}: {median:.2f} s", flush=True)
    totals = {case: [one["total"] for one in all_] for case, all_ in found.items()}
    rows = []
    for (layers, name), all_ in found.items():
        first = min(depth for depth, other in found if other == name)
        rows.append(
            {
                "layers": layers,
                "contender": name,
                "seconds": {p: summary([one[p] for one in all_]) for p in (*PHASES, "total")},
                "over_ours": ratio(totals[layers, name], totals[layers, OURS]),
                "from": first,
                "growth": ratio(totals[layers, name], totals[first, name]),
                "temporary_bytes": all_[0]["temporary_bytes"],
            }
        )
    return rows


def main() -> None:
    """Measures, prints and stores."""
    made = parser(__doc__, "compile_time")
    made.add_argument("--measure", nargs=2, metavar=("NAME", "LAYERS"), help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return
    depths = {OURS: (1, 2), OPTAX: (1,), ADAMW: (1, 2)} if options.smoke else DEPTHS
    rows = rows_of(depths, 1 if options.smoke else options.rounds)
    store("compile_time", {"rows": rows}, options)


if __name__ == "__main__":
    main()
