"""The first rescaling: it brings the singular values into [0, 1].

Newton-Schulz converges from singular values in (0, 1], and every step that only makes small ones
grow is lost; so the tighter the bound on the largest one, the better. In order of tightness:

- "frobenius": divide by `||X||_F`. Far too much when the spectrum is flat.
- "schatten": divide by `||A||_F^(1/2) = (sum sigma^4)^(1/4)`, where `A = X X^H` is what the first
  step computes anyway.
- "schatten8": divide by `||A A||_F^(1/4) = (sum sigma^8)^(1/8)`; the first step needs that square
  too, so in 32 bits this bound is free as well.
- "spectral": divide by the largest singular value. Exact, but costs an eigenvalue computation.
- "aol": divide row `i` by `(sum_j |A_ij|)^(1/2)`. Rows of different size end up alike, so the
  result is near orthogonal, yet not the polar factor of `X`.

The last step of each is invariant to the scale of `X`, so all start from the Frobenius norm, which
keeps every number of the iteration within the range of float16. `axes` names the mapped axes whose
devices each have some columns of every matrix; () means that a device has them all.
"""

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.newton_schulz.plan import ResolvedPlan
from muonclip_jax.newton_schulz.products import accumulator, gram, polynomial


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


def scale_by_power_of_two(x: jax.Array, axes: tuple[str, ...] = ()) -> tuple[jax.Array, jax.Array]:
    """Brings the largest entry of each matrix (real or imaginary part) near one, without rounding.

    The squares in the norm then neither overflow nor vanish, whatever the scale of `x`. The largest
    entry is found among the bits, which are ordered as sizes are. CPUs and TPUs read a subnormal
    number as zero, so where those count no product could lift them; but the bits are an integer,
    the number's multiple of the smallest one.

    Returns the matrices, their largest entries in [1, 4) unless they were subnormal or zero; and
    the powers of two that they were multiplied by, `(..., 1, 1)`.
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


def normalize(
    x: jax.Array, plan: ResolvedPlan, eps: jax.typing.ArrayLike, axes: tuple[str, ...] = ()
) -> jax.Array:
    """Divides wide matrices by their Frobenius (or spectral) norm; returns float32 or wider.

    `eps` is the smallest divisor once the largest entry is near one, which only the zero matrix
    meets; without the plan's `relative_eps` it is added to the norm as it is, as in Optax.
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


def rescale(
    X: jax.Array, plan: ResolvedPlan, axes: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Divides normalised `X` by a norm of `A` or of `A A`, where the preconditioning is one.

    Returns what the first step starts from, in the plan's dtype: `X`, `A`, and `A A` where it is
    known.
    """
    dtype = jnp.dtype(plan.dtype)
    low = X.astype(dtype)
    if plan.preconditioning in ("frobenius", "spectral"):
        return low, _sum(gram(low, plan.symmetric), axes), None
    A = _sum(gram(low, plan.symmetric, accumulator(dtype)), axes)
    if plan.preconditioning == "aol":
        tiny = jnp.finfo(A.dtype).tiny
        rows = jnp.sum(jnp.abs(A), axis=-1, keepdims=True)
        scale = jnp.where(rows > tiny, lax.rsqrt(jnp.maximum(rows, tiny)), 0)
        A = (A * scale) * jnp.swapaxes(scale, -1, -2)
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
