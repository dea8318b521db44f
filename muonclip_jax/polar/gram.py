"""The Gram form of Newton-Schulz: iterate on the small matrix, touch the large one at the ends.

    R = X X^H;  Q = I
    step:     Z = b R + c R^2;  Q <- Q Z + a Q;  W = R Z + a R;  R <- Z W + a W
    restart:  X <- Q X;  R = X X^H;  Q = I
    return    Q X

`R`, `Q` and `Z` are polynomials in the first `X X^H`: they commute and stay Hermitian. For an
`n x m` matrix with `m = alpha n` a step costs `8 n^3` here instead of `(4 alpha + 2) n^3`.
"""

import itertools

import jax
import jax.numpy as jnp

from muonclip_jax.polar.generators import Rows
from muonclip_jax.polar.preconditioning import rescale_first
from muonclip_jax.polar.products import accumulator_dtype, commuting, gram, matmul


def _segment(r: jax.Array, rows: Rows) -> jax.Array:
    """Returns the factor Q that the rows accumulate, starting from the Gram matrix `r`."""
    dtype, wide = r.dtype, accumulator_dtype(r.dtype)
    identity = jnp.eye(r.shape[-1], dtype=wide)
    q = None
    for index, (a, b, c) in enumerate(rows):
        z = b * r.astype(wide)
        if c:
            z = z + c * commuting(r, r)
        z = z.astype(dtype)
        if q is None:
            q = (z.astype(wide) + a * identity).astype(dtype)
        else:
            q = (commuting(q, z) + a * q.astype(wide)).astype(dtype)
        if index < len(rows) - 1:
            w = (commuting(r, z) + a * r.astype(wide)).astype(dtype)
            r = (commuting(z, w) + a * w.astype(wide)).astype(dtype)
    assert q is not None
    return q


def gram_newton_schulz(
    x: jax.Array, rows: Rows, preconditioning: str, dtype: jnp.dtype, restarts: tuple[int, ...]
) -> jax.Array:
    """Runs the Gram form.

    Args:
        x: `(..., m, n)` with `m <= n`, normalised, of at least 32 bits.
        rows: Coefficients, one `(a, b, c)` a step.
        preconditioning: Which rescaling the first step applies.
        dtype: What the products compute in; they accumulate in float32 or wider.
        restarts: After which steps to restart (`choose_restarts`).

    Returns:
        The result in `dtype`.

    References:
        Zhang, Amsel, Chen and Dao 2026, "Gram Newton-Schulz".
    """
    x, r = rescale_first(x, preconditioning, dtype)
    for start, stop in itertools.pairwise((0, *restarts, len(rows))):
        if start:
            r = gram(x).astype(dtype)
        x = matmul(_segment(r, rows[start:stop]), x).astype(dtype)
    return x


def gram_flops(rows: Rows, m: int, n: int, restarts: tuple[int, ...]) -> int:
    """Counts the multiply-adds (times two) of the Gram form on one `(m, n)` matrix."""
    small, large = min(m, n), max(m, n)
    cubes = 0
    for start, stop in itertools.pairwise((0, *restarts, len(rows))):
        steps = stop - start
        cubes += sum(1 for row in rows[start:stop] if row[2]) + 3 * (steps - 1)
    return (len(restarts) + 1) * 4 * small * small * large + cubes * 2 * small**3
