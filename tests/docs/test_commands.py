"""Every command of README and docs is executed: here, or by the test that a table names."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import COMMANDS, ROOT, Command, Covered, Run, collect, split, who

FOUND = collect()
#: The environments count as made, so that nothing is installed.
MAKE = ("make", "-o", ".venv/.ready", "-o", ".venv/.bench")
MAKE += ("-o", ".venv-newest/.ready", "-o", ".venv-oldest/.ready")


def _name(command: Command) -> str:
    return f"{command.page}:{command.line}"


def _defines(test: str) -> bool:
    """Whether a test's file has its function."""
    file, _, function = test.partition("::")
    path = ROOT / file
    if not path.exists():
        return False
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def test_commands_are_split_as_a_shell_does():
    code = "# why\nmake test\n\nsay 'one\ntwo' &&\n  more \\\n  words\nlast\n"
    assert split(code) == [
        (1, "make test"),
        (3, "say 'one\ntwo' &&\n  more \\\n  words"),
        (7, "last"),
    ]
    with pytest.raises(ValueError, match="does not end"):
        split("say 'one\n")


def test_an_unknown_command_is_refused():
    with pytest.raises(KeyError, match="nobody executes 'rm -rf runs'"):
        who(Command("README.md", 1, "rm -rf runs"))


@pytest.mark.parametrize("command", FOUND, ids=_name)
def test_somebody_executes_it(command):
    answer = who(command)
    if isinstance(answer, Covered):
        assert _defines(answer.test), f"{answer.test} is not there"


@pytest.mark.parametrize("command", FOUND, ids=_name)
def test_the_programs_are_there(command):
    for program in re.findall(r"(?:examples|benchmarks|tools)/\w+\.(?:py|sh)", command.text):
        assert (ROOT / program).exists(), program


TARGETS = sorted({c.text for c in FOUND if c.text.startswith("make ")})


@pytest.mark.parametrize("target", TARGETS)
def test_a_make_target_starts_what_its_test_runs(target):
    answer = who(Command("", 0, target))
    words = target.split()[1:]
    planned = subprocess.run(
        [*MAKE, "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert planned.returncode == 0, planned.stderr
    for program in answer.programs if isinstance(answer, Covered) else ():
        assert program in planned.stdout, f"`{target}` does not start {program}"


RUN = {pattern: answer for pattern, answer in COMMANDS.items() if isinstance(answer, Run)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in FOUND if any(re.fullmatch(p, c.text) for p in RUN)], ids=_name
)
def test_it_runs_as_it_stands(command):
    answer = who(command)
    assert isinstance(answer, Run)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    text = re.sub(r"^make ", " ".join(MAKE) + " ", command.text)
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        ["sh", "-ec", text], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert answer.says in done.stdout


PROGRAMS = sorted(
    {
        (program, option)
        for command in FOUND
        for program, rest in re.findall(
            r"((?:examples|benchmarks)/\w+\.py)([^&|;\"]*)", command.text
        )
        for option in re.findall(r"--[a-z][a-z-]*", rest)
    }
)


@pytest.mark.parametrize("program", sorted({program for program, _ in PROGRAMS}))
def test_a_program_knows_the_options_of_the_pages(program):
    """Read in the sources, for a program that names its options in a module that it shares."""
    texts = [(ROOT / program).read_text()]
    texts += [path.read_text() for path in (ROOT / program).parent.glob("common/*.py")]
    for option in (option for name, option in PROGRAMS if name == program):
        field = option.removeprefix("--").replace("-", "_")
        assert any(
            f'"{option}"' in text or re.search(rf"^ +{field}:", text, re.MULTILINE)
            for text in texts
        ), f"{program} has no option {option}"


def test_what_ci_runs_is_make_test():
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    planned = subprocess.run(
        [*MAKE, "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for tool in ("ruff format --check", "ruff check", "basedpyright", "lint-imports", "pytest"):
        assert tool in planned.stdout
