"""The report's tables of quality: how near each set comes, what rounding does, what diverges."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.matrices import MOMENTUM
from benchmarks.report_tables import table

#: Columns of the table, in order; what was not measured is left out.
FAMILIES = ("gaussian", "low rank + 1 % noise", "cond 1e3", "cond 1e6", "power law", MOMENTUM)
#: Outside of these, rounding of the input alone makes new directions.
_GENTLE = ("gaussian", "low rank + 1 % noise", "cond 1e3", "power law", MOMENTUM)


def auto_records(stored: Mapping[str, Any], name: str, dtype: str) -> list[Mapping[str, Any]]:
    """What "auto" takes for each shape."""
    return [r for r in stored["records"] if r["set"] == name and r["dtype"] == dtype and r["auto"]]


def _over(records: list[Mapping[str, Any]], family: str, key: str) -> list[float]:
    return [r["quality"][family][key] for r in records if family in r["quality"]]


def names(stored: Mapping[str, Any]) -> list[str]:
    """Returns the sets that were measured, in order."""
    return list(dict.fromkeys(record["set"] for record in stored["records"]))


def rms_and_cosine(records: list[Mapping[str, Any]], family: str) -> tuple[float, float] | None:
    """Returns the RMS of (sigma - 1) and the mean cosine over shapes, or None if not measured."""
    rms, cosine = (_over(records, family, key) for key in ("rms", "mean_cosine"))
    if not rms:
        return None
    return float(np.sqrt(np.mean(np.square(rms)))), float(np.mean(cosine))


def cost(records: list[Mapping[str, Any]], key: str = "full_flops") -> float:
    """Returns operations relative to five plain Keller-Jordan steps, over all shapes."""
    return sum(r[key] for r in records) / sum(r["baseline_flops"] for r in records)


def diverging(stored: Mapping[str, Any], name: str) -> list[str]:
    """Says in which forms a set diverges on anything; "(not auto)" where only a request leads."""
    found: dict[str, bool] = {}
    for record in stored["records"]:
        if record["set"] == name and record["diverges_on"]:
            form = f"{record['method']} {record['dtype']}"
            found[form] = found.get(form, False) or record["auto"]
    return [form if auto else f"{form} (not auto)" for form, auto in found.items()]


def quality_table(stored: Mapping[str, Any]) -> str:
    """Nearness to the polar factor in float32, in the form that "auto" takes."""
    present = [f for f in FAMILIES if f in stored["families"]]
    lines = []
    for name in names(stored):
        records = auto_records(stored, name, "float32")
        if not records:
            continue
        cells = [rms_and_cosine(records, family) for family in present]
        largest = max(r["quality"][f]["largest"] for r in records for f in r["quality"])
        lines.append(
            [
                name,
                f"{records[0]['steps']}",
                f"{cost(records):.2f}",
                f"{_microseconds(records):.0f}",
                f"{largest:.2f}",
                *("" if cell is None else f"{cell[0]:.3f} / {cell[1]:.4f}" for cell in cells),
                ", ".join(diverging(stored, name)) or "nowhere",
            ]
        )
    return table(["", "steps", "FLOPs", "µs", "largest", *present, "diverges"], lines)


def _microseconds(records: list[Mapping[str, Any]]) -> float:
    return 1e6 * sum(r["seconds_per_matrix"] for r in records) / len(records)


def rounding_table(stored: Mapping[str, Any]) -> str:
    """What each dtype and form does to a set: largest singular value, distance by rounding."""
    forms = list(dict.fromkeys((r["method"], r["dtype"]) for r in stored["records"]))
    lines = []
    for name in names(stored):
        cells = []
        for form in forms:
            records = [
                r
                for r in stored["records"]
                if r["set"] == name and (r["method"], r["dtype"]) == form
            ]
            largest = np.max([q["largest"] for r in records for q in r["quality"].values()])
            gentle = [f for f in _GENTLE if f in stored["families"]]
            rounding = np.max([x for f in gentle for x in _over(records, f, "rounding")])
            text = f"{largest:.2f} / {rounding:.0e}"
            cells.append(f"**{text}**" if any(r["diverges_on"] for r in records) else text)
        lines.append([name, *cells])
    return table(["", *(f"{method} {dtype}" for method, dtype in forms)], lines)
