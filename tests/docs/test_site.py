"""The documentation site: a warning is an error, and a reader's browser fetches nothing."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.test_pages import shown
from tests.helpers import ROOT, finished
from tools.site_hooks import all_pages, expand


@pytest.mark.slow
def test_the_site_has_every_page_and_fetches_nothing(tmp_path):
    words = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path)
    done = finished(*words, env={"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    for name in all_pages(ROOT / "docs"):
        page = Path(name).with_suffix("")
        folder = page.parent if page.name == "index" else page
        assert (tmp_path / folder / "index.html").exists(), name
    for page in tmp_path.glob("**/*.html"):
        # Links are a reader's choice; scripts, styles, fonts and pictures are not.
        tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page.read_text())
        loading = [tag for tag in tags if not re.search(r'rel="?(canonical|next|prev)', tag)]
        assert not [tag for tag in loading if re.search(r'(?:src|href)="?https?:', tag)], page
    equations = (tmp_path / "mathematics" / "index.html").read_text()
    assert equations.count("<math") > 40
    assert 'class="arithmatex"' not in equations
    api = "".join(page.read_text() for page in (tmp_path / "api").glob("**/*.html"))
    assert not [path for path in shown() if f'id="{path}"' not in api]
    assert "DEFAULT_" not in api, "a named default is shown as its value"
    # The examples are highlighted as code, not run together as text.
    assert api.count('class="gp"') > len(shown())
    assert list((tmp_path / "notebooks").glob("*_files/*.png"))


def test_the_navigation_has_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    there = all_pages(ROOT / "docs")

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [page for child in children for page in pages(child)]

    assert sorted(pages(expand(nav, there))) == sorted(there)
