"""Every block of Python in README and `docs/` runs, every link leads on, every name has its page.

Blocks of one page share one namespace, as a reader who types them in has it. What is not meant to
run is fenced as `text` or `console`. Warnings are errors, as in all tests.
"""

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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(
    r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
MODULES = ("muonclip_jax", "muonclip_jax.linen", "muonclip_jax.nnx", "muonclip_jax.checkpoint")


def define(page: Path, blocks: int | None = None) -> dict[str, Any]:
    """Executes the first blocks of a page and returns what they define."""
    text, namespace = page.read_text(), {"__name__": "__main__"}
    for match in list(BLOCK.finditer(text))[:blocks]:
        # Padded, so that a traceback shows the line of the page.
        padding = "\n" * (text.count("\n", 0, match.start()) + 1)
        exec(compile(padding + match["code"], str(page), "exec"), namespace)
    return namespace


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_a_page_runs(page: Path, monkeypatch, tmp_path):
    if "import equinox" in page.read_text():
        pytest.importorskip("equinox")
    monkeypatch.chdir(tmp_path)  # what a page writes stays out of the repository
    define(page)
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert all(fences[::2]), "a fence has no language; write text or console"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_lead_somewhere(page: Path):
    for target, anchor in re.findall(
        r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text()
    ):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", x).strip().lower().replace(" ", "-") for x in headings}
            assert anchor[1:] in slugs or f'id="{anchor[1:]}"' in path.read_text(), anchor


def public_names(module: ModuleType) -> list[str]:
    """What a module hands on as `X as X`, and what it defines."""
    found = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name == alias.asname]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
    return [name for name in found if not name.startswith("_")]


PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in map(importlib.import_module, MODULES)
    for name in public_names(module)
    if getattr(module, name).__module__.startswith("muonclip_jax")  # not Optax's own class
}


def shown() -> dict[str, Any]:
    """The objects on the API pages, by what stands behind `:::`."""
    text = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    paths = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(paths) == len(set(paths)), "a name is on two pages"
    pairs = [path.rpartition(".") for path in paths if path not in MODULES]
    return {f"{m}.{name}": getattr(importlib.import_module(m), name) for m, _, name in pairs}


def test_the_api_pages_have_every_public_name():
    objects = list(shown().values())
    missing = [name for name, value in PUBLIC.items() if not any(value is x for x in objects)]
    assert not missing, "write `::: NAME` on a page of docs/api"
    assert not [x for x in objects if not any(x is value for value in PUBLIC.values())]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_function_or_class_has_an_example_that_runs(name: str):
    value = PUBLIC[name]
    # A NamedTuple comes back as a result; pytest runs the examples of the package's modules.
    if inspect.isfunction(value) or (inspect.isclass(value) and not hasattr(value, "_fields")):
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
        assert examples
        assert not any(doctest.SKIP in example.options for example in examples)
