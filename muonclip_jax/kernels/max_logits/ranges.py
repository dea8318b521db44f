"""Which blocks of keys a block of queries visits, worked out inside a kernel.

A kernel holds one block of queries and goes through the keys block by block. Causality, the window
and the lengths say where it begins and ends, and between which blocks no pair is hidden at all:

    keys      0 . . . low ----- full_low =========== full_high ----- high . . . S
                      some pairs            all pairs          some pairs

Only the outer two stretches look at single pairs. Everything here is a handful of scalar
operations on numbers that only the running kernel knows.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.kernels.pairs import Geometry, Position

#: `low`, `full_low`, `full_high` and `high`, in blocks of keys.
BlockRanges: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def block_ranges(
    geometry: Geometry,
    query_start: Position,
    queries: int,
    query_limit: Position,
    key_limit: Position,
    key_block: int,
    *,
    rows_are_hidden_later: bool,
) -> BlockRanges:
    """Returns the blocks of keys that some, and that all, of a block's queries see.

    Args:
        geometry: Causality and window.
        query_start: The first query.
        queries: How many queries the block has.
        query_limit: Queries from here on are padding.
        key_limit: Keys from here on are padding.
        key_block: Keys in a block.
        rows_are_hidden_later: Whether the kernel hides padded queries by itself; otherwise a block
            that has some sees no block of keys in full.

    Returns:
        `low <= full_low <= full_high <= high`.

    Example:
        >>> causal = Geometry(is_causal=True)
        >>> ranges = block_ranges(causal, 64, 32, 256, 256, 16, rows_are_hidden_later=False)
        >>> [int(bound) for bound in ranges]
        [0, 0, 4, 6]
    """
    first, last = query_start, query_start + queries - 1
    last_seeing = jnp.minimum(last, query_limit - 1)
    low, high = jnp.int32(0), jnp.asarray(key_limit, jnp.int32)
    full_low, full_high = low, high
    if geometry.is_causal:
        high = jnp.minimum(high, last_seeing + 1)
        full_high = jnp.minimum(full_high, first + 1)
    if geometry.local_window_size is not None:
        left, right = geometry.local_window_size
        low, high = jnp.maximum(low, first - left), jnp.minimum(high, last_seeing + right + 1)
        full_low = jnp.maximum(full_low, last - left)
        full_high = jnp.minimum(full_high, first + right + 1)

    # lax.div rounds to zero, which is enough for what is clipped to zero and more; jnp's floor
    # division needs the sign, which the TPU's lowering wants to look up on a TPU.
    low = lax.div(low, jnp.int32(key_block))
    high = jnp.maximum(lax.div(high + key_block - 1, key_block), low)
    high = jnp.where(first < query_limit, high, low)
    full_low = jnp.clip(lax.div(full_low + key_block - 1, key_block), low, high)
    full_high = jnp.clip(lax.div(full_high, key_block), full_low, high)
    if not rows_are_hidden_later:
        full_high = jnp.where(last < query_limit, full_high, full_low)
    return low, full_low, full_high, high


def within(ranges: BlockRanges, start: Position, stop: Position) -> BlockRanges:
    """Returns the part of the ranges that lies between two blocks of keys.

    Example:
        >>> import jax.numpy as jnp
        >>> [int(bound) for bound in within(tuple(jnp.array([0, 1, 4, 6])), 2, 5)]
        [2, 2, 4, 5]
    """
    low, full_low, full_high, high = (jnp.clip(bound, start, stop) for bound in ranges)
    return low, full_low, full_high, high
