"""The one array operation of a clip: a leaf times a broadcast factor.

A factor is as small as the maxima. Where heads are sharded over devices, maxima and weights alike,
it is laid out without leaving them; where they are sharded differently, it is the factor that
moves, never a weight.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from muonclip_jax._devices import varying_axes
from muonclip_jax.heads.plan import LeafPlan


def leaf_factor(leaf: LeafPlan, factors: Mapping[str, jax.Array]) -> Float[Array, "..."]:
    """Lays the heads' factors out along a leaf's features.

    It broadcasts against the leaf, with size 1 along its input axis. `factors` is role -> `(*stack,
    heads of that role)`; an absent role is not scaled.
    """
    stack = tuple(leaf.shape[axis] for axis in leaf.stack_axes)
    first = leaf.segments[0]
    if leaf.repeat == len(leaf.segments) == 1 and leaf.features == (first.heads, first.size):
        # Heads have an axis for themselves: no axis is split or joined.
        row = jnp.expand_dims(factors[first.role], -1)
    else:
        row = _flat_row(leaf, factors, stack).reshape(*stack, *leaf.features)
    # Into the leaf's order of axes: stack and features are ascending, but may alternate.
    axes = leaf.stack_axes + leaf.feature_axes
    row = row.transpose(sorted(range(len(axes)), key=axes.__getitem__))
    return jnp.expand_dims(row, tuple(i for i in range(len(leaf.shape)) if i not in axes))


def _flat_row(
    leaf: LeafPlan, factors: Mapping[str, jax.Array], stack: tuple[int, ...]
) -> Float[Array, "..."]:
    """The factors along the features in one row, `(*stack, features)`."""
    rows: list[jax.Array] = []
    joined = leaf.repeat == len(leaf.segments) == len(leaf.feature_axes) == 1
    for segment in leaf.segments:
        shape = (*stack, leaf.repeat, segment.heads, segment.size)
        factor = factors.get(segment.role)
        if factor is None:
            row = jnp.ones(shape, next(iter(factors.values())).dtype)
        else:
            factor = factor if joined else _whole(factor)
            row = jnp.broadcast_to(factor.reshape(*shape[:-1], 1), shape)
        rows.append(row.reshape(*stack, leaf.repeat, -1))
    row = jnp.concatenate(rows, axis=-1) if len(rows) > 1 else rows[0]
    return row.reshape(*stack, -1)


def _whole(x: jax.Array) -> jax.Array:
    """Gathers what Explicit axes shard: an axis that they shard cannot be split."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
        return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return x


def beside(factor: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Brings a factor to the sharding of the leaf that it multiplies, where axes are Explicit."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return factor
    spec = [
        axes if length > 1 else None
        for axes, length in zip(sharding.spec, factor.shape, strict=True)
    ]
    return jax.reshard(factor, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def scale(x: Float[Array, "..."], factor: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiplies in float32 or better and rounds once; where the factor is 1, every bit stays."""
    factor = beside(factor, x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scaled = (x.astype(wide) * factor.astype(wide)).astype(x.dtype)
    return keep_unscaled(x, scaled, factor)


def scale_if(
    needed: Bool[Array, ""], x: Float[Array, "..."], factor: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns what `scale` does where it is needed, and `x` without reading it where it is not.

    Most steps clip no head of most blocks; donated memory is then neither read nor written.
    """
    return compute_if(needed, scale, x, factor)


def compute_if(
    needed: Bool[Array, ""], function: Callable[..., jax.Array], x: jax.Array, *others: jax.Array
) -> jax.Array:
    """Returns `function(x, *others)` where it is needed, and `x` without reading it elsewhere."""
    # Inside a checked `jax.shard_map` both branches must vary over the same mesh axes.
    varying = frozenset[str]().union(*map(varying_axes, (needed, x, *others)))
    if missing := tuple(sorted(varying - varying_axes(x))):
        x = jax.lax.pcast(x, missing, to="varying")
    return jax.lax.cond(needed, function, lambda x, *_: x, x, *others)


def keep_shardings(new: Mapping[str, jax.Array], old: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns concrete arrays with the shardings of those that they replace.

    Called outside of `jit` on Auto axes, XLA may shard a result as the maxima are.
    """
    return {
        path: x
        if isinstance(x, Tracer)
        or not isinstance(old[path], jax.Array)
        or x.sharding.is_equivalent_to(old[path].sharding, x.ndim)
        else jax.device_put(x, old[path].sharding)
        for path, x in new.items()
    }


def check_reduced(leaves: Mapping[str, Any], factors: Mapping[str, jax.Array]) -> None:
    """Raises where maxima differ between devices that hold the same weights.

    Inside a checked `jax.shard_map` the types say over which mesh axes arrays vary. A factor that
    varies where its leaf does not would clip every copy of the weights in its own way.
    """
    for path, factor in factors.items():
        axes = tuple(sorted(varying_axes(factor) - varying_axes(leaves[path])))
        if axes:
            raise ValueError(
                f"The maxima for {path!r} vary over the mapped mesh axes {axes} and the weights do "
                "not: every device knows the maxima of its own part of the batch. Expected those "
                "of the whole batch; write max_logits = muonclip_jax.reduce_max_logits("
                f"max_logits, {(axes[0] if len(axes) == 1 else axes)!r})."
            )


def keep_unscaled(x: jax.Array, scaled: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `scaled`, and `x` itself to the bit where the factor, which broadcasts, is 1."""
    # A select wants its condition sharded as its cases are; a product takes over their sharding.
    laid_out = factor * jnp.ones_like(x, dtype=factor.dtype)
    one = laid_out == 1.0
    if x.dtype.itemsize != 2:
        return jnp.where(one, x, scaled)
    # A CPU computes on 16-bit floats in float32, selections too, and rounds once more after each.
    # It selects integers as they are.
    bits = [jax.lax.bitcast_convert_type(y, jnp.uint16) for y in (x, scaled)]
    return jax.lax.bitcast_convert_type(jnp.where(one, *bits), x.dtype)
