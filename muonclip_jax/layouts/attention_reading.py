"""From a block's shapes to its plan: which axes are stacked, which hold heads.

A kernel of rank 3 may be `(d_model, heads, head_dim)` or `(layers, d_model, features)`. No rule
on ranks can tell, but the whole block can: every leaf is stacked alike, the maxima say how many
layers and query heads there are, biases repeat the kernels' features, and the output projection
takes one head's values a query head. So every reading is tried on all of that, and what fits is
kept. Where several fit, the stack on the first axes wins; a tie beyond that is an error.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from muonclip_jax._paths import join
from muonclip_jax.layouts.attention import SCALED, AttentionLayout, Projection
from muonclip_jax.layouts.attention_builtin import (
    ADAPTER_NAMES,
    BIAS_NAMES,
    KERNEL_NAMES,
    OUT_NAMES,
)
from muonclip_jax.layouts.attention_leaves import (
    Leaves,
    MisfitError,
    RefusalError,
    kernel_of,
    under,
    unstack,
)
from muonclip_jax.layouts.attention_norms import gains_instead
from muonclip_jax.layouts.attention_plan import BlockPlan, LeafPlan, Segment
from muonclip_jax.layouts.attention_sizes import (
    fits_feature_shape,
    head_size,
    key_heads,
    segments_of,
)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A projection's kernel under one reading."""

    name: str
    features: tuple[int, ...]
    inputs: int
    feature_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]

    @property
    def total(self) -> int:
        return math.prod(self.features)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One choice of stacked axes and of input axes, to be checked on every leaf of a block."""

    layout: AttentionLayout
    block: str
    leaves: Leaves
    stack_axes: tuple[int, ...]
    stack: tuple[int, ...]
    heads: int
    choice: int

    def one_layer(self, leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return unstack(tuple(leaf.shape), self.stack_axes, self.stack)

    def kernel(self, path: str, input_axis: int | tuple[int, ...] | None) -> _Kernel:
        found = kernel_of(self.leaves, path)
        if found is None:
            raise MisfitError(f"{path} has no leaf named {', '.join(filter(None, KERNEL_NAMES))}")
        name, leaf = found
        shape, stacked = self.one_layer(leaf)
        axes = KERNEL_NAMES[name] if input_axis is None else input_axis
        axes = axes if isinstance(axes, tuple) else (axes,)
        axis = axes[min(self.choice, len(axes) - 1)]
        if len(shape) < 2 or not -len(shape) <= axis < len(shape):
            raise MisfitError(f"{path}: {shape} is no kernel of one layer")
        axis %= len(shape)
        free = [i for i in range(len(leaf.shape)) if i not in stacked]
        return _Kernel(
            name=name,
            features=tuple(n for i, n in enumerate(shape) if i != axis),
            inputs=shape[axis],
            feature_axes=tuple(a for i, a in enumerate(free) if i != axis),
            stack_axes=stacked,
        )

    def out_features(self) -> int | None:
        """Returns the input features of the output projection, where there is one."""
        for path in OUT_NAMES:
            found = kernel_of(self.leaves, path)
            if found is None:
                continue
            shape, _ = self.one_layer(found[1])
            inputs = shape[1:] if found[0] == "weight" else shape[:-1]
            if len(inputs) not in (1, 2):
                raise MisfitError(f"{path}: {shape} is no output kernel of one layer")
            return math.prod(inputs) if len(inputs) == 1 or inputs[0] == self.heads else None
        return None

    def plan(self) -> BlockPlan:
        """Returns the block's plan under this reading, or raises `MisfitError`."""
        layout, heads = self.layout, self.heads
        kernels = {p.path: self.kernel(p.path, p.input_axis) for p in layout.projections}
        totals = {path: kernel.total for path, kernel in kernels.items()}
        rope = None if layout.latent is None else self._rope(*layout.latent)
        out = self.out_features()
        size = head_size(layout, totals, heads, layout.kv_heads, rope, out)
        self._refuse_hidden_gate(size, out)
        kv_heads = key_heads(layout, totals, heads, size)
        leaves: list[LeafPlan] = []
        for p in layout.projections:
            kernel = kernels[p.path]
            segments, repeat = segments_of(p, kernel.total, heads, kv_heads, size, rope)
            if not fits_feature_shape(kernel.features, segments, repeat):
                raise MisfitError(
                    f"{p.path}: its features {kernel.features} do not hold {heads} heads"
                )
            if any(segment.role in SCALED for segment in segments):
                leaves += self._leaf_plans(p, kernel, segments, repeat)
        plan = BlockPlan(
            path=self.block,
            layout=layout.name,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=size,
            stack=self.stack,
            leaves=tuple(leaves),
        )
        return gains_instead(plan, self.leaves, self.stack_axes, latent=layout.own_keys)

    def _rope(self, down: str, up: str) -> int:
        """Returns the size of latent attention's shared rotary key."""
        made, taken = self.kernel(down, None).total, self.kernel(up, None).inputs
        if made <= taken:
            raise MisfitError(
                f"{down} makes {made} features and {up} takes {taken}: no rotary key left"
            )
        return made - taken

    def _refuse_hidden_gate(self, size: int, out: int | None) -> None:
        """Refuses a query projection with twice the features that the output takes."""
        layout = self.layout
        first = layout.projections[0]
        if first.parts != ("query",) or layout.head_dim is not None or layout.own_keys:
            return
        if out is not None and self.heads * size == 2 * out:
            raise RefusalError(
                f"{first.path!r} makes {2 * out} features and the output projection takes {out}, "
                f"as if half of them were a gate. If so, pass an AttentionLayout with "
                f"Projection({first.path!r}, ('query', 'gate'), interleaved=True); if not, "
                f"one with head_dim={size}"
            )

    def _leaf_plans(
        self, projection: Projection, kernel: _Kernel, segments: tuple[Segment, ...], repeat: int
    ) -> Iterator[LeafPlan]:
        """Yields the plans of a projection's kernel, its bias and its adapters."""
        path = projection.path
        for name, leaf in under(self.leaves, path).items():
            full = join(filter(None, (self.block, path, name)))
            shape = tuple(leaf.shape)
            if name == kernel.name:
                axes, stacked = kernel.feature_axes, kernel.stack_axes
            elif ADAPTER_NAMES.get(name) is False:
                continue
            elif name in BIAS_NAMES or name in ADAPTER_NAMES:
                inputs = 0 if name in BIAS_NAMES else 1
                one, stacked = self.one_layer(leaf)
                if one[inputs:] not in (kernel.features, (kernel.total,)):
                    raise MisfitError(f"{path}/{name}: {one} does not end in {kernel.features}")
                axes = tuple(i for i in range(len(shape)) if i not in stacked)[inputs:]
            else:
                known = (*filter(None, KERNEL_NAMES), *BIAS_NAMES, *ADAPTER_NAMES)
                raise RefusalError(
                    f"{full!r} belongs to a projection that QK-Clip multiplies, and how it enters "
                    f"the result is not known. Known names are {', '.join(known)}"
                )
            yield LeafPlan(full, shape, stacked, axes, segments, repeat)


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
        reading = _Reading(layout, block, leaves, axes, stack, maxima_shape[-1], choice)
        try:
            plan = reading.plan()
            agrees = reading.out_features() == plan.heads * plan.head_dim
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
        "query heads) where the kernels are stacked; axes before those are reduced. "
        f"Tried: {reasons or 'nothing, for there are too few axes'}."
    )
