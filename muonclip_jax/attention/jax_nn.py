"""Attention by cuDNN, whose log-sum-exp bounds its largest logits from above."""

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax.attention.arguments import AttentionArguments
from muonclip_jax.attention.log_sum_exp import bound_from_log_sum_exp


def merge_groups(array: Float[Array, "B T K G D"]) -> Float[Array, "B T N D"]:
    """Joins the axes of key heads and of query heads on each."""
    batch, queries, key_heads, groups, depth = array.shape
    return array.reshape(batch, queries, key_heads * groups, depth)


def _merge_pair_groups(array: jax.Array | None) -> jax.Array | None:
    if array is None:
        return None
    batch, key_heads, groups, queries, keys = array.shape
    return array.reshape(batch, key_heads * groups, queries, keys)


def attend_cudnn(
    arguments: AttentionArguments,
) -> tuple[Float[Array, "B T N D"], Float[Array, " N"]]:
    """Returns cuDNN's attention and an upper bound of the maxima of its heads."""
    arrays, geometry = arguments.arrays, arguments.geometry
    assert arguments.value is not None
    out, log_sum_exp = jax.nn.dot_product_attention(
        merge_groups(arguments.query),
        arguments.key,
        arguments.value,
        mask=_merge_pair_groups(arrays.mask),
        scale=cast(float, arguments.scale),
        is_causal=geometry.is_causal,
        query_seq_lengths=arrays.query_seq_lengths,
        key_value_seq_lengths=arrays.key_value_seq_lengths,
        local_window_size=geometry.local_window_size,
        implementation="cudnn",
        return_residual=True,
    )
    return out, bound_from_log_sum_exp(log_sum_exp, arrays.query_seq_lengths)


def refuse_cudnn(arguments: AttentionArguments) -> str | None:
    """Says why cuDNN cannot serve a call, or returns None."""
    if arguments.arrays.bias is not None:
        return (
            "its log-sum-exp includes the additive bias, which no clip can change; use 'xla', or "
            "pass what only forbids pairs as mask"
        )
    if arguments.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {arguments.query.dtype}; use 'xla'"
    if jax.default_backend() != "gpu":
        return f"it runs on NVIDIA GPUs, not on {jax.default_backend()!r}; use 'xla'"
    try:
        jax.eval_shape(
            lambda *arrays: attend_cudnn(arguments.with_sequences(*arrays)),
            arguments.query,
            arguments.key,
            arguments.value,
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"cuDNN says: {str(error).strip().rstrip('.')}; use 'xla'"
    return None
