"""Every command of README and docs is executed: the test that does it stands in a table.

A command is a line of a fence called `sh`, or of one called `console`, where lines that start with
a dollar sign are the commands if there are any.
"""

import ast
import re
import shlex

import pytest

from tests.helpers import ROOT, finished

FENCE = re.compile(
    r"^(?P<indent> *)```(?:sh|console)\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
EXAMPLES, MULTIHOST = "tests/examples/test_programs.py", "tests/examples/test_multihost.py"
#: A pattern that a whole command matches -> the test that runs it, or a shorter form of it.
COMMANDS = {
    r"make \w+": "tests/docs/test_commands.py::test_make_knows_the_target",
    # Each in an environment of its own; a test compares its page with its program.
    r"make stacks STACK=\w+( PYTHON=\S+)?": (
        "tests/docs/test_stacks.py::test_a_page_shows_its_recipe"
    ),
    r"pip install '\.\[flax\]'": (
        "tests/package/test_package.py::test_the_wheel_works_in_an_empty_environment"
    ),
    r"python -m muonclip_jax describe( \S+)+": (
        "tests/test_commands.py::test_the_page_shows_what_describe_prints"
    ),
    r"python -m muonclip_jax doctor": "tests/test_commands.py::test_doctor_passes_here",
    r"python examples/train_multihost\.py .*--smoke.*": (
        f"{MULTIHOST}::test_the_page_starts_two_processes"
    ),
    # They need a cluster: the same program in processes on loopback, killed and started again.
    r"(?s)(gcloud|srun) .*examples/train_multihost\.py.*": (
        f"{MULTIHOST}::test_a_restart_ends_with_the_same_bits"
    ),
    r"(?s)python examples/\w+\.py.*": f"{EXAMPLES}::test_a_short_run_does_what_its_page_says",
}


def split(code: str) -> list[str]:
    """The commands of a fence. An open quotation or the end of a line can continue them."""
    commands, waiting = [], ""
    for line in code.splitlines():
        if not waiting and (not line.strip() or line.lstrip().startswith("#")):
            continue
        waiting += line
        try:
            shlex.split(waiting)
            ends = not line.rstrip().endswith(("\\", "&&", "|"))
        except ValueError:
            ends = False
        commands += [waiting] if ends else []
        waiting = "" if ends else f"{waiting}\n"
    assert not waiting, f"this command does not end: {waiting}"
    return commands


def collect() -> list[str]:
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))):
        for match in FENCE.finditer(page.read_text()):
            code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
            prompts = re.findall(r"^\$ (.*)$", code, re.MULTILINE)
            found += prompts or split(code)
    return list(dict.fromkeys(found))


FOUND = collect()


def test_commands_are_split_as_a_shell_does():
    code = "# why\nmake test\n\nsay 'one\ntwo' &&\n  more \\\n  words\nlast\n"
    assert split(code) == ["make test", "say 'one\ntwo' &&\n  more \\\n  words", "last"]
    assert len(FOUND) > 10


@pytest.mark.parametrize("command", FOUND)
def test_a_test_executes_it(command: str):
    found = [test for pattern, test in COMMANDS.items() if re.fullmatch(pattern, command)]
    assert found, "add a row to COMMANDS; what is not meant to be typed is fenced as text"
    file, function = found[0].split("::")
    tree = ast.parse((ROOT / file).read_text())
    assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)
    for program, rest in re.findall(r"((?:examples|benchmarks)/\w+\.py)([^&|;\"]*)", command):
        # Programs name options in a module that they share, some as fields of a dataclass.
        paths = [ROOT / program, *(ROOT / program).parent.glob("common/*.py")]
        texts = "".join(path.read_text() for path in paths)
        for option in re.findall(r"--[a-z][a-z-]*", rest):
            field = option.removeprefix("--").replace("-", "_")
            assert f'"{option}"' in texts or re.search(rf"^ +{field}:", texts, re.MULTILINE)


@pytest.mark.parametrize("command", [command for command in FOUND if command.startswith("make ")])
def test_make_knows_the_target(command: str):
    # The environments count as made, so that nothing is installed.
    made = ("-o", ".venv/.ready", "-o", ".venv/.bench")
    planned = finished("make", *made, "--dry-run", *command.split()[1:])
    assert planned.returncode == 0, planned.stderr
