"""From a block's shapes to its plan: which axes are stacked, which hold heads.

A kernel of rank 3 may be `(d_model, heads, head_dim)` or `(layers, d_model, features)`. No rule
on ranks can tell, but the whole block can: every leaf is stacked alike, the maxima say how many
layers and query heads there are, biases repeat the kernels' features, and the output projection
takes one head's values a query head. So every reading is tried on all of that, and what fits is
kept. Where several fit, the stack on the first axes wins; a tie beyond that is an error.
"""

import contextlib
import itertools
from collections.abc import Iterator

from muonclip_jax._paths import join
from muonclip_jax.heads.builtin import ADAPTER_NAMES, BIAS_NAMES, KERNEL_NAMES
from muonclip_jax.heads.choices import choices_of, query_shape
from muonclip_jax.heads.kernels import Choice, Heads
from muonclip_jax.heads.layouts import SCALED, AttentionLayout, Projection
from muonclip_jax.heads.leaves import (
    Leaves,
    MisfitError,
    RefusalError,
    kernel_of,
    under,
)
from muonclip_jax.heads.norms import gains_instead
from muonclip_jax.heads.plan import BlockPlan, LeafPlan


def _block_plan(block: str, choice: Choice) -> tuple[BlockPlan, bool]:
    """Returns the block's plan under one choice, and whether the output projection agrees."""
    reading = choice.read()
    leaves: list[LeafPlan] = []
    for projection, found in reading.projections:
        if any(segment.role in SCALED for segment in found.segments):
            leaves += _leaf_plans(block, choice, projection, found)
    plan = BlockPlan(
        path=block,
        layout=reading.layout.name,
        heads=choice.heads,
        kv_heads=reading.kv_heads,
        head_dim=reading.head_dim,
        stack=choice.stack,
        leaves=tuple(leaves),
    )
    latent = choice.layout.own_keys
    return gains_instead(plan, choice.leaves, choice.stack_axes, latent), reading.agrees


def _leaf_plans(
    block: str, choice: Choice, projection: Projection, found: Heads
) -> Iterator[LeafPlan]:
    """Yields the plans of a projection's kernel, its bias and its adapters."""
    path, kernel = projection.path, found.kernel
    for name, leaf in under(choice.leaves, path).items():
        full = join(filter(None, (block, path, name)))
        shape = tuple(leaf.shape)
        if name == kernel.name:
            axes, stacked = kernel.feature_axes, kernel.stack_axes
        elif ADAPTER_NAMES.get(name) is False:
            continue
        elif name in BIAS_NAMES or name in ADAPTER_NAMES:
            inputs = 0 if name in BIAS_NAMES else 1
            one, stacked = choice.one_layer(leaf)
            if one[inputs:] not in (kernel.features, (kernel.total,)):
                raise MisfitError(f"{path}/{name}: {one} does not end in {kernel.features}")
            axes = tuple(i for i in range(len(shape)) if i not in stacked)[inputs:]
        else:
            known = (*filter(None, KERNEL_NAMES), *BIAS_NAMES, *ADAPTER_NAMES)
            raise RefusalError(
                f"{full!r} belongs to a projection that QK-Clip multiplies, and how it enters "
                f"the result is not known. Known names are {', '.join(known)}"
            )
        yield LeafPlan(full, shape, stacked, axes, found.segments, found.repeat)


