"""What the Makefile's commands run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_needs_a_real_compiler_runs_where_they_are_installed():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (named,) = re.findall(r"^COMPILER_TESTS := (.*)$", makefile, re.MULTILINE)
    needing = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob("**/test_*.py")
        if re.search(r"^from benchmarks.compilers import", path.read_text(), re.MULTILINE)
    }
    assert len(needing) > 1
    assert set(named.split()) == needing
    (recipe,) = re.findall(r"^kernels:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert "$(KERNELS)/bin/python -m pytest" in recipe
    assert "$(COMPILER_TESTS)" in recipe
