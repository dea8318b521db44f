"""Fails where the package outgrows its bounds: lines of a subpackage, a file, a function.

    python tools/check_sizes.py

Where the package is still above the size that its design aims at (in brackets), the bound is
today's size: it may fall and never rise.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "muonclip_jax"
#: Lines with docstrings; in brackets the aim.
SUBPACKAGES = {
    "_commands": 335,  # (250)
    "linen": 400,
    "checkpoint": 444,  # (400)
    "transforms": 1961,  # (1,200)
    "sharding": 1_500,
    "matrices": 600,
    "newton_schulz": 1_000,
    "clipping": 804,  # (800)
    "attention": 959,  # (900)
    "heads": 1219,  # (1,200)
    "routing": 1680,  # (1,300)
    "kernels": 650,
}
FILE, FUNCTION, ANY = 300, 60, 126  # Any: (150)
LONGER_FILES = {"optimizers.py": 378}
LONGER_FUNCTIONS = {
    "_kernel": 115,
    "_program": 95,
}
TOTAL = {
    "muonclip_jax": 12_657,  # (11,000)
    "tests": 12_356,  # (12,000)
    "benchmarks": 4_000,
}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts the lines of a function without its signature and docstring."""
    body = function.body[bool(ast.get_docstring(function)) :]
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


def complaints() -> Iterator[str]:
    """Yields what is over its bound."""
    lines: Counter[str] = Counter()
    uses_of_any = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        name = path.relative_to(PACKAGE)
        count = len(text.splitlines())
        lines[name.parts[0]] += count
        uses_of_any += text.count("Any")
        bound = LONGER_FILES.get(str(name), FILE)
        if count > bound:
            yield f"{name}: {count} lines, at most {bound}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size, bound = body_lines(node), LONGER_FUNCTIONS.get(node.name, FUNCTION)
                if size > bound:
                    yield f"{name}: {node.name} has {size} lines, at most {bound}"
    for name, bound in SUBPACKAGES.items():
        if lines[name] > bound:
            yield f"{name}: {lines[name]} lines, at most {bound}"
    if uses_of_any > ANY:
        yield f"Any: {uses_of_any} uses, at most {ANY}"
    for folder, bound in TOTAL.items():
        paths = (ROOT / folder).rglob("*.py")
        total = sum(len(path.read_text().splitlines()) for path in paths)
        if total > bound:
            yield f"{folder}: {total} lines, at most {bound}"


def main() -> None:
    """Prints what is over its bound."""
    found = list(complaints())
    if found:
        raise SystemExit("Over their bounds (tools/check_sizes.py):\n  " + "\n  ".join(found))


if __name__ == "__main__":
    main()
