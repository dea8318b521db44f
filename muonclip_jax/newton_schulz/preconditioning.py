"""The first rescaling: it brings the singular values into [0, 1] at once.

Newton-Schulz converges from singular values in (0, 1], and every step that only makes small ones
grow is lost; so the tighter the bound on the largest one, the better. In order of tightness:

- "frobenius": divide by `||X||_F`. Far too much when the spectrum is flat.
- "schatten": divide by `||X X^H||_F^(1/2) = (sum sigma^4)^(1/4)`; `X X^H` is what the first step
  computes anyway.
- "schatten8": divide by `||(X X^H)^2||_F^(1/4) = (sum sigma^8)^(1/8)`; the first step wants that
  square too, so in 32 bits this bound is free as well.
- "spectral": divide by the largest singular value. Exact, but costs an eigenvalue computation.
- "aol": divide row `i` by `(sum_j |X X^H|_ij)^(1/2)`. Rows of different size end up alike, so the
  result is near orthogonal, yet not the polar factor of `X`.

The last step of each is invariant to the scale of `X`, so all start from the Frobenius norm, which
keeps every number of the iteration within the range of float16.

Every function here takes the columns that one device has of each matrix, and `Shares`, which says
how devices sum and compare what they have; by default a device has them all.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.newton_schulz.products import accumulator, gram
from muonclip_jax.newton_schulz.shares import WHOLE, Shares

#: The names that `preconditioning` allows; those in `INSIDE` act on the first Gram matrix.
PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten", "schatten8")
INSIDE = ("aol", "schatten", "schatten8")


def _squares(x: jax.Array) -> jax.Array:
    return jnp.real(x) ** 2 + jnp.imag(x) ** 2 if jnp.iscomplexobj(x) else x * x


def frobenius_norm(x: jax.Array, shares: Shares = WHOLE) -> jax.Array:
    """Returns the Frobenius norm over the last two axes, kept as axes of length one."""
    return jnp.sqrt(shares.sum(jnp.sum(_squares(x), axis=(-2, -1), keepdims=True)))


def scale_by_power_of_two(x: jax.Array, shares: Shares = WHOLE) -> tuple[jax.Array, jax.Array]:
    """Brings the largest entry of each matrix (real or imaginary part) near one, without rounding.

    The squares in the norm then neither overflow nor vanish, whatever the scale of `x`. The largest
    entry is found among the bits, which are ordered as sizes are. CPUs and TPUs read a subnormal
    number as zero, so where those count no product could lift them; but the bits are an integer,
    the number's multiple of the smallest one.

    Args:
        x: `(..., m, n)`, of at least 32 bits; or the columns that a device has of it.
        shares: How devices that share the columns compute together.

    Returns:
        The matrices, their largest entries in [1, 4) unless they were subnormal or zero; and the
        powers of two that they were multiplied by, `(..., 1, 1)`.
    """
    parts = (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,)
    info = jnp.finfo(x.dtype)
    bias, digits = info.maxexp - 1, info.nmant
    integer = jnp.dtype(f"int{info.bits}").type
    all_bits = [lax.bitcast_convert_type(part, integer) for part in parts]
    magnitudes = [bits & jnp.iinfo(integer).max for bits in all_bits]
    largest = jnp.max(functools.reduce(jnp.maximum, magnitudes), axis=(-2, -1), keepdims=True)
    exponent = shares.max(largest) >> digits
    # Subnormal entries count beside a largest one that is a few digits above them at most.
    lift = bias - digits - 4
    is_small = exponent < bias - lift
    exponent = jnp.minimum(exponent + jnp.where(is_small, lift, 0), 2 * bias - 1)
    power = lax.bitcast_convert_type((2 * bias - exponent).astype(integer) << digits, info.dtype)

    def scaled(part: jax.Array, bits: jax.Array, magnitude: jax.Array) -> jax.Array:
        size = magnitude.astype(part.dtype) * 2.0 ** (lift + 1 - bias - digits)
        subnormal = jnp.where(bits < 0, -size, size)
        lifted = jnp.where(magnitude < 1 << digits, subnormal, part * 2.0**lift)
        return jnp.where(is_small, lifted, part) * power

    done = [scaled(*each) for each in zip(parts, all_bits, magnitudes, strict=True)]
    power = power * jnp.where(is_small, 2.0**lift, 1).astype(power.dtype)
    return done[0] if len(done) == 1 else lax.complex(*done), power


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
        eps: Smallest divisor, once the largest entry is near one: only the zero matrix meets it.
        relative_eps: False adds `eps`, as it is, to the norm, as Optax does.
        shares: How devices that share the columns compute together.

    Returns:
        As `x`, with Frobenius (or spectral) norm one.
    """
    x, power = scale_by_power_of_two(x, shares)
    norm = frobenius_norm(x, shares)
    if preconditioning == "spectral":
        safe = jnp.where(norm > 0, norm, 1)
        product = shares.sum(gram(x / safe.astype(x.dtype), platform=shares.platform))
        square = jnp.linalg.eigvalsh(product)[..., -1:, None]
        norm = safe * jnp.sqrt(jnp.abs(square))
    divisor = jnp.maximum(norm, eps) if relative_eps else norm + eps * power
    return x / jnp.where(divisor == 0, 1, divisor).astype(x.dtype)


