"""Writes tables and pictures of the docs (performance, quality, scaling) from the stored results.

    python benchmarks/report.py

Between the markers `<!-- NAME -->` and `<!-- end NAME -->` a page is this script's; a table whose
results are not there says which command makes them. `--check` changes nothing and fails if a page
is not what would be written.
"""

import argparse
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import pods, scaling
from benchmarks.harness import RESULTS, ROOT
from benchmarks.report_attention import blocks_table, clip_table, recording_table
from benchmarks.report_floor import floor_table
from benchmarks.report_pictures import draw_all
from benchmarks.report_quality import (
    default_table,
    errors_table,
    quality_table,
    rounding_table,
)
from benchmarks.report_targets import targets_table
from benchmarks.report_text import COMMANDS, Results, by, missing, ranged, table, times

DOCS = ROOT / "docs"


def load(folder: Path) -> Results:
    """Reads every result, by name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def machine_list(results: Results) -> str:
    """Says what each result was measured on."""
    lines = []
    for name in COMMANDS:
        if name.endswith("_gpu") and name not in results:
            continue
        found = results.get(name, {}).get("machine")
        if found is None:
            lines.append(f"- {name}: {missing(name)}")
            continue
        versions = ", ".join(f"{package} {v}" for package, v in found["versions"].items())
        lines.append(
            f"- {name}: {found['cores']} cores of {found['processor']}, {found['system']}, device "
            f"{found['device']}; Python {found['python']}, {versions}"
        )
    return "\n".join(lines)


def compile_table(results: Results) -> str:
    """Compile times by depth."""
    stored = results.get("compile_time")
    if stored is None:
        return missing("compile_time")
    ratios = by(stored["ratios"], "layers", "contender")
    lines = []
    for row in stored["rows"]:
        compared = ratios[row["layers"], row["contender"]]
        seconds = row["seconds"]
        lines.append(
            [
                f"{row['layers']}",
                row["contender"],
                ranged(seconds["total"], 2),
                " + ".join(f"{seconds[p]['median']:.2f}" for p in ("trace", "lower", "compile")),
                times(compared["over_ours"]),
                f"{compared['growth']['median']:.1f} since {compared['from']}",
                f"{row['instructions']}",
                f"{row['temporary_bytes'] / 1e6:.0f}",
            ]
        )
    head = ["layers", "", "seconds", "trace + lower + compile", "over ours", "growth"]
    return table([*head, "instructions", "temporary MB"], lines)


def step_table(results: Results, name: str = "step_time") -> str:
    """Step times of one model."""
    stored = results.get(name)
    if stored is None:
        return missing(name)
    lines = []
    for row in stored["rows"]:
        quality = row.get("quality")
        momentum = stored.get("momentum_quality", {}).get(row["contender"])
        difference = row.get("difference_from_optax")
        temporary = row.get("temporary_bytes")
        lines.append(
            [
                row["contender"],
                ranged(row["seconds"], 2),
                times(row["over_ours"]) if "over_ours" in row else "",
                times(row["over_fast"]) if "over_fast" in row else "",
                "" if temporary is None else f"{100 * temporary / stored['matrix_bytes']:.0f} %",
                "" if difference is None else f"{difference:.0e}",
                _near(quality),
                _near(momentum),
            ]
        )
    head = ["", "seconds", "over ours", "over ours, minimax4", "temporary memory"]
    return table([*head, "difference from Optax", "Gaussian", "momentum"], lines)


def _near(quality: Mapping[str, float] | None) -> str:
    return "" if quality is None else f"{quality['rms']:.3f} / {quality['mean_cosine']:.4f}"


def polar_table(results: Results, name: str = "polar_time") -> str:
    """Times of single polar factors."""
    stored = results.get(name)
    if stored is None:
        return missing(name)
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
                "" if rate else times(row["optax_over_this"]),
                f"{rate / 1e9:.0f}" if rate else "",
                whole,
                needed,
            ]
        )
    head = ["shape", "", "ms", "Optax over this", "GFLOP/s", "whole products / time"]
    return table([*head, "needed products / time"], lines)


def _scaled(value: Any) -> Any:
    return [1e3 * v for v in value] if isinstance(value, list) else 1e3 * value


def pods_table(results: Results) -> str:
    """What the compilers say, and which they were."""
    stored = results.get("pods")
    if stored is None:
        return missing("pods")
    used = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    return f"Compiled with {used}.\n\n{pods.table(stored)}"


Blocks = Mapping[str, Callable[[Results], str]]
#: Every part of each page that is written here.
PAGES: Mapping[str, Blocks] = {
    "performance.md": {
        "machine": machine_list,
        "targets": targets_table,
        "compile": compile_table,
        "step": step_table,
        "polar": polar_table,
        "quality": quality_table,
        "rounding": rounding_table,
        "default": default_table,
        "blocks": blocks_table,
        "floor": floor_table,
        "clip": clip_table,
        "recording": recording_table,
    },
    "quality.md": {
        dtype: functools.partial(errors_table, dtype=dtype)
        for dtype in ("float32", "float16", "bfloat16")
    },
    "scaling.md": {
        "pods": pods_table,
        "cost": lambda _: scaling.cost_table(),
        "break even": lambda _: scaling.break_even_table(),
    },
}


def written(page: str, results: Results, blocks: Blocks) -> str:
    """Returns the page with every block written anew.

    Raises:
        ValueError: If the page has no markers for a block.
    """
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
        text = block(results)
        page, count = pattern.subn(lambda m, text=text: f"{m[1]}\n{text}\n{m[2]}", page)
        if count != 1:
            raise ValueError(
                f"The page has {count} places for {name!r}. Write one: <!-- {name} --> and "
                f"<!-- end {name} --> on lines of their own."
            )
    return page


def main() -> None:
    """Writes pages and pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of the pages")
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    results = load(options.results)
    for name, blocks in PAGES.items():
        page = options.docs / name
        old = page.read_text()
        new = written(old, results, blocks)
        if options.check and new != old:
            raise SystemExit(f"{page} is not what its results say; run this script.")
        if new != old:
            page.write_text(new)
        print(f"{'as it was' if new == old else 'written'}: {page}")
    if not options.check:
        for path in draw_all(results, options.docs / "images"):
            print(f"written: {path}")


if __name__ == "__main__":
    main()
