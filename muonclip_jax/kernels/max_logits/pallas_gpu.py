"""Per-head maxima on a GPU: a Pallas kernel in the Triton language.

A program holds one block of queries of one head and goes through the keys that it sees. What it
keeps is the largest logit of every query; the tile of logits itself never leaves the registers.
It is the first of the two products of a flash attention, without its exponentials.

Triton's tiles are powers of two long. A head that is not is taken apart (192 = 128 + 64), and the
ends of sequences are cut off by masks when they are loaded.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from muonclip_jax.kernels.max_logits.operands import Operands, at, like
from muonclip_jax.kernels.max_logits.ranges import block_ranges
from muonclip_jax.kernels.pairs import Geometry

# JAX 0.11 announces that a later version will be without it.
try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:
    plgpu: Any = None

NAME = "muonclip_max_logits"
_DTYPES = ("bfloat16", "float16", "float32")
# The longest piece of a head in one product, and the shortest one that tensor cores take.
_LONGEST_PIECE, _SHORTEST_PIECE = 128, 16
# Bytes of shared memory for the queries and for each of the blocks of keys that are on their way:
# 32 + 3 * 16 KB, which every GPU since Ampere has (99 KB at least).
_QUERY_BYTES, _KEY_BYTES, _STAGES = 32 * 1024, 16 * 1024, 3
_LONGEST_HEAD = 1024


def refuse_gpu(operands: Operands) -> str | None:
    """Says why the kernel cannot serve a call, or returns None."""
    if plgpu is None:
        return "this version of JAX has no Triton in Pallas"
    largest = max(math.prod(x.shape) for x in jax.tree.leaves(operands))
    if largest > np.iinfo(np.int32).max:
        return f"its kernel addresses entries by 32-bit numbers, and an array has {largest}"
    if operands.query.dtype.name not in _DTYPES:
        return f"its kernel takes {', '.join(_DTYPES)}, not {operands.query.dtype}"
    if operands.query.shape[-1] > _LONGEST_HEAD:
        return (
            f"its kernel keeps a block of queries in shared memory, which heads up to "
            f"{_LONGEST_HEAD} fit, not {operands.query.shape[-1]}"
        )
    return None


def head_pieces(head_dim: int) -> list[tuple[int, int]]:
    """Takes a head apart into starts and lengths that are powers of two.

    Example:
        >>> head_pieces(64), head_pieces(192), head_pieces(72)
        ([(0, 64)], [(0, 128), (128, 64)], [(0, 64), (64, 16)])
    """
    pieces, start = [], 0
    while start < head_dim:
        length = min(_LONGEST_PIECE, 1 << ((head_dim - start).bit_length() - 1))
        length = max(_SHORTEST_PIECE, length)
        pieces.append((start, length))
        start += length
    return pieces


def _rows(limit: int, row_bytes: int) -> int:
    """Returns how many rows of a tile fit: a power of two from 16 to 128."""
    return min(128, max(16, 1 << ((limit // row_bytes).bit_length() - 1)))


def _kernel(
    query_ref: Any,
    key_ref: Any,
    *refs: Any,
    geometry: Geometry,
    sizes: tuple[int, int, int],
    permit_shapes: tuple[tuple[int, ...], ...],
    has_limits: bool,
    query_block: int,
    key_block: int,
) -> None:
    queries, keys, head_dim = sizes
    *permit_refs, out_ref = refs
    query_limit, key_limit = jnp.int32(queries), jnp.int32(keys)
    if has_limits:
        *permit_refs, limits_ref = permit_refs
        query_limit, key_limit = limits_ref[0], limits_ref[1]
    start = _query_block(geometry) * query_block
    rows = start + jnp.arange(query_block)
    pieces = [
        (pl.ds(at_head, length), (at_head + jnp.arange(length) < head_dim)[None, :])
        for at_head, length in head_pieces(head_dim)
    ]
    query = [
        plgpu.load(query_ref.at[:, piece], mask=(rows < queries)[:, None] & inside, other=0)
        for piece, inside in pieces
    ]

    def visit(hidden: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def block(number: jax.Array, maxima: jax.Array) -> jax.Array:
            columns = number * key_block + jnp.arange(key_block)
            here = pl.ds(number * key_block, key_block)
            logits = jnp.zeros((query_block, key_block), jnp.float32)
            for part, (piece, inside) in zip(query, pieces, strict=True):
                key = plgpu.load(
                    key_ref.at[here, piece], mask=(columns < keys)[:, None] & inside, other=0
                )
                logits += plgpu.dot(part, key, trans_b=True)
            if hidden:
                allowed = (columns < key_limit)[None, :]
                pairs = geometry.allowed(rows[:, None], columns[None, :])
                allowed = allowed if pairs is None else allowed & pairs
                for ref, (height, width) in zip(permit_refs, permit_shapes, strict=True):
                    mask = jnp.ones((1, 1), bool)
                    if height > 1:
                        mask = mask & (rows < queries)[:, None]
                    if width > 1:
                        mask = mask & (columns < keys)[None, :]
                    window = ref.at[:, here] if width > 1 else ref
                    allowed &= plgpu.load(window, mask=mask, other=0) != 0
                logits = jnp.where(allowed, logits, -jnp.inf)
            return jnp.maximum(maxima, jnp.max(logits, axis=1))

        return block

    low, full_low, full_high, high = block_ranges(
        geometry, start, query_block, query_limit, key_limit, key_block, rows_are_hidden_later=True
    )
    maxima = jnp.full((query_block,), -jnp.inf, jnp.float32)
    if permit_refs:
        maxima = jax.lax.fori_loop(low, high, visit(True), maxima)
    else:
        if geometry.local_window_size is not None:
            maxima = jax.lax.fori_loop(low, full_low, visit(True), maxima)
        maxima = jax.lax.fori_loop(full_low, full_high, visit(False), maxima)
        maxima = jax.lax.fori_loop(full_high, high, visit(True), maxima)
    out_ref[...] = jnp.max(jnp.where(rows < query_limit, maxima, -jnp.inf))


def _query_block(geometry: Geometry) -> jax.Array:
    """Returns this program's block; under causality the longest ones start first."""
    number = pl.program_id(0)
    return pl.num_programs(0) - 1 - number if geometry.is_causal else number