def _stackings(rank: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yields axes that may be stacked, counted from the front and, for biases' sake, the end."""
    yield from itertools.combinations(range(rank), count)
    if count:
        yield from itertools.combinations(range(-rank, 0), count)


def _plans(
    layout: AttentionLayout, block: str, leaves: Leaves, maxima_shape: tuple[int, ...]
) -> tuple[list[BlockPlan], list[MisfitError]]:
    """Returns the plans that fit a block's leaves and maxima best, and reasons against the rest."""
    found = kernel_of(leaves, layout.projections[0].path)
    rank = len(found[1].shape) if found else 0
    if layout.stack_axes is not None:
        stackings = [layout.stack_axes]
    else:
        counts = range(min(len(maxima_shape) - 1, rank - 2) + 1)
        stackings = [axes for count in counts for axes in _stackings(rank, count)]
    choices = [len(p.input_axis) for p in layout.projections if isinstance(p.input_axis, tuple)]
    plans: dict[BlockPlan, bool] = {}
    misfits: list[MisfitError] = []
    for axes, choice in itertools.product(stackings, range(max(choices, default=1))):
        if len(axes) >= len(maxima_shape):
            misfits.append(MisfitError(f"layers are stacked on axes {axes}"))
            continue
        stack = maxima_shape[len(maxima_shape) - 1 - len(axes) : -1]
        try:
            plan, agrees = _block_plan(
                block, Choice(layout, leaves, axes, stack, maxima_shape[-1], choice)
            )
        except MisfitError as misfit:
            misfits.append(misfit)
        else:
            plans[plan] = agrees or plans.get(plan, False)
    best = [plan for plan, agrees in plans.items() if agrees] or list(plans)
    return [plan for plan in best if _stacked_first(plan)] or best, misfits


def _stacked_first(plan: BlockPlan) -> bool:
    return all(leaf.stack_axes == tuple(range(len(leaf.stack_axes))) for leaf in plan.leaves)


def read_block(
    layout: AttentionLayout, block: str, leaves: Leaves, maxima_shape: tuple[int, ...]
) -> BlockPlan:
    """Returns the plan of one block, given the shape of its maxima.

    Args:
        layout: What the block's projections are.
        block: The block's path.
        leaves: Its leaves by their path inside it.
        maxima_shape: `(..., stacked layers, query heads)`.

    Returns:
        The plan.

    Raises:
        ValueError: If no reading of the shapes fits, several do, or the block cannot be clipped.
    """
    plans, misfits = _plans(layout, block, leaves, maxima_shape)
    if len(plans) == 1:
        return plans[0]
    found = kernel_of(leaves, layout.projections[0].path)
    kernel = join(filter(None, (block, layout.projections[0].path, found[0] if found else "")))
    shape = tuple(found[1].shape) if found else ()
    if plans:
        ways = "; ".join(
            f"{plan.heads} heads of {plan.head_dim}, stacked {plan.stack or 'nowhere'} on axes "
            f"{plan.leaves[0].stack_axes}"
            for plan in plans
        )
        raise ValueError(
            f"The attention kernel {kernel!r} of shape {shape} can be read in several ways: "
            f"{ways}. Say which with blocks=[(pattern, AttentionLayout(..., stack_axes=...))]."
        )
    refusal = next((misfit for misfit in misfits if isinstance(misfit, RefusalError)), None)
    if refusal is not None:
        raise ValueError(f"QK-Clip cannot clip attention block {block!r}: {refusal}.")
    reasons = "; ".join(dict.fromkeys(str(misfit) for misfit in misfits))
    raise ValueError(
        f"The attention kernel {kernel!r} of shape {shape} ({layout.name}) and its maxima of shape "
        f"{maxima_shape} do not fit together. Expected maxima (query heads,), or (stacked layers, "
        "query heads) where the kernels are stacked; axes before those are reduced."
        f"{_without_batch(layout, block, leaves, maxima_shape)} "
        f"Tried: {reasons or 'nothing, for there are too few axes'}."
    )


def guess_block(layout: AttentionLayout, block: str, leaves: Leaves) -> BlockPlan | None:
    """Returns the plan of one block without its maxima, or None where shapes leave it open.

    Every number of heads on every stack is tried. One reading has to be the only one that the
    output projection agrees with: `(4, 64, 64)` alone may be four layers of merged heads as well as
    64 heads of 64.

    Args:
        layout: What the block's projections are.
        block: The block's path.
        leaves: Its leaves by their path inside it.
    """
    rank = len(query_shape(layout, leaves))
    stackings = [layout.stack_axes or ()]
    if layout.stack_axes is None:
        stackings = [axes for count in range(rank - 1) for axes in _stackings(rank, count)]
    plans: set[BlockPlan] = set()
    for choice in choices_of(layout, leaves, stackings):
        with contextlib.suppress(MisfitError):
            plan, agrees = _block_plan(block, choice)
            plans |= {plan} if agrees else set()
    return plans.pop() if len(plans) == 1 else None


def _without_batch(
    layout: AttentionLayout, block: str, leaves: Leaves, maxima_shape: tuple[int, ...]
) -> str:
    """Says what to write where the maxima would fit without axes between layers and heads.

    A module that records `(batch, heads)` under `nn.scan` gives `(layers, batch, heads)`.
    """
    for count in range(1, len(maxima_shape) - 1):
        if _plans(layout, block, leaves, (*maxima_shape[:count], maxima_shape[-1]))[0]:
            axes = tuple(range(count, len(maxima_shape) - 1))
            axis = f"axis={axes[0] if len(axes) == 1 else axes}"
            return (
                " If their axes are (stacked layers, batch, query heads), as of a module that "
                "records (batch, query heads) under nn.scan, take the maximum over the batch: "
                f"jax.tree.map(lambda s: s.max({axis}), max_logits)."
            )
    return ""
