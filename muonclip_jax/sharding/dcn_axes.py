"""Which axes of a mesh cross a slow network.

Devices of one slice (a TPU pod, the GPUs of one NVLink domain) talk over its own network; slices
talk over the data centre's, tens of times slower. JAX numbers them: `device.slice_index`. An axis
of the mesh is slow where every step along it leads to another slice; one that has many devices of
each slice is not, for to leave it out would be to repeat the work inside of slices too. A process
says nothing about speed (the hosts of a TPU slice are many processes on one fast network), so it
is not asked.

Matrices that a slow axis replicates are not shared along it: every slice works on all of them, and
nothing crosses. Matrices that it shards have to cross in any case, and then the devices on both
sides share them, for that sends less than gathering would.
"""

import itertools
import warnings
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from muonclip_jax.routing import axes_tuple
from muonclip_jax.sharding.blocks import Axes, LeafAxes

SLICES_WARNING = (
    "Muon's matrices are on a mesh with Explicit axes, whose devices cannot be seen while tracing, "
    "and this machine's are of {slices} slices: the work may be shared across the slow network "
    "between them. Pass param_shardings=jax.tree.map(lambda x: x.sharding, params), or name the "
    "axes inside of a slice: distribution=Distribution(axes=(...))."
)


def slice_of(device: Any) -> int:
    """The number of a device's slice; 0 where the platform has no such thing."""
    number = getattr(device, "slice_index", None)
    return 0 if number is None else number


def slow_axes(mesh: Mesh | AbstractMesh) -> Axes:
    """Returns the axes of a mesh along which no two devices are of one slice.

    Args:
        mesh: The mesh. One that is abstract does not know its devices: then no axis is slow, with a
            warning where this program has devices of several slices.

    Returns:
        Names of axes, in the order of the mesh.

    Example:
        >>> slow_axes(jax.make_mesh((2, 4), ("slice", "fsdp")))
        ()
    """
    if not isinstance(mesh, Mesh):
        slices = len({slice_of(device) for device in jax.devices()})
        if slices > 1 and mesh.size > 1:
            warnings.warn(SLICES_WARNING.format(slices=slices), stacklevel=2)
        return ()
    numbers = np.array([slice_of(device) for device in mesh.devices.flat])
    numbers = numbers.reshape(mesh.devices.shape)
    slow = []
    for axis, name in enumerate(mesh.axis_names):
        along = np.sort(numbers, axis=axis)
        if numbers.shape[axis] > 1 and np.all(np.diff(along, axis=axis)):
            slow.append(name)
    return tuple(slow)


def sharing_axes(
    names: Axes, slow: Axes, chosen: Axes | None, leaf: LeafAxes, dims: tuple[Any, Any]
) -> frozenset[str]:
    """Returns the mesh axes along which devices share the work on a leaf.

    Args:
        names: All axes.
        slow: Those that cross a slow network.
        chosen: Those that the caller named, if any.
        leaf: The axes that shard each dimension of the leaf.
        dims: The leaf's reduction and output axes.

    Returns:
        What the caller named; else all but the slow axes that do not shard the leaf's matrices.

    Example:
        >>> held = (("slice",), ("fsdp",))
        >>> sorted(sharing_axes(("slice", "fsdp"), ("slice",), None, held, (0, 1)))
        ['fsdp', 'slice']
        >>> sorted(sharing_axes(("slice", "fsdp"), ("slice",), None, ((), ("fsdp",)), (0, 1)))
        ['fsdp']
    """
    if chosen is not None:
        return frozenset(chosen)
    matrix = itertools.chain.from_iterable(map(axes_tuple, dims))
    held = {name for axis in matrix for name in leaf[axis]}
    return frozenset(name for name in names if name not in slow or name in held)
