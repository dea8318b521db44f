"""The local block of each matrix on one device.

A parameter of shape `(24, 1024, 16, 64)` sharded `P(None, "fsdp", "tp")` is 24 matrices with 1024
rows and 16 * 64 columns. A device has a block of each: some of the rows (over "fsdp") and some of
the columns (over "tp"). Rows and columns may be products of axes and be sharded on any of them, so
a `Block` keeps the dimensions that sharding separates.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
from jax import lax

from muonclip_jax._devices import all_gather
from muonclip_jax.matrices import LeafPlan, Part, join_leaf, plan_leaf, split_leaf
from muonclip_jax.routing import MatrixSpec, Split, axes_tuple
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
    def dims(self) -> tuple[Dim, ...]:
        """Rows, then columns."""
        return self.rows + self.columns

    @property
    def shape(self) -> tuple[int, ...]:
        """The local lengths."""
        return tuple(length for length, _ in self.dims)

    @property
    def axes(self) -> frozenset[str]:
        """All axes that shard the matrix."""
        return frozenset(axis for _, axes in self.dims for axis in axes)

    def gathered_shape(self, axes: Container[str], sizes: Sizes) -> tuple[int, int]:
        """Rows and columns after gathering the matrix along some axes."""
        rows, columns = (_length(dims, axes, sizes) for dims in (self.rows, self.columns))
        return rows, columns


@dataclass(frozen=True)
class LocalLeaf:
    """A device's piece of a parameter: the matrices inside, and a block for every part of them."""

    plan: LeafPlan
    blocks: tuple[Block, ...]
    #: `(dimension, axes)` along which the piece is gathered first, and its result in the end.
    gathered: tuple[tuple[int, Axes], ...]
    out_gathered: tuple[tuple[int, Axes], ...]
    #: The dimensions that count matrices, and those of a matrix.
    batch: tuple[int, ...]
    own: tuple[int, ...]
    #: For every part, the order of the latter that makes blocks, after the number of the matrix.
    permutations: tuple[tuple[int, ...], ...]
    #: The axes along which the matrices themselves differ.
    batch_axes: frozenset[str]


def make_block(reduction: Sequence[Dim], output: Sequence[Dim], sizes: Sizes) -> Block:
    """The block of a wide matrix, from the parameter's own dimensions."""
    rows, columns = _merged(reduction), _merged(output)
    if _length(reduction, sizes, sizes) > _length(output, sizes, sizes):
        return Block(columns, rows, transposed=True)
    return Block(rows, columns, transposed=False)


def _length(dims: Sequence[Dim], gathered: Container[str], sizes: Sizes) -> int:
    return math.prod(
        length * math.prod(sizes[axis] for axis in axes if axis in gathered)
        for length, axes in dims
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
    reduction, output = (axes_tuple(dims) for dims in spec.dims)
    splits = {split.axis: split for split in spec.splits}
    lengths, sharded, gathered = [], [], []
    for axis, (length, names) in enumerate(zip(shape, in_axes, strict=True)):
        names = tuple(name for name in names if sizes[name] > 1)
        ways = math.prod(sizes[name] for name in names)
        is_gathered = axis in reduction + output and not shared.issuperset(names)
        if axis in splits and ways > 1 and not is_gathered:
            local_split = _local_split(splits[axis], ways)
            is_gathered = local_split is None
            splits[axis] = local_split or splits[axis]
        if is_gathered:
            gathered.append((axis, names))
            names, ways = (), 1
        lengths.append(length // ways)
        sharded.append(names)
    local_spec = MatrixSpec(spec.dims, tuple(splits[split.axis] for split in spec.splits))
    plan = plan_leaf(lengths, local_spec)
    blocks = tuple(
        make_block(
            [(part.shape[axis], sharded[axis]) for axis in reduction],
            [(part.shape[axis], sharded[axis]) for axis in output],
            sizes,
        )
        for part in plan.parts
    )
    batch = tuple(axis for axis in range(len(shape)) if axis not in reduction + output)
    own = tuple(axis for axis in range(len(shape)) if axis not in batch)
    permutations = tuple(
        (0, *(1 + own.index(axis) for axis in dims))
        for block in blocks
        for dims in [output + reduction if block.transposed else reduction + output]
    )
    differ = frozenset(name for axis in batch for name in sharded[axis])
    out_gathered = tuple(
        (axis, names[len(kept) :])
        for axis, (names, kept) in enumerate(zip(in_axes, out_axes, strict=True))
        if len(names) > len(kept)
    )
    return LocalLeaf(plan, blocks, tuple(gathered), out_gathered, batch, own, permutations, differ)


def _local_split(split: Split, ways: int) -> Split | None:
    """The split of one shard, if it is the same for all shards; else None."""
    if split.view is None or split.along == 0 or split.view[0] % ways:
        return None
    return Split(split.axis, split.sizes, (split.view[0] // ways, *split.view[1:]), split.along)


def local_matrices(x: jax.Array, local: LocalLeaf) -> list[jax.Array]:
    """The local shard as the matrices of its parts, each `(count, *dimensions)`.

    `to_blocks` transposes only the selected ones: if the whole shard were transposed, compilers
    would choose that layout for the momentum and the gradient.
    """
    for axis, names in local.gathered:
        x = lax.all_gather(x, names, axis=axis, tiled=True)
    return [
        piece.transpose(local.batch + local.own).reshape(part.count, *_own_shape(part, local))
        for piece, part in zip(split_leaf(x, local.plan.splits), local.plan.parts, strict=True)
    ]


def to_blocks(x: jax.Array, local: LocalLeaf, part: int) -> jax.Array:
    """Some matrices `(n, *dimensions)` of a part as blocks `(n, *block.shape)`."""
    return x.transpose(local.permutations[part]).reshape(len(x), *local.blocks[part].shape)


def from_blocks(blocks: Sequence[jax.Array], local: LocalLeaf) -> jax.Array:
    """Undoes `local_matrices` and `to_blocks`."""
    pieces, order = [], local.batch + local.own
    for x, part, permutation in zip(blocks, local.plan.parts, local.permutations, strict=True):
        shape = (part.count, *_own_shape(part, local))
        x = x.reshape([shape[axis] for axis in permutation]).transpose(inverse_of(permutation))
        x = x.reshape([part.shape[axis] for axis in order]).transpose(inverse_of(order))
        pieces.append(x)
    x = join_leaf(pieces, local.plan.splits)
    for axis, names in local.gathered:
        length = x.shape[axis] // lax.axis_size(names)
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * length, length, axis=axis)
    for axis, names in local.out_gathered:
        x = all_gather(x, names, axis)
    return x


def _own_shape(part: Part, local: LocalLeaf) -> list[int]:
    return [part.shape[axis] for axis in local.own]


def inverse_of(permutation: Sequence[int]) -> list[int]:
    """The permutation that undoes another."""
    return [permutation.index(axis) for axis in range(len(permutation))]
