"""What per-head maxima mean: the operation in XLA, block by block.

It goes through the pairs in blocks of queries and keys. Each block is a small matrix
product and a maximum; what lives at once is one block, and memory grows with `T + S` and not with
their product. The last block of an axis is moved back until it fits: pairs seen twice do not
change a maximum, and no padding is needed. Blocks that causality or the window rule out are never
visited.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax._typing import ScalarLike
from muonclip_jax.kernels.pairs import (
    Geometry,
    PairArrays,
    allowed_pairs,
    bias_permits,
    cut,
    permitted_max,
)
from muonclip_jax.kernels.shards import shares_of

# Logits alive at once: 2 MB in float32, which a core's caches hold.
_BLOCK_ELEMENTS = 1 << 19
# Queries in a block at least. Under Auto axes it is not known how many devices share a batch, so a
# block may come out many times smaller than one of them would hold: on an accelerator, where every
# block is a launch, it keeps as many as fill a matrix unit. From 512 tokens and 64 features a head
# on, the logits of 256 by 256 pairs take no more memory than queries and keys do.
_LEAST_BLOCK = {"cpu": 32}
_ACCELERATOR_LEAST_BLOCK = 256


def dot_precision(dtype: jax.typing.DTypeLike) -> lax.DotAlgorithmPreset | None:
    """Returns the algorithm of dot products that accumulate in float32.

    For bfloat16 it is named, so that a gradient's products, whose cotangent is float32, stay
    bfloat16 products too (https://github.com/jax-ml/jax/issues/24047). The same name for float16
    exists, but not on every platform.
    """
    return lax.DotAlgorithmPreset.BF16_BF16_F32 if dtype == jnp.bfloat16 else None


def block_logits(
    query: Float[Array, "B t K G H"], key: Float[Array, "B s K H"], scale: ScalarLike
) -> Float[Array, "B K G t s"]:
    """Returns `scale q . k`, accumulated and kept in float32 (float64 for float64 input)."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum(
        "btkgh,bskh->bkgts",
        query,
        key,
        precision=dot_precision(query.dtype),
        preferred_element_type=dtype,
    )
    return logits * jnp.asarray(scale, dtype)


def least_block() -> int:
    """Returns how many queries a block has at least, where there are as many."""
    return _LEAST_BLOCK.get(jax.default_backend(), _ACCELERATOR_LEAST_BLOCK)


def known_product(*sizes: Any) -> int:
    """Multiplies sizes; a symbolic one, of a program exported for any batch, counts as one."""
    return math.prod(size for size in sizes if isinstance(size, int))


def _block_length(length: int, other: int, rows: int) -> int:
    """Returns how much of an axis a block covers, given `rows` products of `other` each."""
    wanted = _BLOCK_ELEMENTS // max(rows * other, 1)
    return min(length, max(least_block(), min(512, wanted // 32 * 32)))


def _block_starts(
    geometry: Geometry, queries: int, keys: int, query_block: int, key_block: int
) -> list[tuple[int, int]]:
    """Lists the blocks in which some pair is attended to, as far as geometry can tell."""
    starts = []
    for query_start in range(0, queries, query_block):
        query_start = min(query_start, queries - query_block)
        low, high = geometry.key_range(query_start, query_start + query_block, keys)
        for key_start in range(low, high, key_block):
            starts.append((query_start, min(key_start, keys - key_block)))
    return starts


def max_logits_xla(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    scale: ScalarLike,
    geometry: Geometry,
    arrays: PairArrays,
) -> Float[Array, "K G"]:
    """Returns the maxima, as `max_logits` describes them."""
    shares = shares_of(query)
    if shares is not None:
        share = functools.partial(max_logits_xla, geometry=geometry)
        return shares.maxima(share, query, key, scale, arrays)
    batch, queries, key_heads, groups, _ = query.shape
    keys = key.shape[1]
    key_block, query_block, starts = keys, queries, [(0, 0)]
    if isinstance(queries, int) and isinstance(keys, int):
        rows = known_product(batch, key_heads, groups)
        key_block = _block_length(keys, 256, rows)
        query_block = _block_length(queries, key_block, rows)
        starts = _block_starts(geometry, queries, keys, query_block, key_block)
    if query.size == 0 or key.size == 0 or not starts:
        return jnp.full((key_heads, groups), -jnp.inf, jnp.float32)

    def maximum(start: tuple[jax.Array, jax.Array]) -> Float[Array, "K G"]:
        query_start, key_start = start
        logits = block_logits(
            lax.dynamic_slice_in_dim(query, query_start, query_block, axis=1),
            lax.dynamic_slice_in_dim(key, key_start, key_block, axis=1),
            scale,
        )
        block = (query_start, query_block, key_start, key_block)
        allowed = allowed_pairs(geometry, arrays, *block)
        if arrays.bias is not None:
            permitted = bias_permits(cut(arrays.bias, *block))
            allowed = permitted if allowed is None else allowed & permitted
        return permitted_max(logits, allowed, axes=(0, 3, 4))

    if len(starts) == 1:
        query_start, key_start = starts[0]
        return maximum((jnp.asarray(query_start), jnp.asarray(key_start)))
    query_starts, key_starts = (jnp.asarray(axis) for axis in zip(*starts, strict=True))
    return jnp.max(lax.map(maximum, (query_starts, key_starts)), axis=0)
