"""The meaning of the products: XLA computes them, in full unless a CPU saves a quarter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._typing import ScalarLike
from muonclip_jax.kernels.platform import plan_platform

#: On a CPU a Hermitian product of at least this many rows is computed as an upper triangle of 2 x 2
#: blocks, and the fourth block is a transpose: a quarter of the work less, 10 to 20 % of the time
#: of a whole polar factor at 768 rows. More blocks save little more and compile twice as long;
#: small matrices lose.
SPLIT_FROM = 512


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns what products of `dtype` accumulate in: float32 or wider."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def adjoint(x: jax.Array) -> jax.Array:
    """Returns the conjugate transpose over the last two axes."""
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `x y`, accumulated and returned in `accumulator`."""
    return jnp.matmul(
        x,
        y,
        # TPUs and GPUs would otherwise round float32 operands to bfloat16 or TF32.
        precision=lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else lax.Precision.DEFAULT,
        preferred_element_type=accumulator(x.dtype),
    )


def hermitian(
    x: jax.Array, y: jax.Array, adjoint_of_y: jax.Array, platform: str | None = None
) -> jax.Array:
    """Computes `x y`, known to be Hermitian, in the way that suits a platform."""
    rows = x.shape[-2]
    if rows < SPLIT_FROM or x.dtype.itemsize < 4 or plan_platform(platform) != "cpu":
        return matmul(x, y)
    half = rows // 2
    upper = matmul(x[..., :half, :], y)
    # Cut between rows, which lie together: a cut between columns is a slow copy.
    corner = matmul(x[..., half:, :], adjoint(adjoint_of_y[..., half:, :]))
    # Written into one array: XLA's CPU compiler would compile every concatenation by itself.
    square = jnp.pad(upper, [(0, 0)] * (x.ndim - 2) + [(0, rows - half), (0, 0)])
    square = square.at[..., half:, :half].set(adjoint(upper[..., half:]))
    return square.at[..., half:, half:].set(corner)


def matmul_add(
    x: jax.Array,
    y: jax.Array,
    addend: jax.Array | None,
    alpha: ScalarLike,
    beta: ScalarLike,
    out_dtype: jax.typing.DTypeLike,
    product: Callable[[jax.Array, jax.Array], jax.Array] = matmul,
) -> jax.Array:
    """Computes `alpha x y + beta addend`, rounded once, at the end; `product` is of `x` and `y`."""
    result = _scale(alpha, product(x, y))
    if addend is not None:
        result = result + _scale(beta, addend.astype(accumulator(x.dtype)))
    return result.astype(out_dtype)


def _scale(factor: ScalarLike, x: jax.Array) -> jax.Array:
    if isinstance(factor, float | int):
        # Folded where it is one, a constant of the program elsewhere.
        return x if factor == 1 else factor * x
    return jnp.asarray(factor, x.real.dtype) * x
