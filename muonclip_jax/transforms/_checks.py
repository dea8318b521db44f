"""Hyperparameters: checks at construction, which let traced values and schedules pass."""

import math
import warnings
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from muonclip_jax._arguments import check_scalar, is_concrete


def value_at(value: Any, count: Any) -> Any:
    """Returns a schedule's value after `count` updates, and anything else as it is.

    Example:
        >>> value_at(0.1, 5), value_at(lambda count: 0.1 * count, 5)
        (0.1, 0.5)
    """
    return value(count) if callable(value) else value


def check_rate(name: str, value: Any) -> None:
    """Raises where a learning rate is neither a positive number nor a schedule.

    Raises:
        TypeError: If it is neither a scalar nor a function.
        ValueError: If it is a number that is not positive.
    """
    check_scalar(name, value, "a positive number", schedule=True)
    check_positive(name, value, "Write a positive number or a schedule.", schedule=True)


def check_adam_rate(learning_rate: Any, adam_learning_rate: Any) -> None:
    """Checks Adam's rate, and warns of a constant one beside a schedule for the other group."""
    if adam_learning_rate is None:
        return
    check_rate("adam_learning_rate", adam_learning_rate)
    if callable(learning_rate) and not callable(adam_learning_rate):
        warnings.warn(
            f"learning_rate is a schedule and adam_learning_rate={adam_learning_rate} is not: "
            "Adam's rate stays the same while the other one warms up and decays. Write "
            "adam_learning_rate=lambda count: ratio * schedule(count), or "
            "optax.constant_schedule(...) if a constant is meant.",
            stacklevel=4,
        )


def check_positive(name: str, value: Any, instead: str = "", *, schedule: bool = False) -> None:
    """Raises where an argument is no scalar, or a number that is not positive and finite."""
    check_scalar(name, value, schedule=schedule)
    if is_concrete(value) and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive, got {value}.{_instead(instead)}")


def check_non_negative(name: str, value: Any, *, schedule: bool = False) -> None:
    """Raises where an argument is no scalar, or a number that is negative or not finite."""
    check_scalar(name, value, schedule=schedule)
    if is_concrete(value) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must not be negative, got {value}.")


def check_fraction(name: str, value: Any, meaning: str, *, schedule: bool = False) -> None:
    """Raises where an argument is no scalar, or a number outside [0, 1).

    `optax.inject_hyperparams` brings numbers to the dtype of the parameters, and bfloat16 has no
    number between 0.996 and 1: a decay of 0.999 becomes 1, and Adam divides by 1 - 1. Where the
    value is known that is an error; of a traced one in 16 bits only the dtype is, and it warns.
    """
    check_scalar(name, value, schedule=schedule)
    dtype = getattr(value, "dtype", np.dtype(float))
    cure = ""
    if dtype.itemsize < 4:
        cure = (
            f" {name} is held in {dtype}, where 0.999 is {float(np.asarray(0.999, dtype)):.4g}; "
            "keep it in float32: optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)."
        )
    if cure and isinstance(value, Tracer):
        warnings.warn(f"{name} is {meaning}.{cure}", stacklevel=4)
    elif (cure or is_concrete(value)) and not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}. It is {meaning}.{cure}")


def check_mask(name: str, mask: Any) -> None:
    """Raises where a mask is one value and neither a tree nor a function."""
    if isinstance(mask, str | bool | int | float | np.generic | np.ndarray | jax.Array):
        raise TypeError(
            f"{name} must be a tree of bools like the parameters, or a function from them to one, "
            f"got {mask!r}. optax.inject_hyperparams takes functions for schedules: give it "
            f"static_args=({name!r},)."
        )


def check_every(every: Any, what: str, *, schedule: bool = False) -> None:
    """Raises where `every` is no integer from 1 and no traced scalar."""
    check_scalar("every", every, "an integer from 1", schedule=schedule)
    if is_concrete(every) and not (every >= 1 and every == every // 1):
        raise ValueError(f"every must be an integer from 1, got {every}. It is {what}.")


def _instead(text: str) -> str:
    return f" {text}" if text else ""
