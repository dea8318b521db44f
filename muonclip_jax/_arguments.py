"""What callers write: names of arguments, numbers, schedules and flags, checked at construction.

Checks look at Python values and let tracers pass.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeGuard, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

#: Names that other optimizers use and that do not end one of ours.
_ELSEWHERE = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "momentum": "beta",
    "decay": "beta",
    "betas": "adam_b1",
    "tau": "qk_clip_threshold",
    "every_k_schedule": "every",
}


def names_known(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a call with an unknown argument name an error that tells the name meant.

    Example:
        >>> @names_known
        ... def scale(*, learning_rate=1.0): ...
        >>> scale(lr=0.1)
        Traceback (most recent call last):
        ...
        TypeError: scale has no argument 'lr'. Did you mean learning_rate?
    """

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        code = inspect.unwrap(function).__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for name in kwargs:
            if name not in names:
                what = function.__qualname__.removesuffix(".__init__")
                raise TypeError(f"{what} has no argument {name!r}. {_meant(name, names)}")
        return function(*args, **kwargs)

    return checked


def _meant(name: str, names: Collection[str]) -> str:
    from difflib import get_close_matches  # Only needed for the message.

    names = [own for own in names if own != "self"]
    meant = [own for own in (_ELSEWHERE.get(name),) if own in names]
    meant = meant or [own for own in names if own.endswith(f"_{name}")]
    meant = meant or get_close_matches(name, names, n=2)
    if meant:
        return f"Did you mean {' or '.join(meant)}?"
    return f"Its arguments are {', '.join(names)}."


def is_concrete(value: object) -> TypeGuard[float]:
    """Whether `value` is a plain number: no schedule, no tracer, no device array.

    Example:
        >>> is_concrete(0.1), is_concrete(lambda count: 0.1)
        (True, False)
    """
    return isinstance(value, int | float | np.number) or (
        isinstance(value, np.ndarray) and value.ndim == 0
    )


#: Ranges of numbers, as messages name them.
_RANGES: dict[str, Callable[[float], bool]] = {
    "a number": lambda x: True,
    "positive": lambda x: x > 0,
    "positive and finite": lambda x: 0 < x < math.inf,
    "finite and not negative": lambda x: 0 <= x < math.inf,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "an integer from 1": lambda x: x >= 1 and x == x // 1,
}


def check_number(
    name: str, value: object, within: str = "a number", hint: str = "", *, schedule: bool = False
) -> None:
    """Raises unless an argument is a number in a range, a traced scalar or an allowed schedule.

    Args:
        name: The argument, as the caller wrote it.
        value: What was given.
        within: The range, a key of `_RANGES`.
        hint: Sentences for the message about a number outside of the range.
        schedule: Whether a function of the number of updates is allowed.

    Raises:
        TypeError: With what was given and what to write.
        ValueError: For a number outside of the range.
    """
    kinds = within if within.startswith("an integer") else "a number"
    if is_concrete(value) and not isinstance(value, bool):
        if not _RANGES[within](value):
            raise ValueError(f"{name} must be {within}, got {value}.{' ' * bool(hint)}{hint}")
        return
    if isinstance(value, jax.Array | np.ndarray) and any(
        jax.numpy.issubdtype(value.dtype, kind) for kind in (np.integer, np.floating)
    ):
        return
    is_function = callable(value) and not isinstance(value, type)
    if is_function and schedule:
        return
    if is_function:
        raise TypeError(
            f"{name} must be {kinds} or a traced scalar, got the function "
            f"{getattr(value, '__name__', value)!r}: it cannot be a schedule. To change it between "
            f"steps, write optax.inject_hyperparams(...)(..., {name}=schedule)."
        )
    allowed = (
        f"{kinds}, a traced scalar or a schedule" if schedule else f"{kinds} or a traced scalar"
    )
    cure = ""
    with contextlib.suppress(TypeError, ValueError):
        cure = f" Write {name}={float(value)}." if isinstance(value, str) else ""
    raise TypeError(
        f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}.{cure}"
    )


def check_type(name: str, value: object, kind: Any, example: str) -> None:
    """Raises a TypeError where an argument, which cannot be traced, is of another type."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be {example}{' or None' * isinstance(None, kind)}, got {value!r} of type "
            f"{type(value).__name__}. It determines the program and cannot be traced."
        )


def check_flags(**flags: object) -> None:
    """Raises a TypeError where an argument is not True or False."""
    for name, value in flags.items():
        check_type(name, value, bool | np.bool_, "True or False")
