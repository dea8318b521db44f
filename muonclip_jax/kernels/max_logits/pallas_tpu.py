"""Per-head maxima on a TPU: a Pallas kernel for its matrix unit.

The grid goes over sequences, heads, long chunks of keys and blocks of queries. A chunk of keys
stays in the core's memory while all blocks of queries pass by; for each of them the kernel goes
through the part of the chunk that they see. A tile of logits is folded, 8 x 128 numbers at a time,
into one such tile of maxima, so that nothing is moved between lanes before the very end.

The matrix unit takes heads-first arrays in tiles of 128. Transposing to that form, and filling the
last blocks up, is one copy of queries and keys before the launch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from muonclip_jax.kernels.max_logits.operands import Operands, at, like
from muonclip_jax.kernels.max_logits.ranges import block_ranges, within
from muonclip_jax.kernels.pairs import Geometry

NAME = "muonclip_max_logits"
_DTYPES = ("bfloat16", "float32")
_SUBLANES, _LANES = 8, 128
_BLOCK = 512
# Rows of a packed byte tile: a block of queries is a multiple of it, and so of every other tile.
_BYTE_SUBLANES = 32
# Bytes of one chunk of keys, and of one window of permits; two of each are in flight, of 16 MB.
_CHUNK_BYTES, _PERMIT_BYTES = 2 * 2**20, 2**20
_LONGEST_HEAD = 1024


def refuse_tpu(operands: Operands) -> str | None:
    """Says why the kernel cannot serve a call, or returns None."""
    if operands.query.dtype.name not in _DTYPES:
        return f"the matrix unit takes {' and '.join(_DTYPES)}, not {operands.query.dtype}"
    if operands.query.shape[-1] > _LONGEST_HEAD:
        return (
            f"its blocks fit the core's memory for heads up to {_LONGEST_HEAD}, not "
            f"{operands.query.shape[-1]}"
        )
    return None


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _fold(logits: jax.Array) -> jax.Array:
    """Returns the maximum of a block's tiles of 8 x 128."""
    rows, columns = logits.shape
    lanes = [logits[:, start : start + _LANES] for start in range(0, columns, _LANES)]
    tile = functools.reduce(jnp.maximum, lanes)
    return jnp.max(tile.reshape(rows // _SUBLANES, _SUBLANES, _LANES), axis=0)


def _kernel(
    query_ref: Any,
    key_ref: Any,
    *refs: Any,
    geometry: Geometry,
    sizes: tuple[int, int],
    has_limits: bool,
    query_block: int,
    key_block: int,
) -> None:
    *permit_refs, out_ref = refs
    query_limit, key_limit = (jnp.int32(size) for size in sizes)
    if has_limits:
        *permit_refs, limits_ref = permit_refs
        sequence = pl.program_id(0)
        query_limit, key_limit = limits_ref[2 * sequence], limits_ref[2 * sequence + 1]
    chunk, number = pl.program_id(2), pl.program_id(3)
    chunk_blocks = key_ref.shape[0] // key_block
    first_block = chunk * chunk_blocks
    start = number * query_block

    @pl.when((chunk == 0) & (number == 0))
    def _():
        out_ref[...] = jnp.full(out_ref.shape, -jnp.inf, jnp.float32)

    query = query_ref[...]

    def visit(hidden: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def block(position: jax.Array, maxima: jax.Array) -> jax.Array:
            here = pl.ds(pl.multiple_of((position - first_block) * key_block, key_block), key_block)
            logits = jax.lax.dot_general(
                query,
                key_ref[here, :],
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            if hidden:
                rows = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
                columns = position * key_block + jax.lax.broadcasted_iota(
                    jnp.int32, logits.shape, 1
                )
                allowed = (rows < query_limit) & (columns < key_limit)
                pairs = geometry.allowed(rows, columns)
                allowed = allowed if pairs is None else allowed & pairs
                for ref in permit_refs:
                    permit = ref[:, here] if ref.shape[1] > 1 else ref[...]
                    permit = jnp.broadcast_to(permit.astype(jnp.int32), logits.shape)
                    allowed &= permit != 0
                logits = jnp.where(allowed, logits, -jnp.inf)
            return jnp.maximum(maxima, _fold(logits))

        return block

    low, full_low, full_high, high = within(
        block_ranges(
            geometry,
            start,
            query_block,
            query_limit,
            key_limit,
            key_block,
            rows_are_hidden_later=False,
        ),
        first_block,
        first_block + chunk_blocks,
    )
    maxima = out_ref[...]
    if permit_refs:
        maxima = jax.lax.fori_loop(low, high, visit(True), maxima)
    else:
        maxima = jax.lax.fori_loop(low, full_low, visit(True), maxima)
        maxima = jax.lax.fori_loop(full_low, full_high, visit(False), maxima)
        maxima = jax.lax.fori_loop(full_high, high, visit(True), maxima)
    out_ref[...] = maxima


def _pairs(geometry: Geometry, lengths: tuple[int, int], query_block: int) -> int:
    """Returns about how many pairs the kernel visits, for XLA's scheduler."""
    ranges = (
        geometry.key_range(start, start + query_block, lengths[1])
        for start in range(0, lengths[0], query_block)
    )
    return query_block * sum(high - low for low, high in ranges)


def _padded(x: jax.Array, sizes: tuple[int, int]) -> jax.Array:
    """Fills the last two axes up with zeros; those that are one long broadcast and stay."""
    missing = [
        (0, size - have if have > 1 else 0) for have, size in zip(x.shape[-2:], sizes, strict=True)
    ]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + missing)


def max_logits_tpu(
    operands: Operands, *, geometry: Geometry, interpret: bool = False
) -> Float[Array, "B N"]:
    """Returns the maxima of every sequence and head, without the scale.

    Args:
        operands: The arrays.
        geometry: Causality and window.
        interpret: Runs the kernel's meaning on any platform instead of compiling it.

    Returns:
        The largest `q . k` of every head in each sequence, -inf where there is no pair.
    """
    query, key, permits, limits = operands
    batch, queries, heads, head_dim = query.shape
    keys, key_heads = key.shape[1:3]
    group = heads // key_heads
    query_block = min(_BLOCK, _round_up(queries, _BYTE_SUBLANES))
    key_block = min(_BLOCK, _round_up(keys, _LANES))
    wanted = _CHUNK_BYTES // (_round_up(head_dim, _LANES) * query.dtype.itemsize)
    if any(permit.shape[3] > 1 for permit in permits):
        wanted = min(wanted, _PERMIT_BYTES // query_block)
    blocks = pl.cdiv(keys, key_block)
    chunks = pl.cdiv(blocks * key_block, max(wanted, key_block))
    chunk = pl.cdiv(blocks, chunks) * key_block
    chunks = pl.cdiv(keys, chunk)
    query_blocks = pl.cdiv(queries, query_block)
    lengths = (query_blocks * query_block, chunks * chunk)

    def permit_spec(permit: jax.Array) -> pl.BlockSpec:
        first, second, height, width = permit.shape
        return pl.BlockSpec(
            (None, None, query_block if height > 1 else 1, chunk if width > 1 else 1),
            lambda b, n, c, i: (at(b, first), at(n, second), at(i, height), at(c, width)),
        )

    def with_permits(permit: jax.Array) -> jax.Array:
        # A single row or column of bytes is no tile.
        wide = 1 not in permit.shape[2:]
        return _padded(permit.astype(jnp.int8 if wide else jnp.int32), lengths)

    in_specs = [
        pl.BlockSpec((None, None, query_block, head_dim), lambda b, n, c, i: (b, n, i, 0)),
        pl.BlockSpec(
            (None, None, chunk, head_dim), lambda b, n, c, i: (b, jax.lax.div(n, group), c, 0)
        ),
        *map(permit_spec, permits),
    ]
    if limits is not None:
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    maxima = pl.pallas_call(
        functools.partial(
            _kernel,
            geometry=geometry,
            sizes=(queries, keys),
            has_limits=limits is not None,
            query_block=query_block,
            key_block=key_block,
        ),
        grid=(batch, heads, chunks, query_blocks),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((None, None, _SUBLANES, _LANES), lambda b, n, c, i: (b, n, 0, 0)),
        out_shape=like(operands, (batch, heads, _SUBLANES, _LANES)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * head_dim * batch * heads * _pairs(geometry, lengths, query_block),
            bytes_accessed=query.dtype.itemsize * (query.size + group * key.size),
            transcendentals=0,
        ),
        interpret=interpret,
        name=NAME,
    )(
        _padded(query.transpose(0, 2, 1, 3), (lengths[0], head_dim)),
        _padded(key.transpose(0, 2, 1, 3), (lengths[1], head_dim)),
        *map(with_permits, permits),
        *([] if limits is None else [limits.reshape(-1)]),
    )
    return jnp.max(maxima, axis=(2, 3))
