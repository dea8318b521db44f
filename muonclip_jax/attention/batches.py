"""Attention over any number of batch axes, as Flax's modules call it.

Flax lets inputs have no batch axis or several, takes masks of any dtype, and masks and biases of
lower rank. Here that is brought to the one batch axis of `dot_product_attention`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax.attention.dot_product import dot_product_attention
from muonclip_jax.attention.maxima import attention_max_logits


def _merge_batch(array: jax.Array) -> jax.Array:
    return array.reshape(math.prod(array.shape[:-3]), *array.shape[-3:])


def _merge_pairs(array: Any, batch: tuple[int, ...]) -> jax.Array | None:
    """Brings a mask or bias, `[*batch, heads, T, S]` or less, to one batch axis."""
    if array is None:
        return None
    array = jnp.asarray(array)
    array = array.reshape((1,) * (len(batch) + 3 - array.ndim) + array.shape)
    if any(size != 1 for size in array.shape[:-3]):
        array = jnp.broadcast_to(array, batch + array.shape[-3:])
    return _merge_batch(array)


def _merge_arguments(query: jax.Array, key: jax.Array, bias: Any, mask: Any) -> dict[str, Any]:
    batch = query.shape[:-3]
    mask = _merge_pairs(mask, batch)
    return {
        "query": _merge_batch(query),
        "key": _merge_batch(key),
        "bias": _merge_pairs(bias, batch),
        "mask": None if mask is None else mask.astype(bool),
    }


def batched_max_logits(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    bias: Any = None,
    mask: Any = None,
    **keywords: Any,
) -> Float[Array, " N"]:
    """Returns `attention_max_logits` over any number of batch axes; any mask dtype will do.

    Example:
        >>> import jax.numpy as jnp
        >>> batched_max_logits(jnp.ones((2, 3, 5, 4, 9)), jnp.ones((2, 3, 5, 4, 9))).tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    return attention_max_logits(**_merge_arguments(query, key, bias, mask), **keywords)


def batched_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    bias: Any = None,
    mask: Any = None,
    **keywords: Any,
) -> tuple[Float[Array, "*B T N D"], Float[Array, " N"]]:
    """Returns `dot_product_attention` over any number of batch axes; any mask dtype will do.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((2, 3, 5, 4, 9))
        >>> out, max_logits = batched_attention(x, x, x, mask=jnp.ones((5, 5)))
        >>> out.shape, max_logits.shape
        ((2, 3, 5, 4, 9), (4,))
    """
    out, max_logits = dot_product_attention(
        value=_merge_batch(value), **_merge_arguments(query, key, bias, mask), **keywords
    )
    return out.reshape(*query.shape[:-1], value.shape[-1]), max_logits
