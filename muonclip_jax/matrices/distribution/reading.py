"""How the leaves of a tree are sharded: read off their types, or given.

While JAX traces, an array on a mesh with Explicit axes has its sharding in its type. On a mesh with
Auto axes the compiler decides later, and the type only tells that there is a mesh: there the
shardings have to be given, as the tree `jax.tree.map(lambda x: x.sharding, params)`.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from muonclip_jax._paths import flatten_with_paths
from muonclip_jax._typing import Tree
from muonclip_jax.matrices.distribution.alignment import align_shardings
from muonclip_jax.matrices.distribution.blocks import Axes, LeafAxes
from muonclip_jax.matrices.distribution.sharding import MeshShardings, axes_of, sharding_of
from muonclip_jax.matrices.distribution.slow import slow_axes

AUTO_WARNING = (
    "Muon's matrices are on a mesh of {devices} devices with Auto axes {axes}, where their "
    "shardings cannot be seen while tracing: every device may repeat all of the orthogonalisation, "
    "or gather inside its iterations. Pass param_shardings=jax.tree.map(lambda x: x.sharding, "
    "params) to scale_by_muon, muon or muonclip."
)


def read_shardings(
    tree: Tree, param_shardings: Tree | None = None, warn: bool = True
) -> MeshShardings | None:
    """Finds mesh and shardings of a tree of arrays.

    Args:
        tree: Arrays, traced or not.
        param_shardings: As in `align_shardings`; None reads them off the arrays.
        warn: Whether to warn where there are many devices and the shardings cannot be known.

    Returns:
        Mesh and shardings, or None where there is one device, or all axes are manual, or nothing is
        known.

    Raises:
        TypeError: As in `align_shardings`.
        ValueError: As in `align_shardings`; also where leaves are on different meshes.
    """
    if param_shardings is None:
        return _read_from_types(flatten_with_paths(tree)[0], warn)
    aligned = align_shardings(tree, param_shardings)
    meshes = {sharding.mesh.abstract_mesh: path for path, _, sharding in aligned if sharding}
    if len({_axes_and_sizes(mesh) for mesh in meshes}) > 1:
        (first, path), (second, other) = list(meshes.items())[:2]
        raise ValueError(
            f"param_shardings has {path!r} on the mesh {dict(first.shape)} and {other!r} on "
            f"{dict(second.shape)}. All parameters that Muon trains must be on one mesh."
        )
    given = next((sharding.mesh for _, _, sharding in aligned if sharding), None)
    if given is None:
        return None
    mesh = _mesh_of_arrays([leaf for _, leaf, _ in aligned])
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = given
    elif _axes_and_sizes(mesh) != _axes_and_sizes(given):
        raise ValueError(
            f"param_shardings is for the mesh {dict(given.shape)}, and the parameters are on "
            f"{dict(mesh.shape)}. Take the shardings from the parameters as they are now: "
            "jax.tree.map(lambda x: x.sharding, params)."
        )
    elif mesh.axis_types == given.axis_types:
        # The same mesh, and this one knows its devices.
        mesh = given
    return _shardings(
        mesh,
        [
            axes_of(sharding.spec if sharding else PartitionSpec(), leaf.ndim)
            for _, leaf, sharding in aligned
        ],
        devices=given,
    )


def _read_from_types(leaves: Sequence[tuple[str, Any]], warn: bool) -> MeshShardings | None:
    arrays = [leaf for _, leaf in leaves]
    mesh = _mesh_of_arrays(arrays)
    if mesh is None:
        return None
    known = [
        axes_of(sharding.spec if (sharding := sharding_of(leaf)) else PartitionSpec(), leaf.ndim)
        for leaf in arrays
    ]
    unseen = [
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and mesh.shape[axis] > 1
    ]
    if any(isinstance(leaf, Tracer) for leaf in arrays) and unseen:
        if warn:
            message = AUTO_WARNING.format(devices=mesh.size, axes=tuple(unseen))
            warnings.warn(message, stacklevel=3)
        # What the Explicit axes of a mixed mesh tell is still good.
        return _shardings(mesh, known, frozenset(unseen))
    return _shardings(mesh, known)


def _mesh_of_arrays(leaves: Sequence[Any]) -> Mesh | AbstractMesh | None:
    """The mesh that the arrays are on, if any."""
    return next((sharding.mesh for leaf in leaves if (sharding := sharding_of(leaf))), None)


def _axes_and_sizes(mesh: Mesh | AbstractMesh) -> tuple[tuple[str, int], ...]:
    return tuple(mesh.shape.items())


def _shardings(
    mesh: Mesh | AbstractMesh,
    leaves: Sequence[LeafAxes],
    unseen: frozenset[str] = frozenset(),
    devices: Mesh | AbstractMesh | None = None,
) -> MeshShardings | None:
    """Puts together what is known; `devices` is a mesh that may know more of its devices."""
    ours: Axes = tuple(
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual and axis not in unseen
    )
    if math.prod(mesh.shape[axis] for axis in ours) == 1:
        return None
    return MeshShardings(
        mesh,
        tuple((axis, mesh.shape[axis]) for axis in ours),
        tuple(
            tuple(tuple(axis for axis in axes if axis in ours) for axes in leaf) for leaf in leaves
        ),
        tuple(axis for axis in slow_axes(mesh if devices is None else devices) if axis in ours),
    )
