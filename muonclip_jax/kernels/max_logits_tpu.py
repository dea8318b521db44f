"""Per-head maxima on TPUs: the largest logit of every head over the unmasked pairs.

The grid iterates over sequences, heads, long chunks of keys and blocks of queries: a chunk of keys
stays in VMEM while all blocks of queries are processed. A block of logits is reduced, 8 x 128
numbers at a time, into one such tile of maxima, so there is no cross-lane reduction before the end.
The matrix unit needs heads-first arrays in tiles of 128: one copy of queries and keys before the
launch transposes them and pads the last blocks with zeros.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas.tpu import SMEM, CompilerParams
from jaxtyping import Array, Bool, Float, Int

DTYPES = ("bfloat16", "float32")
LONGEST_HEAD = 1024
_SUBLANES, _LANES = 8, 128
_BLOCK = 512
# Rows of a packed byte tile: a block of queries is a multiple of it, and so of every other tile.
_BYTE_SUBLANES = 32
# Bytes of one chunk of keys, and of one window of masks; two of each are in flight, of 16 MB.
_CHUNK_BYTES, _MASK_BYTES = 2 * 2**20, 2**20


def _kernel(
    limits_ref, query_ref, key_ref, *refs, window, query_block: int, key_block: int
) -> None:
    *mask_refs, out_ref = refs
    left, right = window
    sequence, chunk, number = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    query_limit, key_limit = limits_ref[2 * sequence], limits_ref[2 * sequence + 1]
    chunk_blocks = key_ref.shape[0] // key_block
    first_block, start = chunk * chunk_blocks, number * query_block

    @pl.when((chunk == 0) & (number == 0))
    def _():
        out_ref[...] = jnp.full(out_ref.shape, -jnp.inf, jnp.float32)

    query = query_ref[...]

    def visit(position: jax.Array, maxima: jax.Array) -> jax.Array:
        here = pl.ds(pl.multiple_of((position - first_block) * key_block, key_block), key_block)
        logits = lax.dot_general(
            query,
            key_ref[here, :],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        rows = start + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        columns = position * key_block + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        allowed = (rows < query_limit) & (columns < key_limit)
        if right is not None:
            allowed &= rows >= columns - right
        if left is not None:
            allowed &= rows <= columns + left
        for ref in mask_refs:
            mask = ref[:, here] if ref.shape[1] > 1 else ref[...]
            allowed &= jnp.broadcast_to(mask.astype(jnp.int32), logits.shape) != 0
        logits = jnp.where(allowed, logits, -jnp.inf)
        lanes = [logits[:, at : at + _LANES] for at in range(0, key_block, _LANES)]
        tile = functools.reduce(jnp.maximum, lanes)
        tiles = tile.reshape(query_block // _SUBLANES, _SUBLANES, _LANES)
        return jnp.maximum(maxima, jnp.max(tiles, axis=0))

    # The keys that some query of the block sees, in blocks of keys, within the chunk.
    last = jnp.minimum(start + query_block, query_limit) - 1
    low, high = jnp.int32(0), key_limit
    if right is not None:
        high = jnp.minimum(high, last + right + 1)
    if left is not None:
        low = jnp.maximum(low, start - left)
    # lax.div rounds to zero, which is enough for what is clipped to zero and more.
    low = lax.div(low, jnp.int32(key_block))
    high = jnp.where(start < query_limit, lax.div(high + key_block - 1, jnp.int32(key_block)), low)
    low, high = (jnp.clip(x, first_block, first_block + chunk_blocks) for x in (low, high))
    out_ref[...] = lax.fori_loop(low, high, visit, out_ref[...])


def _padded(x: jax.Array, sizes: tuple[int, int]) -> jax.Array:
    """Pads the last two axes with zeros, except axes of length one, which broadcast."""
    missing = [
        (0, size - have if have > 1 else 0) for have, size in zip(x.shape[-2:], sizes, strict=True)
    ]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + missing)


def _mask_spec(mask: jax.Array, query_block: int, chunk: int) -> pl.BlockSpec:
    def at(index: jax.Array, size: int) -> jax.Array | int:
        return index if size > 1 else 0

    of_batch, of_heads, height, width = mask.shape
    return pl.BlockSpec(
        (None, None, query_block if height > 1 else 1, chunk if width > 1 else 1),
        lambda b, n, c, i: (at(b, of_batch), at(n, of_heads), at(i, height), at(c, width)),
    )


def max_logits(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    masks: Sequence[Bool[Array, "_ _ _ _"]],
    limits: Int[Array, "B 2"],
    *,
    window: tuple[int | None, int | None],
    interpret: bool = False,
) -> Float[Array, "B N"]:
    """Returns the largest `q . k` of every head in each sequence, -inf if there is no pair.

    Query head `n` uses key head `n // (N / K)`. Masks are False for masked pairs, each
    `(B, N, T, S)`, where axes may have length one; `limits` are the numbers of queries and keys of
    each sequence; query `t` attends to keys from `t - left` to `t + right` of the `window`, where
    None is no limit.
    """
    batch, queries, heads, head_dim = query.shape
    keys, key_heads = key.shape[1:3]
    group = heads // key_heads

    def up(size: int, multiple: int) -> int:
        return pl.cdiv(size, multiple) * multiple

    query_block = min(_BLOCK, up(queries, _BYTE_SUBLANES))
    key_block = min(_BLOCK, up(keys, _LANES))
    wanted = _CHUNK_BYTES // (up(head_dim, _LANES) * query.dtype.itemsize)
    if any(mask.shape[3] > 1 for mask in masks):
        wanted = min(wanted, _MASK_BYTES // query_block)
    chunks = pl.cdiv(keys, max(wanted // key_block, 1) * key_block)
    chunk = up(pl.cdiv(keys, chunks), key_block)
    grid = (batch, heads, pl.cdiv(keys, chunk), pl.cdiv(queries, query_block))
    lengths = (grid[3] * query_block, grid[2] * chunk)

    # A single row or column of bytes is no tile.
    as_numbers = [mask.astype(jnp.int32 if 1 in mask.shape[2:] else jnp.int8) for mask in masks]

    def like(*operands: jax.Array) -> jax.Array:
        # Inside shard_map a type includes what varies between devices.
        corner = sum(x.reshape(-1)[0].astype(jnp.float32) for x in operands)
        return jnp.broadcast_to(corner, (batch, heads, _SUBLANES, _LANES))

    maxima = pl.pallas_call(
        functools.partial(_kernel, window=window, query_block=query_block, key_block=key_block),
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=SMEM),
            pl.BlockSpec((None, None, query_block, head_dim), lambda b, n, c, i: (b, n, i, 0)),
            pl.BlockSpec(
                (None, None, chunk, head_dim), lambda b, n, c, i: (b, lax.div(n, group), c, 0)
            ),
            *(_mask_spec(mask, query_block, chunk) for mask in masks),
        ],
        out_specs=pl.BlockSpec((None, None, _SUBLANES, _LANES), lambda b, n, c, i: (b, n, 0, 0)),
        out_shape=jax.eval_shape(like, query, key, limits, *masks),
        compiler_params=CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="max_logits",
    )(
        limits.reshape(-1),
        _padded(query.transpose(0, 2, 1, 3), (lengths[0], head_dim)),
        _padded(key.transpose(0, 2, 1, 3), (lengths[1], head_dim)),
        *(_padded(mask, lengths) for mask in as_numbers),
    )
    return jnp.max(maxima, axis=(2, 3))
