"""The plain Newton-Schulz iteration on wide matrices.

    A = X X^H
    X <- a X + (b A + c A^2) X

In exact arithmetic this applies the odd quintic `a x + b x^3 + c x^5` to every singular value and
leaves the singular vectors alone. The loop is unrolled and the coefficients are Python floats: a
loop would keep XLA from fusing the scalings into the products, and five steps make a small program.
"""

import jax
import jax.numpy as jnp

from muonclip_jax.newton_schulz.generators import Rows
from muonclip_jax.newton_schulz.preconditioning import rescale_first
from muonclip_jax.newton_schulz.products import matmul_add
from muonclip_jax.newton_schulz.shares import WHOLE, Shares


def newton_schulz(
    x: jax.Array, rows: Rows, preconditioning: str, dtype: jnp.dtype, shares: Shares = WHOLE
) -> jax.Array:
    """Runs the plain iteration.

    Args:
        x: `(..., m, n)` with `m <= n`, normalised, of at least 32 bits; or the columns that a
            device has of it.
        rows: Coefficients, one `(a, b, c)` a step.
        preconditioning: Which rescaling the first step applies.
        dtype: What the products compute in; they accumulate in float32 or wider.
        shares: How devices that share the columns compute together.

    Returns:
        The result in `dtype`.

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    x, product, square = rescale_first(x, preconditioning, dtype, shares)
    for index, (a, b, c) in enumerate(rows):
        if index:
            # Rounded before the sum: where there is one, half the bytes are sent.
            product = shares.sum(shares.gram(x))
            square = None
        x = matmul_add(shares.polynomial(product, b, c, square), x, x, 1.0, a)
    return x


def plain_flops(rows: Rows, m: int, n: int) -> int:
    """Counts the multiply-adds (times two) of the plain iteration on one `(m, n)` matrix."""
    small, large = min(m, n), max(m, n)
    quintic = sum(1 for row in rows if row[2])
    return len(rows) * 4 * small * small * large + quintic * 2 * small**3
