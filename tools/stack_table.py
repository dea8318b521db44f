"""Writes the tables of `docs/stacks/index.md`: recorded runs, and what each family of models gets.

It also writes which leaves need the names of their modules, to the page and for the tests.

    python -m tools.stack_table            # write
    python -m tools.stack_table --check    # 1 if the page says something else

Runs are those of `make stacks STACK=... ARGS=--record`. Families are the trees of
`tests/routing/trees`, asked without rules.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax import describe_attention
from tests.routing.test_trees import (
    FAMILIES,
    NEED_NAMES,
    TREES,
    decide,
    is_right,
    need_names,
    nest,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "stacks" / "index.md"
#: Families whose kind of attention a recorded run clips with the family's own package.
RECORDED = {
    "easydel_qwen2_moe": "easydel",
    "equinox_zoo": "equinox",
    "haiku_transformer": "haiku",
    "hf_gpt2": "huggingface",
    "levanter_llama": "levanter",
    "maxtext_deepseek3": "maxtext",
    "nnx_zoo": "nnx",
    "tunix_llama3": "tunix",
}


def table(titles: list[str], rows: list[list[Any]]) -> str:
    """Returns a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def runs() -> dict[str, dict[str, Any]]:
    """The recorded runs, by stack."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(ROOT.glob("stacks/*.json"))}


def shown_lines(stack: str) -> int:
    """Lines of code on a stack's page; of a whole script, those on this library."""
    text = (ROOT / "docs" / "stacks" / f"{stack}.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    script = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    lines = [line for line in script.splitlines() if re.search(r"\bmc\b|maxima|max_logits", line)]
    return len(lines) + sum(bool(line.strip()) for x in blocks for line in x.splitlines())


def run_table() -> str:
    """Versions, losses and clips of the recorded runs."""
    rows = []
    for stack, run in runs().items():
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        first, last = run["loss"]
        clip = f"{run['clip']['heads']} heads, {run['clip']['error']:.0e}"
        rows.append([f"[{stack}]({stack}.md)", versions, f"{first} -> {last}", clip])
        rows[-1].append(shown_lines(stack))
    return table(["stack", "ran with", "loss", "clipped, largest error", "lines"], rows)


def block_is_right(leaves: Any, entry: dict[str, Any]) -> bool:
    """Whether a block is found with the heads its source says, or refused where it says so."""
    inside = [
        path for path in leaves if path.startswith((entry["block"] + "/", entry["block"] + "."))
    ]
    first = next(p for p in inside if len(leaves[p]["shape"]) > len(entry["stack_axes"]))
    stack = tuple(leaves[first]["shape"][axis] for axis in entry["stack_axes"])
    form = jax.ShapeDtypeStruct((*stack, entry["heads"]), jnp.float32)
    only = re.escape(entry["block"]) + "$"
    try:
        text = describe_attention(nest(leaves), {entry["block"]: form}, blocks=only)
    except ValueError:
        return entry["clippable"] is False
    return ("cannot be clipped" in text) == (entry["clippable"] is False)


def family_row(family: str) -> list[Any]:
    """Counts of one tree."""
    tree = json.loads((TREES / f"{family}.json").read_text())
    matrices = {p: leaf for p, leaf in tree["leaves"].items() if len(leaf["shape"]) > 1}
    found = decide(tree["leaves"])
    refused = sum(isinstance(found[path], str) for path in matrices)
    right = sum(
        not isinstance(found[path], str) and is_right(leaf, found[path])
        for path, leaf in matrices.items()
    )
    blocks = tree["attention"]
    as_source = sum(block_is_right(tree["leaves"], entry) for entry in blocks)
    clipped = sum(entry["clippable"] is not False for entry in blocks)
    attention = f"{as_source} of {len(blocks)}, {clipped} can be clipped" if blocks else "-"
    run = runs().get(RECORDED.get(family, ""))
    exact = f"to {run['clip']['error']:.0e}" if run else "-"
    return [family, len(matrices), right, refused, attention, exact]


def family_table() -> str:
    """All families."""
    titles = ["family", "leaves", "right", "refused", "attention blocks right", "clip in a run"]
    return table(titles, [family_row(family) for family in FAMILIES])


def names_table() -> str:
    """Leaves that are decided by the names of their modules."""
    found: dict[str, list[str]] = {}
    for line in NEED_NAMES.read_text().splitlines():
        family, path = line.split(" ")
        found.setdefault(family, []).append(f"`{path}`")
    return table(["family", "leaves"], [[x, ", ".join(paths)] for x, paths in found.items()])


def page(text: str) -> str:
    """Returns the page with its tables renewed."""
    tables = {"runs": run_table(), "families": family_table(), "names": names_table()}
    for name, content in tables.items():
        start = f"<!-- {name}: tools/stack_table.py -->\n"
        end = f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{content}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    if "--check" not in sys.argv:
        lines = [f"{family} {path}\n" for family in FAMILIES for path in need_names(family)]
        NEED_NAMES.write_text("".join(lines))
    new = page(PAGE.read_text())
    if "--check" in sys.argv and new != PAGE.read_text():
        sys.exit("docs/stacks/index.md is out of date. Run `python -m tools.stack_table`.")
    PAGE.write_text(new)
