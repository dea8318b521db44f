"""Compiles every kernel with the real TPU and GPU compilers, which needs neither machine.

    make kernels          or, where the extras tpu and cuda13 are installed,
    python benchmarks/kernels.py [--only tpu|cuda] [--match TEXT] [--out FILE.json]

Prints for each kernel and shape how long its compilation took, its temporary memory and the size of
its code, or what the compiler said. Writes JSON with the versions of what compiled.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import compilers, kernel_cases_max_logits, kernel_cases_symmetric
from benchmarks.harness import versions

#: What each platform's compiler comes in, and the extra that brings it.
PACKAGES = {
    "tpu": (("libtpu",), "tpu"),
    "cuda": (("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"), "cuda13"),
}
#: What is compiled for.
DEVICES: dict[str, dict[str, Callable[[], list[Any]]]] = {
    "tpu": {
        "v5e": lambda: compilers.tpu_devices("v5e:2x2"),
        "v5p": lambda: compilers.tpu_devices("v5p:2x2x1"),
    },
    "cuda": {"H200": lambda: compilers.h200_devices(1)},
}

Case = tuple[str, Callable[..., Any], tuple[Any, ...]]


def all_cases() -> dict[str, list[Case]]:
    """Collects the cases of every kernel that has a file of them."""
    found: dict[str, list[Case]] = {name: [] for name in PACKAGES}
    sources = [
        kernel_cases_symmetric.compiler_cases(),
        kernel_cases_max_logits.CASES,
    ]
    for source in sources:
        for name, cases in source.items():
            found[name] += cases
    return found


def missing(name: str) -> list[str]:
    """Lists the packages that a platform's compiler needs and that are not installed."""
    installed = versions(PACKAGES[name][0])
    return [package for package in PACKAGES[name][0] if package not in installed]


def compile_case(name: str, case: Case, devices: list[Any]) -> dict[str, Any]:
    """Compiles one case and says what came out."""
    label, function, arguments = case
    sharding = NamedSharding(Mesh(devices[:1], ("device",)), PartitionSpec())
    placed = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=sharding), arguments
    )
    start = time.perf_counter()
    try:
        traced = jax.jit(function).trace(*placed)
        compiled = traced.lower(lowering_platforms=(name,)).compile()
    # Whatever a compiler raises is what this script is about.
    except Exception as error:
        said = " ".join(str(error).split())
        return {"case": label, "refused": f"{type(error).__name__}: {said[:400]}"}
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return {
        "case": label,
        "seconds": round(time.perf_counter() - start, 2),
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "code_bytes": (memory.generated_code_size_in_bytes or None) if memory else None,
        "flops": cost.get("flops"),
    }


def line(row: dict[str, Any]) -> str:
    """Formats a row of the table."""
    if "refused" in row:
        return f"  {row['case']:<66}  refused: {row['refused']}"
    parts = [f"{row['seconds']:.1f} s"]
    for key, unit, size in (
        ("temporary_bytes", "MB", 1e6),
        ("code_bytes", "kB", 1e3),
        ("flops", "GFLOP", 1e9),
    ):
        # The GPU's compiler does not tell code and operations.
        parts.append(f"{row[key] / size:.1f} {unit}" if row[key] is not None else f"- {unit}")
    return f"  {row['case']:<66}" + "".join(f"{part:>15}" for part in parts)


def main() -> None:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=PACKAGES, help="one platform")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"))
    options = parser.parse_args()

    results: dict[str, list[dict[str, Any]]] = {}
    for name, cases in all_cases().items():
        if options.only not in (None, name):
            continue
        absent = missing(name)
        if absent:
            extra = PACKAGES[name][1]
            print(
                f"{name}: not compiled, for {', '.join(absent)} is not installed. `make kernels` "
                f"installs it; so does pip install 'muonclip_jax[{extra}]'."
            )
            continue
        chosen = [case for case in cases if options.match in case[0]]
        for device, described in DEVICES[name].items():
            print(f"{name}, {device}: compile time, temporary memory, code, operations")
            devices, rows = described(), []
            for case in chosen:
                rows.append(compile_case(name, case, devices))
                print(line(rows[-1]), flush=True)
            refused = sum("refused" in row for row in rows)
            print(f"  {len(rows) - refused} compiled, {refused} refused")
            results[device] = rows
    if results and not options.match and options.only is None:
        packages = ["jax", "jaxlib", *(each for names, _ in PACKAGES.values() for each in names)]
        used = {"python": platform.python_version(), **versions(packages)}
        record = {"versions": used, "machine": platform.machine(), "results": results}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {options.out}")
    if any("refused" in row for rows in results.values() for row in rows):
        sys.exit("A compiler refused a kernel.")


if __name__ == "__main__":
    main()
