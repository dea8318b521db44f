"""The Newton-Schulz iteration on wide matrices, in three forms with the same result.

    A = X X^H                         (1)
    B = b A + c A A                   (2)
    X <- a X + B X                    (3)

In exact arithmetic this applies the odd quintic `a x + b x^3 + c x^5` to every singular value and
leaves the singular vectors alone. The loops are unrolled and the coefficients are Python floats: a
loop would keep XLA from fusing the scalings into the products, and five steps make a small program.

All three take `(..., m, n)` with `m <= n`, normalised (`normalize`), of at least 32 bits, and
return the result in the dtype of the plan.

References:
    Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    Zhang, Amsel, Chen and Dao 2026, "Gram Newton-Schulz".
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.newton_schulz.normalization import rescale
from muonclip_jax.newton_schulz.plan import ResolvedPlan
from muonclip_jax.newton_schulz.products import (
    accumulator,
    gram,
    matmul,
    polynomial,
    symmetric_product,
)


def newton_schulz(X: jax.Array, plan: ResolvedPlan) -> jax.Array:
    """Runs the plain iteration."""
    dtype, wide = jnp.dtype(plan.dtype), accumulator(plan.dtype)
    X, A, AA = rescale(X, plan)
    for step, (a, b, c) in enumerate(plan.rows):
        if step:
            A, AA = gram(X, plan.symmetric), None  # (1)
        B = polynomial(A, b, c, AA, symmetric=plan.symmetric)  # (2)
        X = (a * X.astype(wide) + matmul(B, X)).astype(dtype)  # (3)
    return X


def newton_schulz_by_columns(X: jax.Array, plan: ResolvedPlan, axes: tuple[str, ...]) -> jax.Array:
    """Runs the plain iteration on `X = [X_1 ... X_k]`, of which each device along `axes` has one.

        A = sum_i X_i X_i^H               all-reduce of an m x m matrix
        B = b A + c A A                   each device computes some rows; all-gather
        X_i <- a X_i + B X_i              no communication

    All `k` devices together do the work of one.
    """
    dtype, wide = jnp.dtype(plan.dtype), accumulator(plan.dtype)
    X, A, AA = rescale(X, plan, axes)
    for step, (a, b, c) in enumerate(plan.rows):
        if step:
            A, AA = lax.psum(gram(X, plan.symmetric), axes), None  # (1)
        B = polynomial(A, b, c, AA, axes=axes)  # (2)
        X = (a * X.astype(wide) + matmul(B, X)).astype(dtype)  # (3)
    return X


def gram_newton_schulz(X: jax.Array, plan: ResolvedPlan) -> jax.Array:
    """Iterates on the small matrix `R = X X^H`; the large one is touched at the ends.

        R = X X^H;  Q = I
        step:     Z = b R + c R R;  Q <- Q Z + a Q;  W = R Z + a R;  R <- Z W + a W
        restart:  X <- Q X;  R = X X^H;  Q = I
        return    Q X

    `R`, `Q` and `Z` are polynomials in the first `X X^H`: they commute and stay Hermitian. For an
    `n x m` matrix with `m = alpha n` a step costs `8 n^3` instead of `(4 alpha + 2) n^3`.
    """
    dtype, wide = jnp.dtype(plan.dtype), accumulator(plan.dtype)
    product = functools.partial(symmetric_product, symmetric=plan.symmetric)
    X, R, RR = rescale(X, plan)
    identity = jnp.eye(R.shape[-1], dtype=wide)
    for start, stop in itertools.pairwise((0, *plan.restarts, len(plan.rows))):
        if start:
            R, RR = gram(X, plan.symmetric), None
        Q = None
        for step in range(start, stop):
            a, b, c = plan.rows[step]
            Z, RR = polynomial(R, b, c, RR, symmetric=plan.symmetric), None
            if Q is None:
                Q = (Z.astype(wide) + a * identity).astype(dtype)
            else:
                Q = product(Q, Z, Q, beta=a)
            if step < stop - 1:
                W = product(R, Z, R, beta=a)
                R = product(Z, W, W, beta=a)
        assert Q is not None
        X = matmul(Q, X).astype(dtype)
    return X
