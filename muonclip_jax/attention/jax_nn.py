"""Attention by `jax.nn`, and two ways to learn its largest logits: a bound, or a kernel beside it.

`jax.nn.dot_product_attention` keeps its logits to itself. cuDNN's hands out a log-sum-exp, which
bounds them. The kernel for per-head maxima runs beside any attention and looks at queries and keys
alone: one product more, of the seven of a training step, and exact.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax.attention.arguments import AttentionArguments
from muonclip_jax.attention.log_sum_exp import bound_from_log_sum_exp
from muonclip_jax.kernels.max_logits import IMPLEMENTATIONS, max_logits


def merge_groups(array: Float[Array, "B T K G D"]) -> Float[Array, "B T N D"]:
    """Joins the axes of key heads and of query heads on each."""
    batch, queries, key_heads, groups, depth = array.shape
    return array.reshape(batch, queries, key_heads * groups, depth)


def _merge_pair_groups(array: jax.Array | None) -> jax.Array | None:
    if array is None:
        return None
    batch, key_heads, groups, queries, keys = array.shape
    return array.reshape(batch, key_heads * groups, queries, keys)


def _attend(
    arguments: AttentionArguments,
    implementation: Literal["cudnn"] | None,
    return_residual: bool = False,
) -> Any:
    arrays, geometry = arguments.arrays, arguments.geometry
    assert arguments.value is not None
    return jax.nn.dot_product_attention(
        merge_groups(arguments.query),
        arguments.key,
        arguments.value,
        bias=_merge_pair_groups(arrays.bias),
        mask=_merge_pair_groups(arrays.mask),
        scale=cast(float, arguments.scale),
        is_causal=geometry.is_causal,
        query_seq_lengths=arrays.query_seq_lengths,
        key_value_seq_lengths=arrays.key_value_seq_lengths,
        local_window_size=geometry.local_window_size,
        implementation=implementation,
        return_residual=return_residual,
    )


def attend_cudnn(
    arguments: AttentionArguments,
) -> tuple[Float[Array, "B T N D"], Float[Array, " N"]]:
    """Returns cuDNN's attention and an upper bound of the maxima of its heads."""
    out, log_sum_exp = _attend(arguments, "cudnn", return_residual=True)
    return out, bound_from_log_sum_exp(log_sum_exp, arguments.arrays.query_seq_lengths)


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
    objection = _objection(
        lambda *arrays: _attend(arguments.with_sequences(*arrays), "cudnn", return_residual=True),
        arguments,
    )
    return None if objection is None else f"cuDNN says: {objection}; use 'xla'"


def _objection(function: Callable[..., Any], arguments: AttentionArguments) -> str | None:
    """Traces a function of query, key and value, and returns what cuDNN has against it."""
    try:
        jax.eval_shape(function, arguments.query, arguments.key, arguments.value)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).strip().rstrip(".")
    return None


def _prefers_cudnn(arguments: AttentionArguments) -> bool:
    """Says whether cuDNN takes a call, forward and backward, as it stands."""
    if refuse_cudnn(arguments) is not None or arguments.arrays.mask is not None:
        return False

    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        call = arguments.with_sequences(query, key, value)
        return jnp.sum(_attend(call, "cudnn"), dtype=jnp.float32)

    return _objection(jax.grad(total, argnums=(0, 1, 2)), arguments) is None


def attend_pallas(
    arguments: AttentionArguments,
) -> tuple[Float[Array, "B T N D"], Float[Array, " N"]]:
    """Returns `jax.nn`'s attention, by cuDNN where it serves, and the kernel's exact maxima."""
    maxima = max_logits(
        arguments.query,
        arguments.key,
        scale=arguments.scale,
        geometry=arguments.geometry,
        arrays=arguments.arrays,
        implementation="pallas",
    )
    out = _attend(arguments, "cudnn" if _prefers_cudnn(arguments) else None)
    return out, maxima.reshape(-1)


def refuse_pallas(arguments: AttentionArguments) -> str | None:
    """Says why the kernel, or `jax.nn` beside it, cannot serve a call, or returns None."""
    value = arguments.value
    if value is not None and value.shape[-1] != arguments.key.shape[-1]:
        return (
            f"jax.nn's attention, which it runs beside, takes values as wide as keys "
            f"({arguments.key.shape[-1]}), not {value.shape[-1]}; use 'xla'"
        )
    reason = IMPLEMENTATIONS["pallas"].refusal(
        arguments.query, arguments.key, jnp.asarray(arguments.scale), arguments.arrays
    )
    return None if reason is None else f"{reason}; use 'xla'"
