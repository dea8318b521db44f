"""What one device holds of each matrix.

A parameter of shape `(24, 1024, 16, 64)` sharded `P(None, "fsdp", "tp")` is 24 matrices with rows
1024 and columns 16 * 64. A device holds of each of them a block: a part of the rows (over "fsdp")
and of the columns (over "tp").

Rows and columns may be products of axes and be sharded on any of them: a `Block` remembers the
dimensions that sharding keeps apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Names of mesh axes, the slowest first.
Axes = tuple[str, ...]
#: Mesh axes that shard each dimension of a leaf.
LeafAxes = tuple[Axes, ...]
#: Sizes of mesh axes by name.
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Block:
    """A device's piece of a matrix: local lengths of its dimensions and the axes that shard them.

    Attributes:
        rows: `(length, axes)` of the dimensions that make the rows, the slowest first.
        columns: The same of the columns.
        transposed: Whether the parameter's own matrix is the transpose of this one.
    """

    rows: tuple[tuple[int, Axes], ...]
    columns: tuple[tuple[int, Axes], ...]
    transposed: bool

    @property
    def dims(self) -> tuple[tuple[int, Axes], ...]:
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

    def whole(self, sizes: Sizes) -> tuple[int, int]:
        """Rows and columns of the whole matrix."""
        rows, columns = (_whole_length(dims, sizes) for dims in (self.rows, self.columns))
        return rows, columns


def _whole_length(dims: Sequence[tuple[int, Axes]], sizes: Sizes) -> int:
    return math.prod(length * math.prod(sizes[axis] for axis in axes) for length, axes in dims)


def make_block(
    reduction: Sequence[tuple[int, Axes]], output: Sequence[tuple[int, Axes]], sizes: Sizes
) -> Block:
    """Makes the block of a wide matrix from the parameter's own dimensions.

    Args:
        reduction: Local length and axes of every reduction axis.
        output: The same of every output axis.
        sizes: Sizes of the mesh axes.

    Returns:
        The block, with dimensions merged where sharding allows it; transposed where the matrix has
        more rows than columns.

    Example:
        >>> make_block([(64, ())], [(2, ("tp",)), (16, ())], {"tp": 4}).columns
        ((32, ('tp',)),)
    """
    fan_in, fan_out = _whole_length(reduction, sizes), _whole_length(output, sizes)
    rows, columns = _merged(reduction), _merged(output)
    if fan_in > fan_out:
        return Block(columns, rows, transposed=True)
    return Block(rows, columns, transposed=False)


def _merged(dims: Sequence[tuple[int, Axes]]) -> tuple[tuple[int, Axes], ...]:
    merged: list[tuple[int, Axes]] = []
    for length, axes in dims:
        if merged and not axes:
            # What follows a sharded dimension whole lies together with it.
            merged[-1] = (merged[-1][0] * length, merged[-1][1])
        elif merged and merged[-1][0] == 1:
            merged[-1] = (length, merged[-1][1] + axes)
        else:
            merged.append((length, axes))
    return tuple(merged) or ((1, ()),)
