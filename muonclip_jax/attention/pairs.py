"""Which query may attend to which key, block by block.

Attention hides pairs for five reasons: a boolean mask, causality, a local window, padding at the
end of a sequence, and an additive bias so low that softmax gives the pair nothing. The last is
common: a bias of -inf, of `finfo.min`, or of -1e9 is a mask that its author wrote as a number. A
bias that only shifts logits hides nothing.

Two of the reasons are geometry: causality and the window say, before any array is known, which
range of keys a range of queries can see at all. The others are arrays, and are cut to the block
at hand, so that nothing of size queries times keys is ever made that was not passed in.

Head axes are split as `(K, G)`: `K` key heads, and `G` query heads on each.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

#: A start within a sequence: a Python number, or traced inside a loop over blocks.
Position: TypeAlias = int | jax.Array

# A bias at or below this one is a mask. float32 spaces its numbers by 64 here: what the logit
# was, down to differences that matter to no softmax, can no longer be told.
_FORBIDDING_BIAS = -1e9


@dataclass(frozen=True)
class Geometry:
    """What causality and the window say about pairs, without looking at an array.

    Attributes:
        is_causal: Query `t` sees keys up to and including `t`.
        local_window_size: Query `t` sees keys from `t - left` to `t + right`.
    """

    is_causal: bool = False
    local_window_size: tuple[int, int] | None = None

    def key_range(self, start: int, stop: int, keys: int) -> tuple[int, int]:
        """Returns the range of keys outside of which queries `start..stop` see nothing.

        Example:
            >>> Geometry(is_causal=True).key_range(8, 12, 64)
            (0, 12)
            >>> Geometry(is_causal=True, local_window_size=(3, 0)).key_range(8, 12, 64)
            (5, 12)
        """
        low, high = 0, keys
        if self.is_causal:
            high = min(high, stop)
        if self.local_window_size is not None:
            left, right = self.local_window_size
            low, high = max(low, start - left), min(high, stop + right)
        return (low, high) if low < high else (0, 0)

    def allowed(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        """Returns which positions of queries see which of keys, broadcast, or None where all do."""
        conditions = []
        if self.is_causal:
            conditions.append(queries >= keys)
        if self.local_window_size is not None:
            left, right = self.local_window_size
            conditions += [queries <= keys + left, queries >= keys - right]
        return _all(conditions)


class PairArrays(NamedTuple):
    """What arrays say about pairs; every axis but the lengths' may be one long.

    Attributes:
        mask: True where a pair takes part `[B, K, G, T, S]`.
        bias: What is added to the logits `[B, K, G, T, S]`.
        query_seq_lengths: Queries from here on are padding `[B]`.
        key_value_seq_lengths: Keys from here on are padding `[B]`.
    """

    mask: jax.Array | None = None
    bias: jax.Array | None = None
    query_seq_lengths: jax.Array | None = None
    key_value_seq_lengths: jax.Array | None = None


def _all(conditions: Sequence[jax.Array]) -> jax.Array | None:
    combined = None
    for condition in conditions:
        combined = condition if combined is None else combined & condition
    return combined


def split_heads(array: jax.Array | None, key_heads: int) -> jax.Array | None:
    """Reshapes the head axis of a mask or bias `(B, N, T, S)` to `(B, K, G, T, S)`."""
    if array is None:
        return None
    batch, heads, *pair = array.shape
    if heads == 1:
        return array.reshape(batch, 1, 1, *pair)
    return array.reshape(batch, key_heads, heads // key_heads, *pair)


def cut(
    array: jax.Array, query_start: Position, queries: int, key_start: Position, keys: int
) -> jax.Array:
    """Cuts the last two axes to a block; axes of length one stay, for they broadcast."""
    if array.shape[-2] != 1:
        array = lax.dynamic_slice_in_dim(array, query_start, queries, axis=-2)
    if array.shape[-1] != 1:
        array = lax.dynamic_slice_in_dim(array, key_start, keys, axis=-1)
    return array


def allowed_pairs(
    geometry: Geometry,
    arrays: PairArrays,
    query_start: Position,
    queries: int,
    key_start: Position,
    keys: int,
) -> jax.Array | None:
    """Returns the boolean mask of one block, the bias left out of it.

    Args:
        geometry: Causality and window.
        arrays: Mask and lengths of the whole attention.
        query_start: The block's first query.
        queries: How many queries the block has, `t`.
        key_start: The block's first key.
        keys: How many keys the block has, `s`.

    Returns:
        True where a pair takes part, broadcastable to `(B, K, G, t, s)`, or None where all do.
    """
    query_positions = query_start + jnp.arange(queries)
    key_positions = key_start + jnp.arange(keys)
    conditions = []
    seen = geometry.allowed(query_positions[:, None], key_positions[None, :])
    if seen is not None:
        conditions.append(seen[None, None, None])
    if arrays.mask is not None:
        conditions.append(cut(arrays.mask, query_start, queries, key_start, keys))
    if arrays.query_seq_lengths is not None:
        inside = query_positions < arrays.query_seq_lengths[:, None]
        conditions.append(inside[:, None, None, :, None])
    if arrays.key_value_seq_lengths is not None:
        inside = key_positions < arrays.key_value_seq_lengths[:, None]
        conditions.append(inside[:, None, None, None, :])
    return _all(conditions)


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


def bias_permits(bias: jax.Array) -> jax.Array:
    """Returns False where a bias is so low that it is a mask in truth.

    That is at `finfo(bias.dtype).min / 2` and below, -inf included, and at -1e9 and below.
    """
    limit = _FORBIDDING_BIAS
    if jnp.issubdtype(bias.dtype, jnp.floating):
        limit = max(limit, float(jnp.finfo(bias.dtype).min) / 2)
    return ~(bias.astype(jnp.float32) <= limit)
