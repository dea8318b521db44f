"""The Newton-Schulz iteration (Jordan et al. 2024) on wide matrices, in two forms.

    A = X X^H                         (1)
    B = b A + c A A                   (2)
    X <- a X + B X                    (3)

In exact arithmetic this applies the odd quintic `a x + b x^3 + c x^5` to every singular value and
does not change the singular vectors. The loops are unrolled and the coefficients are Python floats:
a loop would keep XLA from fusing the scalings into the products, and five steps are a small
program.

First, `normalize` scales the singular values to [0, 1]. The tighter the bound on the largest one,
the fewer steps are needed:

- "frobenius": divide by `||X||_F`, a loose bound if the spectrum is flat.
- "schatten": divide by `||A||_F^(1/2) = (sum sigma^4)^(1/4)`; the first step computes `A` anyway.
- "schatten8": divide by `||A A||_F^(1/4) = (sum sigma^8)^(1/8)`; in 32 bits `A A` is free as well.
- "spectral": divide by the largest singular value, which costs an eigenvalue computation.
- "aol": divide row `i` by `(sum_j |A_ij|)^(1/2)`. The result is not the polar factor of `X`.

All start from the Frobenius norm, which keeps all numbers in the range of float16. `axes` are the
mapped axes over which the columns of a matrix are sharded; () if they are not.

Most products have a Hermitian result: `X X^H`, and products of polynomials of it, which commute:
`b A + c A A`, `Q Z + a Q`. `symmetric` selects the implementation: "xla" computes them in full;
"triangle" one triangle of 2 x 2 blocks, where that is faster on a CPU; a name in
`kernels.SYMMETRIC` that kernel.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._devices import all_gather
from muonclip_jax.kernels import SYMMETRIC, multiply_symmetric
from muonclip_jax.newton_schulz.plan import ResolvedPlan

#: From so many rows on "triangle" computes three of four blocks: a quarter of the work less, 10 to
#: 20 % of the time of a whole polar factor at 768 rows. More blocks save little more and compile
#: twice as long; small matrices lose.
SPLIT_FROM = 512


def newton_schulz(
    x: jax.Array, plan: ResolvedPlan, eps: jax.typing.ArrayLike, axes: tuple[str, ...] = ()
) -> jax.Array:
    """Runs the plain iteration.

    Each device along `axes` has some columns, `X_i` of `X = [X_1 ... X_k]`:

    A = sum_i X_i X_i^H               all-reduce of an m x m matrix
    B = b A + c A A                   each device computes some rows; all-gather
    X_i <- a X_i + B X_i              no communication
    """
    dtype, wide = jnp.dtype(plan.dtype), accumulator(plan.dtype)
    X, A, AA = normalize(x, plan, eps, axes)
    for step, (a, b, c) in enumerate(plan.rows):
        if step:
            A, AA = gram(X, plan.symmetric, axes=axes), None  # (1)
        B = polynomial(A, b, c, AA, symmetric=plan.symmetric, axes=axes)  # (2)
        X = (a * X.astype(wide) + matmul(B, X)).astype(dtype)  # (3)
    return X


def gram_newton_schulz(x: jax.Array, plan: ResolvedPlan, eps: jax.typing.ArrayLike) -> jax.Array:
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
    X, R, RR = normalize(x, plan, eps)
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
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Divides wide matrices by a bound on their largest singular value.

    `eps` is the smallest divisor of a matrix whose largest entry is near one, so it affects only
    the zero matrix; without the plan's `relative_eps` it is added to the norm, as in Optax.

    Returns `X`, `A`, and `A A` if it was computed, for the first step, in the plan's dtype.
    """
    dtype, wide = jnp.dtype(plan.dtype), accumulator(plan.dtype)
    X, power = scale_by_power_of_two(x.astype(jnp.promote_types(wide, x.dtype)), axes)
    norm = _norm(X, axes)
    if plan.preconditioning == "spectral":
        safe = jnp.where(norm > 0, norm, 1)
        A = gram(X / safe.astype(X.dtype), axes=axes)
        norm = safe * jnp.sqrt(jnp.abs(jnp.linalg.eigvalsh(A)[..., -1:, None]))
    divisor = jnp.maximum(norm, eps) if plan.relative_eps else norm + eps * power
    X = (X / jnp.where(divisor == 0, 1, divisor).astype(X.dtype)).astype(wide)
    low, bounded = X.astype(dtype), plan.preconditioning in ("frobenius", "spectral")
    A, AA = gram(low, plan.symmetric, wide=not bounded, axes=axes), None
    if bounded:
        return low, A, None
    if plan.preconditioning == "aol":
        tiny = jnp.finfo(A.dtype).tiny
        rows = jnp.sum(jnp.abs(A), axis=-1, keepdims=True)
        scale = jnp.where(rows > tiny, lax.rsqrt(jnp.maximum(rows, tiny)), 0)
        A = (A * scale) * scale.mT
        return (X * scale.astype(X.dtype)).astype(dtype), A.astype(dtype), None
    bound = _norm_or_one(A)
    A = A / bound.astype(A.dtype)
    if plan.preconditioning == "schatten8":
        AA = polynomial(A.astype(dtype), 0.0, 1.0, symmetric=plan.symmetric, axes=axes)
        AA = AA.astype(A.dtype)
        tighter = jnp.sqrt(_norm_or_one(AA))
        A = A / tighter.astype(A.dtype)
        AA = None if plan.extra_squares else AA / (tighter**2).astype(AA.dtype)
        bound = bound * tighter
    return (X / jnp.sqrt(bound).astype(X.dtype)).astype(dtype), A.astype(dtype), AA


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


