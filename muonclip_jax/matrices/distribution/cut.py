"""Cutting an axis of a mesh in two: groups of its devices then share matrices.

A matrix can be split over the devices along a whole axis, not along a part of one. Where a mesh has
one axis of 512 devices and a model 168 matrices, that leaves most devices without work. So the same
devices are seen as a mesh whose axis is two, say 128 x 4, and matrices are split along the second.
Every array stays where it is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from muonclip_jax.matrices.distribution.blocks import Axes, LeafAxes

# Larger groups lose in sending what they gain in work.
_LARGEST_GROUP = 64


@dataclass(frozen=True)
class Cut:
    """An axis, and how many neighbours along it make a group.

    Attributes:
        axis: The axis.
        group: The size of a group, a divisor of the size of the axis.
    """

    axis: str
    group: int

    def axes(self, axes: Axes) -> Axes:
        """The two axes in place of the one.

        Example:
            >>> Cut("fsdp", 4).axes(("fsdp", "tp"))
            ('fsdp_groups', 'fsdp_within', 'tp')
        """
        two = (f"{self.axis}_groups", f"{self.axis}_within")
        return tuple(new for axis in axes for new in (two if axis == self.axis else (axis,)))

    def sizes(self, sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        """Names and sizes of the axes."""
        lengths = [
            length
            for axis, size in sizes
            for length in ((size // self.group, self.group) if axis == self.axis else (size,))
        ]
        return tuple(zip(self.axes(tuple(axis for axis, _ in sizes)), lengths, strict=True))

    def leaf(self, leaf: LeafAxes) -> LeafAxes:
        """The axes that shard each dimension of a leaf."""
        return tuple(map(self.axes, leaf))

    def mesh(self, mesh: Mesh) -> Mesh:
        """The same devices, in the same order."""
        names, lengths = zip(*self.sizes(tuple(mesh.shape.items())), strict=True)
        kinds = (AxisType.Auto,) * len(names)
        return Mesh(np.asarray(mesh.devices).reshape(lengths), names, axis_types=kinds)


def cuttable_axes(mesh: Mesh | AbstractMesh, slow: Axes) -> Axes:
    """Returns the axes that may be cut: of a mesh that knows its devices, with Auto axes alone.

    The type of an array on Explicit axes names the mesh, and so does a mesh that is set for all of
    a program: neither can be seen as another one.
    """
    if not isinstance(mesh, Mesh) or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return ()
    if not jax.sharding.get_abstract_mesh().empty:
        return ()
    return tuple(axis for axis in mesh.axis_names if axis not in slow)


def cuts(sizes: tuple[tuple[str, int], ...], axes: Axes) -> Iterator[Cut]:
    """All cuts of some axes, small groups first.

    Example:
        >>> [cut.group for cut in cuts((("fsdp", 12), ("tp", 2)), ("fsdp", "tp"))]
        [2, 3, 4, 6]
    """
    for axis, size in sizes:
        if axis in axes:
            for group in range(2, min(_LARGEST_GROUP, math.ceil(size / 2)) + 1):
                if size % group == 0:
                    yield Cut(axis, group)
