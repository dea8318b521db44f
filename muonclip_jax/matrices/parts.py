"""Conversion of a parameter to its matrices, and back.

A `MatrixSpec` has the reduction and output axes of a parameter, and the splits of a fused kernel.
All other axes are batch axes. An attention kernel `(d_model, heads, head_dim)` is one
`(d_model, heads * head_dim)` matrix; 24 of them stacked by `nn.scan` are a batch of 24; a fused
`(d_model, 3 * d_model)` QKV kernel is three matrices, each `(d_model, d_model)`.

The conversion is planned from shapes (`plan_leaf`) and applied by `to_matrices`, `from_matrices`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from muonclip_jax.routing import MatrixSpec, Split, axes_tuple


@dataclass(frozen=True)
class Part:
    """One part of a parameter: `count` matrices `(fan_in, fan_out)`."""

    #: The part in the parameter's own axes.
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    count: int
    #: Axes in the order batch, reduction, output.
    permutation: tuple[int, ...]

    def matrices(self, piece: jax.Array) -> jax.Array:
        """Returns the part as `(count, fan_in, fan_out)`."""
        return piece.transpose(self.permutation).reshape(self.count, self.fan_in, self.fan_out)


@dataclass(frozen=True)
class LeafPlan:
    """The splits of one parameter, and a part for every combination of their pieces."""

    splits: tuple[Split, ...]
    parts: tuple[Part, ...]


class Run(NamedTuple):
    """Consecutive matrices of one part of one leaf: `part[start:stop]`."""

    leaf: int
    part: int
    start: int
    stop: int


def plan_leaf(shape: Sequence[int], spec: MatrixSpec) -> LeafPlan:
    """Plans the matrices of a parameter.

    `spec` is normalised (`normalize_spec`): non-negative axes, checked splits.

    Example:
        >>> from muonclip_jax.routing import MatrixSpec
        >>> plan = plan_leaf((24, 64, 4, 16), MatrixSpec(((1,), (2, 3))))
        >>> [(part.count, part.fan_in, part.fan_out) for part in plan.parts]
        [(24, 64, 64)]
    """
    reduction, output = (axes_tuple(axes) for axes in spec.dims)
    batch = tuple(axis for axis in range(len(shape)) if axis not in reduction + output)
    parts = []
    for lengths in itertools.product(*(split.part_lengths for split in spec.splits)):
        cut = list(shape)
        for split, length in zip(spec.splits, lengths, strict=True):
            cut[split.axis] = length
        parts.append(
            Part(
                shape=tuple(cut),
                fan_in=math.prod(cut[axis] for axis in reduction),
                fan_out=math.prod(cut[axis] for axis in output),
                count=math.prod(cut[axis] for axis in batch),
                permutation=batch + reduction + output,
            )
        )
    return LeafPlan(splits=spec.splits, parts=tuple(parts))


def runs_by_shape(
    leaves: Sequence[LeafPlan], dtypes: Sequence[str], max_bytes: int
) -> list[tuple[int, list[Run]]]:
    """Whole parts with entries by shape and dtype: how many matrices `max_bytes` hold, and parts.

    Tall matrices are counted as their transposes: Newton-Schulz commutes with transposition.
    """
    buckets: dict[tuple[int, int, str], list[Run]] = {}
    for leaf, (plan, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        for index, part in enumerate(plan.parts):
            if part.count * part.fan_in * part.fan_out:
                rows, columns = sorted((part.fan_in, part.fan_out))
                run = Run(leaf, index, 0, part.count)
                buckets.setdefault((rows, columns, dtype), []).append(run)
    return [
        (max(1, max_bytes // (rows * columns * jnp.dtype(dtype).itemsize)), runs)
        for (rows, columns, dtype), runs in buckets.items()
    ]


def runs_of(matrices: Sequence[tuple[int, int, int]]) -> tuple[Run, ...]:
    """The runs of matrices `(leaf, part, number in the part)`, consecutive within each part."""
    groups = itertools.groupby(matrices, key=lambda matrix: matrix[:2])
    numbers = [(*part, [number for *_, number in same]) for part, same in groups]
    return tuple(Run(leaf, part, among[0], among[-1] + 1) for leaf, part, among in numbers)


def even_size(total: int, most: int) -> int:
    """The size of nearly equal slices: 13 under a limit of 8 are 7 and 6, not 8 and 5."""
    return math.ceil(total / math.ceil(total / most))


def to_matrices(x: jax.Array, plan: LeafPlan) -> list[jax.Array]:
    """Returns the parts of `x`, each `(count, fan_in, fan_out)`."""
    pieces = split_leaf(x, plan.splits)
    return [part.matrices(piece) for piece, part in zip(pieces, plan.parts, strict=True)]


def from_matrices(matrices: Sequence[jax.Array], plan: LeafPlan) -> jax.Array:
    """Reassembles a parameter from the parts of `to_matrices`."""
    pieces = []
    for matrix, part in zip(matrices, plan.parts, strict=True):
        permuted = tuple(part.shape[axis] for axis in part.permutation)
        inverse = tuple(part.permutation.index(axis) for axis in range(len(part.shape)))
        pieces.append(matrix.reshape(permuted).transpose(inverse))
    return join_leaf(pieces, plan.splits)


def split_leaf(x: jax.Array, splits: Sequence[Split]) -> list[jax.Array]:
    """Applies the splits to `x`, one after another; the first split varies slowest."""
    pieces = [x]
    for split in splits:
        whole, pieces = pieces, []
        for x in whole:
            before, after = x.shape[: split.axis], x.shape[split.axis + 1 :]
            x = x.reshape(*before, *_grid(split), *after)
            cut = jax.lax.split(x, split.sizes, split.axis + split.along)
            lengths = zip(cut, split.part_lengths, strict=True)
            pieces += [piece.reshape(*before, length, *after) for piece, length in lengths]
    return pieces


def join_leaf(pieces: Sequence[jax.Array], splits: Sequence[Split]) -> jax.Array:
    """Undoes `split_leaf`."""
    joined = list(pieces)
    for split in reversed(splits):
        parts, joined = joined, []
        for start in range(0, len(parts), len(split.sizes)):
            shape = parts[start].shape
            before, after = shape[: split.axis], shape[split.axis + 1 :]
            grid, gridded = list(_grid(split)), []
            for part, size in zip(parts[start:], split.sizes, strict=False):
                view = (*grid[: split.along], size, *grid[split.along + 1 :])
                gridded.append(part.reshape(*before, *view, *after))
            whole = jnp.concatenate(gridded, axis=split.axis + split.along)
            joined.append(whole.reshape(*before, math.prod(grid), *after))
    (whole,) = joined
    return whole


def _grid(split: Split) -> tuple[int, ...]:
    return (sum(split.sizes),) if split.view is None else split.view
