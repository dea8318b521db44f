"""What the documentation site needs beside its pages.

- `folder/*` in `nav` stands for all pages of a folder.
- The notebooks of `examples/notebooks`, with what their cells returned, are pages too.
- Equations are MathML, which browsers render themselves: a page of mathematics loads no script.
- Links from a page to a file of the repository that is no page lead into the repository, or are
  plain text as long as `repo_url` is not set.
"""

import html
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"

_EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>(?!https?:|#|mailto:)[^)\s]+)\)")


def expand(nav: Any, pages: Sequence[str]) -> Any:
    """Replaces each `folder/*` in a navigation by the folder's pages, `index.md` first.

    An entry whose folder has no pages is left out.

    Args:
        nav: As in `mkdocs.yml`.
        pages: All pages, by their paths inside `docs/`.

    Returns:
        The navigation without globs.
    """
    if isinstance(nav, list):
        return [entry for entry in (expand(item, pages) for item in nav) if entry]
    if isinstance(nav, dict):
        inside = {title: expand(entry, pages) for title, entry in nav.items()}
        return {title: entry for title, entry in inside.items() if entry}
    if isinstance(nav, str) and nav.endswith("/*"):
        found = [page for page in pages if posixpath.dirname(page) == nav[:-2]]
        return sorted(found, key=lambda page: (not page.endswith("/index.md"), page))
    return nav


def all_pages(docs: Path) -> list[str]:
    """Returns the pages of `docs/`, and those that the notebooks become."""
    return [page.relative_to(docs).as_posix() for page in docs.glob("**/*.md")] + [
        f"notebooks/{path.stem}.md" for path in NOTEBOOKS.glob("*.ipynb")
    ]


def from_notebook(text: str) -> str:
    """Points a notebook's links, which are relative to its own folder, from the page it becomes."""

    def replace(match: re.Match[str]) -> str:
        target, hash_sign, anchor = match["target"].partition("#")
        path = posixpath.normpath(posixpath.join("examples/notebooks", target))
        if path.startswith("docs/"):
            path = f"../{path.removeprefix('docs/')}"
        elif path.startswith("examples/notebooks/") and path.endswith(".ipynb"):
            path = f"{posixpath.basename(path).removesuffix('.ipynb')}.md"
        else:
            path = f"../../{path}"
        return f"[{match['text']}]({path}{hash_sign}{anchor})"

    return _LINK.sub(replace, text)


def notebook_page(path: Path) -> Mapping[str, str | bytes]:
    """Returns a notebook as a page and its pictures, by their paths inside `docs/`."""
    exporter = MarkdownExporter()
    text, resources = exporter.from_filename(
        str(path), resources={"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    )
    pictures = {f"notebooks/{name}": data for name, data in resources["outputs"].items()}
    return {f"notebooks/{path.stem}.md": from_notebook(text), **pictures}


def mathml(page: str) -> str:
    """Replaces the equations of a rendered page, which arithmatex has marked, by MathML.

    Raises:
        ValueError: If an equation holds something that has no MathML here.
    """

    def replace(match: re.Match[str]) -> str:
        tex = html.unescape(match["tex"]).strip()
        result = convert(tex, display="block" if match["open"] == "[" else "inline")
        if unknown := re.search(r"<m[io]>(\\\w+|&)</m[io]>", result):
            raise ValueError(f"{unknown[1]} in the equation {tex!r} is not known to latex2mathml.")
        return result

    return _EQUATION.sub(replace, page)


def unbroken(page: str) -> str:
    """Keeps ranges and pairs of numbers, such as `1.2 - 1.4`, on one line of a table's cell."""

    def replace(match: re.Match[str]) -> str:
        return re.sub(r"(?<=\d) ([-/]) (?=\d)", r"&nbsp;\1&#8288;&nbsp;", match[0])

    return re.sub(r"<td\b.*?</td>", replace, page, flags=re.DOTALL)


def outside(text: str, page: str, repository: str | None) -> str:
    """Points links that leave `docs/` to the repository, or makes them plain text.

    Args:
        text: A page's Markdown.
        page: Its path inside `docs/`.
        repository: Where the repository is browsed, or None.

    Returns:
        The Markdown with those links replaced.
    """

    def replace(match: re.Match[str]) -> str:
        path = posixpath.normpath(
            posixpath.join("docs", posixpath.dirname(page), match["target"].split("#")[0])
        )
        if path.startswith("docs/"):
            return match[0]
        if repository is None:
            return match["text"]
        return f"[{match['text']}]({repository.rstrip('/')}/blob/main/{path})"

    return _LINK.sub(replace, text)


def on_config(config: Any) -> Any:
    """Called by mkdocs with its configuration."""
    config.nav = expand(config.nav, all_pages(Path(config.docs_dir)))
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Called by mkdocs with the files that it has found."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for name, content in notebook_page(path).items():
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with each page's Markdown."""
    return outside(markdown, page.file.src_uri, config.repo_url or None)


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with each page as rendered, before its template."""
    return unbroken(mathml(html))
