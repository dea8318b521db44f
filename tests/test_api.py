"""The public surface: names, parameters, defaults. A change of it is a decision.

`python tests/test_api.py` writes `tests/api.txt` anew.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
STORED = Path(__file__).with_name("api.txt")


def surface() -> Iterator[str]:
    """Yields a line for every name that the API pages document."""
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    for path in sorted(set(re.findall(r"^::: (muonclip_jax[\w.]*)$", pages, re.MULTILINE))):
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module or path), name, None)
        if found is not None and not inspect.ismodule(found):
            yield f"{path}{parameters(found)}"


def parameters(value: object) -> str:
    """Returns a signature without its annotations."""
    if not callable(value):
        return f" = {value!r}"
    signature = inspect.signature(value)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    return re.sub(" at 0x[0-9a-f]+", "", text)


def test_the_public_surface_is_the_stored_one():
    assert list(surface()) == STORED.read_text().splitlines(), (
        "The public surface has changed. If that is meant: a changelog line, and "
        "`python tests/test_api.py`."
    )


if __name__ == "__main__":
    STORED.write_text("\n".join(surface()) + "\n")
