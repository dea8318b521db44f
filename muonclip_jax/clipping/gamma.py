"""QK-Clip's equation: gamma from a head's maximum logit, and weights times their share of it.

Kimi K2 (arXiv 2507.20534), Algorithm 1, the step after the weight update. For a head with maximum
logit `S` of the forward pass and the threshold `tau`, where `S > tau`:

    gamma = tau / S,    W_q *= gamma ** alpha,    W_k *= gamma ** (1 - alpha)

with `alpha = 1/2` there. Query features whose key is shared by all heads (latent attention's rotary
part) are scaled by gamma.

A factor is as small as the maxima. If heads are sharded the same way in maxima and weights, it
needs no communication; otherwise the factor is resharded, never a weight.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from muonclip_jax._arguments import check_number
from muonclip_jax._devices import vary_like, varying_axes
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule
from muonclip_jax.heads.plan import LeafPlan

#: Rules for keys that several query heads share; `role_factors` explains them.
SHARED_KEYS = ("query", "group", "balanced")


def clip_gamma(max_logits: Float[Array, "..."], threshold: ScalarLike) -> Float[Array, "..."]:
    """Computes the factor that brings each head's maximum logit down to the threshold.

        gamma = tau / S   where S is finite and S > tau > 0,   1 elsewhere

    A maximum or a threshold that is NaN, infinite, zero or negative never changes a weight. (Such a
    number is an error as threshold, but a traced value or a schedule may produce one.) The result
    is in float32 or wider.
    """
    s = jnp.asarray(max_logits)
    s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    tau = jnp.asarray(threshold, s.dtype)
    over = jnp.isfinite(s) & (s > tau) & (tau > 0)
    return jnp.where(over, tau / jnp.where(over, s, 1.0), 1.0)


def role_factors(
    gamma: Float[Array, "*stack heads"], alpha: ScalarLike, shared_keys: str, kv_heads: int
) -> dict[str, jax.Array]:
    """Splits gamma over the roles of an attention layout.

    If every query head has its own key, queries are scaled by `gamma ** alpha` and keys by
    `gamma ** (1 - alpha)`. If heads share keys, with `eta` the smallest gamma of the heads of a
    key:

    | shared_keys | queries | keys | maxima afterwards |
    |---|---|---|---|
    | "query" | gamma | unchanged | the threshold if above it, else unchanged |
    | "group" | eta ** alpha | eta ** (1 - alpha) | multiplied by eta |
    | "balanced" | gamma / eta ** (1 - alpha) | eta ** (1 - alpha) | as "query" |

    "query" never enlarges a weight and is Kimi K2's rule for the shared rotary key. "group" is
    Megatron's rule. "balanced" also shrinks keys and compensates in the queries.

    Returns role -> factor `(*stack, heads)` or `(*stack, kv_heads)`; absent roles are not scaled.
    """
    group = gamma.shape[-1] // kv_heads
    if group > 1 and shared_keys == "query":
        return {"query": gamma, "query_alone": gamma}
    eta = gamma if group == 1 else gamma.reshape(*gamma.shape[:-1], kv_heads, group).min(-1)
    alpha = jnp.asarray(alpha, gamma.dtype)
    # gamma = 1 leaves every bit, and so do queries with alpha = 0 and keys with alpha = 1.
    query = jnp.where(alpha == 1.0, eta, eta**alpha)
    query = jnp.where((eta == 1.0) | (alpha == 0.0), 1.0, query)
    key = jnp.where(eta == query, 1.0, eta / query)
    if group > 1 and shared_keys == "group":
        query = jnp.repeat(query, group, axis=-1)
    elif group > 1:
        query = gamma / jnp.repeat(key, group, axis=-1)
    return {"query": query, "key": key, "query_alone": gamma}


def check_clip_settings(
    threshold: ScalarOrSchedule,
    alpha: ScalarOrSchedule,
    shared_keys: str,
    prefix: str = "",
    *,
    schedules: bool = False,
) -> None:
    """Raises on settings out of range; traced values and schedules pass."""
    hint = "It is the maximum pre-softmax logit of a head after the step; Kimi K2 uses 100."
    check_number(f"{prefix}threshold", threshold, "positive", hint, schedule=schedules)
    hint = "It is the exponent of gamma for queries; 0.5 scales queries and keys equally."
    check_number(f"{prefix}alpha", alpha, "in [0, 1]", hint, schedule=schedules)
    if not isinstance(shared_keys, str) or shared_keys not in SHARED_KEYS:
        raise ValueError(
            f"{prefix}shared_keys must be one of {', '.join(map(repr, SHARED_KEYS))}, got "
            f"{shared_keys!r}."
        )


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
    for other in (needed, p, factor):  # both branches must vary over the same axes
        old = vary_like(old, other)
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
