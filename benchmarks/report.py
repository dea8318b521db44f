"""Writes the tables of the docs (performance, quality, scaling, settings) from the stored results.

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

from benchmarks import pods, report_quality, report_settings, report_tables, scaling
from benchmarks.harness import RESULTS, ROOT

DOCS = ROOT / "docs"
Results = Mapping[str, Any]
#: What makes a result, by name.
COMMANDS = {
    "step_time": "make bench",
    "compile_time": "make bench",
    "polar_time": "make bench",
    "polar_quality": "make bench",
    "clip_cost": "make bench-attention",
    "attention_recording": "make bench-attention",
    "pods": "python -m benchmarks.pods",
    "settings_width": "make settings",
    "settings_clip": "make settings",
}


def load(folder: Path) -> Results:
    """Reads every result, by name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _from(write: Callable[..., str], *needs: str) -> Callable[[Results], str]:
    """Returns a block that is written from some results, or says what makes those."""

    def block(results: Results) -> str:
        missing = [name for name in needs if name not in results]
        if missing:
            return f"not measured: `{COMMANDS[missing[0]]}`"
        return write(*(results[name] for name in needs))

    return block


def machine_list(results: Results, names: tuple[str, ...]) -> str:
    """Says what each result was measured on."""
    lines = []
    for name in names:
        line = _from(lambda stored: report_tables.machine_line(stored["machine"]), name)(results)
        lines.append(f"- {name}: {line}")
    return "\n".join(lines)


def _pods_table(stored: Mapping[str, Any]) -> str:
    """What the compilers say, and which they were."""
    used = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    return f"Compiled with {used}.\n\n{pods.table(stored)}"


_TIMED = tuple(name for name, command in COMMANDS.items() if command.startswith("make bench"))
Blocks = Mapping[str, Callable[[Results], str]]
#: Every part of each page that is written here.
PAGES: Mapping[str, Blocks] = {
    "performance.md": {
        "machine": functools.partial(machine_list, names=_TIMED),
        "compile": _from(report_tables.compile_table, "compile_time"),
        "step": _from(report_tables.step_table, "step_time"),
        "polar": _from(report_tables.polar_table, "polar_time"),
        "quality": _from(report_quality.quality_table, "polar_quality"),
        "rounding": _from(report_quality.rounding_table, "polar_quality"),
        "clip": _from(report_tables.clip_table, "clip_cost"),
        "recording": _from(report_tables.recording_table, "attention_recording"),
    },
    "quality.md": {
        dtype: _from(functools.partial(report_quality.errors_table, dtype=dtype), "polar_quality")
        for dtype in ("float32", "float16", "bfloat16")
    },
    "scaling.md": {
        "pods": _from(_pods_table, "pods"),
        "cost": lambda _: scaling.cost_table(),
        "break even": lambda _: scaling.break_even_table(),
    },
    "settings.md": {
        "machine": functools.partial(machine_list, names=("settings_width", "settings_clip")),
        "width": _from(report_settings.width_table, "settings_width"),
        "losses": _from(report_settings.losses_table, "settings_width"),
        "threshold": _from(report_settings.threshold_table, "settings_clip"),
        "alpha": _from(report_settings.alpha_table, "settings_clip"),
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
    """Writes the pages."""
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


if __name__ == "__main__":
    main()
