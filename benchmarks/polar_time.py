"""The polar factor of one matrix, by the shapes of named models, against what the products cost.

    python benchmarks/polar_time.py
    python benchmarks/polar_time.py --models llama3-8b --dtype bfloat16    on a GPU

Ours in both forms and with cheaper coefficients, five plain Keller-Jordan steps by Optax's own
function, and torch's, in turns; in the same turns XLA's three matrix products that an iteration is
made of, each alone. From these follows how near an iteration comes to XLA's own rate: the time that
its products would take by themselves over the time that it took, with symmetric products counted
whole and counted half. Counted whole, it can pass 100 % only by using the symmetry.
"""

import functools
import importlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import _muon as optax_muon

from benchmarks.counting import product_flops, seconds_at
from benchmarks.harness import interleave, parser, ratio, store, summary
from benchmarks.matrices import Reference, diverges, over_all
from benchmarks.models import MODELS
from benchmarks.optimizers import KELLER_JORDAN
from muonclip_jax.newton_schulz import PolarPlan, apply_polar, plan_polar
from muonclip_jax.newton_schulz.products import matmul

torch_muon: Any = (
    importlib.import_module("benchmarks.torch_muon") if importlib.util.find_spec("torch") else None
)

OPTAX = "optax, 5 plain steps"
#: Arguments of `plan_polar` by name.
OURS: Mapping[str, Mapping[str, Any]] = {
    "ours, keller_jordan, plain": {"ns_coeffs": "keller_jordan", "ns_method": "standard"},
    "ours, keller_jordan, auto": {"ns_coeffs": "keller_jordan"},
    "ours, minimax4, auto": {"ns_coeffs": "minimax4"},
    "ours, polar_express 5, auto": {"ns_coeffs": "polar_express", "ns_steps": 5},
}
PRODUCTS: Mapping[str, Callable[..., jax.Array]] = {
    "gram": lambda x, _: matmul(x, x.mT),
    "square": lambda _, r: matmul(r, r),
    "update": lambda x, r: matmul(r, x),
}
#: One timing lasts at least so long; a shorter call is repeated.
LEAST_SECONDS = 0.05


def repeated(function: Callable[[], Any], least: float) -> tuple[Callable[[], Any], int]:
    """Returns a function that calls until `least` seconds are over, and how many calls that is."""
    jax.block_until_ready(function())
    start = time.perf_counter()
    jax.block_until_ready(function())
    times = max(1, math.ceil(least / (time.perf_counter() - start)))

    def run() -> Any:
        out = None
        for _ in range(times):
            out = function()
        return out

    return run, times


def programs(x: jax.Array) -> tuple[dict[str, Callable[[], Any]], dict[str, PolarPlan]]:
    """Returns what is timed on a matrix, and the plans of ours."""
    plans = {name: plan_polar(**arguments) for name, arguments in OURS.items()}
    jitted: dict[str, Callable[[], Any]] = {
        name: functools.partial(jax.jit(functools.partial(apply_polar, plan)), x)
        for name, plan in plans.items()
    }
    optax_function = functools.partial(
        optax_muon.orthogonalize_via_newton_schulz, ns_coeffs=jnp.asarray(KELLER_JORDAN)
    )
    jitted[OPTAX] = functools.partial(jax.jit(optax_function), x)
    work = plans["ours, keller_jordan, plain"].resolve(x.shape, x.dtype).dtype
    scaled = (x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)).astype(work)
    square = matmul(scaled, scaled.mT).astype(work)
    for name, product in PRODUCTS.items():
        jitted[f"product: {name}"] = functools.partial(jax.jit(product), scaled, square)
    if torch_muon is not None:
        torch_muon.prepare()
        tensor = torch_muon.tensor(np.asarray(x, np.float32))
        for name, function in torch_muon.newton_schulz_functions().items():
            jitted[name] = functools.partial(_by_torch, function, tensor)
    return jitted, plans


def _by_torch(function: Callable[..., Any], tensor: Any) -> None:
    function(tensor, KELLER_JORDAN, 5, 1e-7)
    torch_muon.synchronize()


def measure(shape: tuple[int, int], dtype: str, rounds: int, least: float) -> list[dict[str, Any]]:
    """Times every program on one shape and compares with the products' own rate."""
    rows, columns = shape
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    jitted, plans = programs(x)
    runs, calls = {}, {}
    for name, function in jitted.items():
        runs[name], calls[name] = repeated(function, least)
    seconds = {
        name: [one / calls[name] for one in times]
        for name, times in interleave(runs, rounds, warmup=0).items()
    }
    products = {kind: summary(seconds[f"product: {kind}"])["median"] for kind in PRODUCTS}
    reference = Reference(np.asarray(x, np.float64)[None])
    flops = product_flops(rows, columns)
    found = []
    for name, times in seconds.items():
        record: dict[str, Any] = {
            "shape": shape,
            "dtype": dtype,
            "contender": name,
            "seconds_per_matrix": summary(times),
            "optax_over_this": ratio(seconds[OPTAX], times),
        }
        median = record["seconds_per_matrix"]["median"]
        if name.startswith("product: "):
            kind = name.removeprefix("product: ")
            record["flops_per_second"] = flops[kind] / median
        if name in plans:
            resolved = plans[name].resolve(x.shape, x.dtype)
            record |= {
                "method": resolved.method,
                "whole_products_over_time": seconds_at(resolved, products) / median,
                "needed_products_over_time": seconds_at(resolved, products, needed=True) / median,
            }
            quality = over_all(reference.quality(np.asarray(jitted[name]())[None]))
            if diverges(quality):
                raise AssertionError(f"{name} diverged on {shape}: {quality}")
        found.append(record)
    return found


def main() -> None:
    """Measures, prints and stores."""
    made = parser(__doc__, "polar_time")
    made.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["gpt2-small"])
    made.add_argument("--dtype", default="float32", help="of the matrices")
    options = made.parse_args()
    shapes = [shape for name in options.models for shape in MODELS[name].matrices()]
    if options.smoke:
        shapes = [(32, 64)]
    rounds, least = (1, 0.0) if options.smoke else (options.rounds, LEAST_SECONDS)
    rows = []
    for shape in dict.fromkeys(shapes):
        found = measure(shape, options.dtype, rounds, least)
        rows += found
        for record in found:
            line = f"{shape[0]} x {shape[1]}, {record['contender']}: "
            line += f"{1e3 * record['seconds_per_matrix']['median']:.2f} ms"
            if "whole_products_over_time" in record:
                line += f", {100 * record['whole_products_over_time']:.0f} % of XLA's products"
            print(line, flush=True)
    store("polar_time", {"rows": rows}, options)


if __name__ == "__main__":
    main()
