"""What the kernels are given: one form for every way to hide a pair.

A kernel knows causality and the window by itself. Everything else that hides pairs comes as an
array: bytes that permit a pair, one array for the mask and one for the bias, each no larger than
what the caller passed; and two limits for every sequence, where its queries and its keys end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muonclip_jax.kernels.pairs import PairArrays, bias_permits


class Operands(NamedTuple):
    """The arrays of one launch; every axis of `permits` but those of pairs may be one long.

    Attributes:
        query: Queries `[B, T, N, H]`, negated where the scale is negative.
        key: Keys `[B, S, K, H]`; query head `n` meets key head `n // (N / K)`.
        permits: Bytes, not zero where a pair may take part `[B, N, T, S]`.
        limits: How many queries and how many keys each sequence has `[B, 2]`, or None for all.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    permits: tuple[Int[Array, "_ _ _ _"], ...]
    limits: Int[Array, "B 2"] | None


def _permits(allowed: jax.Array) -> jax.Array:
    batch, key_heads, groups, queries, keys = allowed.shape
    return allowed.astype(jnp.int8).reshape(batch, key_heads * groups, queries, keys)


def make_operands(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    scale: Float[Array, ""] | float,
    arrays: PairArrays,
) -> Operands:
    """Brings the operation's arguments into the form of the kernels.

    The maximum of `scale x` is `|scale|` times the maximum of `x` or of `-x`. So a kernel needs no
    scale: the sign goes on the queries, where it changes no rounding, and the rest on the maxima.
    """
    batch, queries, key_heads, groups, head_dim = query.shape
    query = query.reshape(batch, queries, key_heads * groups, head_dim)
    permits = []
    if arrays.mask is not None:
        permits.append(_permits(arrays.mask))
    if arrays.bias is not None:
        permits.append(_permits(bias_permits(arrays.bias)))
    limits = None
    lengths = (arrays.query_seq_lengths, arrays.key_value_seq_lengths)
    known = [length for length in lengths if length is not None]
    if known:
        sizes = zip(lengths, (queries, key.shape[1]), strict=True)
        limits = [
            jnp.full_like(known[0], size) if length is None else jnp.minimum(length, size)
            for length, size in sizes
        ]
        limits = jnp.stack([limit.astype(jnp.int32) for limit in limits], axis=1)
    return Operands(jnp.where(scale < 0, -query, query), key, tuple(permits), limits)


def rescale(maxima: Float[Array, "B N"], scale: Float[Array, ""]) -> Float[Array, "B N"]:
    """Multiplies maxima by `|scale|`; those of no pair at all stay -inf, also where it is zero."""
    return jnp.where(jnp.isneginf(maxima), maxima, maxima * jnp.abs(scale).astype(jnp.float32))


def like(operands: Operands, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Returns float32 of a shape that differs between the shards between which an operand does."""

    def anything(operands: Operands) -> jax.Array:
        corners = [x.reshape(-1)[0].astype(jnp.float32) for x in jax.tree.leaves(operands)]
        return jnp.broadcast_to(sum(corners), shape)

    return jax.eval_shape(anything, operands)


def at(index: jax.Array, size: int) -> jax.Array | int:
    """Returns the index into an axis that may be one long and broadcast."""
    return index if size > 1 else 0
