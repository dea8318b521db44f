"""Attention and its maxima in XLA, block by block, so that memory is linear in the sequence.

Attention: softmax subtracts the maximum of every row before it exponentiates. That maximum is the
number that QK-Clip needs; only an additive bias, which is not part of the recorded logit, needs a
second reduction. A short sequence is one block. A longer one is processed sequentially in blocks of
queries; each block uses all keys that the causal mask and the window allow, and its logits are
recomputed in the backward pass (`jax.checkpoint`).

Maxima alone: blocks of queries and keys. The last block of an axis is shifted so that it fits,
since pairs that occur twice do not change a maximum. Blocks without unmasked pairs are skipped.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax._tree import ScalarLike
from muonclip_jax.attention.pairs import (
    Block,
    Geometry,
    Inputs,
    allowed_pairs,
    bias_permits,
    permitted_max,
)


class Sizes(NamedTuple):
    """Sizes of blocks on a platform.

    Attributes:
        dense: Up to this number of logits attention is one block, stored for the backward pass.
        block: Float32 logits of one block of attention. On a CPU 8 MB fit into the last-level
            cache; on an accelerator few large launches are faster.
        queries: Minimum number of queries per block. On Auto axes the number of devices over which
            a batch is sharded is unknown, so a block may be many times smaller per device than
            planned: on an accelerator it has at least enough queries to fill a matrix unit.
    """

    dense: int
    block: int
    queries: int


SIZES = {"cpu": Sizes(1 << 21, 1 << 21, 32)}
_ACCELERATOR = Sizes(1 << 28, 1 << 26, 256)
# Logits of a block where only maxima are asked for: 2 MB, which a core's caches hold.
_MAXIMA_BLOCK = 1 << 19

# Ranges of queries that share one range of keys under causality: four leave 5/8 of all pairs to
# compute, where infinitely many would leave 1/2 in a program of infinite length.
_CAUSAL_RANGES = 4
# Hides a pair, and is finite, so that a row without any pair stays finite.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def _sizes(geometry: Geometry) -> Sizes:
    return SIZES.get(geometry.platform, _ACCELERATOR)


def _rows(query: jax.Array) -> int:
    """Rows of logits per query position; a symbolic batch counts as one sequence."""
    return math.prod(n for n in (query.shape[0], *query.shape[2:4]) if isinstance(n, int))


def block_logits(
    query: Float[Array, "B t K G H"], key: Float[Array, "B s K H"], scale: ScalarLike
) -> Float[Array, "B K G t s"]:
    """Returns `scale q . k`, accumulated and returned in float32 (float64 for float64 input)."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Named for bfloat16, so that a gradient's products, whose cotangent is float32, stay bfloat16
    # products too (https://github.com/jax-ml/jax/issues/24047). Not every platform has float16's.
    precision = lax.DotAlgorithmPreset.BF16_BF16_F32 if query.dtype == jnp.bfloat16 else None
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", query, key, precision=precision, preferred_element_type=dtype
    )
    return logits * jnp.asarray(scale, dtype)


class Segment(NamedTuple):
    """Consecutive blocks of `length` queries with `keys` keys each, starting at `key_starts`."""

    start: int
    length: int
    key_starts: tuple[int, ...]
    keys: int


