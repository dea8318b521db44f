"""Normalised queries and keys: clip the gains instead of the kernels, or refuse.

`q = gain * normalise(W_q x)` does not change when `W_q` does, so scaling the kernels would do
nothing. Scaling the gain is exact, and possible for one head alone where the gain has an entry for
every feature of every head, as in OLMo 2. A gain of `(head_dim,)`, as in Qwen 3 and Gemma 3, is
shared by all heads, and there the clip refuses. Gains are taken to be stored as they multiply; a
model that stores their offset from one needs its block left out.
"""

import dataclasses

from muonclip_jax.heads.builtin import GAIN_NAMES, NORM_NAMES, SHIFT_NAMES
from muonclip_jax.heads.layouts import SCALED
from muonclip_jax.heads.leaves import RefusalError, Shapes, under
from muonclip_jax.heads.plan import BlockPlan, LeafPlan, Segment
from muonclip_jax.heads.solver import Attempt, Reading


def norms_of(shapes: Shapes, latent: bool) -> tuple[str | None, str | None]:
    """Returns the names of the query's and the key's normalisation, None where there is none.

    In latent attention a lone "q_norm" acts on the low-rank query, before its heads are made.

    Example:
        >>> norms_of({"query_ln/scale": (4,), "key_ln/scale": (4,)}, latent=False)
        ('query_ln', 'key_ln')
    """
    for query, key in NORM_NAMES:
        has_query, has_key = bool(under(shapes, query)), bool(under(shapes, key))
        if has_key or (has_query and not latent):
            return query if has_query else None, key if has_key else None
    return None, None


def _gain_plans(attempt: Attempt, norm: str | None, segment: Segment) -> list[LeafPlan]:
    """Returns the plans of a norm's gain and shift, empty where heads share or lack a gain."""
    plans: list[LeafPlan] = []
    inside = under(attempt.shapes, norm) if norm else {}
    for name, shape in inside.items():
        path = f"{norm}/{name}".removesuffix("/")
        one, stacked = attempt.one_layer(path)
        if name not in GAIN_NAMES + SHIFT_NAMES:
            raise RefusalError("is no gain or shift that QK-Clip knows", path)
        if one not in ((segment.heads, segment.size), (segment.heads * segment.size,)):
            return []
        axes = tuple(axis for axis in range(len(shape)) if axis not in stacked)
        plans.append(LeafPlan(path, shape, stacked, axes, (segment,)))
    return plans if any(name in GAIN_NAMES for name in inside) else []


def gains_instead(plan: BlockPlan, reading: Reading) -> BlockPlan:
    """Returns the plan with gains in place of kernels where queries or keys are normalised.

    Raises:
        RefusalError: If heads share the gain of the queries.
    """
    attempt, latent = reading.attempt, reading.layout.own_keys
    query, key = norms_of(attempt.shapes, latent)
    if query is None and key is None:
        return plan
    names = " and ".join(repr(name) for name in (query, key) if name)
    roles = {segment.role for leaf in plan.leaves for segment in leaf.segments}
    role = "query" if "query" in roles else "query_alone"
    queries = _gain_plans(attempt, query, Segment(role, plan.heads, plan.head_dim))
    keys = _gain_plans(attempt, key, Segment("key", plan.kv_heads, plan.head_dim))
    if latent or (query and not queries):
        raise RefusalError(
            f"its queries and keys are normalised ({names}) with gains that the heads share or "
            "do not have, so scaling the kernels would change nothing and one head cannot be "
            "clipped alone. Leave the block out with blocks=, or train without QK-Clip: the "
            "gains bound the logits"
        )
    untouched = ({role: "gate"} if query else {}) | ({"key": "value"} if key else {})
    leaves = [*(leaf.with_roles(untouched) for leaf in plan.leaves), *queries]
    if key and not keys:  # heads share the key's gain: the query takes the whole factor
        leaves = [leaf.with_roles({"query": "query_alone"}) for leaf in leaves]
    leaves += keys if "key" in roles else []
    scaled = (leaf for leaf in leaves if any(s.role in SCALED for s in leaf.segments))
    return dataclasses.replace(plan, leaves=tuple(scaled), note=f"normalised: gains of {names}")
