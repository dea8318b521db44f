"""One step of each optimizer on the tree of a named model, interleaved, with answers compared.

    python benchmarks/step_time.py

All take the same random gradients on the same cores; embeddings and head go to AdamW. On a GPU also
torch's Newton-Schulz under `torch.compile` and other packages' kernels, where they are installed.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Contenders of two libraries share a GPU; neither may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

from benchmarks.harness import interleave, parser, ratio, store, summary
from benchmarks.matrices import Reference, over_all
from benchmarks.models import MODELS, Model
from benchmarks.optimizers import (
    FAST,
    LEARNING_RATE,
    OPTAX,
    OPTIMIZERS,
    OURS,
    jitted_step,
    optax_at,
    training_memory,
)

torch_muon: Any = (
    importlib.import_module("benchmarks.torch_muon") if importlib.util.find_spec("torch") else None
)


def random_gradients(tree: Any, seed: int = 0) -> Any:
    """Returns Gaussian gradients of the tree's shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    values = [draw(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, values)


def flat(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path; None and `MuonDimensionNumbers` are leaves here."""
    leaves = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    )[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


class JaxStep:
    """A compiled step that keeps its parameters and state between calls, from zeros."""

    def __init__(self, tx: Any, grads: Any):
        self.tx, self.grads = tx, grads
        self.params = jax.tree.map(jnp.zeros_like, grads)
        self.state = jax.jit(tx.init)(self.params)
        self.compiled = jitted_step(tx).lower(self.params, self.state, grads).compile()

    def start(self) -> None:
        """Takes one step and does not wait for it."""
        self.params, self.state = self.compiled(self.params, self.state, self.grads)

    def __call__(self) -> None:
        """Takes one step and waits for it."""
        self.start()
        jax.block_until_ready((self.params, self.state))

    def value(self, path: str) -> np.ndarray:
        """Returns a parameter."""
        return np.asarray(flat(self.params)[path], np.float32)

    def temporary_bytes(self) -> int | None:
        """Returns what the compiler plans beside arguments and results."""
        memory = self.compiled.memory_analysis()
        return None if memory is None else memory.temp_size_in_bytes


def contenders(model: Model, grads: Any, optax_path: Path | None) -> dict[str, Any]:
    """Builds all steps."""
    numbers = model.dimension_numbers()
    steps: dict[str, Any] = {
        name: JaxStep(factory(numbers), grads) for name, factory in OPTIMIZERS.items()
    }
    if optax_path is not None:
        steps[f"{OPTAX} of {optax_path}"] = JaxStep(optax_at(optax_path)(numbers), grads)
    if torch_muon is None:
        print("torch is not installed: its contenders are left out", flush=True)
        return steps
    return steps | torch_steps(grads, numbers)


def torch_steps(grads: Any, numbers: Any) -> dict[str, Any]:
    """Returns torch's steps, which copy the gradients."""
    matrices = {path for path, spec in flat(numbers).items() if spec is not None}
    torch_muon.prepare()
    tensors = torch_muon.gradients(flat(grads), matrices)
    return {
        name: torch_muon.Step(tensors, matrices, LEARNING_RATE, function)
        for name, function in torch_muon.newton_schulz_functions().items()
    }


def answers(steps: Mapping[str, Any], model: Model, grads: Any) -> dict[str, Any]:
    """Compares the first step from zeros: with Optax's in the worst matrix, and by quality."""
    numbers = flat(model.dimension_numbers())
    matrices = [path for path, spec in numbers.items() if spec is not None]
    flat_grads = flat(grads)
    sample = {flat_grads[path].shape: path for path in matrices}
    references = {
        path: Reference(_wide(np.asarray(flat_grads[path], np.float64))[None])
        for path in sample.values()
    }
    found: dict[str, Any] = {}
    for name, step in steps.items():
        if "uon" not in name and not name.startswith("ours"):
            continue
        row: dict[str, Any] = {}
        if OPTAX in steps:
            row["difference_from_optax"] = max(
                _difference(step.value(path), steps[OPTAX].value(path)) for path in matrices
            )
        qualities = []
        for path, reference in references.items():
            fan_in, fan_out = flat_grads[path].shape
            scale = -LEARNING_RATE * np.sqrt(max(1, fan_out / fan_in))
            qualities += reference.quality(_wide(step.value(path) / scale)[None])
        if qualities:
            row["quality"] = over_all(qualities)
        found[name] = row
    return found


def _wide(x: np.ndarray) -> np.ndarray:
    return x if x.shape[0] <= x.shape[1] else x.T


def _difference(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def measure(
    steps: Mapping[str, Any], model: Model, grads: Any, rounds: int, *, in_a_row: int = 1
) -> list[dict[str, Any]]:
    """Times interleaved steps, each several times in a row, after comparing their answers.

    `model` says whose answers are compared: none of a model without layers.
    """
    found = answers(steps, model, grads) if model.layers else {}

    def several(step: Any) -> None:
        for _ in range(in_a_row - 1):
            step.start()
        step()

    runs = {name: functools.partial(several, step) for name, step in steps.items()}
    times = interleave(runs, rounds, warmup=int(in_a_row > 1))
    seconds = {name: [value / in_a_row for value in values] for name, values in times.items()}
    rows = []
    for name, step in steps.items():
        row: dict[str, Any] = {"contender": name, "seconds": summary(seconds[name])}
        for key, baseline in (("over_ours", OURS), ("over_fast", FAST)):
            if baseline in steps:
                row[key] = ratio(seconds[name], seconds[baseline])
        if isinstance(step, JaxStep):
            row["temporary_bytes"] = step.temporary_bytes()
        rows.append(row | found.get(name, {}))
    return rows


def main() -> None:
    """Measures, prints and stores."""
    made = parser(__doc__, "step_time")
    made.add_argument("--optax", type=Path, help="the folder of another checkout of Optax, beside")
    options = made.parse_args()
    name = "layers-of-256" if options.smoke else "gpt2-small"
    model = MODELS[name].with_layers(1) if options.smoke else MODELS[name]
    grads = random_gradients(model.tree())
    steps = contenders(model, grads, options.optax)
    for contender, step in steps.items():  # the first step, whose answer is known
        step()
        print(f"first step done: {contender}", flush=True)
    rows = measure(steps, model, grads, 1 if options.smoke else options.rounds)
    for row in rows:
        print(f"{row['contender']}: {row['seconds']['median']:.3f} s", flush=True)
        step = steps[row["contender"]]
        if isinstance(step, JaxStep):
            row["temporary_bytes"] = training_memory(step.tx, step.params, step.state)
    content = {
        "model": name,
        "layers": model.layers,
        "dtype": "float32",
        "matrix_bytes": 4 * model.entries(),
        "rows": rows,
    }
    store("step_time", content, options)


if __name__ == "__main__":
    main()
