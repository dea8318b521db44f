"""The leaves of a block that a clip scales, and the positions of their heads, or an error.

If queries and keys are normalised, `q = gain * normalise(W_q x)` does not depend on the scale of
`W_q`. Scaling the gain is exact, and possible for one head if every head has its own gain, as in
OLMo 2. A gain of `(head_dim,)`, as in Qwen 3 and Gemma 3, is shared by all heads: an error. The
stored gain is taken for the multiplier; if it is an offset from one, the block must be excluded.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator

from muonclip_jax.heads.finding import (
    BIAS_NAMES,
    KERNEL_NAMES,
    LORA_A,
    LORA_B,
    FoundBlock,
    Shape,
    kernel_name,
    under,
)
from muonclip_jax.heads.layouts import (
    BUILTIN_LAYOUTS,
    NORM_NAMES,
    SCALED,
    AttentionLayout,
    spelling,
)
from muonclip_jax.heads.plan import BlockPlan, LeafPlan, MisfitError, RefusalError, Segment
from muonclip_jax.heads.reading import Reading, solve

_GAINS = ("scale", "weight", "w", "gain", "gamma", "")
_SHIFTS = ("bias", "beta", "offset")
#: Words in the names of further queries, keys, and relative positions.
_MORE_LOGITS = {"q", "k", "query", "key", "qkv", "kv", "r", "rel", "relative", "pos", "position"}


def read_block(block: FoundBlock, *shapes: Shape) -> BlockPlan:
    """Returns a block's plan for maxima `(..., stack, query heads)`, the shortest shape first."""
    maxima_shape = shapes[0]
    plans, misfits = _plans(block.layout, tuple(block.leaves.items()), maxima_shape)
    shown = block.stack if block.layout.stack_axes is None else None
    if shown is not None and len(plans) > 1:
        plans = [plan for plan in plans if plan.leaves[0].stack_axes == shown] or plans
    if len(plans) == 1:
        if shown and not plans[0].stack:
            raise ValueError(
                f"The maxima of attention block {block.path!r} are {maxima_shape}: one layer. By "
                f"the rest of the tree its kernels are stacked on axes {shown}. Expected (stacked "
                "layers, query heads). If the maxima are right, write blocks=[(pattern, "
                "AttentionLayout(..., stack_axes=()))] (muonclip: qk_clip_blocks=)."
            )
        for shape in shapes:
            _check_maxima(block, plans[0], shape)
        plan, paths = plans[0], block.paths
        leaves = tuple(dataclasses.replace(leaf, path=paths[leaf.path]) for leaf in plan.leaves)
        return dataclasses.replace(plan, path=block.path, leaves=leaves)
    name = kernel_name(block.leaves, block.layout.projections[0].path)
    shape, path = ((), block.path) if name is None else (block.leaves[name], block.paths[name])
    kernel = f"The attention kernel {path!r} of shape {shape}"
    if plans:
        ways = "; ".join(
            f"{plan.heads} heads of {plan.head_dim}, stacked {plan.stack or 'nowhere'} on axes "
            f"{plan.leaves[0].stack_axes}"
            for plan in plans
        )
        raise ValueError(
            f"{kernel} can be read in several ways: {ways}. Say which with "
            "blocks=[(pattern, AttentionLayout(..., stack_axes=...))] (muonclip: qk_clip_blocks=)."
        )
    if refusal := _refusal(misfits, block):
        raise ValueError(f"QK-Clip cannot clip attention block {block.path!r}: {refusal}.")
    reasons = "; ".join(dict.fromkeys(map(str, misfits)))
    raise ValueError(
        f"{kernel} ({block.layout.name}) and its maxima of shape {maxima_shape} do not match"
        f"{_other_heads(block, maxima_shape)}. Expected maxima (query heads,), or (stacked layers, "
        "query heads) where the kernels are stacked; axes before those are reduced."
        f"{''.join(_reductions(block, maxima_shape).values())} "
        f"Tried: {reasons or 'nothing, for there are too few axes'}."
    )


def guess_block(block: FoundBlock) -> BlockPlan | None:
    """Returns the plan of a block without its maxima if one interpretation alone fits the output.

    It is an error if the block cannot be clipped.
    """
    plans, misfits = _plans(block.layout, tuple(block.leaves.items()), None)
    if not plans and (refusal := _refusal(misfits, block)):
        raise ValueError(refusal)
    alone = len(plans) == 1 and plans[0].agrees
    return read_block(block, plans[0].maxima_shape) if alone else None


def _refusal(misfits: list[MisfitError], block: FoundBlock) -> str | None:
    """Returns why a block cannot be clipped, with the whole path of the leaf it begins with."""
    if not misfits or not isinstance(misfits[0], RefusalError):
        return None
    whole = lambda match: repr(block.paths.get(match[1], match[1]))  # noqa: E731
    return re.sub("^'(.*?)'", whole, str(misfits[0]))


