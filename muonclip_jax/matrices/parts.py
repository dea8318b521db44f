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

from muonclip_jax.routing import MatrixSpec, batch_axes, normalized_axes


@dataclass(frozen=True)
class Part:
    """One part of a parameter: `count` matrices `(fan_in, fan_out)`."""

    #: The part in the parameter's own axes, and in those of the plan's view.
    shape: tuple[int, ...]
    view: tuple[int, ...]
    fan_in: int
    fan_out: int
    count: int
    #: Axes of the view in the order batch, reduction, output.
    permutation: tuple[int, ...]

    def matrices(self, piece: jax.Array) -> jax.Array:
        """Returns the part as `(count, fan_in, fan_out)`."""
        return piece.transpose(self.permutation).reshape(self.count, self.fan_in, self.fan_out)


@dataclass(frozen=True)
class LeafPlan:
    """A parameter's shape, with the views of its splits, and a part for every piece of the cuts."""

    shape: tuple[int, ...]
    view: tuple[int, ...]
    #: An axis of the view and the lengths of its pieces; the pieces of the first vary slowest.
    cuts: tuple[tuple[int, tuple[int, ...]], ...]
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
    reduction, output = normalized_axes(spec)
    batch = batch_axes(spec, len(shape))
    grids: list[tuple[int, ...]] = [(length,) for length in shape]
    for split in spec.splits:
        grids[split.axis] = split.view or grids[split.axis]
    # The axes of the view that make each axis of the parameter.
    ends = itertools.accumulate(map(len, grids))
    numbers = [tuple(range(end - len(grid), end)) for end, grid in zip(ends, grids, strict=True)]
    cuts = tuple((numbers[split.axis][split.along], split.sizes) for split in spec.splits)
    permutation = tuple(i for axis in batch + reduction + output for i in numbers[axis])
    view = tuple(itertools.chain.from_iterable(grids))
    parts = []
    for sizes in itertools.product(*(sizes for _, sizes in cuts)):
        cut = dict(enumerate(view)) | {axis: n for (axis, _), n in zip(cuts, sizes, strict=True)}
        own = [math.prod(cut[i] for i in axes) for axes in numbers]
        count, fan_in, fan_out = (
            math.prod(own[axis] for axis in axes) for axes in (batch, reduction, output)
        )
        parts.append(Part(tuple(own), tuple(cut.values()), fan_in, fan_out, count, permutation))
    return LeafPlan(tuple(shape), view, cuts, tuple(parts))


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


def split_leaf(x: jax.Array, plan: LeafPlan) -> list[jax.Array]:
    """Returns the parts of `x` as pieces of its view."""
    pieces = [x.reshape(plan.view)]
    for axis, sizes in plan.cuts:
        pieces = [piece for whole in pieces for piece in jax.lax.split(whole, sizes, axis)]
    return pieces


def to_matrices(x: jax.Array, plan: LeafPlan) -> list[jax.Array]:
    """Returns the parts of `x`, each `(count, fan_in, fan_out)`."""
    return [part.matrices(x) for x, part in zip(split_leaf(x, plan), plan.parts, strict=True)]


def from_matrices(matrices: Sequence[jax.Array], plan: LeafPlan) -> jax.Array:
    """Reassembles a parameter from the parts of `to_matrices`."""
    pieces = []
    for x, part in zip(matrices, plan.parts, strict=True):
        inverse = tuple(part.permutation.index(axis) for axis in range(len(part.view)))
        pieces.append(x.reshape([part.view[axis] for axis in part.permutation]).transpose(inverse))
    for axis, sizes in reversed(plan.cuts):
        groups = range(0, len(pieces), len(sizes))
        pieces = [jnp.concatenate(pieces[i : i + len(sizes)], axis) for i in groups]
    return pieces[0].reshape(plan.shape)
