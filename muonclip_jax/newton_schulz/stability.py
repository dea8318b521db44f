"""Effects of rounding on coefficient rows, simulated on singular values.

Values just above 1 diverge where a row rises steeply (`guard_rows`). The Gram form does not use `X`
between restarts (`choose_restarts`): `Q` and `Q X` are rounded relative to their largest entries,
so the error of singular values is up to `max |Q| max(sigma)` rounding units; and `R = X X^H` is
rounded relative to its largest eigenvalue, which makes some eigenvalues slightly negative, where
the polynomials grow fastest.
"""

import functools
import itertools

import numpy as np

from muonclip_jax.newton_schulz.coefficients import SIGMA, Rows, evaluate, with_safety_factor

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
