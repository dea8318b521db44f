"""The polar factor from a singular value decomposition: slow, and right."""

import jax
import jax.numpy as jnp


def svd_polar(x: jax.Array) -> jax.Array:
    """Computes `U V^H` for `X = U S V^H`, over the singular values that are not zero to rounding.

    Args:
        x: `(..., m, n)`, of at least 32 bits, at a scale that does not overflow when squared.

    Returns:
        The nearest partial isometry of the same shape; zero for the zero matrix.
    """
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    rounding = max(x.shape[-2:]) * jnp.finfo(x.dtype).eps
    keep = (s > rounding * s[..., :1]).astype(x.dtype)
    return jnp.matmul(u * keep[..., None, :], vh, precision=jax.lax.Precision.HIGHEST)
