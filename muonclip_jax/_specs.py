"""MatrixSpec and Split: how one parameter is divided into matrices, and checks against its shape.

The shape alone does not determine the matrices. `(768, 12, 64)` may be a query kernel of 12 heads,
one matrix with 768 rows and 12 * 64 columns; `(24, 768, 3072)` may be 24 scanned layers, that is 24
matrices. Optax's `MuonDimensionNumbers` lists the axes that are summed over (reduction) and
produced (output); all others are batch axes. `MatrixSpec` adds `Split`s for fused kernels, which
contain several matrices.
"""

import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import SupportsIndex, TypeAlias

from optax.contrib import MuonDimensionNumbers

_PLAIN = MuonDimensionNumbers()


@dataclass(frozen=True, init=False)
class Split:
    r"""Splits one axis of a parameter into consecutive parts.

    The axis has `sum(sizes)` entries. If the parts are interleaved, the axis is first reshaped to
    `view`, and dimension `along` of that shape is split.

    Args:
        axis: The parameter's axis; negative ones count from the end.
        sizes: Length of each part, along the axis or along dimension `along` of `view`.
        view: Shape to which the axis is reshaped; None does not reshape it.
        along: Which dimension of `view` is split.

    Raises:
        TypeError: If an axis or a size is not an integer.
        ValueError: If a size is not positive, or `along` and `view` do not fit the sizes.

    Example:
        Query, key and value with 12, 4 and 4 heads of size 64, concatenated on axis 1:

        >>> Split(1, (12 * 64, 4 * 64, 4 * 64)).sizes
        (768, 256, 256)

        Query, key and value interleaved by head, for 12 heads:

        >>> Split(1, (1, 1, 1), view=(12, 3, 64), along=1).view
        (12, 3, 64)
    """

    axis: int
    sizes: tuple[int, ...]
    view: tuple[int, ...] | None = None
    along: int = 0

    def __init__(self, axis: object, sizes: object, view: object = None, along: object = 0):
        axis, along = _integers((axis, along), "Split's axis and along")
        sizes = _integers(sizes, "Split's sizes")
        grid = None if view is None else _integers(view, "Split's view")
        lengths = (sum(sizes),) if grid is None else grid
        fits = 0 <= along < len(lengths) and lengths[along] == sum(sizes)
        if not fits or min(sizes, default=0) < 1:
            raise ValueError(
                "Split's sizes must be positive and add up to the length of the axis, or of "
                f"dimension along= of view=; got sizes={sizes}, view={grid}, along={along}. Write "
                "the length of every part, as in Split(1, (768, 256, 256)), or of parts along a "
                "dimension of a view, as in Split(1, (1, 1, 1), (12, 3, 64), 1)."
            )
        vars(self).update(axis=axis, sizes=sizes, view=grid, along=along)

    @property
    def length(self) -> int:
        """The required length of the axis."""
        return sum(self.part_lengths)

    @property
    def part_lengths(self) -> tuple[int, ...]:
        """Number of entries of the axis in each part."""
        others = 1 if self.view is None else math.prod(self.view) // self.view[self.along]
        return tuple(size * others for size in self.sizes)


@dataclass(frozen=True, init=False)
class MatrixSpec:
    """Defines the row and column axes of a parameter's matrices, and the splits of fused kernels.

    All other axes are batch axes, with one matrix per entry.

    Args:
        dims: `MuonDimensionNumbers(reduction_axis, output_axis)` or a pair
            `(reduction_axis, output_axis)`; each is an axis or a tuple of axes. The default is an
            ordinary matrix with rows on axis 0.
        splits: `Split`s of reduction or output axes, at most one per axis. Every part is a separate
            matrix with its own shape scale.

    Raises:
        TypeError: If `dims` is not a pair of axes, or a split is not a `Split`.
        ValueError: If two splits have the same axis.

    Example:
        >>> MatrixSpec((0, (1, 2))).dims
        MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
        >>> MatrixSpec((0, 1), [Split(1, (64, 64))]).splits
        (Split(axis=1, sizes=(64, 64), view=None, along=0),)
    """

    dims: MuonDimensionNumbers
    splits: tuple[Split, ...]

    def __init__(self, dims: object = _PLAIN, splits: Split | Iterable[object] = ()):
        if not isinstance(dims, tuple | list) or len(dims) != 2:
            raise TypeError(
                "MatrixSpec's dims must be MuonDimensionNumbers or a pair (reduction axes, output "
                f"axes), got {dims!r}. Write, for example, MatrixSpec((0, (1, 2)))."
            )
        sides = []
        for side in dims:
            several = isinstance(side, tuple | list)
            axes = _integers(side if several else (side,), "MatrixSpec's axes")
            sides.append(axes if several else axes[0])
        parts: list[Split] = []
        for split in (splits,) if isinstance(splits, Split) else splits:
            if not isinstance(split, Split):
                raise TypeError(
                    f"MatrixSpec's splits must be Splits, got {split!r}. Write, for example, "
                    "MatrixSpec((0, 1), (Split(1, (64, 64)),))."
                )
            parts.append(split)
        if len({split.axis for split in parts}) < len(parts):
            raise ValueError(f"MatrixSpec's splits must have different axes, got {parts}.")
        vars(self).update(dims=MuonDimensionNumbers(*sides), splits=tuple(parts))


