"""One way to read a block's shapes: which axes are stacked, which hold heads, how many there are.

A reading is a choice of stacked axes, of input axes and of the number of query heads. It is
checked against every projection of the block and against the output projection; what does not fit
is a `MisfitError` with the reason.
"""

import contextlib
import dataclasses
import math
from typing import Any

from muonclip_jax._names import spelling
from muonclip_jax.heads.builtin import KERNEL_NAMES, NORM_NAMES, VALUE_NAMES
from muonclip_jax.heads.layouts import AttentionLayout, Projection
from muonclip_jax.heads.leaves import (
    Leaves,
    MisfitError,
    RefusalError,
    children,
    kernel_of,
    unstack,
)
from muonclip_jax.heads.plan import Segment
from muonclip_jax.heads.sizes import (
    feature_grid,
    head_size,
    key_heads,
    segments_of,
)
from muonclip_jax.heads.words import OUT_NAMES

#: What stands beside queries and keys and is no output projection.
_NO_OUTPUT = (*VALUE_NAMES, *(name for names in NORM_NAMES for name in names))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A projection's kernel under one reading.

    Args:
        path: The projection's path in the block.
        name: The kernel's name below it.
        features: Sizes of its output features' axes.
        inputs: Its input features.
        input_axis: The axis of those, counted in the whole leaf.
        feature_axes: Axes of the output features, likewise.
        stack_axes: Axes of stacked layers, likewise.
    """

    path: str
    name: str
    features: tuple[int, ...]
    inputs: int
    input_axis: int
    feature_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Output features in all."""
        return math.prod(self.features)


