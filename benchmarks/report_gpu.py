"""Tables of what `benchmarks/gpu.py` measured, and of what its time did not suffice for."""

from collections.abc import Mapping
from typing import Any

from benchmarks.report_tables import Stored, ranged, table

COMMAND = "python benchmarks/gpu.py --seconds 480 --out benchmarks/results"
MISSING = f"not measured: `{COMMAND}`"


def _scaled(summary: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {"median": factor * summary["median"], "range": [factor * x for x in summary["range"]]}


def right_table(stored: Stored) -> str:
    """What was checked, and what came out."""
    by_kind: dict[str, list[Stored]] = {}
    for row in stored["rows"]:
        by_kind.setdefault(row["what"], []).append(row)
    lines = []
    for row in by_kind.get("one step against the CPU's", ()):
        result = f"{row['largest_relative_difference']:.1e} in the worst leaf, "
        result += f"{row['traces_of_two_calls']} trace for two calls"
        lines.append([f"one step of a small GPT against the CPU's, {row['settings']}", result])
    for row in by_kind.get("clip", ()):
        result = f"{row['clipped_heads']} heads, maxima within "
        result += f"{row['largest_relative_distance_from_threshold']:.0e} of the threshold"
        lines.append(["the clip", result])
    if scales := by_kind.get("scale"):
        finite = "finite" if all(row["finite"] for row in scales) else "not all finite"
        largest = max(row["largest_difference"] for row in scales)
        low, high = (min(r["scale"] for r in scales if r["scale"]), max(r["scale"] for r in scales))
        what = f"polar factor of a matrix times 0, and times {low:g} to {high:g}"
        lines.append([what, f"{finite}, entries within {largest:.4f} of those at scale 1"])
    polar = by_kind.get("polar factor", ())
    if not polar:
        lines.append(["polar factors against float64", MISSING])
    for row in polar:
        shape = "{} x {}".format(*row["shape"])
        result = f"singular values up to {row['largest']:.2f}, RMS of (value - 1) {row['rms']:.3f}"
        lines.append([f"polar factor, {shape}, {row['settings']} ({row['form']})", result])
    return table(["", "on the GPU"], lines)


def steps_table(stored: Stored) -> str:
    """Optimizer steps, and which contenders and models were not reached."""
    (peak,) = (row for row in stored["rows"] if row.get("what") == "ceiling")
    rows = [row for row in stored["rows"] if "seconds" in row]
    lines = []
    for row in rows:
        difference, share = row.get("difference_from_optax"), row.get("needed_share_of_ceiling")
        temporary = row.get("temporary_bytes")
        lines.append(
            [
                f"{row['model']}, {row['dtype']}",
                row["contender"],
                ranged(_scaled(row["seconds"], 1e3), 1),
                f"{row.get('in_a_row', 1)}",
                f"{row['over_fast']['median']:.2f}",
                "" if share is None else f"{100 * share:.0f} %",
                "" if difference is None else f"{difference:.0e}",
                "" if temporary is None else f"{temporary / 1e9:.2f}",
                f"{row['compile_seconds']:.0f}",
            ]
        )
    wanted = {
        "the 1.3B model": any(row["model"] == "1.3b" for row in rows),
        "torch": any(row["contender"].startswith("torch") for row in rows),
        "several steps in a row": any("in_a_row" in row for row in rows),
    }
    missing = ", ".join(name for name, is_there in wanted.items() if not is_there)
    head = ["", "", "ms a step", "steps a call", "over ours, minimax4", "of the ceiling"]
    text = table([*head, "difference from Optax", "temporary GB", "compile s"], lines)
    text += f"\n\nThe ceiling: {peak['flops_per_second'] / 1e12:.0f} TFLOP/s in float16."
    return text + (f"\n\n{MISSING}: {missing}." if missing else "")


def kernels_table(stored: Stored) -> str:
    """The symmetric product by each kernel against XLA's whole one."""
    lines = []
    for row in stored["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        product = "a X X^T + b X" if row["addend"] else "X X^T"
        for name, found in row.items():
            if not isinstance(found, Mapping) or name == "xla" or "seconds" not in found:
                continue
            times = [ranged(_scaled(x["seconds"], 1e6), 0) for x in (row["xla"], found)]
            errors = [f"{x['error']:.1e}" for x in (row["xla"], found)]
            faster = f"{found['xla_over_this']:.2f}"
            exact = "yes" if found["symmetric"] else "no"
            lines.append([shape, row["dtype"], product, name, *times, faster, *errors, exact])
    head = ["shape of X", "dtype", "product", "kernel", "XLA µs", "kernel µs", "XLA / kernel"]
    return table([*head, "XLA's error", "kernel's error", "symmetric to the bit"], lines)


def run_table(stored: Stored) -> str:
    """Training runs, and how much of a step the optimizer takes."""
    rows = [row for row in stored["rows"] if row["what"] == "run"]
    seconds = next(row["seconds"] for row in stored["rows"] if row["what"] == "step")
    lines = []
    for row in rows:
        name = row["optimizer"]
        loss = row.get("held_out_loss") or row["validation_loss"]
        share = f"{100 * (1 - seconds['none'] / seconds[name]):.0f} %"
        settings = [name, f"{row['rate']:g}", f"{row['decay']:g}", f"{row['steps']}"]
        results = [f"{row['seconds']:.0f}", share, f"{loss[-1]:.3f}"]
        lines.append([*settings, *results, f"{max(row['largest_logit']):.1f}"])
    head = ["", "rate", "decay", "steps", "s", "optimizer's share of a step", "loss"]
    return table([*head, "largest logit"], lines)
