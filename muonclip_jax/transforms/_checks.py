"""Hyperparameters: checks at construction, which let traced values and schedules pass."""

import math
from typing import Any

import jax
import numpy as np


def is_concrete(value: Any) -> bool:
    """Whether `value` is a plain number: no schedule, no tracer, no device array.

    Example:
        >>> is_concrete(0.1), is_concrete(lambda count: 0.1)
        (True, False)
    """
    return isinstance(value, int | float | np.number) and not isinstance(value, jax.Array)


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
    if not (is_concrete(value) or callable(value) or hasattr(value, "dtype")):
        raise TypeError(
            f"{name} must be a positive number, a traced scalar or a schedule, got {value!r}. "
            "Write, for example, 0.02 or optax.cosine_decay_schedule(0.02, 1000)."
        )
    check_positive(name, value, "Write a positive number or a schedule.")


def check_positive(name: str, value: Any, instead: str = "") -> None:
    """Raises a ValueError where a number is not positive and finite."""
    if is_concrete(value) and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive, got {value}.{_instead(instead)}")


def check_non_negative(name: str, value: Any, instead: str = "") -> None:
    """Raises a ValueError where a number is negative or not finite."""
    if is_concrete(value) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must not be negative, got {value}.{_instead(instead)}")


def check_fraction(name: str, value: Any, meaning: str, *, closed: bool = False) -> None:
    """Raises a ValueError where a number is outside [0, 1), or [0, 1] if `closed`."""
    if is_concrete(value) and not (0 <= value < 1 or (closed and value == 1)):
        interval = "[0, 1]" if closed else "[0, 1)"
        raise ValueError(f"{name} must lie in {interval}, got {value}. It is {meaning}.")


def _instead(text: str) -> str:
    return f" {text}" if text else ""