@functools.lru_cache(maxsize=1024)
def _plans(
    layout: AttentionLayout, shapes: tuple[tuple[str, Shape], ...], maxima_shape: Shape | None
) -> tuple[list[BlockPlan], list[MisfitError]]:
    """Returns the plans that fit best, and reasons against the others; cached for equal blocks."""
    found, misfits = solve(layout, dict(shapes), _clipped, maxima_shape=maxima_shape)
    plans, first = list(found), []
    if maxima_shape is not None:  # then layers are on the first axes if several axes fit
        in_order = lambda leaf: leaf.stack_axes == tuple(range(len(leaf.stack_axes)))  # noqa: E731
        first = [plan for plan in plans if all(map(in_order, plan.leaves))]
    return first or plans, misfits


def _clipped(reading: Reading, plan: BlockPlan) -> tuple[tuple[int, ...], BlockPlan]:
    """Returns the plan with the leaves that a clip multiplies; paths are names in the block."""
    # A leaf that a built-in layout leaves out may be in the logits too.
    known = {*reading.layout.paths, *itertools.chain(*NORM_NAMES)}
    features = {kernel.features for kernel in plan.leaves}
    features |= {(plan.heads, plan.head_dim), (plan.kv_heads, plan.head_dim)}
    for name, shape in reading.shapes.items() if reading.layout in BUILTIN_LAYOUTS else ():
        module = name.partition("/")[0]
        if module in known or _MORE_LOGITS.isdisjoint(spelling(module).split("_")):
            continue
        if any(made in itertools.combinations(shape, len(made)) for made in features):
            raise RefusalError(
                f"{name!r} may make queries or keys too, which the layout {reading.layout.name!r} "
                "does not scale. Give all projections of these logits by blocks=[(pattern, "
                "AttentionLayout(...))], or exclude the block"
            )
    pairs = zip(reading.layout.projections, plan.leaves, strict=True)
    leaves = [leaf for p, kernel in pairs for leaf in _leaf_plans(reading, p.path, kernel)]
    roles, gains, note = _normalised(reading, plan)
    for i, leaf in enumerate(leaves):
        segments = (dataclasses.replace(s, role=roles.get(s.role, s.role)) for s in leaf.segments)
        leaves[i] = dataclasses.replace(leaf, segments=tuple(segments))
    scaled = tuple(leaf for leaf in leaves + gains if any(s.role in SCALED for s in leaf.segments))
    return (not plan.agrees,), dataclasses.replace(plan, leaves=scaled, note=note)


def _leaf_plans(reading: Reading, projection: str, kernel: LeafPlan) -> Iterator[LeafPlan]:
    """Yields the plans of a scaled projection's kernel, its bias and its adapter."""
    scaled = any(segment.role in SCALED for segment in kernel.segments)
    inside = under(reading.shapes, projection) if scaled else {}
    for name in inside:
        path, first = f"{projection}/{name}".removesuffix("/"), name.partition("/")[0]
        if path == kernel.path:
            yield kernel
        elif name in BIAS_NAMES or first == LORA_B:
            plan = _with_features(reading, path, kernel, adapter=first == LORA_B)
            if plan is None:
                raise MisfitError(f"{path}: its shape lacks the features {kernel.features}")
            yield plan
        elif first != LORA_A or not any(other.startswith(LORA_B) for other in inside):
            known = (*filter(None, KERNEL_NAMES), *BIAS_NAMES, LORA_A, LORA_B)
            raise RefusalError(
                f"{path!r} belongs to a projection that QK-Clip multiplies, and how it enters the "
                f"result is not known. Known names are {', '.join(known)}; an adapter needs both "
                "halves"
            )


def _with_features(
    reading: Reading, path: str, kernel: LeafPlan, *, adapter: bool = False
) -> LeafPlan | None:
    """Returns the plan of a leaf with the features of a kernel, or None if it lacks them."""
    shape, (_, stacked) = reading.shapes[path], reading.one_layer(path)
    free = tuple(axis for axis in range(len(shape)) if axis not in stacked)
    # An adapter is (rank, features), and (features, rank) in PyTorch.
    orders = (free[1:], free[:-1]) if adapter else (free,)
    for axes in reversed(orders) if path.endswith("weight") else orders:
        if tuple(shape[axis] for axis in axes) in (kernel.features, (kernel.total,)):
            return LeafPlan(path, shape, stacked, axes, kernel.segments, kernel.repeat)
    return None


