"""Which dtypes a stored moment may have: those in which an exponential average moves."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._tree import flatten_with_paths
from muonclip_jax.transforms._checks import is_concrete

_REAL = ("float32", "bfloat16", "float16", "float64")
_COMPLEX = ("complex64", "complex128")
_EXPECTED = f"one of {', '.join(map(repr, _REAL))}, or None for the parameter's dtype"


def check_moment_dtype(mu_dtype: Any, name: str, decay: Any) -> None:
    """Refuses a dtype in which a first moment would stand still, at construction.

    A step moves the moment by `1 - decay` of its distance to the gradient. Integers round that to
    nothing, floats of 8 bits nearly all of it, and any float whose spacing is wider than that.

    Args:
        mu_dtype: What the caller gave.
        name: The name of the argument that holds the decay.
        decay: The decay: a number, a schedule or traced.

    Raises:
        ValueError: If it is no dtype, or such a one.
    """
    if mu_dtype is None:
        return
    try:
        dtype = jnp.dtype(mu_dtype)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in (*_REAL, *_COMPLEX):
        what = "is no dtype" if dtype is None else "cannot hold a moving average"
        raise ValueError(f"mu_dtype={mu_dtype!r} {what}. Pass {_EXPECTED}.")
    if is_concrete(decay) and 1 - decay < jnp.finfo(dtype).eps / 2:
        raise ValueError(
            f"mu_dtype={dtype.name!r} cannot hold a moving average with {name}={decay}: a step "
            f"moves it by {1 - decay:.2g} of its distance to the gradient, and its numbers are "
            f"{float(jnp.finfo(dtype).eps):.2g} apart. Pass mu_dtype='float32' or a smaller {name}."
        )


def check_moment_leaf(path: str, dtype: Any, mu_dtype: Any) -> None:
    """Refuses a leaf whose moment `mu_dtype` cannot hold, at `init`.

    Raises:
        ValueError: If one is complex and the other real, or JAX has switched 64-bit types off.
        TypeError: If the leaf is neither a real nor a complex array of at least 16 bits.
    """
    dtype = jnp.dtype(dtype)
    where = path or "The leaf"
    if dtype.name not in (*_REAL, *_COMPLEX):
        raise TypeError(
            f"{where} has dtype {dtype.name}; an optimizer's moments need parameters of dtype "
            f"{', '.join((*_REAL, *_COMPLEX))}. Convert it, or keep it out of the optimizer, for "
            "example by optax.masked."
        )
    if mu_dtype is None:
        return
    stored = jnp.dtype(mu_dtype)
    if (stored.name in _COMPLEX) != (dtype.name in _COMPLEX):
        kind = "complex" if stored.name in _COMPLEX else "real"
        raise ValueError(
            f"{where} has dtype {dtype.name}, and mu_dtype={stored.name!r} is {kind}. Pass "
            "mu_dtype=None, which keeps each leaf's own dtype."
        )
    if mu_dtype not in (float, complex) and jax.dtypes.canonicalize_dtype(stored) != stored:
        raise ValueError(
            f"mu_dtype={stored.name!r} needs 64-bit types, which JAX has switched off. Set "
            "jax.config.update('jax_enable_x64', True), or pass mu_dtype='float32'."
        )


def with_checked_moments(
    tx: optax.GradientTransformation, mu_dtype: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx`, whose `init` refuses leaves that `mu_dtype` cannot hold."""
    extended = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> Any:
        if mu_dtype is not None:
            for path, leaf in flatten_with_paths(params)[0]:
                check_moment_leaf(path, leaf.dtype, mu_dtype)
        return extended.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, extended.update)
