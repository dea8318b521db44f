"""The array operation of a clip: a leaf times a broadcast factor, a power of gamma for its heads.

A factor is as small as the maxima. If heads are sharded the same way in maxima and weights, this
needs no communication; otherwise the factor is resharded, never a weight.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from muonclip_jax._devices import varying_axes
from muonclip_jax.heads.plan import LeafPlan


def leaf_factor(leaf: LeafPlan, factors: Mapping[str, jax.Array]) -> Float[Array, "..."]:
    """Broadcasts the factors of the heads to the features of a leaf.

    The result broadcasts against the leaf, with size 1 along its input axis. `factors` is
    role -> `(*stack, heads of that role)`; an absent role is not scaled.
    """
    stack = tuple(leaf.shape[axis] for axis in leaf.stack_axes)
    first = leaf.segments[0]
    if leaf.repeat == len(leaf.segments) == 1 and leaf.features == (first.heads, first.size):
        # Heads have an axis of their own: no axis is split or joined.
        row = jnp.expand_dims(factors[first.role], -1)
    else:
        row = _feature_row(leaf, factors, stack).reshape(*stack, *leaf.features)
    # Into the leaf's order of axes: stack and features are ascending, but may alternate.
    axes = leaf.stack_axes + leaf.feature_axes
    row = row.transpose(sorted(range(len(axes)), key=axes.__getitem__))
    return jnp.expand_dims(row, tuple(i for i in range(len(leaf.shape)) if i not in axes))


def _feature_row(
    leaf: LeafPlan, factors: Mapping[str, jax.Array], stack: tuple[int, ...]
) -> Float[Array, "..."]:
    """The factors of all features in one row, `(*stack, features)`."""
    dtype = next(iter(factors.values())).dtype
    one_role = leaf.repeat == len(leaf.segments) == len(leaf.feature_axes) == 1
    rows: list[jax.Array] = []
    for segment in leaf.segments:
        shape = (*stack, leaf.repeat, segment.heads, segment.size)
        factor = factors.get(segment.role)
        if factor is None:
            row = jnp.ones(shape, dtype)
        else:
            factor = factor if one_role else _replicated(factor)
            row = jnp.broadcast_to(factor.reshape(*shape[:-1], 1), shape)
        rows.append(row.reshape(*stack, leaf.repeat, -1))
    row = jnp.concatenate(rows, axis=-1) if len(rows) > 1 else rows[0]
    return row.reshape(*stack, -1)


def _replicated(x: jax.Array) -> jax.Array:
    """Replicates an array over Explicit axes, because a sharded axis cannot be split."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
        return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return x


def _sharded_like(factor: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Reshards a factor like the leaf that it multiplies, on Explicit axes."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return factor
    axes = zip(sharding.spec, factor.shape, strict=True)
    spec = PartitionSpec(*(entry if length > 1 else None for entry, length in axes))
    return jax.reshard(factor, NamedSharding(sharding.mesh, spec))


def _clipped(
    p: Float[Array, "..."], u: Float[Array, "..."] | None, factor: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns `factor p`, or with an update `factor (p + u) - p`, rounded once."""
    factor = _sharded_like(factor, p)
    old = p if u is None else u
    wide = jnp.promote_types(jnp.promote_types(p.dtype, old.dtype), jnp.float32)
    moved = p.astype(wide) if u is None else p.astype(wide) + u.astype(wide)
    new = moved * factor.astype(wide)
    new = (new if u is None else new - p.astype(wide)).astype(old.dtype)

    # Where the factor is 1 every bit of `old` stays. A select wants its condition sharded as its
    # cases are; a product takes over their sharding.
    one = factor * jnp.ones_like(old, dtype=factor.dtype) == 1.0
    if old.dtype.itemsize != 2:
        return jnp.where(one, old, new)
    # A CPU computes on 16-bit floats in float32, selections too, and rounds once more after each.
    # It selects integers as they are.
    bits = [jax.lax.bitcast_convert_type(y, jnp.uint16) for y in (old, new)]
    return jax.lax.bitcast_convert_type(jnp.where(one, *bits), old.dtype)


def clip_leaf(
    needed: Bool[Array, ""],
    p: Float[Array, "..."],
    u: Float[Array, "..."] | None,
    factor: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Clips a parameter, or the update `u` that will be added to it, if any head needs it.

    Most steps clip no head of most blocks; the weights are then neither read nor written.
    """
    # Inside a checked `jax.shard_map` both branches must vary over the same mesh axes.
    old = p if u is None else u
    varying = frozenset[str]().union(*map(varying_axes, (needed, p, old, factor)))
    if missing := tuple(sorted(varying - varying_axes(old))):
        old = jax.lax.pcast(old, missing, to="varying")
    p, u = (old, None) if u is None else (p, old)
    unchanged = lambda p, u, factor: p if u is None else u  # noqa: E731
    return jax.lax.cond(needed, _clipped, unchanged, p, u, factor)


def check_reduced(leaves: Mapping[str, jax.Array], factors: Mapping[str, jax.Array]) -> None:
    """Raises if maxima vary over mesh axes along which the weights are replicated.

    Inside a checked `jax.shard_map` the types show over which mesh axes arrays vary. Such a factor
    would make the replicas of the weights different.
    """
    for path, factor in factors.items():
        axes = tuple(sorted(varying_axes(factor) - varying_axes(leaves[path])))
        if axes:
            raise ValueError(
                f"The maxima for {path!r} vary over the mapped mesh axes {axes} and the weights do "
                "not: every device has the maxima of its own part of the batch. Expected those "
                "of the whole batch; write max_logits = muonclip_jax.reduce_max_logits("
                f"max_logits, {(axes[0] if len(axes) == 1 else axes)!r})."
            )


def keep_shardings(
    new: Mapping[str, jax.Array], old: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns concrete arrays with the shardings of those that they replace.

    Called outside of `jit` on Auto axes, XLA may shard a result as the maxima are.
    """

    def kept(x: jax.Array, before: jax.Array) -> jax.Array:
        concrete = isinstance(before, jax.Array) and not isinstance(x, Tracer)
        if not concrete or x.sharding.is_equivalent_to(before.sharding, x.ndim):
            return x
        return jax.device_put(x, before.sharding)

    return {path: kept(x, old[path]) for path, x in new.items()}
