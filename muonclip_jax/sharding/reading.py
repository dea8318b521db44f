"""Shardings of the leaves of a tree: from their types, or given by the caller.

While tracing, an array on a mesh with Explicit axes has its sharding in its type. On a mesh with
Auto axes the compiler decides later, and the type only contains the mesh: there the shardings must
be given, as the tree `jax.tree.map(lambda x: x.sharding, params)`.
"""

import warnings
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from muonclip_jax._tree import Tree, flatten_with_paths
from muonclip_jax.sharding.alignment import PlacedLeaf, align_shardings, check_reduced
from muonclip_jax.sharding.dcn_axes import dcn_axes
from muonclip_jax.sharding.mesh_shardings import Axes, MeshShardings, axes_of, sharding_of

_TOGETHER = (
    "All leaves that one transformation trains must be on one mesh. Move them there by "
    "jax.device_put, or train the parts by transformations of their own, each called on its part."
)


def read_shardings(
    tree: Tree, param_shardings: Tree | None = None, warn: bool = True, required_by: str = ""
) -> MeshShardings | None:
    """Finds mesh and shardings of a tree of arrays.

    Args:
        tree: Arrays, traced or not.
        param_shardings: As in `align_shardings`; None reads them from the arrays.
        warn: Whether to warn if there are several devices and the shardings are unknown.
        required_by: The setting that makes this an error, if there is one.

    Returns:
        Mesh and shardings, or None if there is one device and no Explicit axis, or all axes are
        manual, or the shardings are unknown.

    Raises:
        TypeError: As in `align_shardings`.
        ValueError: As in `align_shardings`; also if leaves are on different devices or meshes, or
            are unreduced over mesh axes, or required shardings are unknown.
    """
    leaves = flatten_with_paths(tree)[0]
    seen: list[PlacedLeaf] = [(path, leaf, sharding_of(leaf)) for path, leaf in leaves]
    _check_devices(seen)
    mesh = next((sharding.mesh for *_, sharding in seen if sharding), None)
    if param_shardings is None:
        unseen = () if mesh is None else _unseen_axes(mesh, seen, warn, required_by)
        shardings = None if mesh is None else _mesh_shardings(mesh, mesh, seen, unseen)
        if shardings is not None:
            _check_one_mesh(seen)
        return shardings
    _check_one_mesh(seen)
    aligned = align_shardings(tree, param_shardings)
    _check_one_mesh(aligned, "param_shardings at ")
    given = next((sharding.mesh for *_, sharding in aligned if sharding), None)
    if given is None:
        return None
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if not mesh.empty and _differ(mesh, given):
        raise ValueError(
            f"param_shardings is for the mesh {_describe(given)}, and the parameters are on "
            f"{_describe(mesh)}. Use the current shardings of the parameters: "
            "jax.tree.map(lambda x: x.sharding, params)."
        )
    if mesh.empty or mesh.axis_types == given.axis_types:
        # The same mesh, and this one knows its devices.
        mesh = given
    return _mesh_shardings(mesh, given, aligned)


def _unseen_axes(
    mesh: Mesh | AbstractMesh, seen: Sequence[PlacedLeaf], warn: bool, required_by: str
) -> Axes:
    """The Auto axes of a mesh if leaves are traced, since their types do not contain them."""
    if not any(isinstance(leaf, Tracer) for _, leaf, _ in seen):
        return ()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = tuple(axis for axis, kind in kinds if kind == AxisType.Auto and mesh.shape[axis] > 1)
    if auto and required_by:
        raise ValueError(
            f"{required_by} needs the shardings of the parameters, which are not known "
            f"while tracing on a mesh with Auto axes {auto}. Pass "
            "param_shardings=jax.tree.map(lambda x: x.sharding, params)."
        )
    if auto and warn:
        warnings.warn(
            f"Muon's matrices are on a mesh of {mesh.size} devices with Auto axes {auto}, where "
            "their shardings cannot be seen while tracing: every device may repeat all of the "
            "orthogonalisation, or gather inside its iterations. Pass "
            "param_shardings=jax.tree.map(lambda x: x.sharding, params) to scale_by_muon, muon or "
            "muonclip.",
            stacklevel=3,
        )
    return auto


