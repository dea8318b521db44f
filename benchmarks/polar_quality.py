"""Measures how near each coefficient set comes to the polar factor, in each dtype and form.

    python benchmarks/polar_quality.py [--quick] [--momentum FILE.npz] [--out FILE.json]

For matrices of several spectra: the largest singular value, the worst and the mean distance of a
singular value from one, the cosine to the exact polar factor, and the distance from the same
polynomial evaluated in float64 (that is what rounding does). The cosine is what an update keeps of
the direction it should have. Prints a markdown table, writes JSON.
"""

import os

# XLA may otherwise skip roundings to 16 bits, and the table would flatter them.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_allow_excess_precision=false"

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax.polar import COEFFICIENT_SETS, PolarPlan, apply_polar, plan_polar
from muonclip_jax.polar.generators import evaluate

RESULTS = Path(__file__).parent / "results" / "polar_quality.json"
# Here rounding the *input* already makes new directions, which the steps amplify by the slope at
# zero; the column "rounding" leaves them out, the JSON has them.
HARD = ("cond 1e6", "rank one")


def spectra(m: int, n: int) -> dict[str, np.ndarray]:
    """Returns one `(m, n)` matrix a family, in float64."""
    rng = np.random.default_rng(0)
    small = min(m, n)
    left, _ = np.linalg.qr(rng.normal(size=(m, small)))
    right, _ = np.linalg.qr(rng.normal(size=(n, small)))

    def with_values(values: np.ndarray) -> np.ndarray:
        return (left * values) @ right.T

    low_rank = rng.normal(size=(m, 8)) @ rng.normal(size=(8, n)) / np.sqrt(8)
    return {
        "gaussian": rng.normal(size=(m, n)),
        "low rank + 1 % noise": low_rank + 0.01 * rng.normal(size=(m, n)),
        "cond 1e3": with_values(np.logspace(0, -3, small)),
        "cond 1e6": with_values(np.logspace(0, -6, small)),
        "power law": with_values(1 / np.arange(1, small + 1)),
        "rank one": np.outer(rng.normal(size=m), rng.normal(size=n)),
    }


