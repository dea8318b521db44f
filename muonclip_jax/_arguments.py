"""What callers write: names of arguments, numbers, schedules and flags, checked at construction.

Checks look at Python values and let tracers pass.
"""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from muonclip_jax._tree import ScalarOrSchedule, Tree

P = ParamSpec("P")
R = TypeVar("R")

#: Dtypes of moments, the real ones first.
MOMENTS = ("float32", "bfloat16", "float16", "float64", "complex64", "complex128")
#: Names that other optimizers use and that do not end one of ours.
_ELSEWHERE = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "momentum": "beta",
    "decay": "beta",
    "betas": "beta adam_b1 adam_b2",
    "adjust_lr_fn": "consistent_rms",
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
    parameters = inspect.signature(function).parameters
    names = [name for name in parameters if name != "self"]
    ordered = [name for name, x in parameters.items() if x.kind == x.POSITIONAL_OR_KEYWORD]
    what = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > len(ordered):
            by_name = ", ".join(names[len(ordered) :])
            raise TypeError(f"{what} takes only {', '.join(ordered)} without names: name {by_name}")
        for name in kwargs:
            if name not in names:
                from difflib import get_close_matches  # Only needed for the message.

                meant = [own for own in _ELSEWHERE.get(name, "").split() if own in names]
                meant = meant or [own for own in names if own.endswith(f"_{name}")]
                meant = meant or get_close_matches(name, names, n=2)
                known = f"Its arguments are {', '.join(names)}."
                known = f"Did you mean {' or '.join(meant)}?" if meant else known
                raise TypeError(f"{what} has no argument {name!r}. {known}")
        return function(*args, **kwargs)

    return checked


def is_concrete(value: object) -> TypeGuard[float]:
    """Whether `value` is a plain number: no schedule, no tracer, no device array."""
    return isinstance(value, int | float | np.number) or (
        isinstance(value, np.ndarray) and value.ndim == 0
    )


#: Ranges of numbers, as messages name them.
_RANGES: dict[str, Callable[[float], bool]] = {
    "a number": lambda x: True,
    "positive": lambda x: x > 0,
    "not negative": lambda x: x >= 0,
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

    `within` is a key of `_RANGES`, `hint` a sentence for a number outside of it. With `schedule`, a
    function of the number of updates is allowed.
    """
    if is_concrete(value) and not isinstance(value, bool):
        if not _RANGES[within](value):
            raise ValueError(f"{name} must be {within}, got {value}. {hint}".rstrip())
        return
    is_function = callable(value) and not isinstance(value, type)
    if is_function and schedule:
        return
    if isinstance(value, jax.Array | np.ndarray) and any(
        jnp.issubdtype(value.dtype, kind) for kind in (np.integer, np.floating)
    ):
        return
    got = f"{value!r} of type {type(value).__name__}."
    if is_function:
        got = (
            f"the function {getattr(value, '__name__', value)!r}: it cannot be a schedule. To "
            f"change it between steps, write optax.inject_hyperparams(...)(..., {name}=schedule)."
        )
    elif isinstance(value, str):
        with contextlib.suppress(ValueError):
            got += f" Write {name}={float(value)}."
    kind = within if within.startswith("an integer") else "a number"
    others = ", a traced scalar or a schedule" if schedule else " or a traced scalar"
    raise TypeError(f"{name} must be {kind}{others}, got {got}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises a ValueError where an argument is not one of the values that are allowed."""
    if value not in (allowed := tuple(allowed)):
        options = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}={value!r} is not known. Pass one of {options}.")


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


def value_at(value: Any, count: Any) -> Any:
    """Returns a schedule's value after `count` updates, and anything else as it is."""
    return value(count) if callable(value) else value


def check_rates(
    rates: Sequence[ScalarOrSchedule], decays: Sequence[ScalarOrSchedule], mask: Tree
) -> None:
    """Checks rates and decays of Muon and Adam; warns if Adam's rate alone is constant."""
    for prefix, rate, decay in zip(("", "adam_"), rates, decays, strict=True):
        check_number(f"{prefix}learning_rate", rate, "positive and finite", schedule=True)
        check_number(f"{prefix}weight_decay", decay, "finite and not negative", schedule=True)
    check_mask("weight_decay_mask", mask)
    if callable(rates[0]) and not callable(rates[1]):
        warnings.warn(
            f"learning_rate is a schedule and adam_learning_rate={rates[1]} is not: Adam's rate "
            "stays the same while the other one warms up and decays. Write "
            "adam_learning_rate=lambda count: ratio * schedule(count), or "
            "optax.constant_schedule(...) if a constant is meant.",
            stacklevel=4,
        )


def check_mask(name: str, mask: Tree) -> None:
    """Raises if a mask is a single value and not a tree or a function."""
    if isinstance(mask, str | bool | int | float | np.generic | np.ndarray | jax.Array):
        raise TypeError(
            f"{name} must be a tree of bools like the parameters, or a function from them to one, "
            f"got {mask!r}. optax.inject_hyperparams takes functions for schedules: give it "
            f"static_args=({name!r},)."
        )


def check_decay(
    name: str, decay: ScalarOrSchedule, mu_dtype: Tree = None, schedule: bool = False
) -> None:
    """Raises for a decay rate outside [0, 1), or a `mu_dtype` too coarse for a moment with it.

    A step changes a moment by `1 - decay` of its distance to the gradient, which is rounded to
    zero in integers, mostly in 8-bit floats, and in any float with a larger spacing.

    `optax.inject_hyperparams` casts numbers to the dtype of the parameters, and bfloat16 has no
    number between 0.996 and 1: a decay rate of 0.999 becomes 1, and Adam divides by zero. A
    concrete value raises an error; a traced 16-bit one, whose value is unknown, gives a warning.
    """
    held, hint = getattr(decay, "dtype", np.dtype(float)), "Usual values are 0.9 to 0.999."
    if held.itemsize < 4:
        hint = (
            f"{name} is held in {held}, where 0.999 is {float(np.asarray(0.999, held)):.4g}; "
            "keep it in float32: optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)."
        )
        if isinstance(decay, Tracer):
            warnings.warn(hint, stacklevel=4)
        else:
            decay = float(np.asarray(decay))
    check_number(name, decay, "in [0, 1)", hint, schedule=schedule)
    if mu_dtype is None:
        return
    dtype = None
    with contextlib.suppress(TypeError):
        dtype = jnp.dtype(mu_dtype)
    if dtype is None or dtype.name not in MOMENTS:
        raise ValueError(
            f"mu_dtype={mu_dtype!r} cannot hold a moving average. Pass one of "
            f"{', '.join(map(repr, MOMENTS[:4]))}, or None for the parameter's dtype."
        )
    spacing = float(jnp.finfo(dtype).eps)
    if is_concrete(decay) and 1 - decay < spacing / 2:
        raise ValueError(
            f"mu_dtype={dtype.name!r} is too coarse for a moving average with {name}={decay}: a "
            f"step changes it by {1 - decay:.2g} of its distance to the gradient, and its numbers "
            f"are {spacing:.2g} apart. Pass mu_dtype='float32' or a smaller {name}."
        )