#: What a user may write for one leaf that Muon trains.
SpecLike: TypeAlias = MatrixSpec | MuonDimensionNumbers


def is_spec(x: object) -> bool:
    """Whether a value is a leaf's spec and not a container (`MuonDimensionNumbers` is a tuple)."""
    return isinstance(x, MatrixSpec | MuonDimensionNumbers)


def normalized_axes(spec: MatrixSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the reduction and the output axes of a spec, each of which may be a single int."""
    reduction, output = ((x,) if isinstance(x, int) else tuple(x) for x in spec.dims)
    return reduction, output


def batch_axes(spec: MatrixSpec, rank: int) -> tuple[int, ...]:
    """Returns the axes of which every entry is a matrix of its own; the spec is normalised."""
    used = sum(normalized_axes(spec), ())
    return tuple(axis for axis in range(rank) if axis not in used)


def normalize_spec(spec: SpecLike, shape: Sequence[int], path: str = "") -> MatrixSpec:
    """Checks a spec against a parameter's shape and writes its axes as non-negative tuples.

    Returns the `MatrixSpec` with `dims` of two tuples, in the order given. Errors name the path.

    Raises:
        ValueError: If an axis does not exist or appears twice, or a split does not fit.
    """
    where, shape = f"{path}: " if path else "", tuple(shape)
    spec, rank = spec if isinstance(spec, MatrixSpec) else MatrixSpec(spec), len(shape)
    sides = normalized_axes(spec)
    for axis in sum(sides, ()):
        if not -rank <= axis < rank:
            raise ValueError(
                f"{where}axis {axis} of {spec.dims} does not exist in shape {shape}. Axes go from "
                f"{-rank} to {rank - 1}."
            )
    reduction, output = (tuple(axis % rank for axis in side) for side in sides)
    used = reduction + output
    if not reduction or not output or len(set(used)) < len(used):
        raise ValueError(
            f"{where}reduction axes {reduction} and output axes {output} of shape {shape} must be "
            "at least one each, and all different. Every axis is summed over, produced, or (left "
            "out) a batch axis."
        )
    splits: dict[int, Split] = {}
    for split in spec.splits:
        axis = split.axis % rank if -rank <= split.axis < rank else split.axis
        if axis not in used:
            raise ValueError(
                f"{where}{split} splits an axis that is neither a reduction nor an output axis of "
                f"shape {shape}; those are {used}. Batch axes are separate matrices already."
            )
        if split.length != shape[axis]:
            raise ValueError(
                f"{where}{split} covers {split.length} entries, and axis {axis} of shape {shape} "
                f"has {shape[axis]}. Write sizes that add up to it."
            )
        splits[axis] = Split(axis, split.sizes, split.view, split.along)
    if len(splits) < len(spec.splits):
        raise ValueError(f"{where}two splits have the same axis: {spec.splits}.")
    return MatrixSpec((reduction, output), splits.values())


def simplify_spec(spec: MatrixSpec) -> SpecLike:
    """Returns the simplest form of a spec: Optax's type without splits, an int for one axis."""
    reduction, output = (a[0] if len(a) == 1 else a for a in normalized_axes(spec))
    dims = MuonDimensionNumbers(reduction, output)
    return MatrixSpec(dims, spec.splits) if spec.splits else dims


def write_spec(spec: MatrixSpec | None) -> str:
    """Returns a spec as code to paste; None is AdamW."""
    if spec is None:
        return "None"
    parts = ((x.axis, x.sizes, x.view, x.along)[: 4 if x.view else 2] for x in spec.splits)
    splits = ", ".join(f"Split{part}" for part in parts)
    reduction, output = (a[0] if len(a) == 1 else a for a in normalized_axes(spec))
    return f"MatrixSpec(({reduction}, {output}){f', [{splits}]' if splits else ''})"


def write_rule(pattern: str, spec: MatrixSpec | None) -> str:
    """A rule to paste; None is AdamW."""
    raw = "r" if "\\" in pattern else ""
    return f'MatrixRules([({raw}"{pattern}", {write_spec(spec)})])'


def matrix_shapes(spec: SpecLike, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Lists `(count, rows, columns)` of the matrices in a parameter, one entry a kind of part."""
    spec = normalize_spec(spec, shape)
    cut = {split.axis: split.part_lengths for split in spec.splits}
    rows, columns = (
        [math.prod(part) for part in product(*(cut.get(a, (shape[a],)) for a in axes))]
        for axes in normalized_axes(spec)
    )
    batch = math.prod(shape[axis] for axis in batch_axes(spec, len(shape)))
    counts = Counter(product(rows, columns))
    return tuple((count * batch, *size) for size, count in counts.items())


def _integers(xs: object, what: str) -> tuple[int, ...]:
    """Python's own integers, from a sequence of integers of any type."""
    if not isinstance(xs, Sequence) or not all(
        isinstance(x, SupportsIndex) and not isinstance(x, bool) for x in xs
    ):
        raise TypeError(f"{what} must be integers, got {xs!r}.")
    return tuple(map(operator.index, xs))
