"""Prints the constraints for the newest, or for the oldest, JAX.

    python tools/constraints.py newest

What only tests and examples need keeps its pinned version, so that a failure speaks of JAX and of
what stands on it. Reads files beside it and needs nothing installed.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Released together with JAX, or made for one version of it.
_WITH_JAX = (
    "jax",
    "jaxlib",
    "ml_dtypes",
    "optax",
    "flax",
    "chex",
    "orbax-checkpoint",
    "tensorstore",
    # An old Flax asks for an old NumPy, and SciPy and scikit-learn are built for a NumPy.
    "numpy",
    "scipy",
    "scikit-learn",
)
#: The tools of the tests ask for a newer one than the package does.
_NEWER_FOR_TESTS = ("typing-extensions",)
_MINIMUM = re.compile(r"([A-Za-z0-9_-]+)>=([0-9.]+)$")


def _key(name: str) -> str:
    return name.lower().replace("_", "-")


def minimums(requirements: Iterable[str]) -> dict[str, str]:
    """Returns the lower bound of each requirement, by normalised name.

    Raises:
        ValueError: If a requirement has none.

    Example:
        >>> minimums(["jax>=0.10", "typing_extensions>=4.12"])
        {'jax': '0.10', 'typing-extensions': '4.12'}
    """
    found = {}
    for requirement in requirements:
        match = _MINIMUM.match(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lower bound. Write it as 'name>=version'.")
        found[_key(match[1])] = match[2]
    return found


def constraints(which: str, pinned: str, project: dict) -> list[str]:
    r"""Returns the lines for "newest" or "oldest".

    Args:
        which: "newest" leaves JAX and what is made for it free; "oldest" holds what the package
            requires, Flax with it, at its lower bound.
        pinned: The text of `constraints.txt`.
        project: The table `project` of `pyproject.toml`.

    Raises:
        ValueError: If `which` is another word.

    Example:
        >>> project = {"dependencies": ["jax>=0.10"], "optional-dependencies": {"flax": []}}
        >>> constraints("newest", "jax==0.10.2\ntqdm==4.70.1", project)
        ['tqdm==4.70.1']
        >>> constraints("oldest", "jax==0.10.2\ntqdm==4.70.1", project)
        ['tqdm==4.70.1', 'jax==0.10']
    """
    if which not in ("newest", "oldest"):
        raise ValueError(f"{which!r} is not known. Say 'newest' or 'oldest'.")
    oldest = minimums([*project["dependencies"], *project["optional-dependencies"]["flax"]])
    free = {_key(name) for name in _WITH_JAX} | (set(oldest) if which == "oldest" else set())
    lines = [line for line in pinned.splitlines() if "==" in line and not line.startswith("#")]
    kept = [line for line in lines if _key(line.split("==")[0]) not in free]
    if which == "oldest":
        kept += [
            f"{name}=={version}" for name, version in oldest.items() if name not in _NEWER_FOR_TESTS
        ]
    return kept


if __name__ == "__main__":
    with (ROOT / "pyproject.toml").open("rb") as file:
        table = tomllib.load(file)["project"]
    text = (ROOT / "constraints.txt").read_text()
    print("\n".join(constraints(sys.argv[1], text, table)))