def plan_segments(inputs: Inputs, geometry: Geometry) -> list[Segment]:
    """Divides the queries of attention into blocks. Symbolic lengths give one block."""
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    rows, sizes = _rows(inputs.query), _sizes(geometry)
    symbolic = not (isinstance(queries, int) and isinstance(keys, int))
    if symbolic or rows * queries * keys <= sizes.dense:
        return [Segment(0, queries, (0,), keys)]
    length = min(queries, max(sizes.queries, sizes.block // (rows * keys) // 32 * 32))
    starts = range(0, queries, length)
    # With a bias every pair is computed: a hidden pair may then outweigh a forbidden one, and
    # which of the two a row of such pairs falls back to is known only from all of its keys.
    ranges = [
        (0, keys)
        if inputs.bias is not None
        else geometry.key_range(start, min(start + length, queries), keys)
        for start in starts
    ]
    whole = queries // length
    count = 1 if len({high - low for low, high in ranges[:whole]}) == 1 else _CAUSAL_RANGES
    each = -(-whole // count)
    groups = [range(first, min(first + each, whole)) for first in range(0, whole, each)]
    groups += [range(whole, len(starts))] if queries % length else []
    segments = []
    for group in groups:
        span = max(1, *(ranges[i][1] - ranges[i][0] for i in group))
        key_starts = tuple(min(ranges[i][0], keys - span) for i in group)
        first = starts[group[0]]
        segments.append(Segment(first, min(length, queries - first), key_starts, span))
    return segments


def _attend_block(
    inputs: Inputs,
    geometry: Geometry,
    fallback: Float[Array, "B 1 K 1 D"] | None,
    query_start: int | jax.Array,
    key_start: int | jax.Array,
) -> tuple[Float[Array, "B t K G D"], Float[Array, "K G"]]:
    """Attention of one block of queries to one range of keys; `inputs` contains only these."""
    assert inputs.value is not None
    block = Block(query_start, inputs.query.shape[1], key_start, inputs.key.shape[1])
    unbiased = logits = block_logits(inputs.query, inputs.key, inputs.scale)
    if inputs.bias is not None:
        logits = (logits + block.cut(inputs.bias)).astype(logits.dtype)
    allowed = allowed_pairs(inputs, geometry, block)
    if allowed is not None:
        logits = jnp.where(allowed, logits, _HIDDEN)
    logits = logits.astype(jnp.float32)
    # XLA computes this maximum and the one inside softmax once.
    maximum = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    weights = jax.nn.softmax(logits, axis=-1).astype(inputs.key.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, inputs.value)
    if fallback is not None:
        out = jnp.where(jnp.moveaxis(maximum <= _HIDDEN / 2, 3, 1), fallback, out)
    if inputs.bias is None:
        recorded, permitted = maximum, ~(maximum <= _HIDDEN / 2)  # A NaN stays.
    else:
        recorded, permitted = lax.stop_gradient(unbiased), bias_permits(block.cut(inputs.bias))
        permitted = permitted if allowed is None else permitted & allowed
    return out, permitted_max(recorded, permitted, axes=(0, 3, 4))


def _attend_segment(
    segment: Segment, inputs: Inputs, geometry: Geometry, fallback: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Attention of the blocks of one segment, sequentially."""
    blocks = len(segment.key_starts)
    stop = segment.start + blocks * segment.length
    queries = inputs.query[:, segment.start : stop]

    @jax.checkpoint
    def attend_block(
        inputs: Inputs, fallback: jax.Array | None, start: jax.Array, key_start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if segment.keys < inputs.key.shape[1]:
            key, value = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, key_start, segment.keys, axis=1),
                (inputs.key, inputs.value),
            )
            inputs = inputs._replace(key=key, value=value)
        return _attend_block(inputs, geometry, fallback, start, key_start)

    def attend_at(block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        query, start, key_start = block
        return attend_block(inputs._replace(query=query), fallback, start, key_start)

    starts = jnp.arange(segment.start, stop, segment.length)
    key_starts = jnp.asarray(segment.key_starts)
    if blocks == 1:
        return attend_at((queries, starts[0], key_starts[0]))
    queries = queries.reshape(queries.shape[0], blocks, segment.length, *queries.shape[2:])
    out, maxima = lax.map(attend_at, (jnp.moveaxis(queries, 1, 0), starts, key_starts))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:]), jnp.max(maxima, axis=0)


def attend(
    inputs: Inputs, geometry: Geometry
) -> tuple[Float[Array, "B T K G D"], Float[Array, "K G"]]:
    """Returns exact attention, and the exact maxima of its heads."""
    assert inputs.value is not None
    segments = plan_segments(inputs, geometry)
    if len(segments) == 1 and len(segments[0].key_starts) == 1:
        out, maxima = _attend_block(inputs, geometry, None, 0, 0)
    else:
        fallback = None
        if any(segment.keys < inputs.key.shape[1] for segment in segments):
            # A row with nothing to attend to falls back to the mean over all values, those outside
            # of its range too.
            fallback = jnp.mean(inputs.value, axis=1, keepdims=True, dtype=jnp.float32)
            fallback = fallback[:, :, :, None].astype(inputs.value.dtype)
        pieces = [_attend_segment(segment, inputs, geometry, fallback) for segment in segments]
        out = jnp.concatenate([out for out, _ in pieces], axis=1)
        maxima = jnp.max(jnp.stack([maxima for _, maxima in pieces]), axis=0)
    if inputs.query_seq_lengths is not None:
        inside = jnp.arange(out.shape[1]) < inputs.query_seq_lengths[:, None]
        out = out * inside[:, :, None, None, None].astype(out.dtype)
    return out, maxima


def _plan_blocks(inputs: Inputs, geometry: Geometry) -> list[Block]:
    """Lists equal blocks that contain every pair that the causal mask and the window allow."""
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    if 0 in inputs.query.shape or 0 in inputs.key.shape:
        return []
    if not (isinstance(queries, int) and isinstance(keys, int)):
        return [Block(0, queries, 0, keys)]
    rows, least = _rows(inputs.query), _sizes(geometry).queries

    def size(length: int, other: int) -> int:
        wanted = _MAXIMA_BLOCK // max(rows * other, 1) // 32 * 32
        return min(length, max(least, min(512, wanted)))

    key_block = size(keys, 256)
    query_block = size(queries, key_block)
    blocks = []
    for start in range(0, queries, query_block):
        start = min(start, queries - query_block)
        for key_start in range(*geometry.key_range(start, start + query_block, keys), key_block):
            blocks.append(Block(start, query_block, min(key_start, keys - key_block), key_block))
    return blocks


def max_logits(inputs: Inputs, geometry: Geometry) -> Float[Array, "K G"]:
    """Returns the largest `scale q . k` of every head over its pairs, -inf for a head without any.

    The bias is not added; it only masks pairs.
    """
    blocks = _plan_blocks(inputs, geometry)
    if not blocks:
        return jnp.full(inputs.query.shape[2:4], -jnp.inf, jnp.float32)
    _, queries, _, keys = blocks[0]

    def maximum(start: jax.Array) -> Float[Array, "K G"]:
        block = Block(start[0], queries, start[1], keys)
        query = lax.dynamic_slice_in_dim(inputs.query, block.query_start, queries, axis=1)
        key = lax.dynamic_slice_in_dim(inputs.key, block.key_start, keys, axis=1)
        allowed = allowed_pairs(inputs, geometry, block)
        if inputs.bias is not None:
            permitted = bias_permits(block.cut(inputs.bias))
            allowed = permitted if allowed is None else allowed & permitted
        return permitted_max(block_logits(query, key, inputs.scale), allowed, axes=(0, 3, 4))

    starts = jnp.asarray([(block.query_start, block.key_start) for block in blocks])
    if len(blocks) == 1:
        return maximum(starts[0])
    return jnp.max(lax.map(maximum, starts), axis=0)