def variants(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a label and the arguments of `plan_polar`, without form and dtype."""
    for name in COEFFICIENT_SETS:
        if name not in ("polar_express_1.00", "polar_express_1.02"):
            yield name, {"ns_coeffs": name}
    yield "polar_express, 5", {"ns_coeffs": "polar_express", "ns_steps": 5}
    if not quick:
        yield "polar_express_1.05, 5", {"ns_coeffs": "polar_express_1.05", "ns_steps": 5}
        for norm in ("schatten", "schatten8"):
            yield (
                f"keller_jordan, {norm}",
                {"ns_coeffs": "keller_jordan", "preconditioning": norm},
            )
        yield (
            "polar_express_1.05, 4, schatten8",
            {"ns_coeffs": "polar_express_1.05", "ns_steps": 4, "preconditioning": "schatten8"},
        )


def rescaled(x: np.ndarray, preconditioning: str) -> np.ndarray:
    """Applies the preconditioning in float64, to a wide matrix."""
    if preconditioning == "aol":
        return x / np.sqrt(np.abs(x @ x.T).sum(axis=1, keepdims=True))
    values = np.linalg.svd(x, compute_uv=False)
    power = {"frobenius": 2, "schatten": 4, "schatten8": 8}[preconditioning]
    return x / (values**power).sum() ** (1 / power)


def quality(plan: PolarPlan, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Compares one result with the exact polar factor and with the exact polynomial."""
    y = y.astype(np.float64)
    if not np.isfinite(y).all():
        return dict.fromkeys(("largest", "worst", "mean", "cosine", "rounding"), float("nan"))
    left, values, right = np.linalg.svd(x, full_matrices=False)
    keep = values > 3e-7 * values[0]  # the rest is the rounding of the float32 input
    polar = (left * keep) @ right
    out = np.linalg.svd(y, compute_uv=False)[: int(keep.sum())]
    left, values, right = np.linalg.svd(rescaled(x, plan.preconditioning), full_matrices=False)
    exact = (left * evaluate(plan.rows, values)) @ right
    return {
        "largest": float(out[0]),
        "worst": float(np.abs(out - 1).max()),
        "mean": float(np.abs(out - 1).mean()),
        "cosine": float((polar * y).sum() / np.linalg.norm(polar) / np.linalg.norm(y)),
        "rounding": float(np.linalg.norm(y - exact) / np.linalg.norm(exact)),
    }


def median_seconds(function: Any, x: jax.Array, repeats: int) -> float:
    """Times a compiled call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def machine() -> dict[str, Any]:
    """Describes where the numbers come from."""
    return {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def load_momentum(path: str) -> dict[str, np.ndarray]:
    """Reads the matrices of a run, oriented wide; arrays of another rank are left out."""
    with np.load(path) as archive:
        arrays = {name: np.asarray(archive[name], np.float64) for name in archive.files}
    return {
        name: value if value.shape[0] <= value.shape[1] else value.T
        for name, value in arrays.items()
        if value.ndim == 2 and value.any()
    }


def measure(matrices: dict[str, np.ndarray], quick: bool) -> list[dict[str, Any]]:
    """Runs every variant, form and dtype over matrices of one shape."""
    x = jnp.asarray(np.stack(list(matrices.values())), jnp.float32)
    exact = np.asarray(x, np.float64)
    records = []
    for label, arguments in variants(quick):
        for method in ("standard", "gram"):
            for dtype in ("float32", "bfloat16") if quick else ("float32", "float16", "bfloat16"):
                if method == "gram" and (dtype == "bfloat16" or x.shape[-2] == x.shape[-1]):
                    continue
                plan = plan_polar(**arguments, ns_method=method, ns_dtype=dtype)
                resolved = plan.resolve(x.shape, x.dtype)
                function = jax.jit(functools.partial(apply_polar, plan))
                results = np.asarray(function(x), np.float32)
                record = {
                    "set": label,
                    "preconditioning": plan.preconditioning,
                    "method": method,
                    "dtype": dtype,
                    "restarts": resolved.restarts,
                    "shape": x.shape[1:],
                    "flops": resolved.flops,
                    "seconds_per_matrix": median_seconds(function, x, 1 if quick else 3) / len(x),
                    "quality": {
                        name: quality(plan, exact[i], results[i]) for i, name in enumerate(matrices)
                    },
                }
                records.append(record)
    return records


def table(records: list[dict[str, Any]], baseline: float) -> str:
    """Formats the records: a cell is "largest / mean distance / cosine"."""
    families = list(records[0]["quality"])
    lines = [
        "| set | form | dtype | FLOPs | ms | rounding | " + " | ".join(families) + " |",
        "|" + "---|" * (6 + len(families)),
    ]
    for record in records:
        cells = [
            "{largest:.2f} {mean:.3f} {cosine:.4f}".format(**record["quality"][family])
            for family in families
        ]
        rounding = max(q["rounding"] for name, q in record["quality"].items() if name not in HARD)
        lines.append(
            f"| {record['set']} | {record['method']} | {record['dtype']} "
            f"| {record['flops'] / baseline:.2f} | {1e3 * record['seconds_per_matrix']:.2f} "
            f"| {rounding:.1e} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small matrices, fewer variants")
    parser.add_argument("--momentum", help="an .npz of matrices from a run")
    parser.add_argument("--out", type=Path, default=None, help=f"default {RESULTS}, none if quick")
    args = parser.parse_args()
    groups: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
    if args.momentum:
        for name, matrix in load_momentum(args.momentum).items():
            groups.setdefault(matrix.shape, {})[name] = matrix
        if not groups:
            raise SystemExit(f"{args.momentum} holds no matrix that is not zero.")
    else:
        for shape in ((32, 64),) if args.quick else ((96, 96), (96, 384)):
            groups[shape] = spectra(*shape)
    everything = []
    for shape, matrices in groups.items():
        records = measure(matrices, args.quick)
        everything += records
        print(f"\n{shape[0]} x {shape[1]}; cells: largest singular value, mean distance from one,")
        print("cosine to the polar factor. FLOPs relative to five plain Keller-Jordan steps.\n")
        print(table(records, records[0]["flops"]))
    out = args.out or (None if args.quick else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"environment": machine(), "records": everything}, indent=1))
        print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
