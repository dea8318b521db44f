"""What says a version says the same one: project, citation, README, tag. Badges are true."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from tools.check_release import problems
from tools.constraints import constraints, minimums

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = (ROOT / "constraints.txt").read_text()


@pytest.fixture
def release(tmp_path) -> Path:
    """A copy of the files that name a version, as they are on the day of a release."""
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    changelog = tmp_path / "CHANGELOG.md"
    today = f"## [Unreleased]\n\n## [{PROJECT['version']}] - 2026-11-26"
    changelog.write_text(changelog.read_text().replace("## [Unreleased]", today, 1))
    return tmp_path


def test_a_release_fits_together(release):
    assert problems(f"v{PROJECT['version']}", release) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("pyproject.toml", 'version = "', 'version = "9', "The tag is"),
        ("CHANGELOG.md", "] - 2026", "] 2026", "has no section"),
        ("CITATION.cff", "\nversion: ", "\nversion: 9", "CITATION.cff cites"),
        ("README.md", "  version = {", "  version = {9", "README.md cites"),
    ],
)
def test_what_does_not_fit_is_said(release, file, before, after, said):
    text = (release / file).read_text()
    assert before in text
    (release / file).write_text(text.replace(before, after, 1))
    assert any(said in problem for problem in problems(f"v{PROJECT['version']}", release))


def test_a_wrong_tag_ends_the_release():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_release.py", "v9.9"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "The tag is 'v9.9'" in done.stderr


def test_the_citation_is_one():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == PROJECT["version"]
    assert cited["license"] == PROJECT["license"]
    # What the format requires of a work and of each reference.
    for work in (cited, *cited["references"]):
        assert work["title"]
        assert work["authors"]
    assert cited["message"]


def test_badges_are_true():
    readme = (ROOT / "README.md").read_text()
    badges = dict(
        re.findall(r"\[!\[(\w+) [^\]]+\]\(https://img\.shields\.io/badge/([^)]+)\)\]", readme)
    )
    # One address for each badge, and no other picture from elsewhere.
    assert len(badges) == readme.count("](https://img.shields.io/")
    texts = {
        name: unquote(address).rsplit("-", 1)[0].replace("--", "-").partition("-")[2]
        for name, address in badges.items()
    }
    supported = [
        line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)
    ]
    needed = minimums(PROJECT["dependencies"])
    assert texts == {
        "python": " | ".join(supported),
        "jax": f"≥ {needed['jax']}",
        "licence": PROJECT["license"],
        "types": "basedpyright",
    }
    assert PROJECT["requires-python"] == f">={supported[0]}"


def test_constraints_for_other_versions():
    newest = constraints("newest", PINNED, PROJECT)
    assert not [line for line in newest if re.match(r"(jax|jaxlib|optax|flax)==", line)]
    assert "tqdm" in "".join(newest)
    oldest = constraints("oldest", PINNED, PROJECT)
    for requirement in PROJECT["dependencies"]:
        held = requirement.replace(">=", "==").replace("_", "-") in oldest
        assert held == (not requirement.startswith("typing_extensions"))
    names = [line.split("==")[0].lower().replace("_", "-") for line in oldest]
    assert len(names) == len(set(names))
    with pytest.raises(ValueError, match="Say 'newest' or 'oldest'"):
        constraints("new", PINNED, PROJECT)
    with pytest.raises(ValueError, match="no lower bound"):
        minimums(["jax"])


def test_every_requirement_is_pinned():
    names = {line.split("==")[0].lower().replace("_", "-") for line in PINNED.splitlines()}
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra in ("cuda13", "tpu"):
            continue  # gigabytes for machines that have them
        for requirement in requirements:
            name = re.split(r"[\[>=<]", requirement)[0].lower().replace("_", "-")
            assert name in names | {"muonclip-jax"}, requirement
    assert not re.search(r"https?:|@|--index", PINNED)
