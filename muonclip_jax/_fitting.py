"""A spec on a parameter's shape: checked, written one way, and counted as matrices."""

import math
from collections.abc import Sequence
from typing import Any

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._specs import MatrixSpec, SpecLike, Split, axes_tuple, is_spec


def normalize_spec(spec: SpecLike, shape: Sequence[int], path: str = "") -> MatrixSpec:
    """Checks a spec against a parameter's shape and writes its axes as non-negative tuples.

    Args:
        spec: A `MatrixSpec` or `MuonDimensionNumbers`.
        shape: The parameter's shape.
        path: The parameter's path, for the messages.

    Returns:
        The `MatrixSpec` with `dims` of two tuples, in the order given.

    Raises:
        TypeError: If `spec` is neither.
        ValueError: If an axis does not exist, is named twice, or a split does not fit.

    Example:
        >>> normalize_spec(MuonDimensionNumbers(0, (-2, -1)), (768, 12, 64)).dims
        MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
    """
    if not is_spec(spec):
        raise TypeError(
            f"{_where(path)}a spec must be a MatrixSpec or MuonDimensionNumbers, got {spec!r}. "
            "Write, for example, MatrixSpec((0, 1))."
        )
    if not isinstance(spec, MatrixSpec):
        spec = MatrixSpec(spec)
    shape = tuple(shape)
    reduction = _axes(spec.dims.reduction_axis, "reduction", spec, shape, path)
    output = _axes(spec.dims.output_axis, "output", spec, shape, path)
    both = reduction + output
    if len(set(both)) < len(both):
        raise ValueError(
            f"{_where(path)}reduction axes {reduction} and output axes {output} of shape {shape} "
            "must all be different. Every axis is summed over, produced, or (left out) a batch "
            "axis."
        )
    splits = tuple(_normalize_split(split, both, shape, path) for split in spec.splits)
    if len({split.axis for split in splits}) < len(splits):
        raise ValueError(f"{_where(path)}two splits cut the same axis: {spec.splits}.")
    return MatrixSpec(MuonDimensionNumbers(reduction, output), splits)


def normalized_axes(spec: MatrixSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The reduction and the output axes of a normalised spec, typed as the tuples they are.

    Example:
        >>> normalized_axes(normalize_spec(MatrixSpec((0, -1)), (4, 8)))
        ((0,), (1,))
    """
    reduction, output = spec.dims
    assert isinstance(reduction, tuple), spec
    assert isinstance(output, tuple), spec
    return reduction, output


def simplify_spec(spec: MatrixSpec) -> SpecLike:
    """Writes a spec as shortly as it goes: Optax's type without splits, an int for one axis.

    Example:
        >>> simplify_spec(MatrixSpec(((0,), (1, 2))))
        MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    """
    reduction, output = (
        axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis for axis in spec.dims
    )
    dims = MuonDimensionNumbers(reduction, output)
    return MatrixSpec(dims, spec.splits) if spec.splits else dims


def matrix_shapes(spec: SpecLike, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Lists `(count, rows, columns)` of the matrices in a parameter, one entry a kind of part.

    Example:
        >>> matrix_shapes(MatrixSpec((0, 1), (Split(1, (768, 256, 256)),)), (512, 1280))
        ((1, 512, 768), (2, 512, 256))
    """
    spec = normalize_spec(spec, shape)
    cut = {split.axis: split.part_lengths for split in spec.splits}
    reduction, output = normalized_axes(spec)
    batch = math.prod(n for axis, n in enumerate(shape) if axis not in reduction + output)

    def lengths(axes: tuple[int, ...]) -> list[int]:
        products = [1]
        for axis in axes:
            products = [p * n for p in products for n in cut.get(axis, (shape[axis],))]
        return products

    counts: dict[tuple[int, int], int] = {}
    for rows in lengths(reduction):
        for columns in lengths(output):
            counts[rows, columns] = counts.get((rows, columns), 0) + batch
    return tuple((count, *size) for size, count in counts.items())


def _where(path: str) -> str:
    return f"{path}: " if path else ""


def _axes(
    axes: Any, what: str, spec: MatrixSpec, shape: tuple[int, ...], path: str
) -> tuple[int, ...]:
    axes = axes_tuple(axes)
    if not axes:
        raise ValueError(f"{_where(path)}{spec.dims} names no {what} axis; a matrix needs one.")
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"{_where(path)}{what} axis {axis} does not exist in shape {shape}. Axes go from "
                f"{-len(shape)} to {len(shape) - 1}; the spec was {spec.dims}."
            )
    return tuple(axis % len(shape) for axis in axes)


def _normalize_split(
    split: Split, axes: tuple[int, ...], shape: tuple[int, ...], path: str
) -> Split:
    axis = split.axis % len(shape) if -len(shape) <= split.axis < len(shape) else split.axis
    if axis not in axes:
        raise ValueError(
            f"{_where(path)}{split} cuts an axis that is neither a reduction nor an output axis "
            f"of shape {shape}; those are {axes}. Batch axes are separate matrices already."
        )
    if split.length != shape[axis]:
        raise ValueError(
            f"{_where(path)}{split} covers {split.length} entries, and axis {axis} of shape "
            f"{shape} has {shape[axis]}. Write sizes that add up to it."
        )
    return Split(axis, split.sizes, split.view, split.along)
