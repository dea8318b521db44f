"""The one array operation of a clip: a leaf times a broadcast factor."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax.layouts.attention_plan import LeafPlan


def leaf_factor(leaf: LeafPlan, factors: Mapping[str, jax.Array]) -> Float[Array, "..."]:
    """Lays the heads' factors out along a leaf's features.

    The result has the leaf's rank, with size 1 along its input axis: it is small, and the leaf is
    multiplied by it in place, whatever its sharding.

    Args:
        leaf: Where the heads lie.
        factors: Role -> `(*stack, heads of that role)`; an absent role is not scaled.

    Returns:
        float32, broadcasts against the leaf.
    """
    stack = tuple(leaf.shape[axis] for axis in leaf.stack_axes)
    features = tuple(leaf.shape[axis] for axis in leaf.feature_axes)
    rows: list[jax.Array] = []
    for segment in leaf.segments:
        shape = (*stack, leaf.repeat, segment.heads, segment.size)
        factor = factors.get(segment.role)
        if factor is None:
            row = jnp.ones(shape, jnp.float32)
        else:
            row = jnp.broadcast_to(factor.reshape(*shape[:-1], 1), shape)
        rows.append(row.reshape(*stack, leaf.repeat, -1))
    row = jnp.concatenate(rows, axis=-1) if len(rows) > 1 else rows[0]
    row = row.reshape(*stack, *features)
    # Into the leaf's order of axes: stack and features are ascending, but may alternate.
    axes = leaf.stack_axes + leaf.feature_axes
    row = row.transpose(sorted(range(len(axes)), key=axes.__getitem__))
    return jnp.expand_dims(row, tuple(i for i in range(len(leaf.shape)) if i not in axes))


def scale(x: Float[Array, "..."], factor: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiplies in float32 or better and rounds once; where the factor is 1, every bit stays.

    Example:
        >>> import jax.numpy as jnp
        >>> scale(jnp.asarray([1.0, 3.0], jnp.bfloat16), jnp.asarray([1.0, 0.5])).tolist()
        [1.0, 1.5]
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scaled = (x.astype(wide) * factor.astype(wide)).astype(x.dtype)
    return keep_unscaled(x, scaled, factor)


def keep_unscaled(x: jax.Array, scaled: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `scaled`, and `x` itself to the bit where the factor, which broadcasts, is 1."""
    # A select wants its condition sharded as its cases are; a product takes over their sharding.
    laid_out = factor * jnp.ones_like(x, dtype=factor.dtype)
    return jnp.where(laid_out == 1.0, x, scaled)
