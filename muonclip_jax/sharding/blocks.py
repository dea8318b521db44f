"""The local block of each matrix on one device.

A parameter of shape `(24, 1024, 16, 64)` sharded `P(None, "fsdp", "tp")` is 24 matrices with 1024
rows and 16 * 64 columns. A device has a block of each: some of the rows (over "fsdp") and some of
the columns (over "tp"). Rows and columns may be products of axes and be sharded on any of them, so
a `Block` keeps the dimensions that sharding separates.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax
from jax import lax

from muonclip_jax._devices import all_gather
from muonclip_jax.matrices.parts import LeafPlan, from_matrices, plan_leaf, to_matrices
from muonclip_jax.routing import MatrixSpec, Split, batch_axes, normalized_axes
from muonclip_jax.sharding.mesh_shardings import Axes, LeafAxes, Sizes

#: Local length of a dimension, and the mesh axes that shard it.
Dim: TypeAlias = tuple[int, Axes]


@dataclass(frozen=True)
class Block:
    """The local block of a wide matrix: the dimensions that form its rows and columns.

    With `transposed`, the parameter's matrix is the transpose of this one.
    """

    rows: tuple[Dim, ...]
    columns: tuple[Dim, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The local lengths, of rows and of columns."""
        return tuple(length for length, _ in self.rows + self.columns)

    def gathered_shape(self, axes: Collection[str], sizes: Sizes) -> tuple[int, int]:
        """Rows and columns after gathering the matrix along some axes."""
        rows, columns = (
            math.prod(length for length, _ in dims)
            * math.prod(sizes[axis] for _, names in dims for axis in names if axis in axes)
            for dims in (self.rows, self.columns)
        )
        return rows, columns


class LocalLeaf(NamedTuple):
    """A device's piece of a parameter: the matrices inside, and a block for every part of them."""

    plan: LeafPlan
    blocks: tuple[Block, ...]
    #: `(dimension, axes)` along which the piece is gathered first, and its result in the end.
    gathered: tuple[tuple[int, Axes], ...]
    out_gathered: tuple[tuple[int, Axes], ...]
    #: The axes along which the matrices themselves differ.
    batch_axes: frozenset[str]


def plan_local(
    shape: Sequence[int],
    spec: MatrixSpec,
    in_axes: LeafAxes,
    out_axes: LeafAxes,
    shared: frozenset[str],
    sizes: Sizes,
) -> LocalLeaf:
    """Plans the local shard of a parameter that is distributed over the `shared` axes.

    Two kinds of dimensions are all-gathered first: matrix dimensions that are sharded over an axis
    not in `shared`, and those where a shard contains pieces of several parts.
    """
    reduction, output = normalized_axes(spec)
    splits = {split.axis: split for split in spec.splits}
    dims: list[Dim] = []
    gathered = []
    for axis, (length, mesh_axes) in enumerate(zip(shape, in_axes, strict=True)):
        names = tuple(name for name in mesh_axes if sizes[name] > 1)
        ways = math.prod(sizes[name] for name in names)
        is_gathered = axis in reduction + output and not shared.issuperset(names)
        if axis in splits and ways > 1 and not is_gathered:
            split = splits[axis]
            if split.view is None or split.along == 0 or split.view[0] % ways:
                is_gathered = True
            else:  # every shard is split alike
                view = split.view[0] // ways, *split.view[1:]
                splits[axis] = Split(axis, split.sizes, view, split.along)
        if is_gathered:
            gathered.append((axis, names))
            names, ways = (), 1
        dims.append((length // ways, names))
    plan = plan_leaf([length for length, _ in dims], MatrixSpec(spec.dims, tuple(splits.values())))
    blocks = []
    for part in plan.parts:
        held = [(length, axes) for length, (_, axes) in zip(part.shape, dims, strict=True)]
        fan_in, fan_out = (_merged([held[axis] for axis in side]) for side in (reduction, output))
        block, transposed = Block(fan_in, fan_out, False), Block(fan_out, fan_in, True)
        rows, columns = block.gathered_shape(sizes, sizes)
        blocks.append(transposed if rows > columns else block)
    return LocalLeaf(
        plan,
        tuple(blocks),
        tuple(gathered),
        tuple(
            (axis, names[len(kept) :])
            for axis, (names, kept) in enumerate(zip(in_axes, out_axes, strict=True))
            if len(names) > len(kept)
        ),
        frozenset(name for axis in batch_axes(spec, len(shape)) for name in dims[axis][1]),
    )


def _merged(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """Dimensions merged where sharding allows it: `(2, tp), (16,)` are `(32, tp)`."""
    merged: list[Dim] = []
    for length, axes in dims:
        if merged and not axes:
            # An unsharded dimension is contiguous with the one before it.
            merged[-1] = (merged[-1][0] * length, merged[-1][1])
        elif merged and merged[-1][0] == 1:
            merged[-1] = (length, merged[-1][1] + axes)
        else:
            merged.append((length, axes))
    return tuple(merged) or ((1, ()),)


def local_matrices(x: jax.Array, local: LocalLeaf) -> list[jax.Array]:
    """The local shard as the matrices of its parts, each `(count, fan_in, fan_out)`.

    `to_blocks` transposes only the selected ones: if the whole shard were transposed, compilers
    would choose that layout for the momentum and the gradient.
    """
    for axis, names in local.gathered:
        x = lax.all_gather(x, names, axis=axis, tiled=True)
    return to_matrices(x, local.plan)


def to_blocks(x: jax.Array, block: Block) -> jax.Array:
    """Some matrices `(n, fan_in, fan_out)` as blocks `(n, *block.shape)`."""
    return (x.mT if block.transposed else x).reshape(len(x), *block.shape)


def from_blocks(blocks: Sequence[jax.Array], local: LocalLeaf) -> jax.Array:
    """Undoes `local_matrices` and `to_blocks`."""
    parts = []
    for x, block in zip(blocks, local.blocks, strict=True):
        x = x.reshape(len(x), *block.gathered_shape((), {}))
        parts.append(x.mT if block.transposed else x)
    x = from_matrices(parts, local.plan)
    for axis, names in local.gathered:
        length = x.shape[axis] // lax.axis_size(names)
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * length, length, axis=axis)
    for axis, names in local.out_gathered:
        x = all_gather(x, names, axis)
    return x
