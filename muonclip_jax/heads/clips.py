"""Which leaves of a block a clip multiplies, and where their heads lie: one plan or a refusal."""

import functools
from collections.abc import Iterator
from typing import TypeAlias

from muonclip_jax.heads.finding import FoundBlock
from muonclip_jax.heads.layouts import SCALED, AttentionLayout, Projection
from muonclip_jax.heads.leaves import (
    BIAS_NAMES,
    KERNEL_NAMES,
    LORA_A,
    LORA_B,
    MisfitError,
    RefusalError,
    kernel_name,
    under,
)
from muonclip_jax.heads.norms import gains_instead
from muonclip_jax.heads.plan import BlockPlan, LeafPlan
from muonclip_jax.heads.solver import Attempt, Reading, attempts, preferred, refusal_in, solve

_Plans: TypeAlias = tuple[tuple[tuple[BlockPlan, Reading], ...], tuple[MisfitError, ...]]


def _block_plan(reading: Reading) -> BlockPlan:
    """Returns the plan under one reading; paths are names inside the block."""
    leaves: list[LeafPlan] = []
    for p, kernel in zip(reading.layout.projections, reading.kernels, strict=True):
        if any(segment.role in SCALED for segment in kernel.segments):
            leaves += _leaf_plans(reading.attempt, p, kernel)
    plan = BlockPlan(
        path="",
        layout=reading.layout.name,
        heads=reading.attempt.heads,
        kv_heads=reading.kv_heads,
        head_dim=reading.head_dim,
        stack=reading.attempt.stack,
        leaves=tuple(leaves),
    )
    return gains_instead(plan, reading)


def _leaf_plans(attempt: Attempt, p: Projection, kernel: LeafPlan) -> Iterator[LeafPlan]:
    """Yields the plans of a projection's kernel, its bias and its adapter."""
    inside = under(attempt.shapes, p.path)
    for name, shape in inside.items():
        path, first = f"{p.path}/{name}".removesuffix("/"), name.partition("/")[0]
        if path == kernel.path:
            yield kernel
        elif name in BIAS_NAMES or first == LORA_B:
            _, stacked = attempt.one_layer(path)
            free = tuple(i for i in range(len(shape)) if i not in stacked)
            # An adapter is (rank, features), and (features, rank) in PyTorch.
            orders = [free[:-1], free[1:]] if name.endswith("weight") else [free[1:], free[:-1]]
            yield _like(kernel, path, shape, stacked, orders if first == LORA_B else [free])
        elif first != LORA_A or not any(other.startswith(LORA_B) for other in inside):
            known = (*filter(None, KERNEL_NAMES), *BIAS_NAMES, LORA_A, LORA_B)
            raise RefusalError(
                "belongs to a projection that QK-Clip multiplies, and how it enters the result is "
                f"not known. Known names are {', '.join(known)}; an adapter needs both halves",
                path,
            )


def _like(
    kernel: LeafPlan,
    path: str,
    shape: tuple[int, ...],
    stacked: tuple[int, ...],
    orders: list[tuple[int, ...]],
) -> LeafPlan:
    """Returns the plan of a leaf whose features are the kernel's, on the first axes that fit."""
    for axes in orders:
        if tuple(shape[axis] for axis in axes) in (kernel.features, (kernel.total,)):
            return LeafPlan(path, shape, stacked, axes, kernel.segments, kernel.repeat)
    raise MisfitError(f"{path}: {shape} does not hold the features {kernel.features}")


def _stacked_first(reading: Reading) -> bool:
    return all(k.stack_axes == tuple(range(len(k.stack_axes))) for k in reading.kernels)


@functools.lru_cache(maxsize=1024)
def _cached_plans(
    layout: AttentionLayout,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    maxima_shape: tuple[int, ...] | None,
) -> _Plans:
    found, misfits = solve(attempts(layout, dict(shapes), maxima_shape), _block_plan)
    best = preferred(found, lambda reading: reading.agrees)
    if maxima_shape is not None:
        best = preferred(best, _stacked_first)
    return tuple((plan, readings[0]) for plan, readings in best.items()), tuple(misfits)


def _plans(block: FoundBlock, maxima_shape: tuple[int, ...] | None) -> _Plans:
    """Returns the plans that fit best, and reasons against the rest; equal blocks are read once."""
    return _cached_plans(block.layout, tuple(block.leaves.items()), maxima_shape)


