"""How the report writes numbers: tables, medians with their ranges, what is not there."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]

#: What makes a result, by name.
COMMANDS = {
    "step_time": "make bench",
    "compile_time": "make bench",
    "polar_time": "make bench",
    "polar_quality": "make bench",
    "block_products": "make bench",
    "clip_cost": "make bench-attention",
    "attention_recording": "make bench-attention",
    "step_time_1.3b_gpu": "PYTHONPATH=. sh benchmarks/gpu.sh",
    "kernel_speed_gpu": "PYTHONPATH=. sh benchmarks/gpu.sh",
    "polar_time_gpu": "PYTHONPATH=. sh benchmarks/gpu.sh",
}
#: The same of results that are compiled for machines that are not here.
COMPILED = {"pods": "python -m benchmarks.pods"}


def missing(name: str) -> str:
    """Says what makes a result that is not there."""
    return f"not measured: `{(COMMANDS | COMPILED)[name]}`"


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


def times(ratio: Mapping[str, Any]) -> str:
    """Returns a ratio with its range."""
    return ranged(ratio, 2)


def by(rows: Iterable[Mapping[str, Any]], *keys: str) -> dict[Any, Mapping[str, Any]]:
    """Returns rows by the values of their keys: the value itself where there is one key."""
    if len(keys) == 1:
        return {row[keys[0]]: row for row in rows}
    return {tuple(row[key] for key in keys): row for row in rows}
