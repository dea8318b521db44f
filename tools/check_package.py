"""Checks what a wheel and a source archive hold: `python tools/check_package.py dist`.

The wheel holds the package with its marker of types and nothing else; the archive holds what is
needed to build, test and document it again.
"""

import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]
PACKAGE = "muonclip_jax"
#: What must be in the source archive, beside the package.
NEEDED = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "conftest.py",
    "constraints.txt",
    "mkdocs.yml",
    "pyproject.toml",
    "benchmarks/report.py",
    "docs/index.md",
    "examples/train_lm.py",
    "tests/helpers.py",
    "tools/check_package.py",
)


def sources(root: Path = ROOT) -> set[str]:
    """Returns the files of the package that users need, relative to the repository."""
    return {
        path.relative_to(root).as_posix()
        for path in (root / PACKAGE).rglob("*")
        if path.suffix in (".py", ".typed")
    }


def wheel_problems(names: list[str], metadata: bytes, expected: set[str]) -> list[str]:
    """Returns what is wrong with a wheel.

    Args:
        names: The files in it.
        metadata: Its `METADATA`.
        expected: The files of the package.

    Returns:
        Sentences; an empty list where all is well.
    """
    files = {name for name in names if ".dist-info/" not in name}
    found = [f"The wheel lacks {name}." for name in sorted(expected - files)]
    found += [
        f"The wheel holds {name}, which is not the package." for name in sorted(files - expected)
    ]
    if f"{PACKAGE}/py.typed" not in files:
        found.append(f"The wheel lacks {PACKAGE}/py.typed: type checkers would ignore its types.")
    if not any(name.endswith("licenses/LICENSE") for name in names):
        found.append("The wheel lacks its licence.")
    try:
        said = Metadata.from_email(metadata, validate=True)
    except ExceptionGroup as errors:
        return [*found, *(f"METADATA: {error}" for error in errors.exceptions)]
    if said.description_content_type != "text/markdown" or not said.description:
        found.append("METADATA: the long description is not the README as Markdown.")
    if said.license_expression != "Apache-2.0":
        found.append(f"METADATA: the licence is {said.license_expression!r}, not 'Apache-2.0'.")
    return found


def archive_problems(names: list[str], expected: set[str]) -> list[str]:
    """Returns what is wrong with a source archive, whose names start with its own folder."""
    files = {name.partition("/")[2] for name in names}
    found = [f"The archive lacks {name}." for name in sorted(({*NEEDED} | expected) - files)]
    left = sorted(
        name for name in files if "__pycache__" in name or name.startswith((".venv", "runs/"))
    )
    return found + [f"The archive holds {name}." for name in left]


def problems(folder: Path, root: Path = ROOT) -> list[str]:
    """Returns what is wrong with the one wheel and the one archive in `folder`."""
    wheels, archives = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(archives) != 1:
        return [
            f"{folder} holds {len(wheels)} wheels and {len(archives)} archives instead of one "
            "each: empty it and run `make package`."
        ]
    expected = sources(root)
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        metadata = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
    found = wheel_problems(names, metadata, expected)
    with tarfile.open(archives[0]) as archive:
        return found + archive_problems(archive.getnames(), expected)


if __name__ == "__main__":
    said = problems(Path(sys.argv[1]))
    sys.exit("\n".join(said) if said else 0)
