"""Which axes of a mesh cross the data-centre network (DCN).

Devices of one slice (a TPU pod, the GPUs of one NVLink domain) communicate over its own network;
slices communicate over the data centre's, tens of times slower. JAX numbers the slices:
`device.slice_index`. A mesh axis is a DCN axis if all devices along it are in different slices. An
axis with several devices per slice is not: without it, work would be replicated inside of slices
too. Process numbers do not help, since one slice has many hosts.

Matrices that are replicated along a DCN axis are not distributed over it: every slice processes all
of them without communication. Matrices that are sharded over a DCN axis must be sent over it
anyway; they are distributed over it, which sends less than an all-gather.
"""

import warnings

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from muonclip_jax.sharding.mesh_shardings import Axes


def slice_of(device: object) -> int:
    """The index of a device's slice; 0 if the platform has none."""
    number = getattr(device, "slice_index", None)
    return 0 if number is None else number


def dcn_axes(mesh: Mesh | AbstractMesh) -> Axes:
    """Returns the axes of a mesh along which no two devices are in the same slice.

    An abstract mesh does not know its devices: then no axis is a DCN axis, with a warning where
    this program has devices of several slices.
    """
    if not isinstance(mesh, Mesh):
        slices = len(set(map(slice_of, jax.devices())))
        if slices > 1 and mesh.size > 1:
            warnings.warn(
                "Muon's matrices are on a mesh with Explicit axes, whose devices cannot be seen "
                f"while tracing, and this machine's are of {slices} slices: the work may be shared "
                "across the slow network between them. Pass "
                "param_shardings=jax.tree.map(lambda x: x.sharding, params), or name the axes "
                "inside of a slice: distribution=Distribution(axes=(...)).",
                stacklevel=2,
            )
        return ()
    numbers = np.array([slice_of(device) for device in mesh.devices.flat])
    numbers = numbers.reshape(mesh.devices.shape)
    return tuple(
        name
        for axis, name in enumerate(mesh.axis_names)
        if numbers.shape[axis] > 1 and np.all(np.diff(np.sort(numbers, axis=axis), axis=axis))
    )
