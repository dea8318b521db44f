"""Maxima from the log-sum-exp that fused attention kernels return, as an upper bound.

A fused kernel keeps its logits to itself, but hands out what its backward pass needs: for every
query the logarithm of the sum of exponentials of its logits. That is never below the largest
logit, and never more than the logarithm of the number of keys above it:

    max_j s_j  <=  log sum_j exp(s_j)  <=  max_j s_j + ln(keys)

Used in the place of the maximum it clips a little early, and never too late. jax returns it in the
dtype of the output, where rounding to nearest may fall below the maximum by half a unit in the
last place; one such unit is added here, so that the bound stays one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A row's log-sum-exp at or below this had nothing to attend to.
_NOTHING = -0.35 * float(jnp.finfo(jnp.float32).max)


def bound_from_log_sum_exp(
    log_sum_exp: Float[Array, "B T N"], query_seq_lengths: jax.Array | None = None
) -> Float[Array, " N"]:
    """Returns an upper bound of every head's largest logit, at most `ln(keys)` and rounding above.

    Args:
        log_sum_exp: For every query, over the logits it attended to `[B, T, N]`.
        query_seq_lengths: Queries from here on are padding and count for nothing `[B]`.

    Returns:
        The bounds `[N]` in float32; -inf for a head without any pair.

    Example:
        >>> import jax.numpy as jnp
        >>> bound = bound_from_log_sum_exp(jnp.full((1, 2, 1), 3.0))
        >>> 3.0 <= float(bound[0]) < 3.00001
        True
    """
    slack = float(jnp.finfo(log_sum_exp.dtype).eps)
    values = jax.lax.stop_gradient(log_sum_exp).astype(jnp.float32)
    values = values + slack * jnp.abs(values)
    if query_seq_lengths is not None:
        inside = jnp.arange(values.shape[1]) < query_seq_lengths[:, None]
        values = jnp.where(inside[:, :, None], values, -jnp.inf)
    values = jnp.where(values <= _NOTHING, -jnp.inf, values)
    return jnp.max(values, axis=(0, 1), initial=-jnp.inf)
