"""Cutting an axis of a mesh in two: groups of its devices then share matrices.

A matrix can be split over the devices along a whole axis, not along a part of one. Where a mesh has
one axis of 512 devices and a model 168 matrices, that leaves most devices without work. So the same
devices are seen as a mesh whose axis is two, say 128 x 4, and matrices are split along the second.
Every array stays where it is.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from muonclip_jax.sharding.blocks import Axes, LeafAxes
from muonclip_jax.sharding.dcn_axes import slice_of

# What a device saves by sharing with one more falls with the square of the group, and what it sends
# does not fall: at the default price of a byte, a matrix of 4096 rows pays up to groups of eight.
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


def possible_cuts(
    mesh: Mesh | AbstractMesh, sizes: tuple[tuple[str, int], ...], slow: Axes
) -> tuple[Cut, ...]:
    """Returns the cuts of a mesh that knows its devices, with Auto axes alone; small groups first.

    The type of an array on Explicit axes names the mesh, and so does a mesh that is set for all of
    a program: neither can be seen as another one.

    Args:
        mesh: The mesh.
        sizes: Names and sizes of all axes, those that are mapped already too.
        slow: The axes that cross a slow network, which are not cut.

    Example:
        >>> [cut.group for cut in possible_cuts(jax.make_mesh(
        ...     (8,), ("fsdp",), axis_types=(AxisType.Auto,)), (("fsdp", 8),), ())]
        [2, 4]
    """
    if not isinstance(mesh, Mesh) or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return ()
    if not jax.sharding.get_abstract_mesh().empty:
        return ()
    slices = np.array([slice_of(device) for device in mesh.devices.flat])
    slices = slices.reshape(mesh.devices.shape)
    taken = {name for name, _ in sizes}
    return tuple(
        Cut(axis, group)
        for number, axis in enumerate(mesh.axis_names)
        if axis not in slow and taken.isdisjoint(Cut(axis, 1).axes((axis,)))
        for group in range(2, min(_LARGEST_GROUP, mesh.shape[axis] // 2) + 1)
        if mesh.shape[axis] % group == 0 and _in_one_slice(slices, number, group)
    )


def _in_one_slice(slices: np.ndarray, axis: int, group: int) -> bool:
    """Whether no group along an axis has devices of two slices."""
    groups = np.moveaxis(slices, axis, -1).reshape(-1, group)
    return bool(np.all(groups == groups[:, :1]))
