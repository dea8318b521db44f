"""What every recipe shares: a small task, and what is asserted at the end.

The task is a sequence in which each token follows from the one before; a model of two layers
learns it in a minute. A recipe then asserts that Muon trains the leaves that its author expects,
the loss falls, the clip is exact and `describe` finds the parameters in a checkpoint.
With `--record` it writes what it found, and the versions, to `stacks/<name>.json`.
"""

import contextlib
import importlib.metadata
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import muonclip_jax as mc
from muonclip_jax.__main__ import main

WORDS = 17
#: Packages whose versions are recorded, where they are installed.
PACKAGES = (
    *("jax", "optax", "flax", "orbax-checkpoint", "equinox", "dm-haiku"),
    *("marin-levanter", "marin-haliax", "google-tunix", "maxtext", "easydel", "transformers"),
)
RESULT: dict[str, Any] = {}


def batch(step: int, size: int = 8, length: int = 12) -> jax.Array:
    """Returns tokens `(size, length)`: each is three times the one before, plus one."""
    rows = [np.random.default_rng(step).integers(0, WORDS, size)]
    for _ in range(length - 1):
        rows.append((3 * rows[-1] + 1) % WORDS)
    return jnp.asarray(np.stack(rows, axis=1), jnp.int32)


def train(
    step: Callable[..., tuple[Any, Any, Any]], params: Any, state: Any, steps: int
) -> tuple[Any, Any, list[Any]]:
    """Trains on one batch a step; returns parameters, optimizer state and the losses."""
    losses = []
    for i in range(steps):
        params, state, loss = step(params, state, batch(i))
        losses.append(loss)
    return params, state, losses


def check_routing(params: Any, muon: str) -> None:
    """Prints which optimizer trains which leaf, and compares with the paths Muon should train."""
    print(mc.describe_labels(params))
    for path, label in jax.tree_util.tree_leaves_with_path(mc.label_params(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        assert (label == "muon") == bool(re.search(muon, name)), f"{name}: {label}"


def check_losses(losses: Sequence[Any]) -> None:
    """Prints the first and the last loss; the last is under half of the first."""
    first, last = float(losses[0]), float(losses[-1])
    print(f"loss {first:.3f} -> {last:.3f}")
    RESULT["loss"] = [round(first, 3), round(last, 3)]
    assert last < 0.5 * first


def check_clip(params: Any, maxima_of: Callable[[Any], Any], **settings: Any) -> None:
    """Clips half of the heads of one layer at a time, and runs the model again.

    Clipped heads must be at the threshold and the others where they were, to 1e-4.

    Args:
        params: The parameters, as the optimizer sees them.
        maxima_of: Parameters -> the maxima that the model's forward pass records.
        settings: `blocks=` and the like, for `apply_qk_clip`.
    """

    def by_path(params: Any) -> dict[str, jax.Array]:
        info = mc.qk_clip_info(params, maxima_of(params), threshold=1.0, **settings)
        return dict(info.max_logits)

    earlier = RESULT.get("clip", {"blocks": [], "heads": 0, "error": 0.0})
    before, heads, errors = by_path(params), 0, [earlier["error"]]
    assert before
    for path, maxima in before.items():
        for layer in np.ndindex(maxima.shape[:-1]):
            threshold = float(np.median(maxima[layer]))
            assert threshold > 0, f"{path} {layer}: no head to clip"
            only = {name: jnp.zeros_like(x) for name, x in before.items()}
            only[path] = only[path].at[layer].set(maxima[layer])
            clipped, info = mc.apply_qk_clip(params, only, threshold=threshold, **settings)
            expected = np.minimum(maxima[layer], threshold)
            again = by_path(clipped)[path][layer]
            np.testing.assert_allclose(again, expected, rtol=1e-4)
            errors.append(float(np.max(np.abs(again / expected - 1))))
            heads += int(info.total_clipped)
    assert heads > 0
    print(f"clip: {heads} heads of {', '.join(before)} are at their threshold")
    blocks, total = [*earlier["blocks"], *before], earlier["heads"] + heads
    RESULT["clip"] = {"blocks": blocks, "heads": total, "error": max(errors)}


def checkpoint_folder(name: str) -> Path:
    """The folder that the command line names, or a temporary one."""
    given = [argument for argument in sys.argv[1:] if argument != "--record"]
    return Path(given[0] if given else tempfile.mkdtemp()).resolve() / name


def check_describe(name: str, saved: Any, params: Any) -> Path:
    """Saves a tree with Orbax; `python -m muonclip_jax describe` finds these parameters alone."""
    folder = checkpoint_folder(name)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, saved, force=True)
    describe(name, folder, params)
    return folder


def describe(name: str, checkpoint: Path, params: Any) -> None:
    """Runs the command on a checkpoint, and compares what it counts with the parameters."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["describe", str(checkpoint)])
    report = printed.getvalue()
    assert status == 0, f"describe cannot read {checkpoint}"
    total = sum(x.size for x in jax.tree.leaves(params))
    numbers = [int(n.replace(",", "")) for n in re.findall(r"leaves, ([\d,]+) numbers", report)]
    assert sum(numbers) == total, f"{sum(numbers)} in place of {total} numbers\n{report}"
    print(f"describe: {report.splitlines()[0]}, {total:,} numbers")
    if "--record" in sys.argv:
        versions = {}
        for package in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        root = Path(__file__).parents[2]
        text = json.dumps(RESULT | {"versions": versions}, indent=2)
        (root / "stacks" / f"{name}.json").write_text(text + "\n")
