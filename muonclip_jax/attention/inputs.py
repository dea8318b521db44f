"""The arguments of an attention call in one form, and which query attends to which key.

There is one batch axis, and query heads are grouped by key head as `(K, G)`. For causality and the
window, the keys of a range of queries follow from shapes; masks and biases are sliced per block, so
no array of size queries times keys is created.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax._devices import entry_axes, plan_platform
from muonclip_jax._tree import ScalarLike

#: What a caller may pass as an array.
AnyArray: TypeAlias = jax.Array | np.ndarray
#: A position, which may be traced.
Index: TypeAlias = int | jax.Array

_STATIC = {"static": True}

# A bias at or below this hides the pair. float32 spaces its numbers by 64 here: what the logit was,
# down to differences that matter to a softmax, can no longer be told.
_FORBIDDING_BIAS = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of one attention call. Axes of mask and bias may have length one."""

    query: jax.Array  # [B, T, K, G, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array | None  # [B, S, K, D]; None if only maxima are needed
    scale: ScalarLike
    mask: jax.Array | None = None  # [B, K, G, T, S]; False for masked pairs
    bias: jax.Array | None = None  # [B, K, G, T, S]; added to the logits
    query_seq_lengths: jax.Array | None = None  # [B]; queries from here on are padding
    key_value_seq_lengths: jax.Array | None = None  # [B]; keys from here on are padding
    # Query t attends to keys up to and including t, and to keys from t - left to t + right.
    is_causal: bool = dataclasses.field(default=False, metadata=_STATIC)
    window: tuple[int, int] | None = dataclasses.field(default=None, metadata=_STATIC)
    platform: str = dataclasses.field(default="cpu", metadata=_STATIC)

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the range of keys to which queries `start..stop` may attend."""
        keys = self.key.shape[1]
        low, high = 0, min(keys, stop) if self.is_causal else keys
        if self.window is not None:
            low, high = max(low, start - self.window[0]), min(high, stop + self.window[1])
        return (low, high) if low < high else (0, 0)

    def block(self, start: Index, queries: int, key_start: Index, keys: int) -> "Inputs":
        """Returns the inputs of a range of queries and one of keys; starts may be traced."""

        def cut(x: jax.Array, at: Index, size: int, axis: int) -> jax.Array:
            whole = x.shape[axis] in (1, size)
            return x if whole else lax.dynamic_slice_in_dim(x, at, size, axis)

        def cut_keys(x: jax.Array) -> jax.Array:
            return cut(x, key_start, keys, 1)

        def cut_both(x: jax.Array) -> jax.Array:
            return cut(cut(x, start, queries, -2), key_start, keys, -1)

        key, value = jax.tree.map(cut_keys, (self.key, self.value))
        mask, bias = jax.tree.map(cut_both, (self.mask, self.bias))
        query = cut(self.query, start, queries, 1)
        return dataclasses.replace(self, query=query, key=key, value=value, mask=mask, bias=bias)


def allowed_pairs(
    block: Inputs, start: Index, key_start: Index, *, bias: bool = False
) -> jax.Array | None:
    """Returns the unmasked pairs of a block, by its bias too if asked; None if all are.

    The result broadcasts to `[B, K, G, t, s]`.
    """
    queries = start + jnp.arange(block.query.shape[1])[:, None]
    keys = key_start + jnp.arange(block.key.shape[1])[None, :]
    conditions = []
    if block.is_causal:
        conditions.append(queries >= keys)
    if block.window is not None:
        left, right = block.window
        conditions += [queries <= keys + left, queries >= keys - right]
    if block.mask is not None:
        conditions.append(block.mask)
    if bias and block.bias is not None:
        conditions.append(bias_permits(block.bias))
    for positions, ends in (
        (queries, block.query_seq_lengths),
        (keys, block.key_value_seq_lengths),
    ):
        if ends is not None:
            conditions.append(positions < ends[:, None, None, None, None])
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def bias_permits(bias: jax.Array) -> jax.Array:
    """Returns False where a bias is at most `finfo(bias.dtype).min / 2` or -1e9: it masks."""
    limit = _FORBIDDING_BIAS
    if jnp.issubdtype(bias.dtype, jnp.floating):
        limit = max(limit, float(jnp.finfo(bias.dtype).min) / 2)
    return ~(bias.astype(jnp.float32) <= limit)


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def permitted_max(logits: jax.Array, permitted: jax.Array | None, axes: Sequence[int]) -> jax.Array:
    """Returns the maximum over axes of the logits of permitted pairs, in float32; -inf without any.

    Compiled as a whole outside of `jit` too, where `jax_debug_infs` would refuse the -inf of a
    hidden pair.
    """
    logits = logits.astype(jnp.float32)
    if permitted is not None:
        logits = jnp.where(permitted, logits, -jnp.inf)
    return jnp.max(logits, axis=axes, initial=-jnp.inf)


def _check_sequences(query: jax.Array, key: jax.Array, value: jax.Array | None) -> None:
    value = key if value is None else value
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(
                f"{name} has shape {x.shape}; attention takes (batch, time, heads, head_dim), with "
                "any number of batch axes."
            )
        if x.dtype != query.dtype:
            raise ValueError(
                f"query is {query.dtype} and {name} is {x.dtype}; cast them to the same dtype, as "
                "jax.nn.dot_product_attention requires too."
            )
    q, k, v = query.shape, key.shape, value.shape
    real = jnp.issubdtype(query.dtype, jnp.floating)
    for right, message in (
        (real, f"query, key and value must be real floating, got {query.dtype}."),
        (k[:-3] == q[:-3], f"query and key must agree in batch, all axes but 3, got {q} and {k}."),
        (k[-1] == q[-1], f"query and key must agree in head_dim, the last axis, got {q} and {k}."),
        (v[:-1] == k[:-1], f"key and value must agree in all but their last axis: {k} and {v}."),
        (
            k[-2] != 0 and q[-2] % k[-2] == 0,
            f"query has {q[-2]} heads and key {k[-2]}: the query heads must be a multiple of the "
            "key heads, each key head being shared by that many.",
        ),
    ):
        if not right:
            raise ValueError(message)


def _grouped(
    name: str, x: AnyArray | None, full: tuple[int, ...], key_heads: int
) -> jax.Array | None:
    """Reshapes a mask or bias that broadcasts to `(*batch, N, T, S)` to `[B, K, G, T, S]`."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.ndim > len(full) or any(
        size not in (1, wanted) for size, wanted in zip(x.shape[::-1], full[::-1], strict=False)
    ):
        raise ValueError(
            f"{name} has shape {x.shape}; it must broadcast to (batch, heads, queries, keys) = "
            f"{full}."
        )
    if name == "mask" and x.dtype != jnp.bool_:
        raise ValueError(
            f"mask is {x.dtype}; it must be boolean, False for masked pairs. Write "
            "mask.astype(bool), or pass an additive mask as bias."
        )
    x = x.reshape((1,) * (len(full) - x.ndim) + x.shape)
    if any(size != 1 for size in x.shape[:-3]):
        x = jnp.broadcast_to(x, full[:-3] + x.shape[-3:])
    heads = x.shape[-3]
    grouped = (1, 1) if heads == 1 else (key_heads, heads // key_heads)
    return x.reshape(math.prod(x.shape[:-3]), *grouped, *x.shape[-2:])


def _lengths(name: str, x: AnyArray | None, batch: tuple[int, ...]) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != batch or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name} must have one integer per sequence, shape {batch}, got {x.dtype} of shape "
            f"{x.shape}."
        )
    return x.reshape(-1)


