"""Tables of the docs as Markdown, from one result each, and how they write numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Stored = Mapping[str, Any]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table.

    Example:
        >>> print(table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    rows = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def ranged(summary: Mapping[str, Any], digits: int) -> str:
    """Returns a median with, in brackets, the smallest and largest value.

    Example:
        >>> ranged({"median": 2.0, "range": [1.0, 4.0]}, 1)
        '2.0 (1.0 - 4.0)'
    """
    low, high = summary["range"]
    return f"{summary['median']:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def machine_line(machine: Stored) -> str:
    """Says what a result was measured on."""
    versions = ", ".join(f"{package} {v}" for package, v in machine["versions"].items())
    return (
        f"{machine['cores']} cores of {machine['processor']}, {machine['system']}, device "
        f"{machine['device']}; Python {machine['python']}, {versions}"
    )


def compile_table(stored: Stored) -> str:
    """Compile times by depth."""
    lines = []
    for row in stored["rows"]:
        seconds = row["seconds"]
        lines.append(
            [
                f"{row['layers']}",
                row["contender"],
                ranged(seconds["total"], 2),
                " + ".join(f"{seconds[p]['median']:.2f}" for p in ("trace", "lower", "compile")),
                ranged(row["over_ours"], 2),
                f"{row['growth']['median']:.1f} since {row['from']}",
                f"{row['instructions']}",
                f"{row['temporary_bytes'] / 1e6:.0f}",
            ]
        )
    head = ["layers", "", "seconds", "trace + lower + compile", "over ours", "growth"]
    return table([*head, "instructions", "temporary MB"], lines)


def step_table(stored: Stored) -> str:
    """Step times of one model."""
    lines = []
    for row in stored["rows"]:
        quality = row.get("quality")
        difference = row.get("difference_from_optax")
        temporary = row.get("temporary_bytes")
        lines.append(
            [
                row["contender"],
                ranged(row["seconds"], 2),
                ranged(row["over_ours"], 2) if "over_ours" in row else "",
                ranged(row["over_fast"], 2) if "over_fast" in row else "",
                "" if temporary is None else f"{100 * temporary / stored['matrix_bytes']:.0f} %",
                "" if difference is None else f"{difference:.0e}",
                _near(quality),
            ]
        )
    head = ["", "seconds", "over ours", "over ours, minimax4", "temporary memory"]
    return table([*head, "difference from Optax", "Gaussian"], lines)


def _near(quality: Mapping[str, float] | None) -> str:
    return "" if quality is None else f"{quality['rms']:.3f} / {quality['mean_cosine']:.4f}"


def polar_table(stored: Stored) -> str:
    """Times of single polar factors."""
    lines = []
    for row in stored["rows"]:
        whole, needed = (
            f"{100 * row[key]:.0f} %" if key in row else ""
            for key in ("whole_products_over_time", "needed_products_over_time")
        )
        rate = row.get("flops_per_second")
        milliseconds = {k: _scaled(v) for k, v in row["seconds_per_matrix"].items()}
        lines.append(
            [
                "{} x {}".format(*row["shape"]),
                row["contender"] + (f" ({row['method']})" if "method" in row else ""),
                ranged(milliseconds, 1),
                "" if rate else ranged(row["optax_over_this"], 2),
                f"{rate / 1e9:.0f}" if rate else "",
                whole,
                needed,
            ]
        )
    head = ["shape", "", "ms", "Optax over this", "GFLOP/s", "whole products / time"]
    return table([*head, "needed products / time"], lines)


def _scaled(value: Any) -> Any:
    return [1e3 * v for v in value] if isinstance(value, list) else 1e3 * value


def clip_table(stored: Stored) -> str:
    """The clip over one pass through the query and key kernels."""
    kinds = list(stored["rows"][0]["over_yardstick"])
    lines = [
        [
            f"`{row['what']}`",
            row["tree"],
            row["dtype"],
            f"{row['bytes'] / 1e6:.0f}",
            *(ranged(row["over_yardstick"][kind], 2) for kind in kinds),
        ]
        for row in stored["rows"]
    ]
    return table(["", "tree", "dtype", "MB of q and k", *(f"{kind} over" for kind in kinds)], lines)


def recording_table(stored: Stored) -> str:
    """A training step of attention with its maxima over one without."""
    lines = []
    for row in stored["rows"]:
        without, beside = (
            f"{100 * (row[name] - 1):+.1f} % ({100 * (row['fastest_' + name] - 1):+.1f} %)"
            for name in ("recording_over_without", "recording_over_jax_nn")
        )
        seconds = row["median_seconds"]["recording"]
        causal = "causal" if row["is_causal"] else "all pairs"
        shape = f"T = {row['shape'][1]}, head size {row['shape'][3]}, {causal}"
        lines.append([shape, f"{seconds:.2f}", without, beside])
    head = ["", "s", "over the same without recording", "over `jax.nn.dot_product_attention`"]
    return table(head, lines)
