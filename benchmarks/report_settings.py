"""Writes the tables and pictures of docs/settings.md from the stored sweeps.

    python benchmarks/report_settings.py

Works as `report.py` does: between markers the page is this script's, and `--check` only compares.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import RESULTS
from benchmarks.report import DOCS, load, written
from benchmarks.report_settings_pictures import draw_clip, draw_width
from benchmarks.report_text import Results, table
from benchmarks.settings_curves import Curve, best, curves, rule_names

PAGE = DOCS / "settings.md"
PICTURES = {
    "settings_width": ("settings_width", draw_width),
    "settings_clip": ("settings_clip", draw_clip),
}


def _missing(name: str) -> str:
    return f"not measured: `python benchmarks/{name}.py`"


def machine_line(results: Results) -> str:
    """Says what the sweeps were run on; they time nothing, but rounding is the machine's."""
    lines = []
    for name in ("settings_width", "settings_clip"):
        found = results.get(name, {}).get("machine")
        if found is None:
            lines.append(f"- {name}: {_missing(name)}")
            continue
        versions = ", ".join(
            f"{package} {found['versions'][package]}" for package in ("jax", "optax", "flax")
        )
        lines.append(
            f"- {name}: {found['cores']} cores of {found['processor']}, device {found['device']}; "
            f"{versions}"
        )
    return "\n".join(lines)


def _rate(rate: float) -> str:
    return f"{rate:.2g}"


def _bounded(curve: Curve) -> str:
    """The best rate; with a sign where it is at the end of those tried."""
    found = best(curve)
    return {-1: "at most ", 0: "", 1: "at least "}[found.at_end] + _rate(found.rate)


def width_table(results: Results) -> str:
    """Best rates by rule and width, how far they move, and what that costs."""
    stored = results.get("settings_width")
    if stored is None:
        return _missing("settings_width")
    widths = sorted({row["width"] for row in stored["rows"]})
    lines = []
    for rule in rule_names():
        by_width = curves(stored["rows"], rule)
        found = [by_width.get(width, Curve((), ())) for width in widths]
        cells = [_bounded(curve) if len(curve.rates) >= 3 else "not finished" for curve in found]
        moved, lost = "", ""
        if "not finished" not in cells:
            narrow, wide = best(found[0]), best(found[-1])
            moved = f"{np.log2(wide.rate / narrow.rate):+.1f}"
            carried = found[-1].at(narrow.rate)
            lost = "outside of what was tried" if carried is None else f"{carried - wide.loss:.3f}"
        lines.append([f"`{rule}`", *cells, moved, lost])
    head = ["rule", *(f"width {width}" for width in widths), "octaves"]
    return table([*head, f"nats lost at {widths[-1]} with the best rate of {widths[0]}"], lines)


def losses_table(results: Results) -> str:
    """The losses behind it, for the rule of `width_transfer`."""
    stored = results.get("settings_width")
    if stored is None:
        return _missing("settings_width")
    by_width = curves(stored["rows"], "width_transfer")
    rates = sorted({rate for curve in by_width.values() for rate in curve.rates})
    lines = []
    for width, curve in sorted(by_width.items()):
        losses = dict(zip(curve.rates, curve.losses, strict=True))
        least = min(losses.values())
        cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        cells = [f"**{c}**" if c == f"{least:.3f}" else c for c in cells]
        lines.append([str(width), *cells])
    return table(["width", *map(_rate, rates)], lines)


def _over_seeds(rows: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if len(values) < len(rows):
        return "no number"
    low, high = min(values), max(values)
    middle = f"{statistics.mean(values):.{digits}f}"
    return middle if low == high else f"{middle} ({low:.{digits}f} - {high:.{digits}f})"


def _clip_rows(
    stored: Mapping[str, Any], chosen: Callable[[Mapping[str, Any]], bool], key: str
) -> dict[Any, list[Mapping[str, Any]]]:
    grouped: dict[Any, list[Mapping[str, Any]]] = {}
    for row in stored["rows"]:
        if chosen(row):
            grouped.setdefault(row[key], []).append(row)
    return grouped


def _against(
    rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Rows with the difference of their loss from the run of the same seed in `base`."""
    by_seed = {row["seed"]: row["validation_loss"] for row in base}
    found = []
    for row in rows:
        loss, other = row["validation_loss"], by_seed.get(row["seed"])
        difference = None if loss is None or other is None else loss - other
        found.append({**row, "difference": difference})
    return found


def threshold_table(results: Results) -> str:
    """What each threshold does."""
    stored = results.get("settings_clip")
    if stored is None:
        return _missing("settings_clip")
    grouped = _clip_rows(stored, lambda row: row["alpha"] == 0.5, "threshold")
    lines = []
    for threshold, rows in grouped.items():
        share = 100 * statistics.mean(row["clipped_share"] for row in rows)
        against = _over_seeds(_against(rows, grouped[None]), "difference", 3)
        lines.append(
            [
                "none" if threshold is None else f"{threshold:g}",
                _over_seeds(rows, "validation_loss", 3),
                "" if threshold is None else against,
                f"{share:.1f} %",
                _over_seeds(rows, "largest_logit", 1),
                _over_seeds(rows, "largest_logit_at_end", 1),
            ]
        )
    head = ["threshold", "validation loss", "minus that without a clip", "heads clipped in a step"]
    return table([*head, "largest logit of all steps", "of the last step"], lines)


def alpha_table(results: Results) -> str:
    """What each alpha does, at one threshold."""
    stored = results.get("settings_clip")
    if stored is None:
        return _missing("settings_clip")
    swept = {row["threshold"] for row in stored["rows"] if row["alpha"] != 0.5}
    grouped = _clip_rows(stored, lambda row: row["threshold"] in swept, "alpha")
    lines = []
    for alpha, rows in sorted(grouped.items()):
        against = _over_seeds(_against(rows, grouped.get(0.5, ())), "difference", 3)
        lines.append(
            [
                f"{alpha:g}",
                _over_seeds(rows, "validation_loss", 3),
                "" if alpha == 0.5 else against,
                _over_seeds(rows, "largest_logit", 1),
                _over_seeds(rows, "query_norm", 1),
                _over_seeds(rows, "key_norm", 1),
            ]
        )
    head = ["alpha", "validation loss", "minus that at 0.5", "largest logit of all steps"]
    return table([*head, "norm of the query kernels", "of the key kernels"], lines)


#: Every part of the page that is written here.
BLOCKS = {
    "machine": machine_line,
    "width": width_table,
    "losses": losses_table,
    "threshold": threshold_table,
    "alpha": alpha_table,
}


def main() -> None:
    """Writes page and pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--images", type=Path, default=DOCS / "images")
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    results, page = load(options.results), options.page.read_text()
    new = written(page, results, BLOCKS)
    if options.check:
        if new != page:
            raise SystemExit(f"{options.page} is not what its results say; run this script.")
        return
    options.page.write_text(new)
    options.images.mkdir(parents=True, exist_ok=True)
    for name, (needs, draw) in PICTURES.items():
        if needs in results:
            draw(results[needs]).savefig(options.images / f"{name}.png")
    print(f"written: {options.page}, pictures in {options.images}")


if __name__ == "__main__":
    main()
