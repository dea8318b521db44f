"""MatrixSpec and Split: how one parameter is read as matrices, and the checks against its shape.

A kernel is more than its shape. `(768, 12, 64)` is twelve query heads that read 768 inputs, and as
a matrix it has 768 rows and 12 * 64 columns; `(24, 768, 3072)` is 24 scanned layers, and 24
matrices. `MuonDimensionNumbers`, Optax's word for it, says which axes are summed over (reduction),
which are produced (output), and that all others are batch axes. `MatrixSpec` adds what it lacks: a
fused kernel is several matrices side by side, and `Split` says where to cut.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from optax.contrib import MuonDimensionNumbers

_PLAIN = MuonDimensionNumbers()


@dataclass(frozen=True, init=False)
class Split:
    r"""Cuts one axis of a parameter into consecutive parts.

    The axis has `sum(sizes)` entries. Where the parts are interleaved, the axis is first seen as a
    grid `view`, and the grid's dimension `along` is the one that is cut.

    Args:
        axis: The parameter's axis; negative ones count from the end.
        sizes: How many entries, along the axis or the grid's dimension, each part has.
        view: The grid, whose product is the axis's length; None is the axis as it is.
        along: Which dimension of `view` is cut.

    Raises:
        TypeError: If an axis or a size is no integer.
        ValueError: If a size is not positive, or `along` and `view` do not fit the sizes.

    Example:
        Query, key and value of 12, 4 and 4 heads of 64, joined on axis 1:

        >>> Split(1, (12 * 64, 4 * 64, 4 * 64)).sizes
        (768, 256, 256)

        The same three for each of 12 heads in turn:

        >>> Split(1, (1, 1, 1), view=(12, 3, 64), along=1).view
        (12, 3, 64)
    """

    axis: int
    sizes: tuple[int, ...]
    view: tuple[int, ...] | None = None
    along: int = 0

    def __init__(self, axis: Any, sizes: Any, view: Any = None, along: Any = 0):
        view = None if view is None else _integers(view, "Split's view")
        object.__setattr__(self, "axis", _integer(axis, "Split's axis"))
        object.__setattr__(self, "sizes", _integers(sizes, "Split's sizes"))
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "along", _integer(along, "Split's along"))
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(
                f"Split's sizes must be positive, got {self.sizes}. Write the length of every "
                "part, as in Split(1, (768, 256, 256))."
            )
        if self.view is None:
            if self.along:
                raise ValueError(
                    f"Split's along={self.along} names a dimension of view, and there is no view. "
                    "Write the grid too, as in Split(1, (1, 1, 1), view=(12, 3, 64), along=1)."
                )
            return
        if not 0 <= self.along < len(self.view):
            raise ValueError(
                f"Split's along={self.along} is no dimension of view={self.view}. It counts from "
                f"0 to {len(self.view) - 1}."
            )
        if self.view[self.along] != sum(self.sizes):
            raise ValueError(
                f"Split's sizes {self.sizes} add up to {sum(self.sizes)}, and view={self.view} "
                f"has {self.view[self.along]} entries along {self.along}. They must agree."
            )

    @property
    def length(self) -> int:
        """The length that the axis must have."""
        return sum(self.sizes) if self.view is None else math.prod(self.view)

    @property
    def part_lengths(self) -> tuple[int, ...]:
        """How many entries of the axis each part takes."""
        if self.view is None:
            return self.sizes
        others = math.prod(self.view) // self.view[self.along]
        return tuple(size * others for size in self.sizes)


@dataclass(frozen=True, init=False)
class MatrixSpec:
    """Says which axes of a parameter are a matrix's rows and columns, and where fused ones part.

    All axes that are neither reduction nor output axes are batch axes: a matrix for each of their
    entries.

    Args:
        dims: `MuonDimensionNumbers(reduction_axis, output_axis)`, or the pair of them; each is an
            axis or a tuple of axes. The default is the plain matrix, rows on axis 0.
        splits: `Split`s of reduction or output axes, at most one an axis. Every part becomes a
            matrix of its own, with its own shape scale.

    Raises:
        TypeError: If `dims` is no pair of axes, or a split is no `Split`.
        ValueError: If two splits cut the same axis.

    Example:
        >>> MatrixSpec((0, (1, 2))).dims
        MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
        >>> MatrixSpec((0, 1), [Split(1, (64, 64))]).splits
        (Split(axis=1, sizes=(64, 64), view=None, along=0),)
    """

    dims: MuonDimensionNumbers
    splits: tuple[Split, ...]

    def __init__(self, dims: Any = _PLAIN, splits: Any = ()):
        object.__setattr__(self, "dims", _dimension_numbers(dims))
        splits = (splits,) if isinstance(splits, Split) else tuple(splits)
        for split in splits:
            if not isinstance(split, Split):
                raise TypeError(
                    f"MatrixSpec's splits must be Splits, got {split!r}. Write, for example, "
                    "MatrixSpec((0, 1), (Split(1, (64, 64)),))."
                )
        if len({split.axis for split in splits}) < len(splits):
            raise ValueError(f"MatrixSpec's splits must cut different axes, got {splits}.")
        object.__setattr__(self, "splits", splits)


#: What a user may write for one leaf that Muon trains.
SpecLike: TypeAlias = MatrixSpec | MuonDimensionNumbers


def is_spec(x: Any) -> bool:
    """Tells a leaf's spec from a container; `MuonDimensionNumbers` is a tuple and yet a leaf.

    Example:
        >>> is_spec(MuonDimensionNumbers(0, 1)), is_spec((0, 1))
        (True, False)
    """
    return isinstance(x, MatrixSpec | MuonDimensionNumbers)


def hashable_spec(spec: SpecLike) -> SpecLike:
    """The same spec with tuples for lists, which Optax allows as axes.

    Example:
        >>> hashable_spec(MuonDimensionNumbers(0, [1, 2]))
        MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    """
    return spec if isinstance(spec, MatrixSpec) else _dimension_numbers(spec)


def axes_tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the axes of a dim of a spec, which may be a single one.

    Example:
        >>> axes_tuple(0), axes_tuple((1, 2))
        ((0,), (1, 2))
    """
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _integer(x: Any, what: str) -> int:
    try:
        if isinstance(x, bool):
            raise TypeError
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{what} must be an integer, got {x!r}.") from None


def _integers(xs: Any, what: str) -> tuple[int, ...]:
    if isinstance(xs, str) or not isinstance(xs, Sequence):
        raise TypeError(f"{what} must be a tuple of integers, got {xs!r}.")
    return tuple(_integer(x, what) for x in xs)


def _dimension_numbers(dims: Any) -> MuonDimensionNumbers:
    if not isinstance(dims, tuple | list) or len(dims) != 2:
        raise TypeError(
            "MatrixSpec's dims must be MuonDimensionNumbers or a pair (reduction axes, output "
            f"axes), got {dims!r}. Write, for example, MatrixSpec((0, (1, 2)))."
        )
    reduction, output = (
        _integers(axis, "An entry of MatrixSpec's dims")
        if isinstance(axis, tuple | list)
        else _integer(axis, "An axis of MatrixSpec's dims")
        for axis in dims
    )
    return MuonDimensionNumbers(reduction, output)
