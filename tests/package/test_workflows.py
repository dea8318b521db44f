"""The workflows parse, run what is there, and cover the versions that pyproject.toml promises."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
#: What `on:` is in YAML 1.1, where the word is true.
ON = True


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def _name(path: Path) -> str:
    return path.name


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=_name)
def test_it_has_what_a_workflow_needs(path):
    workflow = load(path)
    assert workflow["name"] == path.stem
    assert workflow[ON]
    # Nothing may write unless a job says so.
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for needed in [job["needs"]] if "needs" in job else []:
            assert needed in workflow["jobs"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w/-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=_name)
def test_its_commands_are_make_targets(path):
    for command in [step["run"] for step in steps(load(path)) if "run" in step]:
        target = re.fullmatch(r'make ([a-z-]+)( TAG="\$GITHUB_REF_NAME")?', command)
        assert target, f"{command!r} is no make target, so nobody can run it at home"
        assert re.search(rf"^{target[1]}:", MAKEFILE, re.MULTILINE), command


def test_every_python_that_is_promised_is_tested():
    tested, run = set(), set()
    for job in (job for path in WORKFLOWS for job in load(path)["jobs"].values()):
        run |= {step.get("run") for step in job["steps"]}
        tested |= set(job.get("strategy", {}).get("matrix", {}).get("python-version", []))
        for step in job["steps"]:
            version = step.get("with", {}).get("python-version", "")
            if re.fullmatch(r"3\.\d+", version):
                tested.add(version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = {
        line.rsplit(" ", 1)[1] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)
    }
    assert tested == promised
    assert run >= {"make test", "make test-all", "make test-oldest", "make test-newest"}


def test_a_release_needs_no_token():
    workflow = load(ROOT / ".github" / "workflows" / "release.yml")
    assert workflow[ON] == {"push": {"tags": ["v*"]}}
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "package"
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "secrets." not in text
    assert "password" not in text
    # The index is that of the action; tests and checks come before.
    run = [step["run"] for step in workflow["jobs"]["package"]["steps"] if "run" in step]
    assert run == ["make test-all", 'make package TAG="$GITHUB_REF_NAME"']
