"""The documentation site: a warning is an error, and a reader's browser fetches nothing."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.test_api import shown

pytest.importorskip("mkdocs", reason="the documentation needs `pip install -e '.[docs]'`")
pytest.importorskip("mkdocstrings", reason="the documentation needs `pip install -e '.[docs]'`")
pytest.importorskip("latex2mathml", reason="the documentation needs `pip install -e '.[docs]'`")
pytest.importorskip("nbconvert", reason="the documentation needs `pip install -e '.[docs]'`")

import griffe

from tools.site_hooks import (
    NOTEBOOKS,
    all_pages,
    expand,
    from_notebook,
    mathml,
    notebook_page,
    outside,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds(site):
    for page in (ROOT / "docs").glob("**/*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        target = site / name.parent if name.name == "index" else site / name
        assert (target / "index.html").exists(), page


@pytest.mark.slow
def test_a_page_fetches_nothing(site):
    for page in site.glob("**/*.html"):
        text = page.read_text()
        # Links are a reader's choice; scripts, styles, fonts and pictures are not.
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?(https?:[^\s\">]+)", text)
        fetched += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*href=\"?(https?:[^\s\">]+)", text
        )
        assert not fetched, f"{page} fetches {fetched}"


@pytest.mark.slow
def test_equations_and_signatures_are_there(site):
    text = (site / "mathematics" / "index.html").read_text()
    assert text.count("<math") > 40
    assert 'class="arithmatex"' not in text
    everything = "".join(page.read_text() for page in (site / "api").glob("**/*.html"))
    for path in shown():
        assert f'id="{path}"' in everything, path
    # The examples are highlighted as code, not run together as text.
    assert everything.count('class="gp"') > len(shown())


def test_the_pages_show_what_they_name():
    """A function in a module of the same name: what stands behind `:::` must not be the module."""
    package = griffe.load("muonclip_jax", search_paths=[ROOT], submodules=True)
    for path in shown():
        found = package[path.removeprefix("muonclip_jax.")]
        found = found.final_target if found.is_alias else found
        assert not found.is_module, f"{path} is the module: write `::: {found.path}.{found.name}`"


def test_globs_stand_for_pages():
    pages = ["one.md", "moves/b.md", "moves/a.md", "moves/index.md", "moves/deep/c.md"]
    nav = [
        "one.md",
        {"Moves": "moves/*"},
        {"Nothing": "nothing/*"},
        {"Deep": ["two.md", "moves/*"]},
    ]
    moves = ["moves/index.md", "moves/a.md", "moves/b.md"]
    assert expand(nav, pages) == ["one.md", {"Moves": moves}, {"Deep": ["two.md", moves]}]


def test_a_notebook_becomes_a_page_with_its_pictures(tmp_path):
    dot = base64.b64encode(b"\x89PNG and so on").decode()
    shown_by_it = {"output_type": "display_data", "data": {"image/png": dot}, "metadata": {}}
    printed = {"output_type": "stream", "name": "stdout", "text": "two"}
    cell = {
        "cell_type": "code",
        "id": "b",
        "execution_count": 1,
        "metadata": {},
        "source": "print(1 + 1)",
        "outputs": [printed, shown_by_it],
    }
    title = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# A title"}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [title, cell]}
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps(notebook))
    made = dict(notebook_page(path))
    text = made.pop("notebooks/small.md")
    assert isinstance(text, str)
    assert text.startswith("# A title")
    assert "print(1 + 1)" in text
    assert "    two" in text
    ((picture, content),) = made.items()
    assert f"({picture.removeprefix('notebooks/')})" in text
    assert isinstance(content, bytes)
    assert content.startswith(b"\x89PNG")


def test_a_notebooks_links_lead_to_pages():
    text = "[page](../../docs/a.md#b) [other](other.ipynb) [code](../run.py) [web](https://a.b)"
    moved = "[page](../a.md#b) [other](other.md) [code](../../examples/run.py) [web](https://a.b)"
    assert from_notebook(text) == moved


def test_equations_become_mathml():
    page = '<p><span class="arithmatex">\\(a &lt; \\tau\\)</span></p>'
    assert re.fullmatch(r'<p><math [^>]*display="inline">.*</math></p>', mathml(page))
    block = '<div class="arithmatex">\\[\nX X^\\top\n\\]</div>'
    assert 'display="block"' in mathml(block)
    with pytest.raises(ValueError, match="not known"):
        mathml('<div class="arithmatex">\\[\\begin{aligned} a &amp;= b \\end{aligned}\\]</div>')


def test_links_out_of_the_pages():
    text = "[here](a.md#x) [code](../../examples/run.py) ![picture](../../x.png) [web](https://a.b)"
    kept = "[here](a.md#x) {} ![picture](../../x.png) [web](https://a.b)"
    assert outside(text, "guide/page.md", None) == kept.format("code")
    linked = "[code](https://forge/me/it/blob/main/examples/run.py)"
    assert outside(text, "guide/page.md", "https://forge/me/it/") == kept.format(linked)


def test_the_navigation_names_pages_that_exist():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [page for child in children for page in pages(child)]

    there = all_pages(ROOT / "docs")
    assert sorted(pages(expand(nav, there))) == sorted(there)
    assert {f"notebooks/{path.stem}.md" for path in NOTEBOOKS.glob("*.ipynb")} <= set(there)
