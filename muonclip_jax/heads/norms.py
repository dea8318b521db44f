"""Normalised queries and keys: clip the gains instead of the kernels, or refuse.

`q = gain * normalise(W_q x)` does not change when `W_q` does, so scaling the kernels would do
nothing. Scaling the gain is exact, and possible for one head alone where the gain has an entry for
every feature of every head, as in OLMo 2. A gain of `(head_dim,)`, as in Qwen 3 and Gemma 3, is
shared by all heads, and there the clip refuses. Gains are taken to be stored as they multiply; a
model that stores their offset from one needs its block left out.
"""

import dataclasses

from muonclip_jax._paths import join
from muonclip_jax.heads.builtin import GAIN_NAMES, NORM_NAMES, SHIFT_NAMES
from muonclip_jax.heads.leaves import Leaves, RefusalError, under, unstack
from muonclip_jax.heads.plan import BlockPlan, LeafPlan, Segment

#: What a projection's part becomes when a gain after it is scaled in its stead.
_UNTOUCHED = {"query": "gate", "key": "value"}


def norms_of(leaves: Leaves, latent: bool) -> tuple[str | None, str | None]:
    """Returns the names of the query's and the key's normalisation, None where there is none.

    In latent attention a lone "q_norm" acts on the low-rank query, before its heads are made.

    Example:
        >>> norms_of({"query_ln/scale": 1, "key_ln/scale": 1}, latent=False)
        ('query_ln', 'key_ln')
    """
    for query, key in NORM_NAMES:
        has_query, has_key = bool(under(leaves, query)), bool(under(leaves, key))
        if latent and not has_key:
            continue
        if has_query or has_key:
            return query if has_query else None, key if has_key else None
    return None, None


def _gain_plans(
    plan: BlockPlan, leaves: Leaves, norm: str, role: str, stack_axes: tuple[int, ...]
) -> tuple[LeafPlan, ...]:
    """Returns the plans of a norm's gain and shift, empty where heads share or lack a gain."""
    heads = plan.heads if role.startswith("query") else plan.kv_heads
    plans: list[LeafPlan] = []
    for name, leaf in under(leaves, norm).items():
        path = join(filter(None, (plan.path, norm, name)))
        shape = tuple(leaf.shape)
        one, stacked = unstack(shape, stack_axes, plan.stack)
        if name not in GAIN_NAMES + SHIFT_NAMES:
            raise RefusalError(f"{path!r} is no gain or shift that QK-Clip knows")
        if one not in ((heads, plan.head_dim), (heads * plan.head_dim,)):
            return ()
        axes = tuple(axis for axis in range(len(shape)) if axis not in stacked)
        segments = (Segment(role, heads, plan.head_dim),)
        plans.append(LeafPlan(path, shape, stacked, axes, segments, 1))
    has_gain = any(name in GAIN_NAMES for name in under(leaves, norm))
    return tuple(plans) if has_gain else ()


def _without(leaf: LeafPlan, roles: tuple[str, ...]) -> LeafPlan:
    segments = tuple(
        dataclasses.replace(s, role=_UNTOUCHED[s.role]) if s.role in roles else s
        for s in leaf.segments
    )
    return dataclasses.replace(leaf, segments=segments)


def gains_instead(
    plan: BlockPlan, leaves: Leaves, stack_axes: tuple[int, ...], latent: bool
) -> BlockPlan:
    """Returns the plan with gains in place of kernels where queries or keys are normalised.

    Args:
        plan: The block's plan on its kernels.
        leaves: The block's leaves by their path inside it.
        stack_axes: Stacked axes as counted in every leaf.
        latent: Whether this is latent attention.

    Raises:
        RefusalError: If heads share the gain of the queries.
    """
    query, key = norms_of(leaves, latent)
    if query is None and key is None:
        return plan
    names = " and ".join(repr(name) for name in (query, key) if name)
    query_gains = _gain_plans(plan, leaves, query, "query", stack_axes) if query else ()
    key_gains = _gain_plans(plan, leaves, key, "key", stack_axes) if key else ()
    if latent or (query and not query_gains):
        raise RefusalError(
            f"its queries and keys are normalised ({names}) with gains that the heads share or "
            "do not have, so scaling the kernels would change nothing and one head cannot be "
            "clipped alone. Leave the block out with blocks=, or train without QK-Clip: the "
            "gains bound the logits"
        )
    kept = plan.leaves
    dropped: tuple[str, ...] = ()
    if query:
        dropped += ("query",)
    if key:
        dropped += ("key",)
    kept = tuple(_without(leaf, dropped) for leaf in kept)
    if key and not key_gains:  # heads share the key's gain: the query takes the whole factor
        alone = (query_gains, kept)
        query_gains, kept = (tuple(_alone(leaf) for leaf in leaves) for leaves in alone)
    scaled = tuple(
        leaf for leaf in kept if any(s.role not in _UNTOUCHED.values() for s in leaf.segments)
    )
    return dataclasses.replace(
        plan, leaves=(*scaled, *query_gains, *key_gains), note=f"normalised: gains of {names}"
    )


def _alone(leaf: LeafPlan) -> LeafPlan:
    segments = tuple(
        dataclasses.replace(s, role="query_alone") if s.role == "query" else s
        for s in leaf.segments
    )
    return dataclasses.replace(leaf, segments=segments)