def _normalised(reading: Reading, plan: BlockPlan) -> tuple[dict[str, str], list[LeafPlan], str]:
    """Returns, if queries or keys are normalised, changed roles of segments, and the gains' plans.

    In latent attention a "q_norm" alone is applied to the low-rank query, before the heads.
    """
    latent = reading.layout.own_keys
    for query, key in NORM_NAMES:
        query, key = (name if under(reading.shapes, name) else None for name in (query, key))
        if key or (query and not latent):
            break
    else:
        return {}, [], ""
    names = " and ".join(repr(name) for name in (query, key) if name)
    made = {segment.role for kernel in plan.leaves for segment in kernel.segments}
    role = "query" if "query" in made else "query_alone"
    keys = _gain_plans(reading, key, Segment("key", plan.kv_heads, plan.head_dim))
    # If heads share the key's gain, the query takes the whole factor.
    whole = {"query": "query_alone"} if key and not keys else {}
    queries = _gain_plans(reading, query, Segment(whole.get(role, role), plan.heads, plan.head_dim))
    if latent or (query and not queries):
        raise RefusalError(
            f"its queries and keys are normalised ({names}) with gains that the heads share or "
            "do not have, so scaling the kernels has no effect and one head cannot be "
            "clipped separately. The gains bound the logits: exclude the block (blocks=; muonclip: "
            "qk_clip_blocks=), or train without QK-Clip (muonclip: qk_clip_threshold=None)"
        )
    roles = whole | ({role: "gate"} if query else {}) | ({"key": "value"} if key else {})
    gains = queries + (keys if "key" in made else [])
    return roles, gains, f"normalised: gains of {names}"


def _gain_plans(reading: Reading, norm: str | None, segment: Segment) -> list[LeafPlan]:
    """Returns the plans of a norm's gain and shift, empty if heads share a gain or have none."""
    kernel = LeafPlan("", (segment.heads, segment.size), (), (0, 1), (segment,))
    plans: list[LeafPlan] = []
    inside = under(reading.shapes, norm) if norm else {}
    for name in inside:
        path = f"{norm}/{name}".removesuffix("/")
        if name not in _GAINS + _SHIFTS:
            raise RefusalError(f"{path!r} is not a gain or shift that QK-Clip knows")
        plan = _with_features(reading, path, kernel)
        if plan is None:
            return []
        plans.append(plan)
    return plans if any(name in _GAINS for name in inside) else []


def _other_heads(block: FoundBlock, maxima_shape: Shape) -> str:
    """Describes the number of heads of the kernel, if its axes or the output projection show it."""
    plans = _plans(block.layout, tuple(block.leaves.items()), None)[0]
    told = [plan for plan in plans if plan.agrees or len(plan.leaves[0].feature_axes) > 1]
    told = [plan for plan in told if len(plan.stack) < len(maxima_shape)]
    most = max((len(plan.stack) for plan in told), default=0)
    heads = {plan.heads for plan in told if len(plan.stack) == most}
    if len(heads) != 1 or maxima_shape[-1] in heads:
        return ""
    return f": the kernel has {heads.pop()} heads, {maxima_shape[-1]} maxima were given"


def _check_maxima(block: FoundBlock, plan: BlockPlan, shape: Shape) -> None:
    """Refuses maxima of another shape than the plan's, or whose axes can be read in two ways."""
    wanted, wrong = plan.maxima_shape, ""
    if shape[-len(wanted) :] != wanted:
        wrong = f"and must end in {wanted} for its kernels: stacked layers, then query heads"
    elif len(shape) > len(wanted) and len(ways := _reductions(block, shape, plan.agrees)) > 1:
        wrong = "which can be read in several ways. Expected maxima over the batch and both "
        wrong += f"sequences, as of attention_max_logits, here {wanted}.{''.join(ways.values())}"
    if wrong:
        raise ValueError(f"The maxima of attention block {block.path!r} are {shape}, {wrong}")


def _reductions(block: FoundBlock, shape: Shape, agrees: bool = False) -> dict[Shape, str]:
    """Returns how maxima with further axes can be read: the axes to reduce -> what to write."""
    rank, found = len(shape), dict[Shape, str]()
    ends = {rank - 1: ""} | ({rank - 2: ""} if shape[-2:-1] == shape[-1:] else {})
    if rank > 2 and 1 not in shape[-2:]:
        ends[rank - 3] = "they are whole logits, and "
    for heads, what in ends.items():
        counts = range(heads + 1)
        for stack in itertools.chain(*(itertools.combinations(range(heads), n) for n in counts)):
            kept = (*stack, heads)
            sizes = tuple(shape[axis] for axis in kept)
            plans = _plans(block.layout, tuple(block.leaves.items()), sizes)[0]
            if any(plan.maxima_shape == sizes and plan.agrees >= agrees for plan in plans):
                names = dict.fromkeys(range(rank), "batch") | dict.fromkeys(stack, "layers")
                names |= {rank - 2: "queries", rank - 1: "keys"} if what else {}
                named = ", ".join((names | {heads: "query heads"}).values())
                axes = tuple(axis for axis in range(rank) if axis not in kept)
                axis = f"axis={axes[0] if len(axes) == 1 else axes}"
                found.setdefault(
                    tuple(axis for axis in axes if shape[axis] > 1),
                    f" If {what}their axes are ({named}), take the maximum first: "
                    f"jax.tree.map(lambda s: s.max({axis}), max_logits).",
                )
    return found
