"""One device's piece of a parameter as blocks of matrices: the plan, the cut, and the way back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import lax

from muonclip_jax.matrices.parts import LeafPlan, Part, join_leaf, plan_leaf, split_leaf
from muonclip_jax.routing import MatrixSpec, Split, axes_tuple
from muonclip_jax.sharding.blocks import Axes, Block, LeafAxes, Sizes, make_block
from muonclip_jax.sharding.moves import position


@dataclass(frozen=True)
class LocalLeaf:
    """A device's piece of a parameter.

    Attributes:
        plan: The matrices inside the piece.
        gathered: `(dimension, axes)` along which the piece is gathered first, because it cannot be
            cut or shared as it is sharded.
        blocks: For every part of the plan, what the device holds of each matrix.
        order: The piece's dimensions, those that count matrices first.
        permutations: For every part, the order that makes blocks of `(matrices, *dimensions)`.
        batch: The axes that shard batch dimensions: the matrices themselves differ along them.
        shared: The mesh axes whose devices share the work on it.
    """

    plan: LeafPlan
    gathered: tuple[tuple[int, Axes], ...]
    blocks: tuple[Block, ...]
    order: tuple[int, ...]
    permutations: tuple[tuple[int, ...], ...]
    batch: frozenset[str]
    shared: frozenset[str]


def plan_local(
    shape: Sequence[int], spec: MatrixSpec, axes: LeafAxes, shared: frozenset[str], sizes: Sizes
) -> LocalLeaf:
    """Plans what one device holds of a parameter.

    Args:
        shape: The parameter's shape on the whole mesh.
        spec: Its normalised spec.
        axes: The mesh axes that shard each dimension.
        shared: The mesh axes whose devices share the work.
        sizes: Sizes of the mesh axes.

    Returns:
        The plan. Two things are gathered first: a dimension of a matrix that is sharded over an
        axis that shares no work, and one where a shard holds pieces of several parts.

    Example:
        >>> local = plan_local((8, 16), MatrixSpec(), (("fsdp",), ()), frozenset(["fsdp"]),
        ...                    {"fsdp": 4})
        >>> local.blocks[0].shape, local.gathered
        ((2, 16), ())
    """
    reduction, output = (axes_tuple(dims) for dims in spec.dims)
    splits = {split.axis: split for split in spec.splits}
    local, held, gathered = [], [], []
    for axis, (length, names) in enumerate(zip(shape, axes, strict=True)):
        names = tuple(name for name in names if sizes[name] > 1)
        ways = math.prod(sizes[name] for name in names)
        away = axis in reduction + output and not shared.issuperset(names)
        split = splits.get(axis)
        if split is not None and ways > 1 and not away:
            cut = _local_split(split, ways)
            away = cut is None
            splits[axis] = split if cut is None else cut
        if away and names:
            gathered.append((axis, names))
            names, ways = (), 1
        local.append(length // ways)
        held.append(names)
    plan = plan_leaf(
        tuple(local), MatrixSpec(spec.dims, tuple(splits[split.axis] for split in spec.splits))
    )
    blocks = tuple(
        make_block(
            [(part.shape[axis], held[axis]) for axis in reduction],
            [(part.shape[axis], held[axis]) for axis in output],
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
    differ = frozenset(name for axis in batch for name in held[axis])
    return LocalLeaf(plan, tuple(gathered), blocks, batch + own, permutations, differ, shared)


def _local_split(split: Split, ways: int) -> Split | None:
    """The cut of one shard, where every shard is cut alike; else None."""
    if split.view is None or split.along == 0 or split.view[0] % ways:
        return None
    return Split(split.axis, split.sizes, (split.view[0] // ways, *split.view[1:]), split.along)


def matrices_of(x: jax.Array, local: LocalLeaf) -> list[jax.Array]:
    """A parameter's piece as the matrices of its parts, each `(count, *dimensions)`.

    Their dimensions are in the parameter's order. Some of them, cut out along the first axis,
    become blocks by `block_of`: were the whole piece transposed first, compilers would lay out the
    momentum and the gradient that way.
    """
    for axis, names in local.gathered:
        x = lax.all_gather(x, names, axis=axis, tiled=True)
    pieces = split_leaf(x, local.plan.splits)
    return [
        piece.transpose(local.order).reshape(part.count, *_own(part, local))
        for piece, part in zip(pieces, local.plan.parts, strict=True)
    ]


def block_of(x: jax.Array, local: LocalLeaf, part: int) -> jax.Array:
    """Matrices `(n, *dimensions)` of a part as blocks `(n, *block.shape)`."""
    return x.transpose(local.permutations[part]).reshape(len(x), *local.blocks[part].shape)


def leaf_of(blocks: Sequence[jax.Array], local: LocalLeaf) -> jax.Array:
    """Undoes `matrices_of` and `block_of`."""
    pieces = []
    for x, part, permutation in zip(blocks, local.plan.parts, local.permutations, strict=True):
        own = (part.count, *_own(part, local))
        x = x.reshape([own[axis] for axis in permutation]).transpose(_inverse(permutation))
        x = x.reshape([part.shape[axis] for axis in local.order]).transpose(_inverse(local.order))
        pieces.append(x)
    x = join_leaf(pieces, local.plan.splits)
    for axis, names in local.gathered:
        length = x.shape[axis] // lax.axis_size(names)
        x = lax.dynamic_slice_in_dim(x, position(names) * length, length, axis=axis)
    return x


def _own(part: Part, local: LocalLeaf) -> list[int]:
    """Lengths of a matrix's dimensions, in the parameter's order."""
    of_matrix = len(local.permutations[0]) - 1
    return [part.shape[axis] for axis in local.order[len(local.order) - of_matrix :]]


def _inverse(permutation: Sequence[int]) -> list[int]:
    return [permutation.index(axis) for axis in range(len(permutation))]
