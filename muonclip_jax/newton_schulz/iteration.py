"""The Newton-Schulz iteration (Jordan et al. 2024) on wide matrices, in three forms.

    A = X X^H                         (1)
    B = b A + c A A                   (2)
    X <- a X + B X                    (3)

In exact arithmetic this applies the odd quintic `a x + b x^3 + c x^5` to every singular value and
does not change the singular vectors. The loops are unrolled and the coefficients are Python floats:
a loop would keep XLA from fusing the scalings into the products, and five steps are a small
program.

First, `normalize` and `rescale` scale the singular values to [0, 1]. The tighter the bound on the
largest one, the fewer steps are needed:

- "frobenius": divide by `||X||_F`, a loose bound if the spectrum is flat.
- "schatten": divide by `||A||_F^(1/2) = (sum sigma^4)^(1/4)`; the first step computes `A` anyway.
- "schatten8": divide by `||A A||_F^(1/4) = (sum sigma^8)^(1/8)`; in 32 bits `A A` is free as well.
- "spectral": divide by the largest singular value, which costs an eigenvalue computation.
- "aol": divide row `i` by `(sum_j |A_ij|)^(1/2)`. The result is not the polar factor of `X`.

All start from the Frobenius norm, which keeps all numbers in the range of float16. `axes` are the
mapped axes over which the columns of a matrix are sharded; () if they are not.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

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
    """Iterates on the small `R = X X^H` (Zhang et al. 2026); `X` is used only at both ends.

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


def normalize(
    x: jax.Array, plan: ResolvedPlan, eps: jax.typing.ArrayLike, axes: tuple[str, ...] = ()
) -> jax.Array:
    """Divides wide matrices by their Frobenius (or spectral) norm; returns float32 or wider.

    `eps` is the smallest divisor of a matrix whose largest entry is near one, so it affects only
    the zero matrix; without the plan's `relative_eps` it is added to the norm, as in Optax.
    """
    wide = accumulator(plan.dtype)
    X, power = scale_by_power_of_two(x.astype(jnp.promote_types(wide, x.dtype)), axes)
    norm = _norm(X, axes)
    if plan.preconditioning == "spectral":
        safe = jnp.where(norm > 0, norm, 1)
        A = _sum(gram(X / safe.astype(X.dtype)), axes)
        norm = safe * jnp.sqrt(jnp.abs(jnp.linalg.eigvalsh(A)[..., -1:, None]))
    divisor = jnp.maximum(norm, eps) if plan.relative_eps else norm + eps * power
    return (X / jnp.where(divisor == 0, 1, divisor).astype(X.dtype)).astype(wide)


def scale_by_power_of_two(x: jax.Array, axes: tuple[str, ...] = ()) -> tuple[jax.Array, jax.Array]:
    """Scales each matrix to a largest entry (real or imaginary part) near one, without rounding.

    Also returns the powers of two, `(..., 1, 1)`. The largest entry, afterwards in [1, 4), is found
    by comparing bits as integers. CPUs and TPUs flush subnormal numbers to zero, so they cannot be
    scaled by a product; their bits, as an integer, are the multiple of the smallest number.
    """
    if jnp.iscomplexobj(x):
        parts = jnp.concatenate([jnp.real(x), jnp.imag(x)], axis=-1)
        parts, power = scale_by_power_of_two(parts, axes)
        return lax.complex(*jnp.split(parts, 2, axis=-1)), power
    info = jnp.finfo(x.dtype)
    bias, digits = info.maxexp - 1, info.nmant
    integer = jnp.dtype(f"int{info.bits}").type
    bits = lax.bitcast_convert_type(x, integer)
    size = bits & jnp.iinfo(integer).max
    largest = jnp.max(size, axis=(-2, -1), keepdims=True)
    exponent = (lax.pmax(largest, axes) if axes else largest) >> digits
    # Subnormal entries count beside a largest one that is a few digits above them at most.
    lift = bias - digits - 4
    is_small = exponent < bias - lift
    exponent = jnp.minimum(exponent + jnp.where(is_small, lift, 0), 2 * bias - 1)
    power = lax.bitcast_convert_type((2 * bias - exponent).astype(integer) << digits, info.dtype)
    multiple = size.astype(x.dtype) * 2.0 ** (lift + 1 - bias - digits)
    subnormal = jnp.where(bits < 0, -multiple, multiple)
    lifted = jnp.where(size < 1 << digits, subnormal, x * 2.0**lift)
    scaled = jnp.where(is_small, lifted, x) * power
    return scaled, power * jnp.where(is_small, 2.0**lift, 1).astype(power.dtype)


def rescale(
    X: jax.Array, plan: ResolvedPlan, axes: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Divides normalised `X` by a norm of `A` or of `A A`, if the preconditioning is one.

    Returns `X`, `A`, and `A A` if it was computed, for the first step, in the plan's dtype.
    """
    dtype = jnp.dtype(plan.dtype)
    low = X.astype(dtype)
    if plan.preconditioning in ("frobenius", "spectral"):
        return low, _sum(gram(low, plan.symmetric), axes), None
    A = _sum(gram(low, plan.symmetric, wide=True), axes)
    if plan.preconditioning == "aol":
        tiny = jnp.finfo(A.dtype).tiny
        rows = jnp.sum(jnp.abs(A), axis=-1, keepdims=True)
        scale = jnp.where(rows > tiny, lax.rsqrt(jnp.maximum(rows, tiny)), 0)
        A = (A * scale) * scale.mT
        return (X * scale.astype(X.dtype)).astype(dtype), A.astype(dtype), None
    bound = _norm_or_one(A)
    A, AA = A / bound.astype(A.dtype), None
    if plan.preconditioning == "schatten8":
        AA = polynomial(A.astype(dtype), 0.0, 1.0, symmetric=plan.symmetric, axes=axes)
        AA = AA.astype(A.dtype)
        tighter = jnp.sqrt(_norm_or_one(AA))
        A = A / tighter.astype(A.dtype)
        AA = None if plan.extra_squares else AA / (tighter**2).astype(AA.dtype)
        bound = bound * tighter
    return (X / jnp.sqrt(bound).astype(X.dtype)).astype(dtype), A.astype(dtype), AA


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.psum(x, axes) if axes else x


def _norm(x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """Returns the Frobenius norm over the last two axes, kept as axes of length one."""
    return jnp.sqrt(_sum(jnp.sum(jnp.abs(x) ** 2, axis=(-2, -1), keepdims=True), axes))


def _norm_or_one(x: jax.Array) -> jax.Array:
    # One where there is nothing to divide by. A tiny number would not do: XLA makes one division of
    # two, and the product of two tiny numbers is zero.
    norm = _norm(x)
    return jnp.where(norm > jnp.finfo(norm.dtype).tiny, norm, 1)
