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
    # Query t attends to keys from t - left to t + right; None is no limit. Causal: right is 0.
    window: tuple[int | None, int | None] = dataclasses.field(kw_only=True, metadata=_STATIC)
    platform: str = dataclasses.field(kw_only=True, metadata=_STATIC)

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the range of keys to which queries `start..stop` may attend."""
        (left, right), keys = self.window, self.key.shape[1]
        low = 0 if left is None else max(0, start - left)
        high = keys if right is None else min(keys, stop + right)
        return (low, high) if low < high else (0, 0)

    def block(self, start: Index, queries: int, key_start: Index, keys: int) -> "Inputs":
        """Returns the inputs of a range of queries and one of keys; starts may be traced."""
        sides = {"queries": (start, queries), "keys": (key_start, keys)}

        def cut(x: jax.Array | None, **axes: int) -> jax.Array | None:
            for side, axis in axes.items():
                at, size = sides[side]
                if x is not None and x.shape[axis] not in (1, size):
                    x = lax.dynamic_slice_in_dim(x, at, size, axis)
            return x

        return dataclasses.replace(
            self,
            query=cut(self.query, queries=1),
            key=cut(self.key, keys=1),
            value=cut(self.value, keys=1),
            mask=cut(self.mask, queries=-2, keys=-1),
            bias=cut(self.bias, queries=-2, keys=-1),
        )


def allowed_pairs(
    block: Inputs, start: Index, key_start: Index, *, bias: bool = False
) -> jax.Array | None:
    """Returns the unmasked pairs of a block, by its bias too if asked; None if all are.

    The result broadcasts to `[B, K, G, t, s]`.
    """
    queries = start + jnp.arange(block.query.shape[1])[:, None]
    keys = key_start + jnp.arange(block.key.shape[1])[None, :]
    conditions = []
    left, right = block.window
    if right is not None:
        conditions.append(queries >= keys - right)
    if left is not None:
        conditions.append(queries <= keys + left)
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
    return jnp.max(logits.astype(jnp.float32), axes, initial=-jnp.inf, where=permitted)


def _check_sequences(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    q, k, v = query.shape, key.shape, value.shape
    if not (
        min(map(len, (q, k, v))) >= 3
        and query.dtype == key.dtype == value.dtype
        and jnp.issubdtype(query.dtype, jnp.floating)
        and (k[:-3], k[-1]) == (q[:-3], q[-1])
        and k[:-1] == v[:-1]
        and k[-2]
        and q[-2] % k[-2] == 0
    ):
        given = ", ".join(f"{x.dtype} of shape {x.shape}" for x in (query, key, value))
        raise ValueError(
            "Attention takes query (*batch, queries, N, H), key (*batch, keys, K, H) and value "
            "(*batch, keys, K, D), where N is a multiple of K: each key head is shared by N / K "
            f"query heads. All are of one real floating dtype. They are {given}."
        )


def _grouped(
    name: str, x: AnyArray | None, full: tuple[int, ...], key_heads: int
) -> jax.Array | None:
    """Reshapes a mask or bias that broadcasts to `(*batch, N, T, S)` to `[B, K, G, T, S]`."""
    if x is None:
        return None
    x = jnp.asarray(x)
    sizes = zip(x.shape[::-1], full[::-1], strict=False)
    if x.ndim > len(full) or any(size not in (1, wanted) for size, wanted in sizes):
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
    if x.shape[:-3] != (1,) * (x.ndim - 3):
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
    _check_sequences(q, k, k if v is None else v)
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
    left, right = (
        local_window_size
        if isinstance(local_window_size, tuple)
        else (local_window_size, local_window_size)
    )
    if is_causal:
        right = 0 if right is None else min(right, 0)
    return Inputs(
        query=q.reshape(*q.shape[:2], key_heads, heads // key_heads, head_dim),
        key=k,
        value=v,
        scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
        mask=_grouped("mask", mask, full, key_heads),
        bias=_grouped("bias", bias, full, key_heads),
        query_seq_lengths=_lengths("query_seq_lengths", query_seq_lengths, batch),
        key_value_seq_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
        window=(left, right),
        platform=plan_platform(None, sharding.mesh, (q,)),
    )
