"""The optimizers that are compared, and the step that all of them take."""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import optax

import muonclip_jax as mc

LEARNING_RATE = 0.02
#: What every row of "the same polynomial" has, as Optax and torch want it.
KELLER_JORDAN = (3.4445, -4.7750, 2.0315)
OURS = "ours"
FAST = "ours, minimax4"
OPTAX = "optax.contrib.muon"

#: What `mc.orthogonalize` is told by the two settings of ours.
POLAR_SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        OURS: {"ns_coeffs": "keller_jordan"},
        FAST: {"ns_coeffs": "minimax4"},
    }
)


def _ours(**settings: Any) -> Callable[[Any], Any]:
    return lambda dims: mc.muon(LEARNING_RATE, muon_weight_dimension_numbers=dims, **settings)


#: From a tree of `MuonDimensionNumbers` and None to an optimizer; not all of them look at it.
OPTIMIZERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        OURS: _ours(**POLAR_SETTINGS[OURS]),
        FAST: _ours(**POLAR_SETTINGS[FAST]),
        OPTAX: lambda dims: optax.contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=dims),
        "optax.adamw": lambda _: optax.adamw(LEARNING_RATE),
        "momentum SGD": lambda _: optax.sgd(LEARNING_RATE, momentum=0.95, nesterov=True),
    }
)


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
