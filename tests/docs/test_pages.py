"""Every block of Python in `docs/` runs, from top to bottom of its page, and every link leads on.

Blocks of one page share one namespace, as a reader who types them in has it. What is not meant to
run is fenced as `text` or `console`. Warnings are errors, as in all tests.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
_BLOCK = re.compile(
    r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


def _blocks(page: Path) -> list[tuple[int, str]]:
    """The line each block starts on, and its code."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start()) + 1, match["code"]) for match in _BLOCK.finditer(text)
    ]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_there_are_pages():
    assert any(_blocks(page) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # what a page writes stays out of the repository
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in _blocks(page):
        # Padded, so that a traceback shows the line of the page.
        exec(compile("\n" * line + code, _name(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{_name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_fences_say_what_they_hold(page):
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert all(fences[::2]), f"{_name(page)} has a fence without a language; write text or console"
