"""The API pages have every public name, and every public function an example that runs."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("muonclip_jax", "muonclip_jax.linen", "muonclip_jax.nnx", "muonclip_jax.checkpoint")


def public_names(module: ModuleType) -> list[str]:
    """What a module hands on as `X as X`, and what it defines."""
    found = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name == alias.asname]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
    return sorted(name for name in found if not name.startswith("_"))


PUBLIC = {
    f"{name}.{public}": getattr(importlib.import_module(name), public)
    for name in MODULES
    for public in public_names(importlib.import_module(name))
}


def shown() -> dict[str, Any]:
    """The objects on the API pages, by what stands behind `:::`."""
    found = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            if path in MODULES:
                continue
            module, _, name = path.rpartition(".")
            holder = importlib.import_module(module)
            assert path not in found, f"{path} is on two pages"
            found[path] = getattr(holder, name)
    return found


def test_the_pages_have_every_public_name():
    objects = shown()
    # A re-export of Optax's own class, which has no page of ours.
    missing = [
        name
        for name, value in PUBLIC.items()
        if not any(value is other for other in objects.values())
        and value.__module__.startswith("muonclip_jax")
    ]
    assert not missing, f"write `::: {missing[0]}` on a page of docs/api"
    unknown = [
        path
        for path, value in objects.items()
        if not any(value is other for other in PUBLIC.values())
    ]
    assert not unknown, f"{unknown} is not public"
    assert "mc.MuonDimensionNumbers" in (ROOT / "docs" / "api" / "index.md").read_text()


def _needs_example(value: Any) -> bool:
    """Functions, and classes that are made by their users: a NamedTuple comes back as a result."""
    if not value.__module__.startswith("muonclip_jax"):
        return False
    return inspect.isfunction(value) or (inspect.isclass(value) and not hasattr(value, "_fields"))


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if _needs_example(value)])
def test_it_has_an_example_that_runs(name):
    value = PUBLIC[name]
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
    assert examples, f"the docstring of {name} has no example"
    assert not any(doctest.SKIP in example.options for example in examples)
    # pytest collects the doctests of every module below the package.
    assert Path(inspect.getfile(inspect.unwrap(value))).is_relative_to(ROOT / "muonclip_jax")


@pytest.mark.parametrize("name", list(PUBLIC))
def test_it_says_what_it_is(name):
    first = (inspect.getdoc(PUBLIC[name]) or "").split("\n\n")[0]
    assert first.rstrip().endswith((".", ":")), f"{name}: {first!r}"
