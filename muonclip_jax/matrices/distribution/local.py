"""One device's piece of a parameter as blocks of matrices: the plan, the cut, and the way back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import lax

from muonclip_jax.layouts import MatrixSpec, Split, axes_tuple
from muonclip_jax.matrices.distribution.blocks import Axes, Block, LeafAxes, Sizes, make_block
from muonclip_jax.matrices.distribution.moves import position
from muonclip_jax.matrices.parts import LeafPlan, join_leaf, plan_leaf, split_leaf


@dataclass(frozen=True)
class LocalLeaf:
    """A device's piece of a parameter.

    Attributes:
        plan: The matrices inside the piece.
        gathered: `(dimension, axes)` along which the piece is gathered first, because it cannot be
            cut or shared as it is sharded.
        blocks: For every part of the plan, what the device holds of each matrix.
        permutations: For every part, its dimensions in the order batch, rows, columns.
        batch: The axes that shard batch dimensions: the matrices themselves differ along them.
        shared: The mesh axes whose devices share the work on it.
    """

    plan: LeafPlan
    gathered: tuple[tuple[int, Axes], ...]
    blocks: tuple[Block, ...]
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
    permutations = tuple(
        batch + (output + reduction if block.transposed else reduction + output) for block in blocks
    )
    differ = frozenset(name for axis in batch for name in held[axis])
    return LocalLeaf(plan, tuple(gathered), blocks, permutations, differ, shared)


def _local_split(split: Split, ways: int) -> Split | None:
    """The cut of one shard, where every shard is cut alike; else None."""
    if split.view is None or split.along == 0 or split.view[0] % ways:
        return None
    return Split(split.axis, split.sizes, (split.view[0] // ways, *split.view[1:]), split.along)


def blocks_of(x: jax.Array, local: LocalLeaf) -> list[jax.Array]:
    """A parameter's piece as the blocks of its matrices, each `(count, *block.shape)`."""
    for axis, names in local.gathered:
        x = lax.all_gather(x, names, axis=axis, tiled=True)
    return [
        piece.transpose(permutation).reshape(part.count, *block.shape)
        for piece, part, block, permutation in zip(
            split_leaf(x, local.plan.splits),
            local.plan.parts,
            local.blocks,
            local.permutations,
            strict=True,
        )
    ]


def leaf_of(blocks: Sequence[jax.Array], local: LocalLeaf) -> jax.Array:
    """Undoes `blocks_of`."""
    pieces = []
    for x, part, permutation in zip(blocks, local.plan.parts, local.permutations, strict=True):
        inverse = [permutation.index(axis) for axis in range(len(permutation))]
        pieces.append(x.reshape([part.shape[axis] for axis in permutation]).transpose(inverse))
    x = join_leaf(pieces, local.plan.splits)
    for axis, names in local.gathered:
        length = x.shape[axis] // lax.axis_size(names)
        x = lax.dynamic_slice_in_dim(x, position(names) * length, length, axis=axis)
    return x
