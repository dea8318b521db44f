"""The named coefficient sets, and the step rule that turns arguments into rows.

A row `(a, b, c)` is one Newton-Schulz step `X <- a X + b (X X^H) X + c (X X^H)^2 X`: the odd
quintic `a x + b x^3 + c x^5` on every singular value.
"""

import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from muonclip_jax.newton_schulz.generators import (
    POLAR_EXPRESS_SAFETY,
    Row,
    Rows,
    evaluate,
    with_safety_factor,
)


class CoefficientSet(NamedTuple):
    """A named schedule of Newton-Schulz steps.

    Attributes:
        rows: One `(a, b, c)` a step.
        source: Where the numbers come from.
        preconditioning: The first rescaling that the set was made for.
        preconditioning_required: Whether another one is an error.
        then: The row of all further steps, where the source has one.
    """

    rows: Rows
    source: str
    preconditioning: str = "frobenius"
    preconditioning_required: bool = False
    then: Row | None = None


_KELLER_JORDAN: Row = (3.4445, -4.7750, 2.0315)
# The quintic that converges fastest near 1: its first two derivatives vanish there.
_CONVERGE: Row = (1.875, -1.25, 0.375)

_YOU: Rows = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

_POLAR_EXPRESS: Rows = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    _CONVERGE,
)

_CANS: Rows = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

_TURBO: Rows = (
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
)

# polar_express_coefficients(0.003, 4, safety_factor=1.0, cushion=0.0)
_MINIMAX4: Rows = (
    (8.383673612923165, -24.765905857974534, 18.357081892887596),
    (4.04342043370043, -3.011404993841536, 0.569512150319183),
    (3.505570617243893, -2.6266538356181015, 0.5257194048203224),
    (2.490115939444256, -1.8342750827526721, 0.43683470689542514),
)


def _polar_express(safety_factor: float) -> CoefficientSet:
    rows = with_safety_factor(_POLAR_EXPRESS, safety_factor)
    return CoefficientSet(
        rows=rows,
        source=f"Amsel et al. 2025, arXiv 2505.16932, safety factor {safety_factor}",
        then=rows[-1],
    )