class First(NamedTuple):
    """What the first step starts from.

    Attributes:
        x: The rescaled matrices.
        product: Their Gram matrices `x x^H`.
        square: The squares of those, where they are known; else None.
    """

    x: jax.Array
    product: jax.Array
    square: jax.Array | None = None


def squares_apart(preconditioning: str, dtype: jax.typing.DTypeLike) -> int:
    """How many squares of the Gram matrix the bound takes beside those of the steps.

    Rounded to 16 bits, scaled product and scaled square would not be one the square of the other,
    and the steps are steep.
    """
    return int(preconditioning == "schatten8" and jnp.dtype(dtype).itemsize < 4)


def rescale_first(
    x: jax.Array, preconditioning: str, dtype: jnp.dtype, shares: Shares = WHOLE
) -> First:
    """Rescales by a norm of the first Gram matrix, or of its square, and returns what it computed.

    Args:
        x: `(..., m, n)`, normalised, of at least 32 bits; or the columns that a device has of it.
        preconditioning: A name of `PRECONDITIONINGS`; outside of `INSIDE` nothing is rescaled.
        dtype: What the iteration computes in.
        shares: How devices that share the columns compute together.

    Returns:
        The rescaled `x`, its Gram matrix and maybe the square of that, all in `dtype`.
    """
    low = x.astype(dtype)
    multiply = functools.partial(shares.gram, low)
    if preconditioning not in INSIDE:
        return First(low, shares.sum(multiply()))
    product = shares.sum(multiply(out_dtype=accumulator(dtype)))
    tiny = jnp.finfo(product.dtype).tiny
    if preconditioning == "aol":
        rows = jnp.sum(jnp.abs(product), axis=-1, keepdims=True)
        scale = jnp.where(rows > tiny, lax.rsqrt(jnp.maximum(rows, tiny)), 0)
        product = (product * scale) * jnp.swapaxes(scale, -1, -2)
        return First((x * scale.astype(x.dtype)).astype(dtype), product.astype(dtype))
    # One where there is nothing to divide by. A tiny number would not do: XLA makes one division of
    # two, and the product of two tiny numbers is zero.
    bound = _or_one(frobenius_norm(product))
    product = product / bound.astype(product.dtype)
    square = None
    if preconditioning == "schatten8":
        square = shares.quadratic(product.astype(dtype), 0.0, 1.0).astype(product.dtype)
        tighter = _or_one(jnp.sqrt(frobenius_norm(square)))
        product = product / tighter.astype(product.dtype)
        lost = squares_apart(preconditioning, dtype)
        square = None if lost else square / (tighter**2).astype(square.dtype)
        bound = bound * tighter
    x = x / jnp.sqrt(bound).astype(x.dtype)
    return First(x.astype(dtype), product.astype(dtype), square)


def _or_one(norm: jax.Array) -> jax.Array:
    return jnp.where(norm > jnp.finfo(norm.dtype).tiny, norm, 1)