def _norm(x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """Returns the Frobenius norm over the last two axes, kept as axes of length one."""
    squares = jnp.sum(jnp.abs(x) ** 2, axis=(-2, -1), keepdims=True)
    return jnp.sqrt(lax.psum(squares, axes) if axes else squares)


def _norm_or_one(x: jax.Array) -> jax.Array:
    # One where there is nothing to divide by. A tiny number would not do: XLA makes one division of
    # two, and the product of two tiny numbers is zero.
    norm = _norm(x)
    return jnp.where(norm > jnp.finfo(norm.dtype).tiny, norm, 1)


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns what products of `dtype` accumulate in: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `x y`, accumulated and returned in `accumulator`."""
    return jnp.matmul(
        x,
        y,
        # TPUs and GPUs would otherwise round float32 operands to bfloat16 or TF32.
        precision=lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else lax.Precision.DEFAULT,
        preferred_element_type=accumulator(x.dtype),
    )


def gram(
    x: jax.Array, symmetric: str = "xla", *, wide: bool = False, axes: tuple[str, ...] = ()
) -> jax.Array:
    """Computes `x x^H`, in the dtype of `x` or in `accumulator`.

    Of a matrix whose columns are sharded over mapped `axes`, the sum over the devices.
    """
    out = accumulator(x.dtype) if wide else x.dtype
    with jax.named_scope("gram"):
        if symmetric in SYMMETRIC and out == x.dtype:
            product = multiply_symmetric(symmetric, x, x)
        else:
            product = _hermitian(x, x.mT.conj(), x, symmetric).astype(out)
    return lax.psum(product, axes) if axes else product


def symmetric_product(
    x: jax.Array,
    y: jax.Array,
    addend: jax.Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    symmetric: str = "xla",
) -> jax.Array:
    """Computes `alpha x y + beta addend` of Hermitian matrices that commute, rounded once."""
    with jax.named_scope("symmetric_product"):
        if symmetric in SYMMETRIC:
            return multiply_symmetric(symmetric, x, y, addend, alpha, beta)
        result = alpha * _hermitian(x, y, y, symmetric)
        if addend is not None:
            result = result + beta * addend.astype(result.dtype)
        return result.astype(x.dtype)


def polynomial(
    A: jax.Array,
    b: float,
    c: float,
    square: jax.Array | None = None,
    *,
    symmetric: str = "xla",
    axes: tuple[str, ...] = (),
) -> jax.Array:
    """Computes `b A + c A A` of Hermitian `A`, rounded once; `square` is `A A`, where it is known.

    Devices along mapped `axes`, which all have `A`, compute some rows each and gather the result.
    """
    wide = accumulator(A.dtype)
    if not c or square is not None:
        result = b * A.astype(wide)
        if square is not None:
            result = result + c * square.astype(wide)
        return result.astype(A.dtype)
    if not axes:
        return symmetric_product(A, A, A, alpha=c, beta=b, symmetric=symmetric)
    m, axis = A.shape[-1], A.ndim - 2
    rows = -(-m // lax.axis_size(axes))
    padding = [(0, 0)] * axis + [(0, rows * lax.axis_size(axes) - m), (0, 0)]
    start = lax.axis_index(axes) * rows
    mine = lax.dynamic_slice_in_dim(jnp.pad(A, padding), start, rows, axis)
    result = c * matmul(mine, A) + b * mine.astype(wide)
    # Rounded before it is sent: half the bytes in 16 bits.
    gathered = all_gather(result.astype(A.dtype), axes, axis)
    return lax.slice_in_dim(gathered, 0, m, axis=axis)


def _hermitian(x: jax.Array, y: jax.Array, adjoint_of_y: jax.Array, symmetric: str) -> jax.Array:
    """Computes `x y`, known to be Hermitian, by XLA."""
    rows = x.shape[-2]
    if symmetric != "triangle" or rows < SPLIT_FROM or x.dtype.itemsize < 4:
        return matmul(x, y)
    half = rows // 2
    upper = matmul(x[..., :half, :], y)
    # Cut between rows, which lie together: a cut between columns is a slow copy.
    corner = matmul(x[..., half:, :], adjoint_of_y[..., half:, :].mT.conj())
    # Written into one array: XLA's CPU compiler would compile every concatenation by itself.
    square = jnp.pad(upper, [(0, 0)] * (x.ndim - 2) + [(0, rows - half), (0, 0)])
    square = square.at[..., half:, :half].set(upper[..., half:].mT.conj())
    return square.at[..., half:, half:].set(corner)