def max_logits_gpu(
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
    row_bytes = query.dtype.itemsize * sum(length for _, length in head_pieces(head_dim))
    query_block, key_block = _rows(_QUERY_BYTES, row_bytes), _rows(_KEY_BYTES, row_bytes)
    blocks = pl.cdiv(queries, query_block)
    covered = pl.cdiv(keys, key_block) * key_block
    depth = sum(length for _, length in head_pieces(head_dim))

    def query_index(i: jax.Array) -> jax.Array:
        return blocks - 1 - i if geometry.is_causal else i

    def permit_spec(permit: jax.Array) -> pl.BlockSpec:
        first, second, height, width = permit.shape
        return pl.BlockSpec(
            (None, None, query_block if height > 1 else 1, covered if width > 1 else 1),
            lambda i, n, b: (
                at(b, first),
                at(n, second),
                query_index(i) if height > 1 else 0,
                0,
            ),
        )

    in_specs = [
        pl.BlockSpec((None, query_block, None, depth), lambda i, n, b: (b, query_index(i), n, 0)),
        pl.BlockSpec(
            (None, covered, None, depth), lambda i, n, b: (b, 0, jax.lax.div(n, group), 0)
        ),
        *map(permit_spec, permits),
    ]
    if limits is not None:
        in_specs.append(pl.BlockSpec((None, 2), lambda i, n, b: (b, 0)))
    maxima = pl.pallas_call(
        functools.partial(
            _kernel,
            geometry=geometry,
            sizes=(queries, keys, head_dim),
            permit_shapes=tuple(permit.shape[2:] for permit in permits),
            has_limits=limits is not None,
            query_block=query_block,
            key_block=key_block,
        ),
        grid=(blocks, heads, batch),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((None, None, None), lambda i, n, b: (b, n, i)),
        out_shape=like(operands, (batch, heads, blocks)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=_STAGES),
        interpret=interpret,
        name=NAME,
    )(query, key, *permits, *([] if limits is None else [limits]))
    return jnp.max(maxima, axis=2)
