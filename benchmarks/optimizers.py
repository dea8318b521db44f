"""The optimizers that are compared, and the step that all of them take."""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import muonclip_jax as mc

LEARNING_RATE = 0.02
OURS = "ours"
FAST = "ours, minimax4"
OPTAX = "optax.contrib.muon"


def ours(numbers: Any, **settings: Any) -> Any:
    """Returns `mc.muon` for a tree of `MuonDimensionNumbers`."""
    return mc.muon(LEARNING_RATE, muon_weight_dimension_numbers=numbers, **settings)


#: From a tree of `MuonDimensionNumbers` and None to an optimizer; not all of them look at it.
OPTIMIZERS: Mapping[str, Callable[[Any], Any]] = {
    OURS: functools.partial(ours, ns_coeffs="keller_jordan"),
    FAST: functools.partial(ours, ns_coeffs="minimax4"),
    OPTAX: lambda dims: optax.contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=dims),
    "optax.adamw": lambda _: optax.adamw(LEARNING_RATE),
    "momentum SGD": lambda _: optax.sgd(LEARNING_RATE, momentum=0.95, nesterov=True),
}


def optax_at(path: str | Path) -> Callable[[Any], Any]:
    """Returns `optax.contrib.muon` of another checkout of Optax, imported beside the installed one.

    Args:
        path: The folder that holds the package `optax`.
    """

    def is_optax(name: str) -> bool:
        return name.split(".")[0] == "optax"

    installed = {name: sys.modules.pop(name) for name in list(sys.modules) if is_optax(name)}
    sys.path.insert(0, str(path))
    try:
        other: Any = importlib.import_module("optax.contrib")
        if Path(path).resolve() not in Path(other.__file__).resolve().parents:
            raise ImportError(f"There is no package optax in {path}.")
    finally:
        sys.path.remove(str(path))
        for name in filter(is_optax, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(installed)

    def muon(numbers: Any) -> Any:
        is_numbers = lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
        numbers = jax.tree.map(
            lambda x: other.MuonDimensionNumbers(*x), numbers, is_leaf=is_numbers
        )
        return other.muon(LEARNING_RATE, muon_weight_dimension_numbers=numbers)

    return muon


def jitted_step(tx: Any) -> Any:
    """Returns the compiled `(params, state, grads) -> (params, state)`, in place as in training."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def training_memory(tx: Any, params: Any, state: Any) -> int:
    """Returns the temporary bytes of a donated step that also computes the gradients."""

    def loss(params: Any) -> jax.Array:
        outputs = [jnp.tanh(jnp.ones((8, len(x))) @ x) for x in jax.tree.leaves(params)]
        return sum((jnp.sum(y * y) for y in outputs), jnp.zeros(()))

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes
