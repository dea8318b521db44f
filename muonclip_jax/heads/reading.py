"""Infers the heads of a block from its shapes: stacked axes, head axes, and number of heads.

A kernel of rank 3 may be `(d_model, heads, head_dim)` or `(layers, d_model, features)`; the whole
block determines which: every leaf has the same stack, the maxima or the output projection give the
number of query heads, and all sizes must be consistent. So every interpretation of the query kernel
is tried on the whole block (`solve`); an inconsistency is a `MisfitError` with the reason.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from muonclip_jax.heads.finding import KERNEL_NAMES, Shape, Shapes, kernel_name
from muonclip_jax.heads.layouts import (
    NORM_NAMES,
    OUT_NAMES,
    VALUE_NAMES,
    AttentionLayout,
    Projection,
    spelling,
)
from muonclip_jax.heads.plan import (
    BlockPlan,
    LeafPlan,
    MisfitError,
    RefusalError,
    Segment,
    divide,
)

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Reading:
    """One interpretation of a block."""

    layout: AttentionLayout
    shapes: Shapes
    stack_axes: tuple[int, ...]  # counted in every leaf, from the front or from the end
    stack: tuple[int, ...]  # their sizes
    choice: int  # which of several candidates for the kernels' input axis
    heads: int = 1  # query heads

    def one_layer(self, name: str) -> tuple[Shape, tuple[int, ...]]:
        """Returns the shape of one layer of a leaf, and its stacked axes from the front."""
        shape, asked = self.shapes[name], self.stack_axes
        rank = len(shape)
        axes = tuple(sorted({a % rank for a in asked if -rank <= a < rank}))
        if len(axes) < len(asked) or tuple(shape[axis] for axis in axes) != self.stack:
            raise MisfitError(f"{name}: shape {shape} is not stacked {self.stack} on axes {axes}")
        return tuple(n for axis, n in enumerate(shape) if axis not in axes), axes

    def kernel(self, p: Projection) -> LeafPlan:
        """Returns a projection's kernel, its features not divided into heads yet."""
        name = kernel_name(self.shapes, p.path)
        if name is None:
            raise RefusalError(
                f"{p.path!r} has a low-rank adapter here, and the kernel that it adapts is not in "
                "this tree. Scaling only the adapter does not scale their sum. Clip a tree that "
                "contains both, or train without QK-Clip"
            )
        one, stacked = self.one_layer(name)
        axes = p.input_axis
        if axes is None:
            axes = KERNEL_NAMES[name[len(p.path) + 1 :]]
            # A matrix under the name "weight" is (outputs, inputs); more axes have either order.
            axes = axes if len(one) > 2 else axes[:1]
            # So is a plain array: (heads, inputs, size) in TransformerLens, where inputs are more.
            axes = (-2,) if name == p.path and len(one) > 2 and one[-2] > one[0] else axes
        axes = axes if isinstance(axes, tuple) else (axes,)
        axis = axes[min(self.choice, len(axes) - 1)]
        if len(one) < 2 or not -len(one) <= axis < len(one):
            raise MisfitError(f"{p.path}: {one} is not a kernel of one layer")
        shape = self.shapes[name]
        free = [i for i in range(len(shape)) if i not in stacked]
        del free[axis]
        return LeafPlan(name, shape, stacked, tuple(free))

    def latent(self, paths: tuple[str, str]) -> LeafPlan:
        """Returns latent attention's down projection, with the latent and the shared rotary key."""
        down, up = (self.kernel(Projection(path, ("key",))) for path in paths)
        size = up.shape[up.input_axis]
        if down.total <= size:
            raise MisfitError(
                f"{paths[0]} makes {down.total} features and {paths[1]} takes {size}: no rotary "
                "key left"
            )
        parts = Segment("latent", 1, size), Segment("shared rotary key", 1, down.total - size)
        return dataclasses.replace(down, segments=parts)

    def _taken(self, name: str) -> tuple[Shape, bool]:
        """Returns a kernel's input axes in one layer, and whether they may be heads' values."""
        one, _ = self.one_layer(name)
        groups = self.kernel(self.layout.query).features[:-1]

        def counted(inputs: Shape) -> bool:
            if len(inputs) > 2:
                return inputs[:-1] == groups
            return len(inputs) == 1 or inputs[:1] == (self.heads,)

        outputs_first = name.endswith("weight") and (len(one) == 2 or not counted(one[:-1]))
        inputs = one[1:] if outputs_first else one[:-1]
        return inputs, counted(inputs)

    def _outputs(self) -> tuple[int | None, set[int]]:
        """Returns the input features of the output projection and of kernels of unknown names."""
        outputs: dict[str, str] = {}
        unknown: set[int] = set()
        others = (*self.layout.paths, *VALUE_NAMES, *itertools.chain(*NORM_NAMES))
        for module in dict.fromkeys(name.partition("/")[0] for name in self.shapes):
            name = kernel_name(self.shapes, module)
            if name is not None and spelling(module) in OUT_NAMES:
                outputs[spelling(module)] = name
            elif name is not None and module not in others:
                with contextlib.suppress(MisfitError):  # it may not be stacked
                    unknown.add(math.prod(self._taken(name)[0]))
        for name in (outputs[out] for out in OUT_NAMES if out in outputs):
            inputs, counted = self._taken(name)
            if len(inputs) not in (1, 2, 3):
                raise MisfitError(f"{name}: its inputs {inputs} are not head values")
            return (math.prod(inputs) if counted else None), unknown
        return None, unknown

    def _with_gate(
        self, kernels: list[LeafPlan], out: int | None, unknown: set[int]
    ) -> AttentionLayout:
        """Returns the layout, with a gate for every query head if the shapes show one, or raises.

        Keys and values tell a gated query from heads twice as large as the values'.
        """
        layout = self.layout
        (first, *others), last = layout.projections, layout.projections[-1]
        if first.parts != ("query",) or layout.head_dim is not None or layout.own_keys:
            return layout
        total, key = kernels[0].total, kernels[-1] if last.parts == ("key",) else None
        half, size, gated = total // 2, total // self.heads, None
        other = half in unknown and total not in unknown  # an output of another name
        if out is None and other and (key is None or key.total <= half):
            out = half
        if out is None or total != 2 * out or total % self.heads:
            return layout
        values = next((v for v in VALUE_NAMES if kernel_name(self.shapes, v) is not None), None)
        if key is not None and len(key.features) > 1:
            gated = {size: False, size // 2: True}.get(key.features[-1])
        elif key is not None and values is not None:
            made = self.kernel(Projection(values, ("value",))).total
            gated = {key.total: True, key.total // 2: False}.get(made)
        if gated is False:
            return layout
        if not gated or len(kernels[0].features) == 1:
            raise RefusalError(
                f"{first.path!r} makes {total} features and the output projection takes {out}, as "
                "if half of them were a gate. Say where the gate is, by an AttentionLayout with "
                f"Projection({first.path!r}, ('query', 'gate'), interleaved=True) where query and "
                "gate alternate head by head (Qwen3-Next), interleaved='group' where they "
                "alternate by key head, interleaved=False where all queries come first"
                + ("" if gated else f"; if there is none, by one with head_dim={size}")
            )
        first = dataclasses.replace(first, parts=("query", "gate"), interleaved=True)
        name = f"{layout.name}, gate beside q"
        return dataclasses.replace(layout, projections=(first, *others), name=name)

    def read(self) -> BlockPlan:
        """Returns the plan of this reading, with the kernels of all projections, or raises."""
        kernels, heads = [self.kernel(p) for p in self.layout.projections], self.heads
        latent, (out, unknown) = self.layout.latent, self._outputs()
        rope = self.latent(latent).segments[1].size if latent else None
        layout = self._with_gate(kernels, out, unknown)
        size, kv_heads, leaves = divide(layout, kernels, heads, rope, out)
        values = [s.size for leaf in leaves for s in leaf.segments if s.role == "value"]
        made, fused = heads * [*values, size][0], not {"query", "key"} - {*layout.query.parts}
        agrees = out == made or (fused and out is None and made in unknown)
        return BlockPlan("", layout.name, heads, kv_heads, size, self.stack, leaves, agrees)


def _readings(
    layout: AttentionLayout,
    shapes: Shapes,
    maxima_shape: Shape | None,
    stacked: Iterable[tuple[int, ...]] | None,
) -> Iterator[Reading]:
    """Yields every interpretation of a block, whose maxima are `(..., stacked layers, heads)`."""
    name = kernel_name(shapes, layout.query.path) or ""
    query = shapes.get(name, ())
    rank = len(query)
    if layout.stack_axes is not None:
        stacked = [layout.stack_axes]
    elif stacked is None:  # counted from the front and, since biases have fewer axes, from the end
        most = rank - 2 if maxima_shape is None else min(rank - 2, len(maxima_shape) - 1)
        counts, both = range(max(most, 0) + 1), (range(rank), range(-rank, 0))
        stacked = [x for n in counts for axes in both for x in itertools.combinations(axes, n)]
    asked = [len(p.input_axis) for p in layout.projections if isinstance(p.input_axis, tuple)]
    choices = range(max([*asked, 1 + name.endswith("weight")]))
    possible = (axes for axes in dict.fromkeys(stacked) if all(-rank <= x < rank for x in axes))
    for axes, choice in itertools.product(possible, choices):
        stack = tuple(query[axis] for axis in sorted(axis % rank for axis in axes))
        reading = Reading(layout, shapes, axes, stack, choice)
        if maxima_shape is None:
            total = 1
            with contextlib.suppress(MisfitError):
                total = reading.kernel(layout.query).total
            # Heads of a known size need not divide a fused kernel: 6 of them on 2 keys are ten.
            size = layout.head_dim
            counts = (n for n in range(1, total // (size or 1) + 1) if size or total % n == 0)
            yield from (dataclasses.replace(reading, heads=n) for n in counts)
        elif len(axes) < len(maxima_shape):
            stack = maxima_shape[len(maxima_shape) - 1 - len(axes) : -1]
            yield dataclasses.replace(reading, stack=stack, heads=maxima_shape[-1])


def solve(
    layout: AttentionLayout,
    shapes: Shapes,
    finish: Callable[[Reading, BlockPlan], tuple[tuple[int, ...], _Result]],
    *,
    maxima_shape: Shape | None = None,
    stacked: Iterable[tuple[int, ...]] | None = None,
) -> tuple[dict[_Result, list[BlockPlan]], list[MisfitError]]:
    """Returns the results of the readings with the least penalty, and reasons against others.

    `finish` gives a reading's penalty and result. The first reason is why the block cannot be
    clipped, if a consistent reading has one.
    """
    found: dict[tuple[int, ...], dict[_Result, list[BlockPlan]]] = {}
    misfits: list[MisfitError] = []
    for reading in _readings(layout, shapes, maxima_shape, stacked):
        try:
            plan = reading.read()
            penalty, result = finish(reading, plan)
            found.setdefault(penalty, {}).setdefault(result, []).append(plan)
        except MisfitError as misfit:
            # A traceback would keep the callers' arrays alive as long as the reason is kept.
            misfits.append(misfit.with_traceback(None))
    misfits.sort(key=lambda misfit: not isinstance(misfit, RefusalError))
    return found[min(found)] if found else {}, misfits
