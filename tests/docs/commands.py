"""Who executes each command of README and docs: the table that `test_commands.py` asks.

A command is a line of a fence called `sh`, or of one called `console`, where lines that start with
a dollar sign are the commands if there are any. What is cheap runs as it stands; the others name
the test that runs their program, by its `--smoke` form where the program is long.
"""

import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<kind>sh|console)\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: The page, relative to the repository.
        line: Where it starts.
        text: All its lines, without the indentation of the fence.
    """

    page: str
    line: int
    text: str


@dataclasses.dataclass(frozen=True)
class Covered:
    """A command that a test stands for.

    Attributes:
        test: The test's id: file and function.
        programs: For a make target, the programs that it starts; the test runs them.
    """

    test: str
    programs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """A command that `test_commands.py` runs as it stands, in the repository.

    Attributes:
        says: What its output contains.
    """

    says: str


def split(code: str) -> list[tuple[int, str]]:
    """Splits a fence into commands: the number of the first line, and the text.

    Comments and empty lines are left out. A quotation that is open, a backslash or `&&` at the end
    of a line continue it.
    """
    commands: list[tuple[int, str]] = []
    waiting: list[str] = []
    start = 0
    for number, line in enumerate(code.splitlines()):
        if not waiting and (not line.strip() or line.lstrip().startswith("#")):
            continue
        start = start if waiting else number
        waiting.append(line)
        text = "\n".join(waiting)
        try:
            shlex.split(text)
        except ValueError:
            continue
        if not line.rstrip().endswith(("\\", "&&", "|")):
            commands.append((start, text))
            waiting = []
    if waiting:
        raise ValueError(f"This command does not end: {waiting}")
    return commands


def collect() -> list[Command]:
    """Returns the commands of README and docs."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))):
        text = page.read_text()
        for match in _FENCE.finditer(text):
            first = text.count("\n", 0, match.start("code")) + 1
            indent = len(match["indent"])
            lines = [line[indent:] for line in match["code"].splitlines()]
            if match["kind"] == "console" and any(line.startswith("$ ") for line in lines):
                # What is not a command is kept as an empty line, so that numbers stay right.
                lines = [line[2:] if line.startswith("$ ") else "" for line in lines]
            code = "\n".join(lines)
            name = page.relative_to(ROOT).as_posix()
            found += [Command(name, first + line, said) for line, said in split(code)]
    return found


_PROGRAMS = "tests/examples/test_programs.py"
_OTHERS = f"{_PROGRAMS}::test_other_programs_train_and_draw"
_CONVNET = "tests/examples/test_convnet.py::test_smoke_prints_who_trains_what_and_draws"
_MOE = "tests/examples/test_moe.py::test_smoke_describes_the_model_and_draws"
_TUNE = "tests/examples/test_fine_tune.py::"
_TUNE += "test_smoke_makes_its_checkpoint_goes_on_in_three_ways_and_draws"
_MULTIHOST = "tests/examples/test_multihost.py"
_BENCH = "tests/benchmarks/test_scripts.py"
_HERE = "tests/docs/test_commands.py"

#: A pattern that a whole command matches, and who executes it.
COMMANDS: dict[str, Run | Covered] = {
    r"make help": Run("make train"),
    r"make train": Covered(
        f"{_PROGRAMS}::test_a_run_leaves_what_it_says", ("examples/train_lm.py",)
    ),
    r"make comparison": Covered(
        f"{_BENCH}::test_a_comparison_is_run_and_replayed",
        ("benchmarks/comparison.py", "benchmarks/report.py"),
    ),
    r"make bench": Covered(
        f"{_BENCH}::test_the_report_writes_pages",
        (
            "benchmarks/momentum.py",
            "benchmarks/step_time.py",
            "benchmarks/polar_time.py",
            "benchmarks/compile_time.py",
            "benchmarks/polar_quality.py",
            "benchmarks/report.py",
        ),
    ),
    r"make bench-attention": Covered(
        f"{_BENCH}::test_the_report_writes_pages",
        ("benchmarks/clip_cost.py", "benchmarks/attention_recording.py", "benchmarks/report.py"),
    ),
    r"make test(-all)?": Covered(f"{_HERE}::test_what_ci_runs_is_make_test", ("pytest",)),
    r"make quick": Covered(f"{_HERE}::test_what_ci_runs_is_make_test", ("pytest",)),
    r"make test-(newest|oldest)( PYTHON=\S+)?": Covered(
        "tests/package/test_versions.py::test_constraints_for_other_versions", ("pytest",)
    ),
    r"make docs": Covered(
        "tests/docs/test_site.py::test_the_site_builds", ("mkdocs build --strict",)
    ),
    r"make package( TAG=\S+)?": Covered(
        "tests/package/test_package.py::test_wheel_and_archive_hold_what_they_should",
        ("build --no-isolation", "tools/check_package.py"),
    ),
    r"python -m muonclip_jax describe( \S+)+": Covered(
        "tests/test_commands.py::test_the_page_shows_what_describe_prints"
    ),
    r"python -m muonclip_jax doctor": Covered("tests/test_commands.py::test_doctor_passes_here"),
    r"make notebooks": Covered(
        "tests/examples/test_notebooks.py::test_it_runs_again_to_the_same_outputs",
        ("examples/notebooks/execute.py",),
    ),
    r"pip install '\.\[flax\]'": Covered(
        "tests/package/test_package.py::test_the_wheel_works_in_an_empty_environment"
    ),
    r"python examples/train_lm\.py( .*)?": Covered(
        f"{_PROGRAMS}::test_own_files_and_another_optimizer"
    ),
    r"python examples/train_(nnx|linen_trainstate|sharded)\.py( .*)?": Covered(_OTHERS),
    r"python examples/train_convnet\.py( .*)?": Covered(_CONVNET),
    r"python examples/train_moe\.py( .*)?": Covered(_MOE),
    r"python examples/fine_tune\.py( .*)?": Covered(_TUNE),
    r"python examples/train_multihost\.py .*--smoke.*": Covered(
        f"{_MULTIHOST}::test_the_page_starts_two_processes"
    ),
    # Need a cluster: the same program in processes on loopback, killed and started again.
    r"(?s)gcloud compute tpus .*examples/train_multihost\.py.*": Covered(
        f"{_MULTIHOST}::test_a_restart_ends_with_the_same_bits"
    ),
    r"srun .*examples/train_multihost\.py.*": Covered(
        f"{_MULTIHOST}::test_a_restart_ends_with_the_same_bits"
    ),
}


def who(command: Command) -> Run | Covered:
    """Looks a command up.

    Raises:
        KeyError: If nobody executes it.
    """
    for pattern, answer in COMMANDS.items():
        if re.fullmatch(pattern, command.text):
            return answer
    raise KeyError(
        f"{command.page}, line {command.line}: nobody executes {command.text!r}. Add a row to "
        "COMMANDS in tests/docs/commands.py, with the test that runs it; what is not meant to be "
        "typed is fenced as text."
    )
