"""The polar factor of one matrix, by the shapes of named models, against what the products cost.

    python benchmarks/polar_time.py
    python benchmarks/polar_time.py --models llama3-8b qwen3-0.6b
    python benchmarks/polar_time.py --shapes 2048x7168x8 4096x11008 --dtype bfloat16    on a GPU

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

from benchmarks.counting import count_products, full_flops, needed_flops, product_flops, seconds_at
from benchmarks.harness import interleave, parser, ratio, store, summary
from benchmarks.matrices import Reference, over_all
from benchmarks.models import MODELS
from benchmarks.optimizers import KELLER_JORDAN
from muonclip_jax.kernels.symmetric import matmul
from muonclip_jax.polar import PolarPlan, apply_polar, plan_polar

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
#: The same with kernels for the symmetric products, which a CPU has not.
WITH_KERNELS: Mapping[str, Mapping[str, Any]] = {
    f"{name}, kernels": {**arguments, "ns_implementation": None} for name, arguments in OURS.items()
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
    """Returns what is timed on a matrix or a stack of them, and the plans of ours."""
    settings = OURS if jax.default_backend() == "cpu" else {**OURS, **WITH_KERNELS}
    plans = {name: plan_polar(**arguments) for name, arguments in settings.items()}
    jitted: dict[str, Callable[[], Any]] = {
        name: functools.partial(jax.jit(functools.partial(apply_polar, plan)), x)
        for name, plan in plans.items()
    }
    optax_function = functools.partial(
        optax_muon.orthogonalize_via_newton_schulz, ns_coeffs=jnp.asarray(KELLER_JORDAN)
    )
    if x.ndim == 3:
        optax_function = jax.vmap(optax_function)
    jitted[OPTAX] = functools.partial(jax.jit(optax_function), x)
    work = plans["ours, keller_jordan, plain"].resolve(x.shape, x.dtype).dtype
    scaled = (x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)).astype(work)
    square = matmul(scaled, scaled.mT).astype(work)
    for name, product in PRODUCTS.items():
        jitted[f"product: {name}"] = functools.partial(jax.jit(product), scaled, square)
    if torch_muon is not None:
        torch_muon.prepare()
        matrices = np.asarray(x, np.float32).reshape(-1, *x.shape[-2:])
        tensors = [torch_muon.tensor(matrix) for matrix in matrices]
        for name, function in torch_muon.newton_schulz_functions().items():
            jitted[name] = functools.partial(_torch_stack, function, tensors)
    return jitted, plans


def _first(x: jax.Array) -> np.ndarray:
    """The first matrix, as a stack of one."""
    return np.asarray(x, np.float64).reshape(-1, *x.shape[-2:])[:1]


def _torch_stack(function: Callable[..., Any], tensors: list[Any]) -> None:
    for tensor in tensors:
        function(tensor, KELLER_JORDAN, 5, 1e-7)
    torch_muon.synchronize()


def measure(
    shape: tuple[int, int], batch: int, dtype: str, rounds: int, least: float
) -> list[dict[str, Any]]:
    """Times every program on one shape and compares with the products' own rate."""
    rows, columns = shape
    # A batch of one is no batch: XLA's CPU compiler makes slow products of it.
    stack = (batch, *shape) if batch > 1 else shape
    x = jax.random.normal(jax.random.key(0), stack, dtype)
    jitted, plans = programs(x)
    runs, calls = {}, {}
    for name, function in jitted.items():
        runs[name], calls[name] = repeated(function, least)
    seconds = {
        name: [one / calls[name] for one in times]
        for name, times in interleave(runs, rounds, warmup=0).items()
    }
    products = {kind: summary(seconds[f"product: {kind}"])["median"] / batch for kind in PRODUCTS}
    reference = Reference(_first(x))
    flops = product_flops(rows, columns)
    found = []
    for name, times in seconds.items():
        per_matrix = [one / batch for one in times]
        record: dict[str, Any] = {
            "shape": shape,
            "batch": batch,
            "dtype": dtype,
            "contender": name,
            "seconds_per_matrix": summary(per_matrix),
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
                "computes_in": resolved.dtype,
                "restarts": resolved.restarts,
                "products": count_products(resolved),
                "full_flops": full_flops(resolved, rows, columns),
                "needed_flops": needed_flops(resolved, rows, columns),
                "whole_products_over_time": seconds_at(resolved, products) / median,
                "needed_products_over_time": seconds_at(resolved, products, needed=True) / median,
            }
        if name in plans or name == OPTAX:
            record["quality"] = over_all(reference.quality(_first(jitted[name]())))
        found.append(record)
    return found


def read_stack(text: str) -> tuple[int, int, int]:
    """Returns rows, columns (the smaller one first) and batch of "ROWSxCOLUMNS[xBATCH]".

    Example:
        >>> read_stack("7168x2048x8")
        (2048, 7168, 8)
    """
    sizes = [int(size) for size in text.split("x")]
    if len(sizes) not in (2, 3):
        raise ValueError(f"{text!r} is no shape; write ROWSxCOLUMNS or ROWSxCOLUMNSxBATCH.")
    rows, columns = sorted(sizes[:2])
    return rows, columns, sizes[2] if len(sizes) == 3 else 1


def main() -> None:
    """Measures, prints and stores."""
    made = parser(__doc__, "polar_time")
    made.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["gpt2-small"])
    made.add_argument(
        "--shapes", nargs="+", metavar="ROWSxCOLUMNS", help="these instead; a third number: a batch"
    )
    made.add_argument("--dtype", default="float32", help="of the matrices")
    options = made.parse_args()
    stacks = [(*shape, 1) for name in options.models for shape in MODELS[name].matrices()]
    if options.shapes:
        stacks = [read_stack(text) for text in options.shapes]
    if options.smoke:
        stacks = [(32, 64, 1)]
    rounds, least = (1, 0.0) if options.smoke else (options.rounds, LEAST_SECONDS)
    rows = []
    for *shape, batch in dict.fromkeys(stacks):
        found = measure((shape[0], shape[1]), batch, options.dtype, rounds, least)
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
