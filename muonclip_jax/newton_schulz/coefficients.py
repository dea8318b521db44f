"""The named coefficient sets, how `ns_coeffs` and `ns_steps` become rows, and rounding.

A row `(a, b, c)` is one Newton-Schulz step `X <- a X + b (X X^H) X + c (X X^H)^2 X`: the odd
quintic `a x + b x^3 + c x^5` on every singular value.

Rounding is simulated on singular values. Values just above 1 diverge where a row rises steeply
(`guard_rows`). The Gram form does not use `X` between restarts (`choose_restarts`): `Q` and `Q X`
are rounded relative to their largest entries, so the error of singular values is up to
`max |Q| max(sigma)` rounding units; and `R = X X^H` is rounded relative to its largest eigenvalue,
which makes some eigenvalues slightly negative, where the polynomials grow fastest.
"""

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jax.core import Tracer

Row: TypeAlias = tuple[float, float, float]
Rows: TypeAlias = tuple[Row, ...]
#: What `ns_coeffs` takes: a name, a triple, or rows of shape `(T, 3)`.
Coefficients: TypeAlias = str | Sequence[object] | np.ndarray | jax.Array

# The defaults of all functions and of the command line. Of five sets at equal settings this one
# trained to the lowest loss (docs/settings.md), and 16 bits round it least.
DEFAULT_SET = "keller_jordan"
DEFAULT_METHOD = "auto"  # the cheaper form that is safe in its dtype
DEFAULT_DTYPE = None  # the rule of the platform
DEFAULT_EPS = 1e-8  # the smallest divisor of a matrix whose largest entry is near one
#: Singular values, dense near 0 and near 1, on which rows are judged.
SIGMA = np.concatenate(
    [np.logspace(-6, -2, 400), np.linspace(0.01, 1, 4001), 1 - np.logspace(-5, -2, 500)]
)
#: How far rounding may push a singular value outwards in one step, relatively.
GROWTH = {"float64": 0.0, "float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
# The negative eigenvalue that rounding leaves in a Gram matrix of norm one.
_SPURIOUS = {"float64": 1e-14, "float32": 1e-6, "float16": 4e-4}
# The amplification `max |Q| max(sigma)` that is good enough to stop adding restarts.
_GOOD = {"float64": 1e6, "float32": 1e3, "float16": 100.0}
# Past this product of amplification and spurious eigenvalue matrices came out with singular values
# of 1.4 to 9; up to it, within 0.05 of exact (benchmarks/polar_quality.py).
_UNSAFE = 0.12
_MOST_RESTARTS = 4
_DIVERGED = 1.6  # an iterate past this is on its way out


def evaluate(rows: Rows, x: np.ndarray | float, growth: float = 0.0) -> np.ndarray:
    """Applies the rows' quintics one after the other, each to values enlarged by `growth`."""
    y = np.asarray(x, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for a, b, c in rows:
            y = y * (1 + growth)
            square = y * y
            y = y * (a + square * (b + square * c))
    return np.asarray(y)


def with_safety_factor(rows: Rows, s: float) -> Rows:
    """Shrinks the argument of every row, `p(x / s)`, which may then be a little more than 1.

    Rows with `p(1) = 1` and `p'(1) = 0` pull such values back by themselves and stay as they are
    (arXiv 2505.16932, section 3.4).
    """
    return tuple(
        (a, b, c)
        if abs(a + b + c - 1) < 1e-12 and abs(a + 3 * b + 5 * c) < 1e-12
        else (a / s, b / s**3, c / s**5)
        for a, b, c in rows
    )


class CoefficientSet(NamedTuple):
    """A named schedule of Newton-Schulz steps."""

    rows: Rows
    preconditioning: str = "frobenius"  # the first rescaling that it was made for
    repeat_row: Row | None = None  # of all further steps, where the source has one


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
# Each row is the minimax quintic on the interval that the rows before it leave of [0.003, 1].
_MINIMAX4: Rows = (
    (8.383673612923165, -24.765905857974534, 18.357081892887596),
    (4.04342043370043, -3.011404993841536, 0.569512150319183),
    (3.505570617243893, -2.6266538356181015, 0.5257194048203224),
    (2.490115939444256, -1.8342750827526721, 0.43683470689542514),
)


def _polar_express(safety_factor: float) -> CoefficientSet:
    return CoefficientSet(with_safety_factor(_POLAR_EXPRESS, safety_factor), repeat_row=_CONVERGE)


#: Every named set. The names that `ns_coeffs` allows are these and `ALIASES`.
COEFFICIENT_SETS: Mapping[str, CoefficientSet] = {
    # Jordan et al. 2024, kellerjordan.github.io/posts/muon
    "keller_jordan": CoefficientSet((_KELLER_JORDAN,) * 5, repeat_row=_KELLER_JORDAN),
    "you": CoefficientSet(_YOU),  # Jiacheng You 2025, in KellerJordan/modded-nanogpt
    # Amsel et al. 2025, arXiv 2505.16932, by their safety factor
    "polar_express": _polar_express(1.01),
    "polar_express_1.00": _polar_express(1.0),
    "polar_express_1.02": _polar_express(1.02),
    "polar_express_1.05": _polar_express(1.05),
    "cans": CoefficientSet(_CANS),  # Grishina et al. 2025, arXiv 2506.10935
    # DeepSeek-V4 technical report
    "deepseek_v4": CoefficientSet((_KELLER_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2),
    "turbo": CoefficientSet(_TURBO, "aol"),  # Boissin et al. 2025, arXiv 2512.04632
    "minimax4": CoefficientSet(_MINIMAX4, "schatten8", repeat_row=_CONVERGE),
}
#: Other names for the same sets; "standard" and "dion" are Optax's.
ALIASES: Mapping[str, str] = {"standard": "keller_jordan", "dion": "you", "quintic": "you"}


def resolve_coefficients(ns_coeffs: object, ns_steps: object = None) -> tuple[Rows, CoefficientSet]:
    """Turns `ns_coeffs` and `ns_steps` into the rows to run, and the set that they come from."""
    for name, value in (("ns_coeffs", ns_coeffs), ("ns_steps", ns_steps)):
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
            raise TypeError(
                f"{name} contains a traced value, but the steps must be known while tracing: pass "
                f"Python numbers. Under optax.inject_hyperparams pass static_args=({name!r},)."
            )
    steps = np.asarray(5 if ns_steps is None else ns_steps)
    is_integer = not steps.ndim and steps.dtype.kind in "iu"
    if not is_integer or steps < 1:
        raise (ValueError if is_integer else TypeError)(
            f"ns_steps must be None or an integer of at least 1, got {ns_steps!r}."
        )
    if isinstance(ns_coeffs, str):
        label, key = repr(ns_coeffs), ALIASES.get(ns_coeffs, ns_coeffs)
        if key not in COEFFICIENT_SETS:
            names = ", ".join(map(repr, (*COEFFICIENT_SETS, *ALIASES)))
            raise ValueError(
                f"ns_coeffs={label} is not a coefficient set. Names are {names}; or pass a triple "
                "(a, b, c) or rows ((a, b, c), ...)."
            )
        source = COEFFICIENT_SETS[key]
    else:
        array: np.ndarray = np.empty(0)
        with contextlib.suppress(TypeError, ValueError):
            array = np.asarray(ns_coeffs, np.float64)
        has_rows = array.ndim in (1, 2) and array.size and array.shape[-1] == 3
        if not has_rows or not np.isfinite(array).all():
            raise ValueError(
                f"ns_coeffs={ns_coeffs!r}: expected a name, a triple (a, b, c) of finite numbers, "
                "or rows ((a, b, c), ...)."
            )
        array = np.tile(array, (int(steps), 1)) if array.ndim == 1 else array
        source = CoefficientSet(tuple((float(a), float(b), float(c)) for a, b, c in array))
        label = "the given ns_coeffs"
    rows, further = source.rows, source.repeat_row
    count = len(rows) if ns_steps is None else int(steps)
    if count <= len(rows):
        return rows[:count], source
    if further is None:
        going_on = ", ".join(repr(n) for n, s in COEFFICIENT_SETS.items() if s.repeat_row)
        raise ValueError(
            f"ns_steps={count} is more than the {len(rows)} rows of {label}, and their source has "
            f"no row for further steps. Pass ns_steps=None or at most {len(rows)}, more rows, or "
            f"one of the sets without this limit ({going_on})."
        )
    return rows + (further,) * (count - len(rows)), source


def find_sign_flip(rows: Rows) -> float | None:
    """Finds a singular value in (0, 1] that the rows would turn negative or blow up."""
    y = evaluate(rows, SIGMA)
    bad = np.flatnonzero((y < 0) | ~np.isfinite(y))
    return float(SIGMA[bad[0]]) if len(bad) else None


@functools.lru_cache(maxsize=256)
def guard_rows(rows: Rows, dtype: str) -> Rows:
    """Adds a safety factor to rows that could diverge by rounding in `dtype`.

    If values that rounding moves outwards at every step diverge, the factor is twice that: with
    once, one of 2,000 Gaussian matrices of 2 x 3 still diverged in bfloat16 with "minimax4"; with
    twice, none of 40,000. Rows that diverge in exact arithmetic are left unchanged.
    """
    growth = GROWTH[dtype]
    guarded = with_safety_factor(rows, 1 + 2 * growth)
    largest, better = (
        np.nan_to_num(np.abs(evaluate(each, SIGMA, growth)), nan=np.inf).max()
        for each in (rows, guarded)
    )
    return guarded if largest > _DIVERGED and better < largest else rows


@functools.lru_cache(maxsize=1024)
def amplification(before: Rows, segment: Rows, spurious: float) -> float:
    """Simulates `max |Q| max(sigma)` of the steps between two restarts, after the rows `before`."""
    sigma = np.abs(evaluate(before, SIGMA))
    largest = max(1.0, float(sigma.max()))
    r = np.append(sigma**2, -spurious * largest**2)  # the eigenvalues of R
    q = np.ones_like(r)
    with np.errstate(all="ignore"):
        for a, b, c in segment:
            z = a + b * r + c * r**2
            q, r = q * z, r * z * z
        return float(np.nan_to_num(np.abs(q) * largest, nan=np.inf).max())


@functools.lru_cache(maxsize=256)
def choose_restarts(rows: Rows, dtype: str) -> tuple[int, ...] | None:
    """Chooses after which steps the Gram form restarts; None if it is unsafe with any restarts.

    Uses the fewest restarts that keep the amplification of every segment below the bound, at the
    positions that minimise the worst segment's. In bfloat16 the Gram form is never safe.
    """
    if dtype == "bfloat16":
        return None
    rows = guard_rows(rows, dtype)
    spurious = _SPURIOUS[dtype]

    def worst(places: tuple[int, ...]) -> float:
        segments = itertools.pairwise((0, *places, len(rows)))
        return max(amplification(rows[:i], rows[i:j], spurious) for i, j in segments)

    best: list[tuple[float, tuple[int, ...]]] = []
    for count in range(min(_MOST_RESTARTS, len(rows) - 1) + 1):
        candidates = itertools.combinations(range(1, len(rows)), count)
        best.append(min((worst(places), places) for places in candidates))
        if best[-1][0] <= _GOOD[dtype]:
            return best[-1][1]
    factor, places = min(best)
    return places if factor * spurious <= _UNSAFE else None
