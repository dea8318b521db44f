"""Infers the heads of a block from its shapes: stacked axes, head axes, and number of heads.

A kernel of rank 3 may be `(d_model, heads, head_dim)` or `(layers, d_model, features)`. Its rank
does not determine which, but the whole block does: every leaf has the same stack, the maxima or the
output projection give the number of query heads, and all sizes must be consistent. So every
interpretation of the query kernel (`attempts`) is tried on the whole block (`Attempt.read`), and an
inconsistency is a `MisfitError` with the reason. The caller completes each reading and ranks them
(`solve`).
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from muonclip_jax.heads.finding import KERNEL_NAMES, Shape, Shapes, has_adapter, kernel_name
from muonclip_jax.heads.layouts import (
    NORM_NAMES,
    OUT_NAMES,
    VALUE_NAMES,
    AttentionLayout,
    Projection,
    spelling,
)
from muonclip_jax.heads.plan import LeafPlan, MisfitError, RefusalError, divide

_Result = TypeVar("_Result")
#: What stands beside queries and keys and is no output projection.
_NO_OUTPUT = (*VALUE_NAMES, *(name for names in NORM_NAMES for name in names))


@dataclasses.dataclass(frozen=True)
class Reading:
    """The result of one attempt."""

    attempt: "Attempt"
    layout: AttentionLayout  # with a gate where the shapes show one
    kv_heads: int
    head_dim: int  # features of one query and key head that clip together
    kernels: tuple[LeafPlan, ...]  # of each projection; paths are names inside the block
    agrees: bool  # whether the output projection takes exactly the heads' values


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One interpretation of a block."""

    layout: AttentionLayout
    shapes: Shapes
    stack_axes: tuple[int, ...]  # counted in every leaf, from the front or from the end
    stack: tuple[int, ...]  # their sizes
    choice: int  # which of several candidates for the kernels' input axis
    heads: int = 1  # query heads

    def one_layer(self, name: str) -> tuple[Shape, tuple[int, ...]]:
        """Returns the shape of one layer of a leaf, and its stacked axes from the front."""
        shape = self.shapes[name]
        rank, asked = len(shape), self.stack_axes
        axes = tuple(sorted({a % rank for a in asked if -rank <= a < rank})) if rank else ()
        if len(axes) < len(asked):
            raise MisfitError(f"{name}: shape {shape} has no axes {asked} to stack layers on")
        if tuple(shape[axis] for axis in axes) != self.stack:
            raise MisfitError(f"{name}: shape {shape} is not stacked {self.stack} on axes {axes}")
        return tuple(n for axis, n in enumerate(shape) if axis not in axes), axes

    def kernel(self, p: Projection) -> LeafPlan:
        """Returns a projection's kernel, its features not divided into heads yet."""
        name = kernel_name(self.shapes, p.path)
        if name is None and has_adapter(self.shapes, p.path):
            raise RefusalError(
                f"{p.path!r} has a low-rank adapter here, and the kernel that it adapts is not in "
                "this tree. Scaling only the adapter does not scale their sum. Clip a tree that "
                "contains both, or train without QK-Clip"
            )
        if name is None:
            names = ", ".join(filter(None, KERNEL_NAMES))
            raise MisfitError(f"{p.path} has no leaf named {names}")
        one, stacked = self.one_layer(name)
        axes = KERNEL_NAMES[name.rpartition("/")[2] if name != p.path else ""]
        # A matrix under the name "weight" is (outputs, inputs); more axes may have either order.
        axes = axes if len(one) > 2 else axes[:1]
        if p.input_axis is not None:
            axes = p.input_axis if isinstance(p.input_axis, tuple) else (p.input_axis,)
        axis = axes[min(self.choice, len(axes) - 1)]
        if len(one) < 2 or not -len(one) <= axis < len(one):
            raise MisfitError(f"{p.path}: {one} is not a kernel of one layer")
        free = [i for i in range(len(self.shapes[name])) if i not in stacked]
        del free[axis]
        return LeafPlan(name, self.shapes[name], stacked, tuple(free))

    def _taken(self, name: str) -> Shape:
        """Returns the input axes of an output projection's kernel in one layer."""
        one, _ = self.one_layer(name)
        if name.endswith("weight") and (len(one) == 2 or not self._counted(one[:-1])):
            return one[1:]
        return one[:-1]

    def _counted(self, inputs: Shape) -> bool:
        """Whether the input axes of an output projection may be heads and their features."""
        if len(inputs) > 2:  # heads on several axes, as the query has them
            return inputs[:-1] == self.kernel(self.layout.query).features[:-1]
        return len(inputs) == 1 or inputs[:1] == (self.heads,)

    def _out_features(self) -> int | None:
        """Returns the input features of the output projection, if there is one."""
        spelled = {spelling(path): path for path in self._children()}
        for name in OUT_NAMES:
            found = kernel_name(self.shapes, spelled[name]) if name in spelled else None
            if found is not None:
                inputs = self._taken(found)
                if len(inputs) not in (1, 2, 3):
                    raise MisfitError(f"{spelled[name]}: its inputs {inputs} are not head values")
                return math.prod(inputs) if self._counted(inputs) else None
        return None

    def _children(self) -> list[str]:
        return list(dict.fromkeys(name.partition("/")[0] for name in self.shapes))

    def latent(self) -> tuple[LeafPlan, int] | None:
        """Returns latent attention's down projection and the size of the latent, if it has them."""
        if self.layout.latent is None:
            return None
        down, up = (self.kernel(Projection(path, ("key",))) for path in self.layout.latent)
        size = up.shape[up.input_axes[0]]
        if down.total <= size:
            raise MisfitError(
                f"{self.layout.latent[0]} makes {down.total} features and {self.layout.latent[1]} "
                f"takes {size}: no rotary key left"
            )
        return down, size

    def read(self) -> Reading:
        """Returns the reading of this attempt, or raises `MisfitError`."""
        kernels = {p.path: self.kernel(p) for p in self.layout.projections}
        totals = {path: kernel.total for path, kernel in kernels.items()}
        latent, out = self.latent(), self._out_features()
        rope = None if latent is None else latent[0].total - latent[1]
        layout = self._with_gate(kernels, out)
        size, kv_heads, rows = divide(layout, totals, self.heads, rope, out)
        for path, (row, repeat) in rows.items():
            kernels[path] = dataclasses.replace(kernels[path], segments=row, repeat=repeat)
            if kernels[path].grid(kv_heads) is None:
                features = kernels[path].features
                raise MisfitError(
                    f"{path}: its features {features} are not divisible into {self.heads} heads"
                )
        sizes = [
            s.size for kernel in kernels.values() for s in kernel.segments if s.role == "value"
        ]
        agrees = out == self.heads * (sizes[0] if sizes else size)
        return Reading(self, layout, kv_heads, size, tuple(kernels.values()), agrees)

    def _half_taken(self, total: int) -> int | None:
        """Returns half of the query's features if they are the input of an unknown kernel.

        So an output projection with an unknown name also reveals a gate.
        """
        taken: set[int] = set()
        for path in self._children():
            found = kernel_name(self.shapes, path)
            known = path in (*self.layout.paths, *_NO_OUTPUT) or spelling(path) in OUT_NAMES
            if found is not None and not known:
                with contextlib.suppress(MisfitError):  # it may not be stacked
                    taken.add(math.prod(self._taken(found)))
        return total // 2 if total % 2 == 0 and total // 2 in taken and total not in taken else None

    def _with_gate(self, kernels: dict[str, LeafPlan], out: int | None) -> AttentionLayout:
        """Returns the layout, with a gate for every query head if the shapes show one.

        A query projection with twice the features that the output takes is either gated, or has
        heads twice as large as the values'. The keys and values beside it tell which.

        Raises:
            RefusalError: If they do not, or if they tell of a gate whose place is open.
        """
        layout = self.layout
        (first, *others), last = layout.projections, layout.projections[-1]
        if first.parts != ("query",) or layout.head_dim is not None or layout.own_keys:
            return layout
        query, key = kernels[first.path], kernels[last.path]
        if out is None and not (last.parts == ("key",) and key.total > query.total // 2):
            out = self._half_taken(query.total)
        if out is None or query.total != 2 * out or query.total % self.heads:
            return layout
        size, gated = query.total // self.heads, None
        values = next((v for v in VALUE_NAMES if kernel_name(self.shapes, v) is not None), None)
        if last.parts == ("key",) and len(key.features) > 1:
            gated = {size: False, size // 2: True}.get(key.features[-1])
        elif last.parts == ("key",) and values is not None:
            made = self.kernel(Projection(values, ("value",))).total
            gated = {key.total: True, key.total // 2: False}.get(made)
        if gated is False:
            return layout
        if not gated or len(query.features) == 1:
            raise RefusalError(
                f"{first.path!r} makes {2 * out} features and the output projection takes {out}, "
                f"as if half of them were a gate{'' if gated else '; if not, pass an '}"
                f"{'' if gated else f'AttentionLayout with head_dim={size}'}. Say where the gate "
                f"is, by an AttentionLayout with Projection({first.path!r}, ('query', 'gate'), "
                "interleaved=True) where query and gate alternate head by head (Qwen3-Next), "
                "interleaved='group' where they alternate by key head, interleaved=False where "
                "all queries come first"
            )
        first = dataclasses.replace(first, parts=("query", "gate"), interleaved=True)
        name = f"{layout.name}, gate beside q"
        return dataclasses.replace(layout, projections=(first, *others), name=name)


def attempts(
    layout: AttentionLayout,
    shapes: Shapes,
    maxima_shape: Shape | None = None,
    stacked: Iterable[tuple[int, ...]] | None = None,
) -> Iterator[Attempt]:
    """Yields every interpretation of a block.

    Without `maxima_shape`, `(..., stacked layers, query heads)`, every number of heads that the
    query's features allow is tried; without `stacked`, every stack, unless the layout has it.
    """
    name = kernel_name(shapes, layout.query.path)
    query = shapes[name] if name is not None else ()
    most = len(query) - 2 if maxima_shape is None else min(len(query) - 2, len(maxima_shape) - 1)
    if layout.stack_axes is not None:
        stacked = [layout.stack_axes]
    elif stacked is None:  # counted from the front and, since biases have fewer axes, from the end
        both = (range(len(query)), range(-len(query), 0))
        counts = range(max(most, 0) + 1)
        stacked = [x for n in counts for axes in both for x in itertools.combinations(axes, n)]
    asked = [len(p.input_axis) for p in layout.projections if isinstance(p.input_axis, tuple)]
    choices = max([*asked, 2 if (name or "").endswith("weight") else 1])
    for axes, choice in itertools.product(dict.fromkeys(stacked), range(choices)):
        if any(not -len(query) <= axis < len(query) for axis in axes):
            continue
        stack = tuple(query[axis] for axis in sorted(axis % len(query) for axis in axes))
        attempt = Attempt(layout, shapes, axes, stack, choice)
        if maxima_shape is not None:
            if len(axes) < len(maxima_shape):
                stack = maxima_shape[len(maxima_shape) - 1 - len(axes) : -1]
                yield dataclasses.replace(attempt, stack=stack, heads=maxima_shape[-1])
            continue
        total = 1
        with contextlib.suppress(MisfitError):
            total = attempt.kernel(layout.query).total
        for heads in (n for n in range(1, total + 1) if total % n == 0):
            yield dataclasses.replace(attempt, heads=heads)


def solve(
    tried: Iterable[Attempt],
    finish: Callable[[Reading], _Result],
    penalty: Callable[[Reading], tuple[int, ...]],
) -> tuple[dict[_Result, list[Reading]], list[MisfitError]]:
    """Returns the results of the readings with the least penalty, and reasons against others."""
    found: list[tuple[tuple[int, ...], _Result, Reading]] = []
    misfits: list[MisfitError] = []
    for attempt in tried:
        try:
            reading = attempt.read()
            found.append((penalty(reading), finish(reading), reading))
        except MisfitError as misfit:
            # A traceback would keep the callers' arrays alive as long as the reason is kept.
            misfits.append(misfit.with_traceback(None))
    least = min((cost for cost, _, _ in found), default=())
    best: dict[_Result, list[Reading]] = {}
    for cost, result, reading in found:
        if cost == least:
            best.setdefault(result, []).append(reading)
    return best, misfits


def refusal_in(misfits: Iterable[MisfitError]) -> RefusalError | None:
    """Returns the first reason against clipping, of interpretations that are consistent."""
    return next((misfit for misfit in misfits if isinstance(misfit, RefusalError)), None)
