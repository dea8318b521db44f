"""The array operation of a clip: a leaf times a broadcast factor, a power of gamma for its heads.

A factor is as small as the maxima. If heads are sharded the same way in maxima and weights, this
needs no communication; otherwise the factor is resharded, never a weight.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from muonclip_jax._devices import varying_axes
from muonclip_jax.heads.plan import LeafPlan


def leaf_factor(leaf: LeafPlan, factors: Mapping[str, jax.Array]) -> Float[Array, "..."]:
    """Broadcasts the factors of the heads to the features of a leaf.

    The result broadcasts against the leaf, with size 1 along its input axis. `factors` is
    role -> `(*stack, heads of that role)`; an absent role is not scaled.
    """
    stack, features = tuple(leaf.shape[axis] for axis in leaf.stack_axes), leaf.features
    first, one_role = leaf.segments[0], leaf.repeat == len(leaf.segments) == 1
    if one_role and features == (first.heads, first.size):
        # Heads have an axis of their own: no axis is split or joined.
        row = jnp.expand_dims(factors[first.role], -1)
    else:
        rows: list[jax.Array] = []
        dtype = next(iter(factors.values())).dtype
        for segment in leaf.segments:
            heads, shape = (*stack, leaf.repeat, segment.heads), (*stack, leaf.repeat, -1)
            factor = factors.get(segment.role, jnp.ones(heads, dtype))
            if not (one_role and len(features) == 1):  # a sharded axis cannot be split
                factor = _reshard(factor, jax.typeof(factor).sharding.mesh, PartitionSpec())
            factor = jnp.expand_dims(factor.reshape(heads), -1)
            rows.append(jnp.broadcast_to(factor, (*heads, segment.size)).reshape(shape))
        row = jnp.concatenate(rows, axis=-1).reshape(*stack, *features)
    # Into the leaf's order of axes: stack and features are ascending, but may alternate.
    axes = leaf.stack_axes + leaf.feature_axes
    row = row.transpose(sorted(range(len(axes)), key=axes.__getitem__))
    return jnp.expand_dims(row, tuple(i for i in range(len(leaf.shape)) if i not in axes))


def _reshard(x: jax.Array, mesh: AbstractMesh, spec: PartitionSpec) -> jax.Array:
    """Reshards an array if the mesh has Explicit axes."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.reshard(x, NamedSharding(mesh, spec)) if explicit else x


def clip_leaf(
    path: str,
    needed: Bool[Array, ""],
    p: Float[Array, "..."],
    u: Float[Array, "..."] | None,
    factor: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Clips a parameter, or the update `u` that will be added to it, if any head needs it.

    Most steps clip no head of most blocks; the weights are then neither read nor written.
    """
    sharding = jax.typeof(p).sharding  # an eager `jnp.zeros_like` of JAX 0.12 has none
    old = p if u is None else _reshard(u, sharding.mesh, sharding.spec)
    # Inside a checked `jax.shard_map` the types show over which mesh axes arrays vary. A factor
    # that varies where weights are replicated would make the replicas different.
    if axes := tuple(sorted(varying_axes(factor) - varying_axes(p))):
        raise ValueError(
            f"The maxima for {path!r} vary over the mapped mesh axes {axes} and the weights do "
            "not: every device has the maxima of its own part of the batch. Expected those "
            "of the whole batch; write max_logits = muonclip_jax.reduce_max_logits("
            f"max_logits, {(axes[0] if len(axes) == 1 else axes)!r})."
        )
    # Both branches must vary over the same axes.
    varying = frozenset[str]().union(*map(varying_axes, (needed, p, old, factor)))
    if missing := tuple(sorted(varying - varying_axes(old))):
        old = jax.lax.pcast(old, missing, to="varying")
    p, u = (old, None) if u is None else (p, old)
    unchanged = lambda p, u, factor: p if u is None else u  # noqa: E731
    return jax.lax.cond(needed, _clipped, unchanged, p, u, factor)


def _clipped(
    p: Float[Array, "..."], u: Float[Array, "..."] | None, factor: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns `factor p`, or with an update `factor (p + u) - p`, rounded once."""
    sharding = jax.typeof(p).sharding
    pairs = zip(sharding.spec, factor.shape, strict=False)
    spec = PartitionSpec(*(axes if n > 1 else None for axes, n in pairs))
    factor = _reshard(factor, sharding.mesh, spec)
    old = p if u is None else u
    wide = jnp.promote_types(jnp.promote_types(p.dtype, old.dtype), jnp.float32)
    moved = p.astype(wide) if u is None else p.astype(wide) + u.astype(wide)
    new = moved * factor.astype(wide)
    new = (new if u is None else new - p.astype(wide)).astype(old.dtype)

    # Where the factor is 1 every bit of `old` stays.
    one = _reshard(jnp.broadcast_to(factor == 1.0, p.shape), sharding.mesh, sharding.spec)
    if old.dtype.itemsize != 2:
        return jnp.where(one, old, new)
    # A CPU computes on 16-bit floats in float32, selections too, and rounds once more after each.
    # It selects integers as they are.
    bits = [jax.lax.bitcast_convert_type(y, jnp.uint16) for y in (old, new)]
    return jax.lax.bitcast_convert_type(jnp.where(one, *bits), old.dtype)
