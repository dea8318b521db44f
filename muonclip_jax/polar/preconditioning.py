"""The first rescaling: it brings the singular values into [0, 1] at once.

Newton-Schulz converges from singular values in (0, 1], and every step that only makes small ones
grow is lost; so the tighter the bound on the largest one, the better. In order of tightness:

- "frobenius": divide by `||X||_F`. Far too much when the spectrum is flat.
- "schatten": divide by `||X X^H||_F^(1/2) = (sum sigma^4)^(1/4)`; `X X^H` is what the first step
  computes anyway.
- "schatten8": divide by `||(X X^H)^2||_F^(1/4) = (sum sigma^8)^(1/8)`; the first step computes that
  square too, so this bound is free as well.
- "spectral": divide by the largest singular value. Exact, but costs an eigenvalue computation.
- "aol": divide row `i` by `(sum_j |X X^H|_ij)^(1/2)`. Rows of different size end up alike, so the
  result is near orthogonal, yet not the polar factor of `X`.

The last step of each is invariant to the scale of `X`, so all start from the Frobenius norm, which
keeps every number of the iteration within the range of float16.

Every function here takes the columns that one device has of each matrix, and `Shares`, which says
how devices sum and compare what they have; by default a device has them all.
"""

import functools

import jax
import jax.numpy as jnp

from muonclip_jax.kernels.symmetric import accumulator, gram
from muonclip_jax.polar.shares import WHOLE, Shares

#: The names that `preconditioning` allows; those in `INSIDE` act on the first Gram matrix.
PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten", "schatten8")
INSIDE = ("aol", "schatten", "schatten8")


def _squares(x: jax.Array) -> jax.Array:
    return jnp.real(x) ** 2 + jnp.imag(x) ** 2 if jnp.iscomplexobj(x) else x * x


def frobenius_norm(x: jax.Array, shares: Shares = WHOLE) -> jax.Array:
    """Returns the Frobenius norm over the last two axes, kept as axes of length one."""
    return jnp.sqrt(shares.sum(jnp.sum(_squares(x), axis=(-2, -1), keepdims=True)))


def _sizes(x: jax.Array) -> jax.Array:
    """The sizes of entries: of the real or the imaginary part, whichever is larger."""
    if jnp.iscomplexobj(x):
        return jnp.maximum(jnp.abs(jnp.real(x)), jnp.abs(jnp.imag(x)))
    return jnp.abs(x)


def _largest(x: jax.Array, shares: Shares) -> jax.Array:
    return shares.max(jnp.max(x, axis=(-2, -1), keepdims=True))


def _into_range(shares: Shares, *parts: jax.Array) -> tuple[jax.Array, ...]:
    """Multiplies a matrix by 2^100 or 2^-100 if its largest entry is below 2^-100 or above 2^100.

    CPUs and TPUs read a subnormal float32 as zero, so a product cannot lift it; but its bits are an
    integer, its multiple of 2^-149. And the reciprocal of an entry above 2^126 is subnormal.
    """
    bits = [jax.lax.bitcast_convert_type(part, jnp.int32) for part in parts]
    magnitudes = [b & 0x7FFFFFFF for b in bits]
    largest = _largest(functools.reduce(jnp.maximum, magnitudes), shares)
    small, large = largest < ((127 - 100) << 23), largest > ((127 + 100) << 23)
    lifted = []
    for part, b, magnitude in zip(parts, bits, magnitudes, strict=True):
        from_bits = magnitude.astype(part.dtype) * 2.0 ** (100 - 149)
        from_bits = jnp.where(b < 0, -from_bits, from_bits)
        up = jnp.where(magnitude < (1 << 23), from_bits, part * 2.0**100)
        lifted.append(jnp.where(small, up, jnp.where(large, part * 2.0**-100, part)))
    return tuple(lifted)


