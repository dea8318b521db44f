"""Layouts: a letter an axis, "i" for inputs, "o" for outputs, "b" for batches of matrices."""

import functools
from collections.abc import Sequence

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._specs import MatrixSpec, Split


@functools.lru_cache(maxsize=8192)
def to_spec(letters: str, shape: tuple[int, ...], parts: int = 1) -> MatrixSpec:
    """The spec of a layout.

    Example:
        >>> to_spec("bio", (6, 8, 32)).dims
        MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    """
    reduction = tuple(i for i, letter in enumerate(letters) if letter == "i")
    output = tuple(i for i, letter in enumerate(letters) if letter == "o")
    splits = ()
    if parts > 1 and shape[output[-1]] % parts == 0:
        splits = (Split(output[-1], (shape[output[-1]] // parts,) * parts),)
    return MatrixSpec(MuonDimensionNumbers(reduction, output), splits)


def without(shape: Sequence[int], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one layer.

    Example:
        >>> without((8, 6, 32), (1,))
        (8, 32)
    """
    return tuple(n for axis, n in enumerate(shape) if axis not in axes)


def with_layers(letters: str, axes: tuple[int, ...], rank: int) -> str:
    """The layout of a stack, from that of one layer."""
    rest = iter(letters)
    return "".join("b" if axis in axes else next(rest) for axis in range(rank))


def turned(letters: str) -> str:
    """The layout with the output where the input was.

    Example:
        >>> turned("biio")
        'boii'
    """
    rest = iter(letters.replace("b", "")[::-1])
    return "".join(letter if letter == "b" else next(rest) for letter in letters)


def outputs_of(letters: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The lengths of the output axes."""
    return tuple(n for n, letter in zip(shape, letters, strict=True) if letter == "o")


def possible_layouts(shape: Sequence[int]) -> tuple[str, ...]:
    """The layouts that a leaf of unknown name may have, the usual ones first."""
    rank = len(shape)
    if rank == 2:
        return ("io", "oi")
    found = [
        "b" * (rank - 3) + "ioo",
        "b" * (rank - 3) + "iio",
        "b" * (rank - 2) + "io",
        "i" * (rank - 1) + "o",
        "b" * (rank - 3) + "oii",
        "o" + "i" * (rank - 1),
        "i" + "o" * (rank - 1),
        "b" * (rank - 3) + "oio",
        "b" * (rank - 2) + "oi",
        "b" * (rank - 3) + "ooi",
        "i" + "b" * (rank - 2) + "o",
        "io" + "b" * (rank - 2),
    ]
    return tuple(dict.fromkeys(found))
