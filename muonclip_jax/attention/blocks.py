"""Attention and its maxima in XLA, block by block, so that memory is linear in the sequence.

Attention: softmax subtracts the maximum of every row before it exponentiates. That maximum is the
number that QK-Clip needs; only an additive bias, which is not part of the recorded logit, needs a
second reduction. A long sequence is processed sequentially in blocks of queries; each block uses
all keys that the causal mask and the window allow, and its logits are recomputed in the backward
pass (`jax.checkpoint`).

Maxima alone: blocks of queries and keys. The last block of an axis is shifted so that it fits.
Blocks without unmasked pairs are skipped.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

from muonclip_jax._devices import entry_axes
from muonclip_jax._tree import ScalarLike
from muonclip_jax.attention.inputs import Index, Inputs, allowed_pairs, permitted_max

#: Output `[B, T, K, G, D]`, or None where only maxima are asked for, and maxima `[K, G]`.
Result: TypeAlias = tuple[jax.Array | None, jax.Array]


class Sizes(NamedTuple):
    """Sizes of blocks on a platform."""

    dense: int  # up to so many logits attention is one block, stored for the backward pass
    # Float32 logits of one block of attention. On a CPU 8 MB fit into the last-level cache; on an
    # accelerator few large launches are faster.
    block: int
    # Minimum number of queries per block. On Auto axes the number of devices over which a batch is
    # sharded is unknown: on an accelerator a block has enough queries to fill a matrix unit.
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


def plan_segments(inputs: Inputs) -> list[Segment]:
    """Divides the queries of attention into blocks. Symbolic lengths give one block."""
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    rows, sizes = _rows(inputs.query), SIZES.get(inputs.platform, _ACCELERATOR)
    symbolic = not (isinstance(queries, int) and isinstance(keys, int))
    if symbolic or rows * queries * keys <= sizes.dense:
        return [Segment(0, queries, (0,), keys)]
    length = min(queries, max(sizes.queries, sizes.block // (rows * keys) // 32 * 32))
    starts = range(0, queries, length)
    ranges = [inputs.key_range(start, min(start + length, queries)) for start in starts]
    if inputs.bias is not None:
        # Every pair is computed: a hidden pair may then outweigh a forbidden one, and which of the
        # two a row of such pairs falls back to is known only from all of its keys.
        ranges = [(0, keys)] * len(starts)
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
    span: int,
    inputs: Inputs,
    fallback: Float[Array, "B 1 K 1 D"] | None,
    piece: tuple[Float[Array, "B t K G H"], Index, Index],
) -> tuple[Float[Array, "B t K G D"], Float[Array, "K G"]]:
    """Attention of a block of queries, with its start, to `span` keys from another start on."""
    query, start, key_start = piece
    block = dataclasses.replace(inputs.block(start, query.shape[1], key_start, span), query=query)
    assert block.value is not None
    unbiased = logits = block_logits(block.query, block.key, block.scale)
    if block.bias is not None:
        logits = (logits + block.bias).astype(logits.dtype)
    allowed = allowed_pairs(block, start, key_start)
    if allowed is not None:
        logits = jnp.where(allowed, logits, _HIDDEN)
    logits = logits.astype(jnp.float32)
    # XLA computes this maximum and the one inside softmax once.
    maximum = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    weights = jax.nn.softmax(logits, axis=-1).astype(block.key.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, block.value)
    if fallback is not None:
        out = jnp.where(jnp.moveaxis(maximum <= _HIDDEN / 2, 3, 1), fallback, out)
    if block.bias is None:
        recorded, permitted = maximum, ~(maximum <= _HIDDEN / 2)  # A NaN stays.
    else:
        recorded = lax.stop_gradient(unbiased)
        permitted = allowed_pairs(block, start, key_start, bias=True)
    return out, permitted_max(recorded, permitted, axes=(0, 3, 4))


def attend(inputs: Inputs) -> tuple[Float[Array, "B T K G D"], Float[Array, "K G"]]:
    """Returns exact attention, and the exact maxima of its heads."""
    assert inputs.value is not None
    segments, fallback = plan_segments(inputs), None
    if any(segment.keys < inputs.key.shape[1] for segment in segments):
        # A row with nothing to attend to falls back to the mean over all values.
        fallback = jnp.mean(inputs.value, axis=1, keepdims=True, dtype=jnp.float32)
        fallback = fallback[:, :, :, None].astype(inputs.value.dtype)
    pieces = []
    for first, length, key_starts, span in segments:
        blocks, attend_block = len(key_starts), functools.partial(_attend_block, span)
        if blocks > 1 or len(segments) > 1:
            attend_block = jax.checkpoint(attend_block)
        # Arguments, since what a function closes over is read more often in the backward pass.
        attend_at = functools.partial(attend_block, inputs, fallback)
        query = inputs.query[:, first : first + blocks * length]
        if blocks == 1:
            pieces.append(attend_at((query, first, key_starts[0])))
            continue
        query = jnp.moveaxis(query.reshape(len(query), blocks, length, *query.shape[2:]), 1, 0)
        starts = first + length * jnp.arange(blocks), jnp.asarray(key_starts)
        out, maxima = lax.map(attend_at, (query, *starts))
        out = jnp.moveaxis(out, 0, 1)
        pieces.append((out.reshape(len(out), -1, *out.shape[3:]), jnp.max(maxima, axis=0)))
    out = jnp.concatenate([out for out, _ in pieces], axis=1)
    maxima = jnp.max(jnp.stack([maxima for _, maxima in pieces]), axis=0)
    if inputs.query_seq_lengths is not None:
        inside = jnp.arange(out.shape[1]) < inputs.query_seq_lengths[:, None]
        out = out * inside[:, :, None, None, None].astype(out.dtype)
    return out, maxima


def max_logits(inputs: Inputs) -> Float[Array, "K G"]:
    """Returns the largest `scale q . k` of every head over its pairs, -inf for a head without any.

    The bias is not added; it only masks pairs. Equal blocks contain every allowed pair.
    """
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    rows, least = _rows(inputs.query), SIZES.get(inputs.platform, _ACCELERATOR).queries
    starts: list[tuple[int, int]] = [(0, 0)]
    whole = queries, keys
    known = isinstance(queries, int) and isinstance(keys, int)
    if known and 0 not in (*inputs.query.shape, keys):

        def size(length: int, other: int) -> int:
            wanted = _MAXIMA_BLOCK // (rows * other) // 32 * 32
            return min(length, max(least, min(512, wanted)))

        keys = size(keys, 256)
        queries = size(queries, keys)
        starts = []
        for start in range(0, whole[0], queries):
            start = min(start, whole[0] - queries)
            reach = range(*inputs.key_range(start, start + queries), keys)
            starts += [(start, min(key, whole[1] - keys)) for key in reach]
    if not starts:
        return jnp.full(inputs.query.shape[2:4], -jnp.inf, jnp.float32)

    def maximum(at: tuple[Index, Index]) -> Float[Array, "K G"]:
        block = inputs.block(at[0], queries, at[1], keys)
        logits = block_logits(block.query, block.key, inputs.scale)
        return permitted_max(logits, allowed_pairs(block, *at, bias=True), axes=(0, 3, 4))

    if len(starts) == 1:
        return maximum(starts[0])
    first, key_first = (jnp.asarray(each) for each in zip(*starts, strict=True))
    return jnp.max(lax.map(maximum, (first, key_first)), axis=0)


def on_each_device(
    function: Callable[[Inputs], Result], inputs: Inputs, *, check_vma: bool = True
) -> Result:
    """Calls `function` on every device's local sequences and heads, if Explicit axes shard them.

    Queries or keys whose positions are sharded are gathered first, and the output is sharded again.
    Under Auto axes the partitioner decides.
    """
    inputs = dataclasses.replace(inputs, scale=jnp.asarray(inputs.scale))
    sharding = jax.typeof(inputs.query).sharding
    mesh, explicit = sharding.mesh, set(sharding.mesh.explicit_axes)
    if not explicit or inputs.query.size == 0:
        return function(inputs)
    batch, queries, key_heads, groups, _ = (*sharding.spec, *[None] * 5)[:5]
    keys, pairs = (batch, None, key_heads), (batch, key_heads, groups)
    # Mesh axes of the leading axes of every array.
    entries = {"query": (*keys, groups), "key": keys, "value": keys, "mask": pairs, "bias": pairs}
    entries |= {"query_seq_lengths": (batch,), "key_value_seq_lengths": (batch,), "scale": ()}
    arrays = {name: x for name in entries if (x := getattr(inputs, name)) is not None}
    specs = {
        name: P(*(axes if n > 1 else None for axes, n in zip(entries[name], x.shape, strict=False)))
        for name, x in arrays.items()
    }

    def local(share: dict[str, jax.Array]) -> Result:
        out, maxima = function(dataclasses.replace(inputs, **share))
        if axes := entry_axes(batch):
            maxima = lax.pmax(lax.stop_gradient(maxima), axes)
        return out, maxima

    def mapped(arrays: dict[str, jax.Array]) -> Result:
        return jax.shard_map(
            local,
            mesh=mesh,
            axis_names=explicit,
            in_specs=(specs,),
            out_specs=(None if inputs.value is None else P(*keys, groups), P(key_heads, groups)),
            check_vma=check_vma,
        )({name: jax.reshard(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()})

    if any(jax.typeof(x).sharding.mesh.empty for x in arrays.values()):
        # Eagerly, where no mesh is set, an array that is on one device cannot be resharded.
        mapped = jax.jit(mapped)
    out, maxima = mapped(arrays)
    if out is not None and queries is not None:
        out = jax.reshard(out, NamedSharding(mesh, P(batch, queries, key_heads, groups)))
    return out, maxima
