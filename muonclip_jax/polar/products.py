"""Matrix products that say their precision, and the two symmetric ones of Newton-Schulz.

A float32 product is a float32 product on every platform (`Precision.HIGHEST`; TPUs and GPUs would
otherwise round its operands to bfloat16 or TF32), and a 16-bit one accumulates in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

# On a CPU a Hermitian product of at least this many rows is computed as an upper triangle of 2 x 2
# blocks, and the fourth block is a transpose: a quarter of the work less, 10 to 20 % of the time of
# a whole polar factor at 768 rows. More blocks save little more and compile twice as long; small
# matrices lose.
_SPLIT_FROM = 512


def default_platform() -> str:
    """Returns the platform that a computation traced now is for, e.g. "cpu"."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def adjoint(x: jax.Array) -> jax.Array:
    """Returns the conjugate transpose over the last two axes."""
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype that products of `dtype` accumulate in: never less than float32."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else jnp.dtype(dtype)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `x @ y`, accumulated and returned in `accumulator_dtype`."""
    wide = x.dtype.itemsize >= 4
    return jnp.matmul(
        x,
        y,
        precision=lax.Precision.HIGHEST if wide else lax.Precision.DEFAULT,
        preferred_element_type=accumulator_dtype(x.dtype),
    )


def gram(x: jax.Array) -> jax.Array:
    """Computes `x x^H`, accumulated and returned in `accumulator_dtype`."""
    return _hermitian(x, adjoint(x))


def commuting(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes the product of two Hermitian matrices that commute, so that it is Hermitian too."""
    return _hermitian(x, y)


def _hermitian(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `x @ y`, known to be Hermitian."""
    rows = x.shape[-2]
    if rows < _SPLIT_FROM or x.dtype.itemsize < 4 or default_platform() != "cpu":
        return matmul(x, y)
    half = rows // 2
    upper = matmul(x[..., :half, :], y)
    corner = matmul(x[..., half:, :], y[..., half:])
    lower = jnp.concatenate([adjoint(upper[..., half:]), corner], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)