def read_inputs(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray | None,
    bias: AnyArray | None = None,
    mask: AnyArray | None = None,
    scale: ScalarLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: AnyArray | None = None,
    key_value_seq_lengths: AnyArray | None = None,
    local_window_size: int | tuple[int, int] | None = None,
) -> Inputs:
    """Checks the arguments of `jax.nn.dot_product_attention` and converts them to one form.

    Raises:
        ValueError: If shapes or dtypes do not match.
    """
    q, k = jnp.asarray(query), jnp.asarray(key)
    v = None if value is None else jnp.asarray(value)
    _check_sequences(q, k, v)
    *axes, queries, heads, head_dim = q.shape
    batch = tuple(axes) or (1,)
    q, k, v = jax.tree.map(lambda x: x.reshape(math.prod(batch), *x.shape[-3:]), (q, k, v))
    sharding = jax.typeof(q).sharding
    head_axes = entry_axes((*sharding.spec, *[None] * 4)[2])
    keys, key_heads = k.shape[1:3]
    if key_heads % math.prod(sharding.mesh.shape[name] for name in head_axes):
        # Devices divide the query heads further than there are key heads: each gets the keys that
        # its own heads read.
        k, v = jax.tree.map(lambda x: jnp.repeat(x, heads // key_heads, axis=2), (k, v))
        key_heads = heads
    full = (*batch, heads, queries, keys)
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    return Inputs(
        query=q.reshape(*q.shape[:2], key_heads, heads // key_heads, head_dim),
        key=k,
        value=v,
        scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
        mask=_grouped("mask", mask, full, key_heads),
        bias=_grouped("bias", bias, full, key_heads),
        query_seq_lengths=_lengths("query_seq_lengths", query_seq_lengths, batch),
        key_value_seq_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
        is_causal=is_causal,
        window=local_window_size,
        platform=plan_platform(None, sharding.mesh, (q,)),
    )
