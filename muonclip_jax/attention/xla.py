"""Exact attention in XLA that records its largest logits on the way.

Softmax subtracts the largest logit of every row before it exponentiates. That maximum is the very
number that QK-Clip asks for, so it is kept instead of being computed again: recording costs one
maximum over rows that are there anyway. Only an additive bias, which is no part of the recorded
logit, makes a second reduction necessary.

Short sequences are one block. Longer ones are cut into blocks of queries, one after another; a
block sees the whole range of keys that causality and the window leave it, and its logits are
computed again in the backward pass (`jax.checkpoint`) instead of being kept. Memory is then one
block, linear in the sequence, and everything stays differentiable in both modes and any order.

Blocks are cut from what one device has, where the types of arrays tell (`shards.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax.attention.arguments import AttentionArguments
from muonclip_jax.attention.max_logits import block_logits, known_product, least_block
from muonclip_jax.attention.pairs import allowed_pairs, bias_permits, cut, permitted_max
from muonclip_jax.attention.shards import shares_of

# Logits alive at once in float32. On a CPU 8 MB stay in the last cache; an accelerator wants
# few large launches. Up to the second number there is one block, kept for the backward pass.
_BLOCK_ELEMENTS = {"cpu": 1 << 21}
_DENSE_ELEMENTS = {"cpu": 1 << 21}
_ACCELERATOR_BLOCK, _ACCELERATOR_DENSE = 1 << 26, 1 << 28

# Ranges of queries that share one range of keys under causality: four leave 5/8 of all pairs to
# compute, where infinitely many would leave 1/2 in a program of infinite length.
_CAUSAL_RANGES = 4


class Segment(NamedTuple):
    """Consecutive equal blocks of queries that see equally many keys.

    Attributes:
        start: The first query.
        blocks: How many blocks there are.
        length: Queries in a block.
        key_starts: For every block, the first key that it sees.
        keys: How many keys a block sees.
    """

    start: int
    blocks: int
    length: int
    key_starts: tuple[int, ...]
    keys: int


@jax.custom_jvp
def softmax_with_max(
    logits: Float[Array, "*rows S"],
) -> tuple[Float[Array, "*rows S"], Float[Array, "*rows 1"]]:
    """Returns softmax over the last axis, and the maximum it subtracted, a constant to autodiff.

    Example:
        >>> import jax.numpy as jnp
        >>> [x.tolist() for x in softmax_with_max(jnp.array([2.0, 2.0]))]
        [[0.5, 0.5], [2.0]]
    """
    maximum = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    unnormalized = jnp.exp(logits - maximum)
    return unnormalized / jnp.sum(unnormalized, axis=-1, keepdims=True), maximum


@softmax_with_max.defjvp
def _softmax_with_max_jvp(primals, tangents):
    (logits,), (tangent,) = primals, tangents
    weights, maximum = softmax_with_max(logits)
    centered = tangent - jnp.sum(weights * tangent, axis=-1, keepdims=True)
    return (weights, maximum), (weights * centered, jnp.zeros_like(maximum))


def _hidden_logit(dtype: jax.typing.DTypeLike) -> float:
    """Returns the logit that hides a pair: finite, so that a row with nothing stays finite."""
    return -0.7 * min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))


def plan_segments(arguments: AttentionArguments) -> tuple[Segment, ...]:
    """Cuts the queries into blocks, from shapes alone.

    A symbolic batch counts as one sequence, and symbolic lengths make one block.
    """
    batch, queries, key_heads, groups, _ = arguments.query.shape
    keys = arguments.key.shape[1]
    rows = known_product(batch, key_heads, groups)
    platform = jax.default_backend()
    whole = not (isinstance(queries, int) and isinstance(keys, int))
    if whole or rows * queries * keys <= _DENSE_ELEMENTS.get(platform, _ACCELERATOR_DENSE):
        return (Segment(0, 1, queries, (0,), keys),)

    wanted = _BLOCK_ELEMENTS.get(platform, _ACCELERATOR_BLOCK) // (rows * keys)
    length = min(queries, max(least_block(), wanted // 32 * 32))
    starts = list(range(0, queries - length + 1, length))

    # With a bias every pair is computed: a hidden pair may then outweigh a forbidden one, and
    # which of the two a row of such pairs falls back to is known only from all of its keys.
    if arguments.arrays.bias is not None:
        ranges = [(0, keys)] * len(starts)
    else:
        ranges = [arguments.geometry.key_range(s, s + length, keys) for s in starts]
    count = 1 if len({high - low for low, high in ranges}) == 1 else _CAUSAL_RANGES
    per_segment = -(-len(starts) // count)

    segments = []
    for first in range(0, len(starts), per_segment):
        chosen = ranges[first : first + per_segment]
        span = max(1, *(high - low for low, high in chosen))
        key_starts = tuple(min(low, keys - span) for low, _ in chosen)
        segments.append(Segment(starts[first], len(chosen), length, key_starts, span))
    rest = queries % length
    if rest:
        start = queries - rest
        low, high = (
            (0, keys)
            if arguments.arrays.bias is not None
            else arguments.geometry.key_range(start, queries, keys)
        )
        span = max(1, high - low)
        segments.append(Segment(start, 1, rest, (min(low, keys - span),), span))
    return tuple(segments)


def _attend(
    query: Float[Array, "B t K G H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K D"],
    fallback: Float[Array, "B 1 K 1 D"] | None,
    arguments: AttentionArguments,
    query_start: int | jax.Array,
    key_start: int | jax.Array,
    record: bool,
) -> tuple[Float[Array, "B t K G D"], Float[Array, "K G"]]:
    """Attends from one block of queries to one range of keys."""
    arrays = arguments.arrays
    block = (query_start, query.shape[1], key_start, key.shape[1])
    unbiased = block_logits(query, key, arguments.scale)
    logits = unbiased
    if arrays.bias is not None:
        logits = (logits + cut(arrays.bias, *block)).astype(logits.dtype)
    allowed = allowed_pairs(arguments.geometry, arrays, *block)
    hidden = _hidden_logit(logits.dtype)
    if allowed is not None:
        logits = jnp.where(allowed, logits, hidden)

    weights, maximum = softmax_with_max(logits.astype(jnp.float32))
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(key.dtype), value)
    if fallback is not None:
        empty = jnp.moveaxis(maximum <= hidden / 2, 3, 1)
        out = jnp.where(empty, fallback, out)

    if not record:
        return out, jnp.zeros(query.shape[2:4], jnp.float32)
    if arrays.bias is None:
        recorded, permitted = maximum, ~(maximum <= hidden / 2)  # A NaN stays.
    else:
        recorded, permitted = unbiased, bias_permits(cut(arrays.bias, *block))
        permitted = permitted if allowed is None else permitted & allowed
    return out, permitted_max(lax.stop_gradient(recorded), permitted, axes=(0, 3, 4))


def _attend_segment(
    segment: Segment,
    key: jax.Array,
    value: jax.Array,
    fallback: jax.Array | None,
    arguments: AttentionArguments,
    record: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attends from the blocks of one segment, one after another."""

    @jax.checkpoint
    def attend(query, key, value, fallback, arrays, query_start, key_start):
        if segment.keys < arguments.key.shape[1]:
            key = lax.dynamic_slice_in_dim(key, key_start, segment.keys, axis=1)
            value = lax.dynamic_slice_in_dim(value, key_start, segment.keys, axis=1)
        call = arguments.with_arrays(arrays)
        return _attend(query, key, value, fallback, call, query_start, key_start, record)

    def attend_block(block):
        return attend(block[0], key, value, fallback, arguments.arrays, *block[1:])

    stop = segment.start + segment.blocks * segment.length
    query = arguments.query[:, segment.start : stop]
    if segment.blocks == 1:
        return attend_block((query, segment.start, segment.key_starts[0]))
    blocks = query.reshape(query.shape[0], segment.blocks, segment.length, *query.shape[2:])
    query_starts = jnp.arange(segment.start, stop, segment.length)
    out, maxima = lax.map(
        attend_block,
        (jnp.moveaxis(blocks, 1, 0), query_starts, jnp.asarray(segment.key_starts)),
    )
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:]), jnp.max(maxima, axis=0)


