"""Times the symmetric kernels against XLA's full product and the machine's own ceiling.

    PYTHONPATH=. python benchmarks/kernel_speed.py            on a GPU or a TPU
    python benchmarks/kernel_speed.py --smoke                 anywhere, to see that it runs

For each case, in turns: every kernel of the platform, XLA's product of the same operands with the
same epilogue, and XLA's bare product, rounded to the operands' dtype. The last is the ceiling: the
best that the machine's own library does for these sizes, and the fastest of them all is the
machine's matmul rate in this run. With `--tilings`, each tiling of the Hopper kernel as well.

Every answer is compared with float64 on some of its rows before it is timed, and must be symmetric
to the bit. A timing is of many calls in a row, enough to last `LEAST_SECONDS`.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleave, parser, ratio, store, summary
from benchmarks.kernel_cases_symmetric import ALPHA, BETA, UPDATE, Case, cases, update_cases
from muonclip_jax.kernels.symmetric import dispatch, mosaic_gpu, mosaic_tpu, triton
from muonclip_jax.kernels.symmetric.problem import Problem
from muonclip_jax.kernels.symmetric.tilings import TILINGS

#: One timing lasts at least so long; a shorter call is repeated.
LEAST_SECONDS = 0.02
_MOST_CALLS = 4096
#: How far from float64 a rounded product may be, of its largest entry.
_TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-5}
_FULL, _BARE = "xla, full product", "xla, bare product"
_SMOKE = (
    Case("smoke, square", 1, 256, None, "bfloat16"),
    Case("smoke, wide", 2, 256, 512, "bfloat16"),
    Case("a X + B X, smoke", 2, 256, 512, "bfloat16", True),
)

#: The kernels that run anywhere, slowly.
_INTERPRETED = {"mosaic_tpu": mosaic_tpu.run, "triton": triton.run}

Function = Callable[..., jax.Array]


def operands(case: Case) -> list[jax.Array]:
    """Draws the operands on the device, with singular values near one."""

    @jax.jit
    def draw() -> list[jax.Array]:
        drawn = []
        for number, shape in enumerate(case.shapes()):
            x = jax.random.normal(jax.random.key(number), shape, jnp.float32) / np.sqrt(shape[-1])
            if shape[-1] == shape[-2]:
                x = (x + jnp.swapaxes(x, 1, 2)) / 2
            drawn.append(x.astype(case.dtype))
        return drawn

    return draw()


def contenders(case: Case, options: Any) -> dict[str, Function]:
    """Returns what is timed, by name."""
    found = {_FULL: case.function("xla"), _BARE: _bare(case)}
    batch, rows, depth = case.shapes()[-1]
    has_addend = case.is_update or case.columns is None
    problem = Problem(
        batch,
        rows,
        depth,
        dtype=case.dtype,
        addend_dtype=case.dtype if has_addend else None,
        out_dtype=case.dtype,
        columns=case.columns if case.is_update else None,
    )
    target = dispatch.current_target()
    for name, implementation in dispatch.kernels_for(problem).items():
        if implementation.refusal(problem) is not None:
            continue
        if dispatch.runs_on(name, target):
            found[name] = case.function(name)
        elif options.smoke and name in _INTERPRETED:
            found[f"{name}, interpreted"] = _direct(case, _INTERPRETED[name], interpret=True)
    if options.tilings and not case.is_update and target.capability[0] == 9:
        for tiling in TILINGS:
            label = f"mosaic_gpu, {tiling.height} x {tiling.width}, {tiling.stages} stages"
            found[label] = _direct(case, mosaic_gpu.run, tiling=tiling)
    return found


def _bare(case: Case) -> Function:
    def bare(x: jax.Array, *square: jax.Array) -> jax.Array:
        if square:
            return jnp.matmul(square[0], x)
        return jnp.matmul(x, x if case.columns is None else jnp.swapaxes(x, 1, 2))

    return bare


def _direct(case: Case, run: Callable[..., jax.Array], **settings: Any) -> Function:
    """Calls a kernel past the dispatch, with settings of its own."""

    def direct(x: jax.Array) -> jax.Array:
        quintic = case.columns is None
        factors = jnp.array([ALPHA, BETA] if quintic else [1.0, 0.0], jnp.float32)
        return run(x, x, x if quintic else None, factors, case.dtype, **settings)

    return direct


def check(case: Case, name: str, given: list[jax.Array], out: jax.Array) -> float:
    """Returns the distance from float64 in some rows of the last matrix; exits if it is large."""
    rows = np.linspace(0, case.rows - 1, min(case.rows, 8)).astype(int)
    last, *square = (np.asarray(x[-1].astype(jnp.float32), np.float64) for x in given)
    expected = square[0][rows] @ last if square else last[rows] @ last.T
    if case.is_update and name != _BARE:
        expected = expected + UPDATE * last[rows]
    elif case.columns is None and name != _BARE:
        expected = ALPHA * expected + BETA * last[rows]
    actual = np.asarray(out[-1][rows].astype(jnp.float32), np.float64)
    error = float(np.abs(actual - expected).max() / np.abs(expected).max())
    if not error <= _TOLERANCE[case.dtype]:
        raise SystemExit(f"{name} is wrong for {case.name}: off by {error} of the largest entry.")
    symmetric = not (case.is_update or name.startswith("xla"))
    if symmetric and not bool(jnp.all(out == jnp.swapaxes(out, 1, 2))):
        raise SystemExit(f"{name} is not symmetric for {case.name}.")
    return error


def repeated(
    function: Function, given: list[jax.Array], least: float
) -> tuple[Callable[[], Any], int]:
    """Returns a function that computes until `least` seconds are over, and how often it does.

    The calls are in one program, or the time that a launch takes on the host would be measured.
    Each waits for the one before it, and none can be left out.
    """

    def again(_: Any, carried: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        kept, _ = jax.lax.optimization_barrier(carried)
        return kept, function(*kept)

    def program(calls: int) -> Callable[[], Any]:
        def run(*given: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, calls - 1, again, (given, function(*given)))[1]

        compiled = jax.jit(run if calls > 1 else function)
        jax.block_until_ready(compiled(*given))
        return lambda: compiled(*given)

    calls = 1
    while True:
        run = program(calls)
        seconds = min(interleave({"once": run}, 2, warmup=0)["once"])
        if seconds >= least or calls >= _MOST_CALLS:
            return run, calls
        wanted = int(1.2 * calls * least / max(seconds, 1e-6)) + 1
        calls = min(_MOST_CALLS, max(2 * calls, wanted))


def measure(case: Case, options: Any) -> dict[str, Any]:
    """Times one case."""
    given = operands(case)
    functions: dict[str, Function] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, function in contenders(case, options).items():
        compiled = jax.jit(function)
        try:
            out = jax.block_until_ready(compiled(*given))
        # A tiling may not fit, a compiler may refuse: the row says so and the rest is timed.
        except Exception as error:
            refused[name] = " ".join(str(error).split())[:300]
            continue
        errors[name] = check(case, name, given, out)
        functions[name] = compiled
    least = 0.0 if options.smoke else LEAST_SECONDS
    prepared = {name: repeated(each, given, least) for name, each in functions.items()}
    seconds = interleave({name: run for name, (run, _) in prepared.items()}, options.rounds)
    times = {name: [each / prepared[name][1] for each in seconds[name]] for name in prepared}
    print(f"{case.name}, {case.dtype}")
    table = {}
    for name, each in times.items():
        against = ratio(times[_FULL], each)
        rate = case.flops / summary(each)["median"] / 1e12
        table[name] = {
            "seconds": summary(each),
            "full product over this": against,
            "bare product over this": ratio(times[_BARE], each),
            "TFLOP/s, counted whole": rate,
            "error": errors[name],
        }
        low, high = against["range"]
        print(
            f"  {name:<38}{summary(each)['median'] * 1e6:>11.1f} us{rate:>9.1f} TFLOP/s counted "
            f"whole   {against['median']:.2f} x ({low:.2f} to {high:.2f})",
            flush=True,
        )
    for name, reason in refused.items():
        print(f"  {name:<38} refused: {reason}", flush=True)
    return {"case": case.name, "dtype": case.dtype, "flops": case.flops, "contenders": table,
            "refused": refused}  # fmt: skip


def main() -> None:
    """Measures, prints and writes."""
    made = parser(__doc__, "kernel_speed")
    made.add_argument("--tilings", action="store_true", help="every tiling of the Hopper kernel")
    made.add_argument("--match", default="", help="only cases whose name contains this")
    options = made.parse_args()
    dtypes = ("bfloat16", "float32" if jax.default_backend() == "tpu" else "float16")
    chosen = _SMOKE if options.smoke else [*cases(dtypes), *update_cases(dtypes[0])]
    rows = [measure(case, options) for case in chosen if options.match in case.name]
    ceiling = max((row["contenders"][_BARE]["TFLOP/s, counted whole"] for row in rows), default=0.0)
    print(f"matmul ceiling of this run: {ceiling:.1f} TFLOP/s")
    for row in rows:
        for name, entry in row["contenders"].items():
            # Of a symmetric product half is needed.
            share = 1.0 if name.startswith("xla") or row["case"].startswith("a X") else 0.5
            entry["needed FLOPs over the ceiling"] = (
                share * entry["TFLOP/s, counted whole"] / ceiling
            )
    store("kernel_speed", {"ceiling_tflops": ceiling, "cases": rows}, options)


if __name__ == "__main__":
    main()