def _mesh_shardings(
    mesh: Mesh | AbstractMesh,
    devices: Mesh | AbstractMesh,
    leaves: Sequence[PlacedLeaf],
    unseen: Axes = (),
) -> MeshShardings | None:
    """What the axes of a mesh shard; `devices` is the same mesh, possibly with devices.

    Explicit axes matter even if all have size one: they are in the types of the arrays, so the
    program of one device must run where they are manual.
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    ours: Axes = tuple(
        axis for axis, kind in kinds.items() if kind != AxisType.Manual and axis not in unseen
    )
    if all(kinds[axis] != AxisType.Explicit and mesh.shape[axis] == 1 for axis in ours):
        return None
    return MeshShardings(
        mesh,
        tuple((axis, mesh.shape[axis]) for axis in ours),
        tuple(
            tuple(
                tuple(axis for axis in axes if axis in ours)
                for axes in axes_of(sharding.spec if sharding else PartitionSpec(), leaf.ndim)
            )
            for _, leaf, sharding in leaves
        ),
        tuple(axis for axis in dcn_axes(devices) if axis in ours),
    )


def _check_devices(leaves: Sequence[PlacedLeaf]) -> None:
    """Raises a ValueError if arrays outside of a trace are committed to different devices."""
    devices: dict[frozenset[jax.Device], str] = {}
    for path, leaf, _ in leaves:
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed:
            devices.setdefault(frozenset(leaf.sharding.device_set), path)
    if len(devices) > 1:
        (first, path), (second, other) = list(devices.items())[:2]
        raise ValueError(
            f"{path} is on the devices {_ids(first)}, and {other} on {_ids(second)}. {_TOGETHER}"
        )


def _check_one_mesh(leaves: Sequence[PlacedLeaf], prefix: str = "") -> None:
    """Raises a ValueError if shardings have different meshes or unreduced axes."""
    meshes: dict[Mesh | AbstractMesh, str] = {}
    for path, _, sharding in leaves:
        if sharding is not None:
            check_reduced(prefix + path, sharding)
            meshes.setdefault(sharding.mesh, prefix + path)
    # Those that know their devices first, so that the others' are compared with them.
    ordered = sorted(meshes, key=lambda mesh: not isinstance(mesh, Mesh))
    for first, other in zip(ordered[:1] * len(ordered), ordered, strict=True):
        if other.axis_types != first.axis_types or _differ(other, first):
            raise ValueError(
                f"{meshes[first]} is on the mesh {_describe(first)}, and {meshes[other]} on "
                f"{_describe(other)}. {_TOGETHER}"
            )


def _differ(mesh: Mesh | AbstractMesh, other: Mesh | AbstractMesh) -> bool:
    """Whether axes differ, or the order of devices if both meshes are concrete."""
    if tuple(mesh.shape.items()) != tuple(other.shape.items()):
        return True
    if mesh is other or not (isinstance(mesh, Mesh) and isinstance(other, Mesh)):
        return False
    return np.asarray(mesh.devices).tolist() != np.asarray(other.devices).tolist()


def _describe(mesh: Mesh | AbstractMesh) -> str:
    """A mesh in an error: its axes with sizes and types, and its devices in their order."""
    axes = ", ".join(
        f"{name!r}: {size} {kind.name}"
        for (name, size), kind in zip(mesh.shape.items(), mesh.axis_types, strict=True)
    )
    if isinstance(mesh, Mesh):
        axes += f"; devices {_ids(np.asarray(mesh.devices).flat)}"
    return f"({axes})"


def _ids(devices: Iterable[jax.Device]) -> str:
    ids = [device.id for device in devices]
    ids = sorted(ids) if isinstance(devices, frozenset) else ids
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"
