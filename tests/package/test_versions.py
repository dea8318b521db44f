"""What names a version names the same one: project, citation, README, tag, workflows."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from tools.check_release import problems
from tools.constraints import constraints, minimums

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = (ROOT / "constraints.txt").read_text()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the files that name a version, as they are on the day of a release."""
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    changelog = tmp_path / "CHANGELOG.md"
    today = f"## [Unreleased]\n\n## [{PROJECT['version']}] - 2026-11-26"
    changelog.write_text(changelog.read_text().replace("## [Unreleased]", today, 1))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("pyproject.toml", 'version = "', 'version = "9', "The tag is"),
        ("CHANGELOG.md", "] - 2026", "] 2026", "has no section"),
        ("CITATION.cff", "\nversion: ", "\nversion: 9", "CITATION.cff cites"),
        ("README.md", "  version = {", "  version = {9", "README.md cites"),
    ],
)
def test_what_does_not_fit_is_said(release: Path, file: str, before: str, after: str, said: str):
    assert problems(f"v{PROJECT['version']}", release) == []
    text = (release / file).read_text()
    assert before in text
    (release / file).write_text(text.replace(before, after, 1))
    assert any(said in problem for problem in problems(f"v{PROJECT['version']}", release))


def test_constraints_for_other_versions():
    newest = constraints("newest", PINNED, PROJECT)
    assert not [line for line in newest if re.match(r"(jax|jaxlib|optax|flax)==", line)]
    oldest = constraints("oldest", PINNED, PROJECT)
    for requirement in PROJECT["dependencies"]:
        assert requirement.replace(">=", "==") in oldest
    names = [line.split("==")[0].lower().replace("_", "-") for line in oldest]
    assert len(names) == len(set(names))
    with pytest.raises(ValueError, match="Say 'newest' or 'oldest'"):
        constraints("new", PINNED, PROJECT)
    with pytest.raises(ValueError, match="no lower bound"):
        minimums(["jax"])