def attend_xla(
    arguments: AttentionArguments, record: bool = True
) -> tuple[Float[Array, "B T K G D"], Float[Array, "K G"]]:
    """Returns exact attention and, unless `record` is false, the exact maxima of its heads."""
    key, value = arguments.key, arguments.value
    assert value is not None
    shares = shares_of(arguments.query)
    if shares is not None:
        return shares.call(
            lambda *own: attend_xla(arguments.with_share(*own), record),
            arguments.query,
            key,
            value,
            arguments.scale,
            arguments.arrays,
        )
    segments = plan_segments(arguments)
    if len(segments) == 1 and segments[0].blocks == 1:
        out, maxima = _attend(arguments.query, key, value, None, arguments, 0, 0, record)
    else:
        # A row with nothing to attend to falls back to the mean over all values, those outside
        # of its range too.
        fallback = None
        if any(segment.keys < key.shape[1] for segment in segments):
            fallback = jnp.mean(value, axis=1, keepdims=True, dtype=jnp.float32)
            fallback = fallback[:, :, :, None].astype(value.dtype)
        pieces = [
            _attend_segment(segment, key, value, fallback, arguments, record)
            for segment in segments
        ]
        out = jnp.concatenate([out for out, _ in pieces], axis=1)
        maxima = jnp.max(jnp.stack([maxima for _, maxima in pieces]), axis=0)

    lengths = arguments.arrays.query_seq_lengths
    if lengths is not None:
        inside = jnp.arange(out.shape[1]) < lengths[:, None]
        out = out * inside[:, :, None, None, None].astype(out.dtype)
    return out, maxima