def divide_by_largest_entry(x: jax.Array, shares: Shares = WHOLE) -> jax.Array:
    """Divides each matrix by its largest entry (real or imaginary part); zero stays zero.

    The squares in the norm then neither overflow nor vanish, whatever the scale of `x`.
    """
    if jnp.iscomplexobj(x):
        parts = (jnp.real(x), jnp.imag(x))
        if x.dtype == jnp.complex64:
            parts = _into_range(shares, *parts)
            x = jax.lax.complex(*parts)
    elif x.dtype == jnp.float32:
        (x,) = _into_range(shares, x)
    largest = _largest(_sizes(x), shares)
    return x / jnp.where(largest == 0, 1, largest).astype(x.dtype)


def normalize(
    x: jax.Array,
    preconditioning: str,
    eps: jax.typing.ArrayLike,
    relative_eps: bool = True,
    shares: Shares = WHOLE,
) -> jax.Array:
    """Divides wide matrices by a bound on their largest singular value, in float32 or wider.

    Args:
        x: `(..., m, n)` with `m <= n`, of at least 32 bits; or the columns that a device has of it.
        preconditioning: A name of `PRECONDITIONINGS`.
        eps: Smallest divisor, after division by the largest entry: only the zero matrix meets it.
        relative_eps: False adds `eps`, as it is, to the norm, as Optax does.
        shares: How devices that share the columns compute together.

    Returns:
        As `x`, with Frobenius (or spectral) norm one.
    """
    given = x
    x = divide_by_largest_entry(x, shares)
    norm = frobenius_norm(x, shares)
    if preconditioning == "spectral":
        safe = jnp.where(norm > 0, norm, 1)
        product = shares.sum(gram(x / safe.astype(x.dtype), implementation="xla"))
        square = jnp.linalg.eigvalsh(product)[..., -1:, None]
        norm = safe * jnp.sqrt(jnp.abs(square))
    if relative_eps:
        divisor = jnp.maximum(norm, eps)
    else:
        largest = _largest(_sizes(given), shares)
        divisor = norm + eps / jnp.where(largest == 0, 1, largest)
    return x / jnp.where(divisor == 0, 1, divisor).astype(x.dtype)


def rescale_first(
    x: jax.Array, preconditioning: str, dtype: jnp.dtype, shares: Shares = WHOLE
) -> tuple[jax.Array, jax.Array]:
    """Rescales by a norm of the first Gram matrix, and returns that matrix with the result.

    Args:
        x: `(..., m, n)`, normalised, of at least 32 bits; or the columns that a device has of it.
        preconditioning: A name of `PRECONDITIONINGS`; outside of `INSIDE` nothing is rescaled.
        dtype: What the iteration computes in.
        shares: How devices that share the columns compute together.

    Returns:
        The rescaled `x` and its Gram matrix `x x^H`, both in `dtype`.
    """
    low = x.astype(dtype)
    multiply = functools.partial(gram, low, implementation=shares.implementation)
    if preconditioning not in INSIDE:
        return low, shares.sum(multiply())
    product = shares.sum(multiply(out_dtype=accumulator(dtype)))
    tiny = jnp.finfo(product.dtype).tiny
    if preconditioning == "aol":
        rows = jnp.sum(jnp.abs(product), axis=-1, keepdims=True)
        scale = jnp.where(rows > tiny, jax.lax.rsqrt(jnp.maximum(rows, tiny)), 0)
        product = (product * scale) * jnp.swapaxes(scale, -1, -2)
        return (x * scale.astype(x.dtype)).astype(dtype), product.astype(dtype)
    # One where there is nothing to divide by. A tiny number would not do: XLA makes one division of
    # two, and the product of two tiny numbers is zero.
    bound = _or_one(frobenius_norm(product))
    product = product / bound.astype(product.dtype)
    if preconditioning == "schatten8":
        square = shares.quadratic(product.astype(dtype), 0.0, 1.0).astype(product.dtype)
        tighter = _or_one(jnp.sqrt(frobenius_norm(square)))
        product = product / tighter.astype(product.dtype)
        bound = bound * tighter
    x = x / jnp.sqrt(bound).astype(x.dtype)
    return x.astype(dtype), product.astype(dtype)


def _or_one(norm: jax.Array) -> jax.Array:
    return jnp.where(norm > jnp.finfo(norm.dtype).tiny, norm, 1)
