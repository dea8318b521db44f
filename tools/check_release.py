"""Checks that a tag, the version, the changelog and the citation say the same.

    python tools/check_release.py v1.2.3

The version stands in `pyproject.toml`, so that a checkout without tags and a source archive know
it too; a tag is made for the commit that has it, and the release workflow runs this check first.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """Returns what does not fit together, as sentences.

    Args:
        tag: As `v1.2.3`.
        root: The repository.

    Returns:
        An empty list where everything fits.
    """
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    found = []
    if tag != f"v{version}":
        found.append(
            f"The tag is {tag!r} and pyproject.toml says version {version!r}: change the version, "
            f"or tag v{version}."
        )
    changelog = (root / "CHANGELOG.md").read_text()
    if not re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE
    ):
        found.append(
            f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD': move there what stands "
            "under [Unreleased]."
        )
    for name, pattern in (
        ("CITATION.cff", r"^version: (.+)$"),
        ("README.md", r"^  version = \{(.+)\},$"),
    ):
        cited = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        if cited is None or cited[1] != version:
            found.append(f"{name} cites version {cited and cited[1]!r}, not {version!r}.")
    return found


if __name__ == "__main__":
    said = problems(sys.argv[1])
    sys.exit("\n".join(said) if said else 0)
