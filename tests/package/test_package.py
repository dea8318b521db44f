"""Wheel and source archive: what is in them, and that the wheel works where nothing else is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.check_package import archive_problems, problems, sources, wheel_problems

ROOT = Path(__file__).parents[2]
METADATA = b"""Metadata-Version: 2.4
Name: muonclip_jax
Version: 0.1.0
License-Expression: Apache-2.0
Description-Content-Type: text/markdown

# muonclip_jax
"""
LICENCE = "muonclip_jax-0.1.0.dist-info/licenses/LICENSE"

#: What a user's first minute is, with warnings as errors.
STEP = """
import jax, jax.numpy as jnp, optax
import muonclip_jax as mc
from muonclip_jax import checkpoint
params = {"up": {"kernel": jnp.ones((4, 8))}, "norm": {"scale": jnp.ones(8)}}
tx = mc.muonclip(learning_rate=0.1, qk_clip_threshold=None)
updates, state = tx.update(params, tx.init(params), params)
new = optax.apply_updates(params, updates)
assert float(new["up"]["kernel"][0, 0]) < 1, new
print(mc.__file__)
"""


@pytest.mark.parametrize(
    ("changed", "metadata", "said"),
    [
        ("muonclip_jax/py.typed", (b"", b""), "type checkers"),
        ("muonclip_jax/optimizers.py", (b"", b""), "lacks muonclip_jax/optimizers.py"),
        ("tests/helpers.py", (b"", b""), "holds tests/helpers.py"),
        (LICENCE, (b"", b""), "lacks its licence"),
        (None, (b"Version: 0.1.0", b"Version: one"), "'one' is invalid"),
        (None, (b"Apache-2.0", b"MIT"), "'MIT', not 'Apache-2.0'"),
        (None, (b"text/markdown", b"text/plain"), "not the README"),
    ],
)
def test_a_bad_wheel_is_refused(changed: str | None, metadata: tuple[bytes, bytes], said: str):
    expected = sources()
    names = {*expected, LICENCE}
    assert wheel_problems(sorted(names), METADATA, expected) == []
    names ^= {changed} if changed else set()  # a file more or a file less
    found = wheel_problems(sorted(names), METADATA.replace(*metadata), expected)
    assert any(said in problem for problem in found), found


def test_an_archive_that_lacks_something_is_refused():
    assert "The archive lacks mkdocs.yml." in archive_problems(["a-0.1.0/README.md"], set())
    assert archive_problems(["a/x/__pycache__/y.pyc"], set())[-1].endswith("y.pyc.")


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Both, built as the release does it: the archive from the tree, the wheel from the archive."""
    pytest.importorskip("build", reason="building needs `pip install -e '.[package]'`")
    pytest.importorskip("hatchling", reason="building needs `pip install -e '.[package]'`")
    folder = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
def test_wheel_and_archive_hold_what_they_should(dist):
    assert problems(dist) == []
    assert problems(dist.parent)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(dist, tmp_path):
    # Nothing of this environment, and not the repository either.
    own = ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV", "JAX_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    clean |= {"JAX_PLATFORMS": "cpu"}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, words)], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )

    made = run(sys.executable, "-m", "venv", tmp_path / "venv")
    assert made.returncode == 0, made.stderr
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    probe = run(*pip, "download", "--no-deps", "--dest", tmp_path / "probe", "typing_extensions")
    if probe.returncode:
        pytest.skip(f"pip reaches no index here: {probe.stderr.strip().splitlines()[-1]}")
    wheel = next(dist.glob("*.whl"))
    installed = run(*pip, "install", "--constraint", ROOT / "constraints.txt", wheel)
    assert installed.returncode == 0, installed.stderr

    listed = run(python, "-m", "pip", "list", "--format", "freeze").stdout
    assert "flax" not in listed
    assert "pytest" not in listed
    stepped = run(python, "-W", "error", "-c", STEP)
    assert stepped.returncode == 0, stepped.stderr
    assert str(tmp_path / "venv") in stepped.stdout
