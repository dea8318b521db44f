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
                f"{row['temporary_bytes'] / 1e6:.0f}",
            ]
        )
    head = ["layers", "", "seconds", "trace + lower + compile", "over ours", "growth"]
    return table([*head, "temporary MB"], lines)


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


def clip_table(stored: Stored) -> str:
    """The clip over one pass through the query and key kernels."""
    kinds = list(stored["rows"][0]["over_yardstick"])
    lines = [
        [
            row["tree"],
            row["dtype"],
            f"{row['bytes'] / 1e6:.0f}",
            *(ranged(row["over_yardstick"][kind], 2) for kind in kinds),
        ]
        for row in stored["rows"]
    ]
    return table(["tree", "dtype", "MB of q and k", *(f"{kind} over" for kind in kinds)], lines)


#: What recording adds, by the name of a stored ratio: which program, over what.
_RECORDING = {
    "recording_over_without": ("recording", "ms", "over the same without recording"),
    "recording_over_jax_nn": (None, "", "over `jax.nn.dot_product_attention`"),
    "cudnn_and_bound_over_cudnn": ("cudnn and bound", "cuDNN and its bound, ms", "over cuDNN's"),
}


def recording_table(stored: Stored) -> str:
    """A training step of attention with its maxima over one without."""
    known = {k: v for k, v in _RECORDING.items() if any(k in row for row in stored["rows"])}
    head = [""]
    for program, milliseconds, over in known.values():
        head += [milliseconds, over] if program else [over]
    lines = []
    for row in stored["rows"]:
        causal = "causal" if row["is_causal"] else "all pairs"
        cells = [f"T = {row['shape'][1]}, head size {row['shape'][3]}, {causal}"]
        for name, (program, *_) in known.items():
            if program:
                cells.append(f"{1e3 * row['median_seconds'][program]:.2f}")
            ratios = [f"{100 * (row[k] - 1):+.1f} %" for k in (name, f"fastest_{name}") if k in row]
            cells.append("{} ({})".format(*ratios) if ratios else "")
        lines.append(cells)
    return table(head, lines)
