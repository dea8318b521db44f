"""The pages of `docs/stacks` show the code of the recipes that run, whatever its line breaks."""

import re
import sys

import pytest

from tests.helpers import ROOT, finished

PAGES = [page for page in sorted((ROOT / "docs" / "stacks").glob("*.md")) if page.stem != "index"]


def words_of(code: str) -> str:
    """Code without white space and trailing commas: pages break lines earlier than scripts."""
    return re.sub(r",(?=[)\]}])", "", re.sub(r"\s", "", code))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_its_recipe(page):
    script = words_of((ROOT / f"examples/stacks/train_{page.stem}.py").read_text())
    blocks = re.findall(r"^```py\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks or "```python" in page.read_text()  # a script of its own, which runs
    for block in blocks:
        assert words_of(block) in script, block


def test_every_recipe_has_a_page_and_named_versions():
    recipes = {path.stem.removeprefix("train_") for path in ROOT.glob("examples/stacks/train_*.py")}
    assert recipes == {page.stem for page in PAGES}
    assert recipes == {path.stem for path in (ROOT / "stacks").glob("*.txt")}
    for path in (ROOT / "stacks").glob("*.txt"):
        lines = path.read_text().splitlines()
        assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in lines), path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["plain_jax", "linen", "nnx", "equinox", "haiku"])
def test_a_recipe_runs(recipe: str, tmp_path):
    pytest.importorskip({"plain_jax": "jax", "linen": "flax", "nnx": "flax"}.get(recipe, recipe))
    done = finished(sys.executable, ROOT / f"examples/stacks/train_{recipe}.py", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_tables_are_what_is_decided_and_recorded():
    done = finished(sys.executable, "-m", "tools.stack_table", "--check")
    assert done.returncode == 0, done.stderr
