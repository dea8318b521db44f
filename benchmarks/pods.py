"""Compiles the optimizer step of named models for TPU pods and for H200s, and says what it costs.

    JAX_PLATFORMS=cpu python benchmarks/pods.py [--only REGEX]

The whole step (`tx.update` and `optax.apply_updates`, parameters and state donated) goes through
the real compilers for machines that are not here (`compilers.py`); nothing runs. Needs the extras
`tpu` and `cuda13`. Each row compiles in a process of its own, so that a refusal or a timeout is one
row's result. Writes results/pods.json after every row and skips rows that are there; prints
a Markdown table, which benchmarks/report.py writes to docs/scaling.md.

FLOPs a device are those of the products, read from the program (`hlo.py`). `optimal_seconds` is the
TPU compiler's own estimate of a step that waits for nothing; there is none for GPUs.
"""

import argparse
import json
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import muonclip_jax as mc
from benchmarks import compilers, hlo, pod_models, report_tables
from benchmarks.harness import ROOT, in_a_process, versions, write
from benchmarks.pod_models import LAYOUTS, MAXIMA, MODELS, Layout
from muonclip_jax import checkpoint

RESULTS = ROOT / "benchmarks" / "results" / "pods.json"
#: TPU slices by their number of devices.
SLICES = {64: "v5p:4x4x4", 512: "v5p:8x8x8", 1024: "v5p:8x8x16"}
#: At the default 2**28, Kimi K2's experts take 17 rounds, and the program compiles for long.
STACK_BYTES = {"7B dense": 2**28, "Kimi K2": 2**30}
TIMEOUT = 900.0  # seconds for one row
OPTIMIZERS = ("muonclip_jax.muonclip", "optax.contrib.muon", "optax.adamw")
#: What takes part.
PACKAGES = ("jax", "jaxlib", "optax", "libtpu", "jax-cuda13-plugin", "muonclip_jax")


class Row(NamedTuple):
    """One program: a model laid out on a machine, and the optimizer."""

    model: str
    layout: str
    machine: str
    optimizer: str

    @property
    def name(self) -> str:
        """What `--only` searches."""
        return " | ".join(self)

    @property
    def on(self) -> Layout:
        """The layout."""
        return LAYOUTS[self.model][self.layout]


def rows() -> Iterator[Row]:
    """All rows, a layout's optimizers one after another."""
    for model, layouts in LAYOUTS.items():
        for layout, on in layouts.items():
            machine = SLICES.get(on.devices, f"h200 x {on.devices}")
            for optimizer in OPTIMIZERS:
                yield Row(model, layout, machine, optimizer)


def optimizer(row: Row, model: Any, shardings: Any) -> Any:
    """Returns a row's transformation."""
    if row.optimizer == "optax.adamw":
        return optax.adamw(1e-3)
    if row.optimizer == "muonclip_jax.muonclip":
        options = mc.Distribution(max_stack_bytes=STACK_BYTES[row.model])
        return mc.muonclip(1e-3, param_shardings=shardings, distribution=options)
    # The same matrices for both libraries.
    numbers = mc.infer_dimension_numbers(pod_models.shapes(model))
    return optax.contrib.muon(1e-3, consistent_rms=0.2, muon_weight_dimension_numbers=numbers)


def compile_step(row: Row) -> Any:
    """Compiles a row's step."""
    model, layout = MODELS[row.model](), row.on
    is_gpu = row.machine.startswith("h200")
    described = compilers.h200_devices(layout.devices) if is_gpu else None
    mesh = layout.on(described or compilers.tpu_devices(row.machine))
    shardings = pod_models.shardings_of(model, layout, mesh)
    params = pod_models.shapes(model, shardings)
    tx = optimizer(row, model, shardings)
    extra = {}
    if row.optimizer.endswith("muonclip"):
        maxima = MAXIMA[row.model]()
        extra["max_logits"] = pod_models.shapes(
            maxima, pod_models.shardings_of(maxima, layout, mesh)
        )

    def step(params: Any, state: Any, grads: Any, extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    with compilers.compiling_for("gpu" if is_gpu else "tpu"):
        state = checkpoint.abstract_state(tx, params)
        shardings = jax.tree.map(lambda x: x.sharding, (params, state))
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
        return jitted.lower(params, state, params, extra).compile()


def measure(row: Row) -> dict[str, Any]:
    """Compiles a row and returns what there is to say of it."""
    start = time.perf_counter()
    program = compile_step(row)
    seconds = time.perf_counter() - start
    memory, costs = program.memory_analysis(), program.cost_analysis() or {}
    found = {
        "optimal_seconds": costs.get("optimal_seconds"),
        "temp_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }
    try:
        counted = hlo.tally(program.as_text())
    except jax.errors.JaxRuntimeError as error:  # a program that jaxlib cannot print
        return found | {"no_text": str(error)[:600]}
    sent = {"collectives": counted.by_kind(), "bytes_sent": counted.bytes_sent}
    return found | {"flops": counted.flops} | sent


def in_its_process(row: Row) -> dict[str, Any]:
    """Runs `measure` in a process of its own; what went wrong is a result too."""
    try:
        return in_a_process("benchmarks.pods", "--row", json.dumps(row), timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"refusal": f"not compiled within {TIMEOUT:.0f} s"}
    except RuntimeError as error:
        return {"refusal": str(error)[:600]}


def table(results: Mapping[str, Any]) -> str:
    """The versions of the compilers, and the results as Markdown."""
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = ["model, machine", "sharding", "optimizer", "TFLOPs", "optimal s", "temporary GB"]
    lines: list[list[str]] = []
    before: tuple[str, str] = ("", "")
    for row in rows():
        if row.name not in results["rows"]:
            continue
        place = (f"{row.model}, {row.machine}", row.layout)
        shown = list(place) if place != before else ["", ""]
        before = place
        lines.append([*shown, f"`{row.optimizer}`", *_cells(results["rows"][row.name])])
    text = report_tables.table([*head, "sent GB", "collectives"], lines)
    return f"Compiled with {used}.\n\n{text}"


def _cells(result: Mapping[str, Any]) -> list[str]:
    if "refusal" in result:
        said = re.sub(r"^([\w.]+: )*", "", result["refusal"])
        return ["", "", "", "", f"refused: {said[:150]}"]
    seconds, temporary = result["optimal_seconds"], f"{result['temp_bytes'] / 1e9:.2f}"
    estimate = "" if seconds is None else f"{seconds:.4f}"
    if "no_text" in result:
        return ["", estimate, temporary, "", "not known: jaxlib cannot print this program"]
    kinds = ", ".join(f"{row['count']} {kind}" for kind, row in result["collectives"].items())
    sent = f"{result['bytes_sent'] / 1e9:.3g}"
    return [f"{result['flops'] / 1e12:.3g}", estimate, temporary, sent, kinds or "none"]


def main() -> None:
    """Runs the rows that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help="again, the rows whose names this regular expression finds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(Row(*json.loads(options.row)))))
        return
    old = json.loads(options.out.read_text()) if options.out.exists() else {}
    used = {"python": platform.python_version(), **versions(PACKAGES)}
    results = {"versions": used, "rows": old.get("rows", {})}
    order = [row.name for row in rows()]
    for row in rows():
        is_there = row.name in results["rows"]
        if is_there if options.only is None else not re.search(options.only, row.name):
            continue
        result = in_its_process(row)
        print(row.name, result, flush=True)
        results["rows"][row.name] = result
        results["rows"] = {name: results["rows"][name] for name in order if name in results["rows"]}
        write(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