#: Every named set. The names that `ns_coeffs` allows are these and `ALIASES`.
COEFFICIENT_SETS: Mapping[str, CoefficientSet] = MappingProxyType(
    {
        "keller_jordan": CoefficientSet(
            (_KELLER_JORDAN,) * 5,
            "Jordan et al. 2024, kellerjordan.github.io/posts/muon",
            then=_KELLER_JORDAN,
        ),
        "you": CoefficientSet(_YOU, "Jiacheng You 2025, in github.com/KellerJordan/modded-nanogpt"),
        "polar_express": _polar_express(POLAR_EXPRESS_SAFETY),
        "polar_express_1.00": _polar_express(1.0),
        "polar_express_1.02": _polar_express(1.02),
        "polar_express_1.05": _polar_express(1.05),
        "cans": CoefficientSet(_CANS, "Grishina et al. 2025, arXiv 2506.10935"),
        "deepseek_v4": CoefficientSet(
            (_KELLER_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, "DeepSeek-V4 technical report"
        ),
        "turbo": CoefficientSet(
            _TURBO,
            "Boissin et al. 2025, arXiv 2512.04632",
            preconditioning="aol",
            preconditioning_required=True,
        ),
        "minimax4": CoefficientSet(
            _MINIMAX4,
            "polar_express_coefficients(0.003, 4, safety_factor=1.0, cushion=0.0)",
            preconditioning="schatten8",
            then=_CONVERGE,
        ),
    }
)

#: Other names for the same sets; "standard" and "dion" are Optax's.
ALIASES: Mapping[str, str] = MappingProxyType(
    {"standard": "keller_jordan", "dion": "you", "quintic": "you"}
)

#: Steps of a single triple when `ns_steps` is None.
TRIPLE_STEPS = 5


def named_set(name: str) -> CoefficientSet:
    """Looks up a coefficient set.

    Args:
        name: A key of `COEFFICIENT_SETS` or `ALIASES`.

    Returns:
        The set.

    Raises:
        ValueError: If there is no such set.

    Example:
        >>> named_set("dion") is COEFFICIENT_SETS["you"]
        True
    """
    key = ALIASES.get(name, name)
    if key not in COEFFICIENT_SETS:
        names = ", ".join(repr(n) for n in (*COEFFICIENT_SETS, *ALIASES))
        raise ValueError(
            f"ns_coeffs={name!r} is no coefficient set. Names are {names}; or pass a triple "
            "(a, b, c) or rows ((a, b, c), ...)."
        )
    return COEFFICIENT_SETS[key]


def _steps(ns_steps: Any) -> int | None:
    if ns_steps is None:
        return None
    if isinstance(ns_steps, Tracer):
        raise TypeError(
            "ns_steps must be a Python integer, got a traced value: the number of steps is part of "
            "the program. Under optax.inject_hyperparams pass static_args=('ns_steps',)."
        )
    try:
        steps = operator.index(ns_steps)
    except TypeError:
        steps = None
    if steps is None or isinstance(ns_steps, (bool, np.bool_)):
        raise TypeError(f"ns_steps must be None or an integer of at least 1, got {ns_steps!r}.")
    if steps < 1:
        raise ValueError(f"ns_steps must be None or at least 1, got {steps}.")
    return steps


def _array(ns_coeffs: Any) -> np.ndarray:
    expected = "expected a name, a triple (a, b, c) of numbers, or rows ((a, b, c), ...)"
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(ns_coeffs)):
        raise TypeError(
            f"ns_coeffs holds a traced value; {expected}: the coefficients are part of the "
            "program. Under optax.inject_hyperparams pass static_args=('ns_coeffs',)."
        )
    if not isinstance(ns_coeffs, (Sequence, np.ndarray, jax.Array)):
        raise TypeError(f"ns_coeffs={ns_coeffs!r}: {expected}.")
    try:
        array = np.asarray(ns_coeffs, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ns_coeffs={ns_coeffs!r}: {expected}.") from error
    if array.ndim not in (1, 2) or array.shape[-1] != 3 or not len(array):
        raise ValueError(f"ns_coeffs has shape {array.shape}; {expected}: shape (3,) or (T, 3).")
    if not np.isfinite(array).all():
        raise ValueError(f"ns_coeffs={ns_coeffs!r} holds a NaN or infinity; {expected}.")
    return array


def resolve_coefficients(ns_coeffs: Any, ns_steps: Any = None) -> tuple[Rows, CoefficientSet]:
    """Turns `ns_coeffs` and `ns_steps` into the rows to run.

    `ns_steps=None` takes all rows of a set and five steps of a triple; fewer steps than rows take
    the first ones; more go on with the row that the set's source has for that.

    Args:
        ns_coeffs: A name, a triple `(a, b, c)`, or rows of shape `(T, 3)`.
        ns_steps: Number of steps, or None.

    Returns:
        The rows, and the set that they come from (one made up for numbers).

    Raises:
        TypeError: If an argument has the wrong type or is traced.
        ValueError: If the name, the shape or the number of steps is wrong.

    Example:
        >>> rows, _ = resolve_coefficients((2.0, -1.5, 0.5), 3)
        >>> len(rows)
        3
    """
    steps = _steps(ns_steps)
    if isinstance(ns_coeffs, str):
        source = named_set(ns_coeffs)
        label = repr(ns_coeffs)
    else:
        array = _array(ns_coeffs)
        if array.ndim == 1:
            array = np.tile(array, (steps or TRIPLE_STEPS, 1))
        rows: Rows = tuple((float(a), float(b), float(c)) for a, b, c in array)
        source = CoefficientSet(rows, "given by the caller")
        label = "the given ns_coeffs"
    rows = source.rows
    if steps is None:
        return rows, source
    if steps > len(rows):
        if source.then is None:
            going_on = ", ".join(repr(n) for n, s in COEFFICIENT_SETS.items() if s.then)
            raise ValueError(
                f"ns_steps={steps} is more than the {len(rows)} rows of {label}, and their source "
                f"has no row for further steps. Pass ns_steps=None or at most {len(rows)}, more "
                f"rows, or one of the sets that go on ({going_on})."
            )
        return rows + (source.then,) * (steps - len(rows)), source
    return rows[:steps], source


def changes_direction(rows: Rows) -> float | None:
    """Finds a singular value in (0, 1] that the rows would turn negative or blow up.

    Args:
        rows: One `(a, b, c)` a step.

    Returns:
        The first such value on a fine grid, or None.

    Example:
        >>> changes_direction(((2.0, -1.5, 0.5),)) is None
        True
    """
    x = np.concatenate([np.logspace(-6, -2, 400), np.linspace(0.01, 1.0, 4001)])
    with np.errstate(over="ignore", invalid="ignore"):
        y = evaluate(rows, x)
    bad = np.flatnonzero((y < 0) | ~np.isfinite(y))
    return float(x[bad[0]]) if len(bad) else None
