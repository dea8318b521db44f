"""The Gram form of Newton-Schulz: iterate on the small matrix, touch the large one at the ends.

    R = X X^H;  Q = I
    step:     Z = b R + c R^2;  Q <- Q Z + a Q;  W = R Z + a R;  R <- Z W + a W
    restart:  X <- Q X;  R = X X^H;  Q = I
    return    Q X

`R`, `Q` and `Z` are polynomials in the first `X X^H`: they commute and stay Hermitian. For an
`n x m` matrix with `m = alpha n` a step costs `8 n^3` here instead of `(4 alpha + 2) n^3`.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax.newton_schulz.generators import Rows
from muonclip_jax.newton_schulz.preconditioning import rescale_first
from muonclip_jax.newton_schulz.products import accumulator, matmul
from muonclip_jax.newton_schulz.shares import WHOLE, Shares


def _segment(r: jax.Array, square: jax.Array | None, rows: Rows, shares: Shares) -> jax.Array:
    """Returns the factor Q that the rows accumulate; `square` is `r r`, where that is known."""
    dtype, wide = r.dtype, accumulator(r.dtype)
    # Polynomials of one matrix: the product of two is Hermitian.
    product = shares.symmetric
    identity = jnp.eye(r.shape[-1], dtype=wide)
    q: Any = None
    for index, (a, b, c) in enumerate(rows):
        z = shares.polynomial(r, b, c, square)
        square = None
        first = q is None
        q = (z.astype(wide) + a * identity).astype(dtype) if first else product(q, z, q, beta=a)
        if index < len(rows) - 1:
            w = product(r, z, r, beta=a)
            r = product(z, w, w, beta=a)
    assert q is not None
    return q


def gram_newton_schulz(
    x: jax.Array,
    rows: Rows,
    preconditioning: str,
    dtype: jnp.dtype,
    restarts: tuple[int, ...],
    shares: Shares = WHOLE,
) -> jax.Array:
    """Runs the Gram form.

    Args:
        x: `(..., m, n)` with `m <= n`, normalised, of at least 32 bits.
        rows: Coefficients, one `(a, b, c)` a step.
        preconditioning: Which rescaling the first step applies.
        dtype: What the products compute in; they accumulate in float32 or wider.
        restarts: After which steps to restart (`choose_restarts`).
        shares: Who computes the products; one device has all columns.

    Returns:
        The result in `dtype`.

    References:
        Zhang, Amsel, Chen and Dao 2026, "Gram Newton-Schulz".
    """
    x, r, square = rescale_first(x, preconditioning, dtype, shares)
    for start, stop in itertools.pairwise((0, *restarts, len(rows))):
        if start:
            r, square = shares.gram(x), None
        q = _segment(r, square, rows[start:stop], shares)
        x = matmul(q, x).astype(dtype)
    return x


def gram_flops(rows: Rows, m: int, n: int, restarts: tuple[int, ...]) -> int:
    """Counts the multiply-adds (times two) of the Gram form on one `(m, n)` matrix."""
    small, large = min(m, n), max(m, n)
    cubes = 0
    for start, stop in itertools.pairwise((0, *restarts, len(rows))):
        steps = stop - start
        cubes += sum(1 for row in rows[start:stop] if row[2]) + 3 * (steps - 1)
    return (len(restarts) + 1) * 4 * small * small * large + cubes * 2 * small**3
