"""Coefficient generators: minimax odd polynomials, composed greedily, in float64 NumPy.

A Newton-Schulz step maps every singular value by an odd polynomial. The best polynomial for values
in `[lower, upper]` is the one whose largest distance from 1 is smallest; that error
*equioscillates*, so it is found by the Remez exchange. After the step the values lie in
`[1 - e, 1 + e]`, where the next best polynomial starts: the greedy composition, which is optimal
among all compositions of the same degrees (Amsel et al., arXiv 2505.16932).
"""

import math

import numpy as np

Row = tuple[float, float, float]
Rows = tuple[Row, ...]

#: The cushion of the published Polar Express rows.
POLAR_EXPRESS_CUSHION = 0.02407327424182761
#: Published safety factor for bfloat16.
POLAR_EXPRESS_SAFETY = 1.01

# Below this relative width the minimax quintic is the Newton-Schulz quintic to rounding, and the
# linear system of the exchange is singular to rounding.
_NARROW = 5e-6
_EXCHANGES = 100


def evaluate(rows: Rows, x: np.ndarray | float) -> np.ndarray:
    """Applies the rows' odd quintics one after the other to `x`.

    Example:
        >>> float(evaluate(((2.0, -1.5, 0.5),), 1.0))
        1.0
    """
    x = np.asarray(x, np.float64)
    for a, b, c in rows:
        square = x * x
        x = x * (a + square * (b + square * c))
    return np.asarray(x)


def with_safety_factor(rows: Rows, safety_factor: float) -> Rows:
    """Shrinks the argument of every row: `p(x / s)`, that is `(a / s, b / s^3, c / s^5)`.

    Rounding can push a singular value past the interval that a row was made for, where minimax
    polynomials rise steeply. Rows with `p(1) = 1` and `p'(1) = 0` pull such values back by
    themselves and stay as they are.

    Args:
        rows: Coefficients `(a, b, c)`, one triple a step.
        safety_factor: `s`, at least 1.

    Returns:
        As many rows.

    Example:
        >>> with_safety_factor(((1.5, -0.5, 0.0), (3.0, -2.0, 0.0)), 2.0)
        ((1.5, -0.5, 0.0), (1.5, -0.25, 0.0))

    References:
        Amsel et al., "The Polar Express", arXiv 2505.16932, section 3.4.
    """

    def contracts(row: Row) -> bool:
        a, b, c = row
        return abs(a + b + c - 1) < 1e-12 and abs(a + 3 * b + 5 * c) < 1e-12

    s = float(safety_factor)
    return tuple(
        row if contracts(row) else (row[0] / s, row[1] / s**3, row[2] / s**5) for row in rows
    )


def _cubic(lower: float, upper: float) -> Row:
    """The minimax cubic on `[lower, upper]` in closed form (arXiv 2506.10935, section 3)."""
    total = lower**2 + lower * upper + upper**2
    e = math.sqrt(total / 3)
    k = 2 / (2 * e**3 + lower**2 * upper + upper**2 * lower)
    return (k * total, -k, 0.0)


def _unit_quintic(lower: float) -> Row:
    """The minimax quintic on `[lower, 1]` by the Remez exchange."""
    if lower > 1 - _NARROW:
        return (15 / 8, -10 / 8, 3 / 8)
    # The inner extremes; exact in the limit lower -> 1.
    q, r = (3 * lower + 1) / 4, (lower + 3) / 4
    a = b = c = 0.0
    error = math.inf
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    for _ in range(_EXCHANGES):
        x = np.array([lower, q, r, 1.0])
        # 1 - p(x_i) = (-1)^i error at four points, which move to the extremes of p.
        system = np.stack([x, x**3, x**5, signs], axis=1)
        previous = error
        a, b, c, error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        if abs(error - previous) < 1e-16:
            break
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return (a, b, c)


def optimal_odd_polynomial(lower: float, upper: float, *, degree: int = 5) -> Row:
    """Finds the odd polynomial nearest to 1 on an interval.

    It minimises `max |1 - p(x)|` over `lower <= x <= upper`, with `p(x) = a x + b x^3 + c x^5`.

    Args:
        lower: Left end, positive.
        upper: Right end, at least `lower`.
        degree: 3 (closed form, `c = 0`) or 5 (Remez exchange).

    Returns:
        `(a, b, c)` as Python floats.

    Raises:
        ValueError: If the interval is empty or not positive, or the degree is another one.

    Example:
        >>> optimal_odd_polynomial(1.0, 1.0)
        (1.875, -1.25, 0.375)
        >>> tuple(round(v, 4) for v in optimal_odd_polynomial(1.0, 1.0, degree=3))
        (1.5, -0.5, 0.0)

    References:
        Grishina, Smirnov and Rakhuba, "Accelerating Newton-Schulz iteration for orthogonalization
        via Chebyshev-type polynomials", arXiv 2506.10935.
    """
    lower, upper = float(lower), float(upper)
    if not (0 < lower <= upper < math.inf):
        raise ValueError(
            f"The interval must satisfy 0 < lower <= upper, got lower={lower!r}, upper={upper!r}. "
            "Singular values of a normalised matrix lie in (0, 1]: take for example lower=1e-3, "
            "upper=1."
        )
    if degree == 3:
        return _cubic(lower, upper)
    if degree != 5:
        raise ValueError(f"degree must be 3 or 5, got {degree!r}.")
    a, b, c = _unit_quintic(lower / upper)
    return (a / upper, b / upper**3, c / upper**5)


