"""Writes the tables of the docs from the stored results.

    python benchmarks/report.py

Text between the markers `<!-- NAME -->` and `<!-- end NAME -->` of a page is written by this
script; a table whose results are missing says which command makes them. `--check` changes nothing
and fails if a page differs from what would be written. `--plot` also draws the comparison.
"""

import argparse
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import pods, report_gpu, report_quality, report_tables, report_training
from benchmarks.harness import RESULTS, ROOT

Results = Mapping[str, Any]
PICTURE = Path("docs/images/comparison.png")
_TIMED = ("step_time", "compile_time", "polar_quality")
_ATTENTION = ("clip_cost", "attention_recording")
_GPU = tuple(f"gpu_{part}" for part in ("right", "steps", "kernels", "recording", "run"))
#: What makes a result, by name.
COMMANDS = {
    **dict.fromkeys(_TIMED, "make bench"),
    **dict.fromkeys(_ATTENTION, "make bench-attention"),
    **dict.fromkeys(("training_runs", "comparison"), "make comparison"),
    **dict.fromkeys(_GPU, report_gpu.COMMAND),
    "pods": "python -m benchmarks.pods",
    "scale_up": "python examples/scale_up.py",
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


def _machines(results: Results, names: tuple[str, ...]) -> str:
    """Says what each result was measured on."""
    lines = []
    for name in names:
        line = _from(lambda stored: report_tables.machine_line(stored["machine"]), name)(results)
        lines.append(f"- {name}: {line}")
    return "\n".join(lines)


def _training_machines(stored: Mapping[str, Any], _: Any) -> str:
    return "\n".join(f"- {report_tables.machine_line(each)}" for each in stored["machines"])


def _trained(write: Callable[..., str], **settings: Any) -> Callable[[Results], str]:
    return _from(functools.partial(write, **settings), "training_runs", "comparison")


Blocks = Mapping[str, Callable[[Results], str]]
#: Every part of each page that is written here.
PAGES: Mapping[str, Blocks] = {
    "docs/comparison.md": {
        "comparison": _trained(report_training.comparison_table),
        "second text": _trained(report_training.second_text_table, part="bible"),
        "digits": _trained(report_training.second_text_table, part="digits"),
        "clip": _trained(report_training.clip_table),
        "coefficients": _trained(report_training.coefficients_table),
        **{
            part.replace("_", " "): _trained(report_training.part_table, part=part)
            for part in ("fine_tuning", "long", "transfer")
        },
        "scale up": _from(report_gpu.run_table, "scale_up"),
        "machine": _trained(_training_machines),
    },
    "docs/performance.md": {
        "machine": functools.partial(_machines, names=(*_TIMED, *_ATTENTION, "gpu_steps")),
        "compile": _from(report_tables.compile_table, "compile_time"),
        "step": _from(report_tables.step_table, "step_time"),
        "quality": _from(report_quality.quality_table, "polar_quality"),
        "rounding": _from(report_quality.rounding_table, "polar_quality"),
        "clip": _from(report_tables.clip_table, "clip_cost"),
        "recording": _from(report_tables.recording_table, "attention_recording"),
        "GPU right": _from(report_gpu.right_table, "gpu_right"),
        "GPU steps": _from(report_gpu.steps_table, "gpu_steps"),
        "GPU kernels": _from(report_gpu.kernels_table, "gpu_kernels"),
        "GPU recording": _from(report_tables.recording_table, "gpu_recording"),
        "GPU run": _from(report_gpu.run_table, "gpu_run"),
    },
    "docs/scaling.md": {"pods": _from(pods.table, "pods")},
}


def written(page: str, results: Results, blocks: Blocks) -> str:
    """Returns the page with every block written anew."""
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
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that holds docs/")
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--plot", action="store_true", help=f"also draw {PICTURE}")
    options = parser.parse_args()
    results = load(options.results)
    for name, blocks in PAGES.items():
        page = options.root / name
        old = page.read_text()
        new = written(old, results, blocks)
        if options.check and new != old:
            raise SystemExit(f"{page} is not what its results say; run this script.")
        if new != old:
            page.write_text(new)
        print(f"{'as it was' if new == old else 'written'}: {page}")
    if options.plot:
        report_training.draw(
            results["training_runs"], results["comparison"], options.root / PICTURE
        )


if __name__ == "__main__":
    main()