@dataclasses.dataclass(frozen=True)
class Heads:
    """What lies along one kernel's features, and how its axes divide them (`feature_grid`)."""

    kernel: Kernel
    segments: tuple[Segment, ...]
    repeat: int
    grid: str


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a reading found.

    Args:
        layout: The layout, with a gate where the shapes show one.
        kv_heads: Key heads.
        head_dim: Features of one query and key head that clip together.
        rope: Size of latent attention's shared rotary key; None in other attention.
        projections: The kernel and the heads of each projection of the layout.
        agrees: Whether the output projection takes exactly the heads' values.
    """

    layout: AttentionLayout
    kv_heads: int
    head_dim: int
    rope: int | None
    projections: tuple[tuple[Projection, Heads], ...]
    agrees: bool


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice of stacked axes, of input axes and of query heads for a block.

    Args:
        layout: The block's layout.
        leaves: Its leaves by their path inside it.
        stack_axes: Stacked axes, counted in every leaf.
        stack: Their sizes.
        heads: Query heads.
        choice: Which of several candidates for the input axis.
    """

    layout: AttentionLayout
    leaves: Leaves
    stack_axes: tuple[int, ...]
    stack: tuple[int, ...]
    heads: int
    choice: int = 0

    def one_layer(self, leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shape of one layer of a leaf, and its stacked axes."""
        return unstack(tuple(leaf.shape), self.stack_axes, self.stack)

    def kernel(self, path: str, input_axis: int | tuple[int, ...] | None = None) -> Kernel:
        """Returns a projection's kernel."""
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
        return Kernel(
            path=path,
            name=name,
            features=tuple(n for i, n in enumerate(shape) if i != axis),
            inputs=shape[axis],
            input_axis=free[axis],
            feature_axes=tuple(a for i, a in enumerate(free) if i != axis),
            stack_axes=stacked,
        )

    def out_features(self) -> int | None:
        """Returns the input features of the output projection, where there is one."""
        spelled = {spelling(path): path for path in children(self.leaves)}
        for name in OUT_NAMES:
            found = kernel_of(self.leaves, spelled[name]) if name in spelled else None
            if found is None:
                continue
            inputs = self._inputs_of(*found)
            if len(inputs) not in (1, 2):
                raise MisfitError(f"{spelled[name]}: its inputs {inputs} are no heads' values")
            return math.prod(inputs) if len(inputs) == 1 or inputs[0] == self.heads else None
        return None

    def _inputs_of(self, name: str, leaf: Any) -> tuple[int, ...]:
        """Returns the axes that an output kernel takes in one layer."""
        shape, _ = self.one_layer(leaf)
        return shape[1:] if name == "weight" else shape[:-1]

    def _half_taken(self, kernels: dict[str, Kernel]) -> int | None:
        """Returns half of the query's features where an unknown kernel takes just those.

        An output projection under a name that is not known shows a gate all the same.
        """
        query, key = self.layout.projections[0], self.layout.projections[-1]
        total = kernels[query.path].total
        if total % 2 or (key.parts == ("key",) and kernels[key.path].total > total // 2):
            return None
        taken: set[int] = set()
        for path in children(self.leaves):
            found = kernel_of(self.leaves, path)
            known = path in (*self.layout.paths, *_NO_OUTPUT) or spelling(path) in OUT_NAMES
            if found is None or known:
                continue
            with contextlib.suppress(MisfitError):  # it may not be stacked
                inputs = self._inputs_of(*found)
                taken.add(math.prod(inputs) if inputs else 0)
        return total // 2 if total // 2 in taken and total not in taken else None

    def read(self) -> Reading:
        """Returns what this choice finds, or raises `MisfitError`."""
        layout, heads = self.layout, self.heads
        kernels = {p.path: self.kernel(p.path, p.input_axis) for p in layout.projections}
        totals = {path: kernel.total for path, kernel in kernels.items()}
        rope = None if layout.latent is None else self._rope(*layout.latent)
        out = self.out_features()
        size = head_size(layout, totals, heads, layout.kv_heads, rope, out)
        if self._has_gate(kernels, size, self._half_taken(kernels) if out is None else out):
            layout = _gated(layout)
            size = head_size(layout, totals, heads, layout.kv_heads, rope, out)
        kv_heads = key_heads(layout, totals, heads, size)
        projections: list[tuple[Projection, Heads]] = []
        for p in layout.projections:
            kernel = kernels[p.path]
            segments, repeat = segments_of(p, kernel.total, heads, kv_heads, size, rope)
            grid = feature_grid(kernel.features, segments, repeat)
            if grid is None:
                raise MisfitError(
                    f"{p.path}: its features {kernel.features} do not hold {heads} heads"
                )
            projections.append((p, Heads(kernel, segments, repeat, grid)))
        values = [s.size for _, found in projections for s in found.segments if s.role == "value"]
        return Reading(
            layout=layout,
            kv_heads=kv_heads,
            head_dim=size,
            rope=rope,
            projections=tuple(projections),
            agrees=out == heads * (values[0] if values else size),
        )

    def _rope(self, down: str, up: str) -> int:
        """Returns the size of latent attention's shared rotary key."""
        made, taken = self.kernel(down).total, self.kernel(up).inputs
        if made <= taken:
            raise MisfitError(
                f"{down} makes {made} features and {up} takes {taken}: no rotary key left"
            )
        return made - taken

    def _has_gate(self, kernels: dict[str, Kernel], size: int, out: int | None) -> bool:
        """Whether half of a query kernel is a gate, judging by the other projections' shapes.

        A query projection with twice the features that the output takes is either gated, or has
        heads twice as large as the values'. The keys and values beside it tell which.

        Raises:
            RefusalError: If they do not, or if they tell of a gate whose place is open.
        """
        layout = self.layout
        first, key = layout.projections[0], layout.projections[-1]
        if first.parts != ("query",) or layout.head_dim is not None or layout.own_keys:
            return False
        if out is None or self.heads * size != 2 * out:
            return False
        gated = None
        if key.parts == ("key",):
            if len(kernels[key.path].features) == 2:
                gated = {size: False, size // 2: True}.get(kernels[key.path].features[-1])
            elif (values := self._values()) is not None:
                made = kernels[key.path].total
                gated = {made: True, made // 2: False}.get(values)
        if gated is not False and not (gated and len(kernels[first.path].features) == 2):
            raise RefusalError(
                f"{first.path!r} makes {2 * out} features and the output projection takes {out}, "
                f"as if half of them were a gate{'' if gated else '; if not, pass an '}"
                f"{'' if gated else f'AttentionLayout with head_dim={size}'}. Say where the gate "
                f"is, by an AttentionLayout with Projection({first.path!r}, ('query', 'gate'), "
                "interleaved=True) where query and gate alternate head by head (Qwen3-Next), "
                "interleaved='group' where they alternate by key head, interleaved=False where "
                "all queries come first"
            )
        return gated

    def _values(self) -> int | None:
        """Returns the features of the value projection, where there is one."""
        for path in VALUE_NAMES:
            if kernel_of(self.leaves, path) is not None:
                return self.kernel(path).total
        return None


def _gated(layout: AttentionLayout) -> AttentionLayout:
    """Returns the layout with a gate beside every head's query."""
    first, *others = layout.projections
    gated = dataclasses.replace(first, parts=("query", "gate"), interleaved=True)
    return dataclasses.replace(
        layout, projections=(gated, *others), name=f"{layout.name}, gate beside q"
    )


def rows_of(heads: Heads) -> tuple[int, ...]:
    """Returns the features of each part in one repetition.

    Example:
        >>> kernel = Kernel("qkv", "kernel", (80,), 48, 0, (1,), ())
        >>> parts = (Segment("query", 6, 8), Segment("key", 2, 8), Segment("value", 2, 8))
        >>> rows_of(Heads(kernel, parts, 1, "flat"))
        (48, 16, 16)
    """
    return tuple(s.heads * s.size for s in heads.segments)