def read_block(block: FoundBlock, maxima_shape: tuple[int, ...]) -> BlockPlan:
    """Returns the plan of one block, given the shape of its maxima `(..., stack, query heads)`.

    Raises:
        ValueError: If no reading of the shapes fits, several do, or the block cannot be clipped.
    """
    plans, misfits = _plans(block, maxima_shape)
    if len(plans) == 1:
        return plans[0][0].in_tree(block.path, block.paths)
    name = kernel_name(block.leaves, block.layout.projections[0].path)
    shape, path = ((), block.path) if name is None else (block.leaves[name], block.paths[name])
    kernel = f"The attention kernel {path!r} of shape {shape}"
    if plans:
        ways = "; ".join(
            f"{plan.heads} heads of {plan.head_dim}, stacked {plan.stack or 'nowhere'} on axes "
            f"{reading.kernels[0].stack_axes}"
            for plan, reading in plans
        )
        raise ValueError(
            f"{kernel} can be read in several ways: {ways}. Say which with "
            "blocks=[(pattern, AttentionLayout(..., stack_axes=...))]."
        )
    if (refusal := refusal_in(misfits)) is not None:
        raise ValueError(
            f"QK-Clip cannot clip attention block {block.path!r}: {refusal.in_tree(block.paths)}."
        )
    reasons = "; ".join(dict.fromkeys(map(str, misfits)))
    raise ValueError(
        f"{kernel} ({block.layout.name}) and its maxima of shape {maxima_shape} do not fit together"
        f"{_other_heads(block, maxima_shape)}. Expected maxima (query heads,), or (stacked layers, "
        "query heads) where the kernels are stacked; axes before those are reduced."
        f"{_reduction(block, maxima_shape)} "
        f"Tried: {reasons or 'nothing, for there are too few axes'}."
    )


def guess_block(block: FoundBlock) -> BlockPlan | RefusalError | None:
    """Returns the plan of one block without its maxima, why it cannot be clipped, or None.

    Every number of heads on every stack is tried. One reading has to be the only one that the
    output projection agrees with: `(4, 64, 64)` alone may be four layers of merged heads as well as
    64 heads of 64. A block is refused where every reading is.
    """
    plans, misfits = _plans(block, None)
    if len(plans) == 1 and plans[0][1].agrees:
        return plans[0][0].in_tree(block.path, block.paths)
    return None if plans else refusal_in(misfits)


def _other_heads(block: FoundBlock, maxima_shape: tuple[int, ...]) -> str:
    """Says how many heads the kernel has, where its axes or the output projection show it."""
    readings = [
        reading
        for _, reading in _plans(block, None)[0]
        if len(reading.attempt.stack) < len(maxima_shape)
        and (reading.agrees or len(reading.kernels[0].features) > 1)
    ]
    most = max((len(reading.attempt.stack) for reading in readings), default=0)
    heads = {r.attempt.heads for r in readings if len(r.attempt.stack) == most}
    if len(heads) != 1 or maxima_shape[-1] in heads:
        return ""
    return f": the kernel has {heads.pop()} heads, {maxima_shape[-1]} maxima were given"


def _reduction(block: FoundBlock, maxima_shape: tuple[int, ...]) -> str:
    """Says what to write where the maxima fit after a maximum over some of their axes.

    A module that records `(batch, heads)` under `nn.scan` gives `(layers, batch, heads)`; whole
    logits are `(batch, heads, queries, keys)`, under a scan with layers before them.
    """
    rank = len(maxima_shape)
    batch = "If their axes are (stacked layers, batch, query heads), as of a module that records "
    batch += "(batch, query heads) under nn.scan, take the maximum over the batch"
    whole = "If they are whole logits (batch, query heads, queries, keys), take the maximum first"
    for heads, what in ((rank - 1, batch), (rank - 3, whole)):
        for layers in range(min(rank - 1, heads + 1)) if heads >= 0 else ():
            kept = (*range(layers), heads)
            if _plans(block, tuple(maxima_shape[axis] for axis in kept))[0]:
                axes = tuple(axis for axis in range(rank) if axis not in kept)
                axis = f"axis={axes[0] if len(axes) == 1 else axes}"
                return f" {what}: jax.tree.map(lambda s: s.max({axis}), max_logits)."
    return ""
