"""Where the Gram form restarts: a simulation of what rounding does to it.

The Gram form never looks at `X` between restarts, so its small matrix `R` must stand for `X X^H`
alone. Rounding makes some eigenvalues of `R` slightly negative, which no `X X^H` has, and there the
polynomials grow faster than anywhere in [0, 1]: after five steps an eigenvalue of -4e-4 has made
the accumulated factor `Q` useless (condition number 1e6 to 1e12). A restart computes `X <- Q X` and
`R = X X^H` anew. So: follow a spectrum that contains such an eigenvalue through the steps, and put
the restarts where the largest condition number of any `Q` is smallest.
"""

import functools
import itertools
import math

import numpy as np

from muonclip_jax.polar.generators import Rows

#: The spurious eigenvalue by dtype: about the rounding of one Gram matrix of norm one.
SPURIOUS = {"float16": 4e-4, "bfloat16": 4e-3, "float32": 1e-6, "float64": 1e-14}
#: The condition number of Q that is good enough to stop adding restarts.
CONDITION_LIMIT = {"float16": 100.0, "bfloat16": 30.0, "float32": 1e3, "float64": 1e6}
_MOST_RESTARTS = 4
# Past this product of condition number and spurious eigenvalue ill-conditioned matrices came out
# with singular values of 1.4 to 9 (benchmarks/polar_quality.py); up to it, within .09 of exact.
_UNSAFE = 0.12


def segment_conditions(rows: Rows, restarts: tuple[int, ...], spurious: float) -> tuple[float, ...]:
    """Simulates the condition number of every accumulated `Q`.

    Args:
        rows: Coefficients, one `(a, b, c)` a step.
        restarts: The numbers of steps after which the iteration restarts, increasing.
        spurious: Size of the negative eigenvalue that rounding leaves in each fresh `R`.

    Returns:
        One condition number a segment; infinite where it overflows.

    Example:
        >>> keller_jordan = ((3.4445, -4.7750, 2.0315),) * 5
        >>> [round(c) for c in segment_conditions(keller_jordan, (3,), 4e-4)]
        [63, 19]
    """
    sigma = np.concatenate([np.linspace(0, 1, 2001), np.logspace(-6, 0, 500)])
    conditions = []
    with np.errstate(all="ignore"):
        for start, stop in itertools.pairwise((0, *restarts, len(rows))):
            eigenvalues = np.append(sigma**2, -spurious)
            q = np.ones_like(eigenvalues)
            for a, b, c in rows[start:stop]:
                z = a + b * eigenvalues + c * eigenvalues**2
                q = q * z
                eigenvalues = eigenvalues * z * z
            size = np.abs(q)
            condition = float(size.max() / size.min())
            conditions.append(condition if math.isfinite(condition) else math.inf)
            sigma = sigma * q[:-1]
    return tuple(conditions)


@functools.lru_cache(maxsize=256)
def choose_restarts(rows: Rows, dtype: str = "float16") -> tuple[int, ...]:
    """Chooses after which steps the Gram form restarts.

    Takes as few restarts as keep the largest condition number of `Q` below `CONDITION_LIMIT`, or,
    where no number of them does, as few as come within 5 % of the best; and of the places for so
    many the ones with the smallest largest condition number.

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
    best: list[tuple[float, float, tuple[int, ...]]] = []
    for count in range(min(_MOST_RESTARTS, len(rows) - 1) + 1):
        candidates = []
        for places in itertools.combinations(range(1, len(rows)), count):
            conditions = segment_conditions(rows, places, SPURIOUS[dtype])
            # Ties in the largest (one step alone can set it) are broken by the whole product.
            total = sum(math.log(c) for c in conditions)
            candidates.append((float(f"{max(conditions):.2g}"), total, places))
        best.append(min(candidates))
        if best[-1][0] <= CONDITION_LIMIT[dtype]:
            return best[-1][2]
    good = 1.05 * min(best)[0]
    return next(places for worst, _, places in best if worst <= good)


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
    conditions = segment_conditions(rows, choose_restarts(rows, dtype), SPURIOUS[dtype])
    return max(conditions) * SPURIOUS[dtype] <= _UNSAFE
