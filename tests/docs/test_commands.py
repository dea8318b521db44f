"""The commands of README and docs name targets, programs and options that there are.

A fence called `sh` or `console` holds commands. Their programs run in `tests/examples`.
"""

import re

import pytest

from tests.helpers import ROOT, finished

FENCE = re.compile(r"^ *```(?:sh|console)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
TEXT = "".join(code for page in PAGES for code in FENCE.findall(page.read_text()))
TARGETS = sorted(set(re.findall(r"^ *(?:\$ )?make (.*)$", TEXT, re.MULTILINE)))
#: Programs with their options, which another command or a closing quotation ends.
PROGRAMS = re.findall(
    r"((?:examples|benchmarks)/\w+\.py)([^&|;\"\n]*)", re.sub(r"\\\n *", "", TEXT)
)


def test_programs_and_their_options_are_there():
    assert len(PROGRAMS) > 10
    for program, rest in PROGRAMS:
        # Programs name options in a module that they share, some as fields of a dataclass.
        paths = [ROOT / program, *(ROOT / program).parent.glob("common/*.py")]
        texts = "".join(path.read_text() for path in paths)
        for option in re.findall(r"--[a-z][a-z-]*", rest):
            field = option.removeprefix("--").replace("-", "_")
            assert f'"{option}"' in texts or re.search(rf"^ +{field}:", texts, re.MULTILINE)


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_the_target(target: str):
    # The environments count as made, so that nothing is installed.
    made = ("-o", ".venv/.ready", "-o", ".venv/.bench")
    planned = finished("make", *made, "--dry-run", *target.split())
    assert planned.returncode == 0, planned.stderr
    assert "Nothing to be done" not in planned.stdout