def _check_composition(lower_bound: float, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}.")
    if not 0 < lower_bound <= 1:
        raise ValueError(
            f"lower_bound must lie in (0, 1], got {lower_bound!r}: it is the smallest singular "
            "value, after division by the norm, that is to be brought near 1. Take 1e-3."
        )


def polar_express_coefficients(
    lower_bound: float = 1e-3,
    steps: int = 5,
    *,
    safety_factor: float = POLAR_EXPRESS_SAFETY,
    cushion: float = POLAR_EXPRESS_CUSHION,
) -> Rows:
    """Generates Polar Express rows: the greedy minimax composition of quintics.

    Step `t` takes the minimax quintic on `[l_t, u_t]`, starting from `[lower_bound, 1]`, and
    `l_(t+1) = p_t(l_t)`, `u_(t+1) = 2 - l_(t+1)`. Where `l_t < cushion * u_t` the quintic is made
    for `[cushion * u_t, u_t]` instead and recentred around 1 on the whole interval, which keeps it
    from nearly touching zero inside. At the end every row is shrunk by `safety_factor`.

    Args:
        lower_bound: Smallest singular value that should come out near 1.
        steps: Number of rows.
        safety_factor: `s` of `with_safety_factor`; 1 leaves the exact rows.
        cushion: Relative left end below which an interval is not followed; 0 follows always.

    Returns:
        A tuple of `steps` rows, to be passed as `ns_coeffs`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> rows = polar_express_coefficients(steps=2, safety_factor=1.0)
        >>> [round(v, 6) for v in rows[0]]
        [8.287212, -23.595887, 17.300387]

    References:
        Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932, algorithm 1.
    """
    _check_composition(lower_bound, steps)
    if not safety_factor >= 1:
        raise ValueError(
            f"safety_factor must be at least 1, got {safety_factor!r}. Values in use are 1.01, "
            "1.02 and 1.05; 1 means none."
        )
    if not 0 <= cushion < 1:
        raise ValueError(
            f"cushion must lie in [0, 1), got {cushion!r}. The published value is "
            f"{POLAR_EXPRESS_CUSHION}; 0 means none."
        )
    rows: list[Row] = []
    lower, upper = float(lower_bound), 1.0
    for _ in range(steps):
        row = optimal_odd_polynomial(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            ends = evaluate((row,), np.array([lower, upper]))
            recentre = 2 / float(ends.sum())
            row = (row[0] * recentre, row[1] * recentre, row[2] * recentre)
        rows.append(row)
        lower = min(float(evaluate((row,), lower)), 1.0)
        upper = 2 - lower
    return with_safety_factor(tuple(rows), safety_factor)


def cans_coefficients(lower_bound: float = 1e-3, steps: int = 5, *, degree: int = 5) -> Rows:
    """Generates Chebyshev-type (CANS) rows: minimax polynomials of degree 3 or 5, composed.

    Each row is optimal on exactly the interval that the rows before it leave. Nothing protects
    them from rounding: a value past 1 grows without bound.

    Args:
        lower_bound: Smallest singular value that should come out near 1.
        steps: Number of rows.
        degree: 3 or 5.

    Returns:
        A tuple of `steps` rows, to be passed as `ns_coeffs`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> [[round(v, 4) for v in row] for row in cans_coefficients(steps=2)]
        [[8.4703, -25.1081, 18.6293], [4.1828, -3.1087, 0.5806]]

    References:
        Grishina, Smirnov and Rakhuba, arXiv 2506.10935.
    """
    _check_composition(lower_bound, steps)
    rows: list[Row] = []
    lower, upper = float(lower_bound), 1.0
    for _ in range(steps):
        row = optimal_odd_polynomial(lower, upper, degree=degree)
        rows.append(row)
        lower = min(float(evaluate((row,), lower)), 1.0)
        upper = 2 - lower
    return tuple(rows)
