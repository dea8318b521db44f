"""Where the Gram form restarts: a simulation of what rounding does to it.

The Gram form never looks at `X` between restarts: it multiplies `X` by the factor `Q` that the
steps accumulate. Two roundings limit it. `Q` and the product `Q X` are rounded relative to their
largest entries, so a singular value comes out wrong by up to `max |Q| max(sigma)` roundings. And
`R = X X^H` is rounded relative to its own largest eigenvalue, which makes some eigenvalues slightly
negative, which no `X X^H` has; there the polynomials grow faster than anywhere in [0, 1]. A restart
computes `X <- Q X` and `R = X X^H` anew. So: follow a spectrum that contains such an eigenvalue
through the steps, and restart where the largest `max |Q| max(sigma)` of any segment is smallest.
"""

import functools
import itertools
import math

import numpy as np

from muonclip_jax.newton_schulz.generators import Rows, evaluate

#: The spurious eigenvalue by dtype: about the rounding of one Gram matrix of norm one.
SPURIOUS = {"float16": 4e-4, "bfloat16": 4e-3, "float32": 1e-6, "float64": 1e-14}
#: The amplification of rounding that is good enough to stop adding restarts.
GOOD_AMPLIFICATION = {"float16": 100.0, "bfloat16": 30.0, "float32": 1e3, "float64": 1e6}
_MOST_RESTARTS = 4
_SIGMA = np.concatenate([np.linspace(0, 1, 2001), np.logspace(-6, 0, 500)])
# Past this product of amplification and spurious eigenvalue matrices came out with singular values
# of 1.4 to 9 (benchmarks/polar_quality.py); up to it, within .05 of exact.
_UNSAFE = 0.12


def amplifications(rows: Rows, restarts: tuple[int, ...], spurious: float) -> tuple[float, ...]:
    """Simulates how far each segment between restarts amplifies rounding: `max |Q| max(sigma)`.

    Args:
        rows: Coefficients, one `(a, b, c)` a step.
        restarts: The numbers of steps after which the iteration restarts, increasing.
        spurious: Size of the negative eigenvalue that rounding leaves in a fresh `R` of norm one.

    Returns:
        One factor a segment; infinite where it overflows.

    Example:
        >>> keller_jordan = ((3.4445, -4.7750, 2.0315),) * 5
        >>> [round(factor) for factor in amplifications(keller_jordan, (3,), 4e-4)]
        [44, 14]
    """
    segments = itertools.pairwise((0, *restarts, len(rows)))
    return tuple(
        _amplification(rows[:start], rows[start:stop], spurious) for start, stop in segments
    )


@functools.lru_cache(maxsize=1024)
def _amplification(before: Rows, rows: Rows, spurious: float) -> float:
    """The amplification of one segment, which does not depend on where those before it end."""
    with np.errstate(all="ignore"):
        sigma = np.abs(evaluate(before, _SIGMA))
        largest = max(1.0, float(sigma.max()))
        eigenvalues = np.append(sigma**2, -spurious * largest**2)
        q = np.ones_like(eigenvalues)
        for a, b, c in rows:
            z = a + b * eigenvalues + c * eigenvalues**2
            q = q * z
            eigenvalues = eigenvalues * z * z
        factor = float(np.abs(q).max() * largest)
    return factor if math.isfinite(factor) else math.inf


@functools.lru_cache(maxsize=256)
def choose_restarts(rows: Rows, dtype: str = "float16") -> tuple[int, ...]:
    """Chooses after which steps the Gram form restarts.

    Takes as few restarts as keep the largest amplification below `GOOD_AMPLIFICATION`, or, where no
    number of them does, as few as come within 5 % of the best; and of the places for so many the
    ones with the smallest largest amplification.

    Args:
        rows: Coefficients, one `(a, b, c)` a step.
        dtype: What the iteration computes in.

    Returns:
        Numbers of steps, increasing, each between 1 and `len(rows) - 1`; maybe none.

    Example:
        >>> choose_restarts(((3.4445, -4.7750, 2.0315),) * 5, "float16")
        (3,)

    References:
        Zhang, Amsel, Chen and Dao 2026, "Gram Newton-Schulz".
    """
    best: list[tuple[float, tuple[int, ...]]] = []
    for count in range(min(_MOST_RESTARTS, len(rows) - 1) + 1):
        best.append(
            min(
                (max(amplifications(rows, places, SPURIOUS[dtype])), places)
                for places in itertools.combinations(range(1, len(rows)), count)
            )
        )
        if best[-1][0] <= GOOD_AMPLIFICATION[dtype]:
            return best[-1][1]
    good = 1.05 * min(best)[0]
    return next(places for worst, places in best if worst <= good)


@functools.lru_cache(maxsize=256)
def is_gram_safe(rows: Rows, dtype: str) -> bool:
    """Tells whether the best restarts make the Gram form safe in a dtype.

    Args:
        rows: Coefficients, one `(a, b, c)` a step.
        dtype: What the iteration computes in.

    Returns:
        False for bfloat16 always.

    Example:
        >>> is_gram_safe(((3.4445, -4.7750, 2.0315),) * 5, "float16")
        True
    """
    if dtype == "bfloat16":
        return False
    factors = amplifications(rows, choose_restarts(rows, dtype), SPURIOUS[dtype])
    return max(factors) * SPURIOUS[dtype] <= _UNSAFE
