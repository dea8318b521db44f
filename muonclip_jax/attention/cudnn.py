"""Attention by cuDNN, whose log-sum-exp bounds its maxima from above."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax.attention.pairs import Geometry, Inputs

# A row's log-sum-exp at or below this had nothing to attend to.
_NOTHING = -0.35 * float(jnp.finfo(jnp.float32).max)


def attend_cudnn(
    inputs: Inputs, geometry: Geometry
) -> tuple[Float[Array, "B T N D"], Float[Array, " N"]]:
    """Returns cuDNN's attention and an upper bound of its maxima.

    Raises:
        NotImplementedError: If cuDNN does not support the call, with the reason.
    """
    reason = None
    if inputs.bias is not None:
        reason = (
            "its log-sum-exp includes the additive bias, which a clip cannot change; use 'xla', or "
            "pass a bias that only masks pairs as mask"
        )
    elif inputs.query.dtype not in (jnp.bfloat16, jnp.float16):
        reason = f"it takes bfloat16 and float16, not {inputs.query.dtype}; use 'xla'"
    elif geometry.platform != "gpu":
        reason = f"it runs on NVIDIA GPUs, not on {geometry.platform!r}; use 'xla'"
    if reason is not None:
        raise NotImplementedError(f"implementation='cudnn' cannot be used: {reason}.")
    assert inputs.value is not None
    batch, queries, key_heads, groups, head_dim = inputs.query.shape
    mask = inputs.mask
    if mask is not None:
        mask = mask.reshape(mask.shape[0], -1, *mask.shape[3:])
    attend = functools.partial(
        jax.nn.dot_product_attention,
        mask=mask,
        scale=cast(float, inputs.scale),
        is_causal=geometry.is_causal,
        query_seq_lengths=inputs.query_seq_lengths,
        key_value_seq_lengths=inputs.key_value_seq_lengths,
        local_window_size=geometry.window,
        implementation="cudnn",
        return_residual=True,
    )
    query = inputs.query.reshape(batch, queries, key_heads * groups, head_dim)
    try:
        jax.eval_shape(attend, query, inputs.key, inputs.value)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        said = str(error).strip().rstrip(".")
        raise NotImplementedError(
            f"implementation='cudnn' cannot be used: cuDNN says: {said}; use 'xla'."
        ) from error
    out, log_sum_exp = attend(query, inputs.key, inputs.value)
    return out, bound_from_log_sum_exp(log_sum_exp, inputs.query_seq_lengths)


def bound_from_log_sum_exp(
    log_sum_exp: Float[Array, "B T N"], query_seq_lengths: jax.Array | None = None
) -> Float[Array, " N"]:
    """Returns an upper bound of every head's maximum logit, from every query's log-sum-exp.

        max_j s_j  <=  log sum_j exp(s_j)  <=  max_j s_j + ln(keys)

    A clip by this bound comes a little early, and never too late. JAX returns the log-sum-exp in
    the dtype of the output, where rounding may fall below the maximum by half a unit in the last
    place; one such unit is added. Queries beyond `query_seq_lengths` `[B]` are padding; a head
    without any pair has -inf.

    Example:
        >>> bound = bound_from_log_sum_exp(jnp.full((1, 2, 1), 3.0))
        >>> 3.0 <= float(bound[0]) < 3.00001
        True
    """
    slack = float(jnp.finfo(log_sum_exp.dtype).eps)
    values = lax.stop_gradient(log_sum_exp).astype(jnp.float32)
    values = values + slack * jnp.abs(values)
    if query_seq_lengths is not None:
        inside = jnp.arange(values.shape[1]) < query_seq_lengths[:, None]
        values = jnp.where(inside[:, :, None], values, -jnp.inf)
    values = jnp.where(values <= _NOTHING, -jnp.inf, values)
    return jnp.max(values, axis=(0, 1), initial=-jnp.inf)
