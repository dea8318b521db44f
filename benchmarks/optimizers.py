"""The optimizers that are compared, and the step that all of them take."""

from collections.abc import Callable, Mapping
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
#: The same polynomial as `OURS`, with kernels for the symmetric products.
KERNELS = "ours, kernels"
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
        KERNELS: _ours(**POLAR_SETTINGS[OURS], ns_implementation=None),
        "ours, scale_by_muon": lambda dims: optax.chain(
            mc.scale_by_muon("keller_jordan", weight_dimension_numbers=dims),
            mc.scale_by_shape(dims),
            optax.scale_by_learning_rate(LEARNING_RATE),
        ),
        OPTAX: lambda dims: optax.contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=dims),
        "optax.adamw": lambda _: optax.adamw(LEARNING_RATE),
        "momentum SGD": lambda _: optax.sgd(LEARNING_RATE, momentum=0.95, nesterov=True),
    }
)


def jitted_step(tx: Any) -> Any:
    """Returns the compiled `(params, state, grads) -> (params, state)`, in place as in training."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))
