"""The arguments of an attention call, checked once and brought into one form.

Everything after this file sees four-dimensional arrays with the query heads grouped by key head,
a scale that is a number, and a window that is a pair.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from muonclip_jax._tree import ScalarLike
from muonclip_jax.attention.pairs import Geometry, PairArrays, split_heads
from muonclip_jax.attention.shards import divisions

#: What a caller may pass as an array.
AnyArray: TypeAlias = jax.Array | np.ndarray


@dataclass(frozen=True)
class AttentionArguments:
    """One attention call in the form that implementations work on.

    Attributes:
        query: Queries, their heads grouped by key head `[B, T, K, G, H]`.
        key: Keys `[B, S, K, H]`.
        value: Values `[B, S, K, D]`, or None where only maxima are asked for.
        scale: What the dot products are multiplied by.
        geometry: Causality and window.
        arrays: Mask, bias and lengths, heads grouped like the query's.
        batched: Whether the caller's arrays had a batch axis.
    """

    query: Float[Array, "B T K G H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K D"] | None
    scale: ScalarLike
    geometry: Geometry
    arrays: PairArrays
    batched: bool

    def with_arrays(self, arrays: PairArrays) -> "AttentionArguments":
        """Returns the same call with other mask, bias and lengths, traced anew for example."""
        return replace(self, arrays=arrays)

    def with_sequences(
        self, query: jax.Array, key: jax.Array, value: jax.Array | None
    ) -> "AttentionArguments":
        """Returns the same call with other queries, keys and values."""
        return replace(self, query=query, key=key, value=value)

    def with_share(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array | None,
        scale: ScalarLike,
        arrays: PairArrays,
    ) -> "AttentionArguments":
        """Returns the same call on what one device has of its arrays."""
        return replace(self, query=query, key=key, value=value, scale=scale, arrays=arrays)


def _as_batched(array: Any) -> jax.Array:
    array = jnp.asarray(array)
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _check_sequences(query: jax.Array, key: jax.Array, value: jax.Array | None) -> None:
    arrays = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, array in arrays.items():
        if array.ndim not in (3, 4):
            raise ValueError(
                f"{name} has shape {array.shape}; attention takes (batch, time, heads, head_dim) "
                "or (time, heads, head_dim). Merge further batch axes into one."
            )
        if array.ndim != query.ndim:
            raise ValueError(
                f"query has shape {query.shape} and {name} {array.shape}: either all have a batch "
                "axis, or none."
            )
        if array.dtype != query.dtype:
            raise ValueError(
                f"query is {query.dtype} and {name} is {array.dtype}; cast them to one dtype, as "
                "jax.nn.dot_product_attention asks too."
            )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"query, key and value must be real floating, got {query.dtype}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must agree in head_dim, their last axis, got {query.shape} and "
            f"{key.shape}."
        )
    for name, array in arrays.items():
        if array.ndim == 4 and array.shape[0] != query.shape[0]:
            raise ValueError(
                f"query and {name} must agree in batch, got {query.shape} and {array.shape}."
            )
    if value is not None and value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"key and value must agree in all but their last axis, got {key.shape} and "
            f"{value.shape}."
        )
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query has {query.shape[-2]} heads and key {key.shape[-2]}: the query heads must be a "
            "multiple of the key heads, each key head being shared by that many."
        )


def _for_every_query_head(keys: jax.Array, heads: int) -> jax.Array:
    batch, length, key_heads, size = keys.shape
    shared = (batch, length, key_heads, heads // key_heads, size)
    return jnp.broadcast_to(keys[:, :, :, None], shared).reshape(batch, length, heads, size)


def _pair_array(name: str, array: Any, full: tuple[int, ...]) -> jax.Array:
    array = jnp.asarray(array)
    lifted = (1,) * (4 - array.ndim) + array.shape
    fits = len(lifted) == 4 and all(
        size in (1, wanted) for size, wanted in zip(lifted, full, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {array.shape}; it must broadcast to (batch, heads, queries, keys) = "
            f"{full}."
        )
    return array.reshape(lifted)


def _lengths(name: str, array: Any, batch: int) -> jax.Array:
    array = jnp.asarray(array)
    if array.shape != (batch,) or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must hold one integer a sequence, shape ({batch},), got {array.dtype} of "
            f"shape {array.shape}."
        )
    return array


def read_arguments(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    *,
    scale: ScalarLike | None,
    is_causal: bool,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    local_window_size: int | tuple[int, int] | None,
) -> AttentionArguments:
    """Checks the arguments of `jax.nn.dot_product_attention` and brings them into one form.

    Raises:
        ValueError: If shapes or dtypes do not fit together.
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    value = None if value is None else jnp.asarray(value)
    _check_sequences(query, key, value)
    batched = query.ndim == 4
    query, key = _as_batched(query), _as_batched(key)
    value = None if value is None else _as_batched(value)

    batch, queries, heads, head_dim = query.shape
    if key.shape[2] % divisions(query, 2):
        # Devices divide the query heads further than there are key heads: each gets the keys that
        # its own heads read.
        key = _for_every_query_head(key, heads)
        value = None if value is None else _for_every_query_head(value, heads)
    keys, key_heads = key.shape[1:3]
    full = (batch, heads, queries, keys)
    if mask is not None:
        mask = _pair_array("mask", mask, full)
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask is {mask.dtype}; it must be boolean, True where a pair takes part. Write "
                "mask.astype(bool), or pass an additive mask as bias."
            )
    if bias is not None:
        bias = _pair_array("bias", bias, full)
    if query_seq_lengths is not None:
        query_seq_lengths = _lengths("query_seq_lengths", query_seq_lengths, batch)
    if key_value_seq_lengths is not None:
        key_value_seq_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, batch)
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)

    return AttentionArguments(
        query=query.reshape(batch, queries, key_heads, heads // key_heads, head_dim),
        key=key,
        value=value,
        scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
        geometry=Geometry(is_causal=is_causal, local_window_size=local_window_size),
        arrays=PairArrays(
            mask=split_heads(mask, key_heads),
            bias=split_heads(bias, key_heads),
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
        ),
        batched=batched,
    )
