"""Measures how near each coefficient set comes to the polar factor, in each dtype and form.

    python benchmarks/polar_quality.py

For matrices of several spectra and for the momentum of a training run: distances of the singular
values from one, the cosine to the exact polar factor, and the distance from the same polynomial
evaluated in float64, which is what rounding does.
"""

import os

# NumPy's threads cost more than these small matrices take.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# XLA may otherwise skip roundings to 16 bits, and the table would flatter them.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_allow_excess_precision=false"

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleave, parser, store, summary
from benchmarks.matrices import (
    MOMENTUM,
    Reference,
    Shape,
    diverges,
    minimax_rows,
    over_all,
    spectra,
)
from benchmarks.momentum import momentum_by_shape
from muonclip_jax.newton_schulz import PolarPlan, apply_polar, plan_polar
from muonclip_jax.newton_schulz.coefficients import COEFFICIENT_SETS, evaluate

SHAPES = ((96, 96), (96, 256))
_POWERS = {"frobenius": 2, "schatten": 4, "schatten8": 8}


def variants(smoke: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a label and the arguments of `plan_polar`, without form and dtype."""
    for name in ("keller_jordan", "minimax4") if smoke else COEFFICIENT_SETS:
        if name not in ("polar_express_1.00", "polar_express_1.02"):
            yield name, {"ns_coeffs": name}
    if smoke:
        return
    for name in ("polar_express", "polar_express_1.05"):
        yield f"{name}, 5", {"ns_coeffs": name, "ns_steps": 5}
    for norm in ("schatten", "schatten8"):
        yield f"keller_jordan, {norm}", {"ns_coeffs": "keller_jordan", "preconditioning": norm}
    settings = {"ns_coeffs": "polar_express_1.05", "ns_steps": 4, "preconditioning": "schatten8"}
    yield "polar_express_1.05, 4, schatten8", settings
    # The greedy minimax composition for other numbers of steps and lower bounds.
    for steps, lower in ((3, 0.01), (3, 0.02), (4, 0.004), (5, 0.001)):
        rows = minimax_rows(lower, steps)
        settings = {"ns_coeffs": rows, "preconditioning": "schatten8"}
        yield f"minimax {steps}, from {lower:g}, schatten8", settings


def forms(smoke: bool) -> Iterator[tuple[str, str]]:
    """Yields form and dtype; the Gram form is never meant for bfloat16."""
    yield from (("standard", "float32"), ("standard", "bfloat16"))
    if not smoke:
        yield from (("standard", "float16"), ("gram", "float32"))
    yield "gram", "float16"


@functools.cache
def _rescaled(reference: Reference, preconditioning: str) -> Any:
    """Returns the float64 SVD of the matrices after the preconditioning."""
    if preconditioning == "aol":
        rows = np.abs(reference.x @ reference.x.mT).sum(axis=-1, keepdims=True)
        return np.linalg.svd(reference.x / np.sqrt(rows), full_matrices=False)
    power = _POWERS[preconditioning]
    norms = (reference.values**power).sum(axis=-1, keepdims=True) ** (1 / power)
    return reference.left, reference.values / norms, reference.right


def exact_polynomial(plan: PolarPlan, reference: Reference) -> np.ndarray:
    """Evaluates the plan's polynomial on the singular values in float64."""
    left, values, right = _rescaled(reference, plan.preconditioning)
    return (left * evaluate(plan.rows, values)[:, None, :]) @ right


def groups(smoke: bool) -> dict[Shape, dict[str, np.ndarray]]:
    """Returns the matrices by shape and family, each family a stack."""
    found = {
        shape: {name: x[None] for name, x in spectra(*shape).items()}
        for shape in (((32, 64),) if smoke else SHAPES)
    }
    for shape, stack in momentum_by_shape(smoke=smoke).items():
        families = {name: x[None] for name, x in spectra(*shape).items()}
        found.setdefault(shape, families)[MOMENTUM] = stack
    return found


def measure(families: dict[str, np.ndarray], smoke: bool, rounds: int) -> list[dict[str, Any]]:
    """Runs every variant, form and dtype over matrices of one shape."""
    x = jnp.asarray(np.concatenate(list(families.values())), jnp.float32)
    owners = [name for name, stack in families.items() for _ in stack]
    reference = Reference(np.asarray(x, np.float64))
    plain = plan_polar("keller_jordan", ns_method="standard")
    baseline = plain.resolve(x.shape, x.dtype).flops
    records = []
    for label, arguments in variants(smoke):
        for method, dtype in forms(smoke):
            if method == "gram" and x.shape[1] == x.shape[2]:
                continue  # needs more operations there, so that nobody wants it
            plan = plan_polar(**arguments, ns_method=method, ns_dtype=dtype)
            resolved = plan.resolve(x.shape, x.dtype)
            function = jax.jit(functools.partial(apply_polar, plan))
            result = np.asarray(function(x), np.float64)
            exact = exact_polynomial(plan, reference)
            qualities = reference.quality(result)
            for quality, got, wanted in zip(qualities, result, exact, strict=True):
                quality["rounding"] = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
            by_family = {
                name: over_all(
                    [q for q, owner in zip(qualities, owners, strict=True) if owner == name]
                )
                for name in families
            }
            seconds = interleave({"": functools.partial(function, x)}, rounds, warmup=0)[""]
            records.append(
                {
                    "set": label,
                    "steps": len(plan.rows),
                    "method": method,
                    "dtype": dtype,
                    # What "auto" takes by itself for such a matrix in this dtype, if anything.
                    "auto": plan_polar(**arguments, ns_dtype=dtype).resolve(x.shape, x.dtype).method
                    == method,
                    "shape": x.shape[1:],
                    "full_flops": resolved.flops,
                    "baseline_flops": baseline,
                    "seconds_per_matrix": summary(seconds)["median"] / len(x),
                    "diverges_on": [name for name, q in by_family.items() if diverges(q)],
                    "quality": by_family,
                }
            )
    return records


def main() -> None:
    """Measures, prints and stores."""
    options = parser(__doc__, "polar_quality").parse_args()
    rounds = 1 if options.smoke else options.rounds
    records = []
    counts: dict[str, int] = {}
    for shape, families in groups(options.smoke).items():
        for name, stack in families.items():
            counts[name] = counts.get(name, 0) + len(stack)
        found = measure(families, options.smoke, rounds)
        records += found
        print(f"{shape[0]} x {shape[1]}: {len(found)} settings", flush=True)
    store("polar_quality", {"families": counts, "records": records}, options)


if __name__ == "__main__":
    main()
