"""How the leaves of a tree are sharded: read off their types, or given.

While JAX traces, an array on a mesh with Explicit axes has its sharding in its type. On a mesh with
Auto axes the compiler decides later, and the type only tells that there is a mesh: there the
shardings have to be given, as the tree `jax.tree.map(lambda x: x.sharding, params)`.
"""

import warnings
from collections.abc import Sequence

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from muonclip_jax._tree import Tree, flatten_with_paths
from muonclip_jax.sharding.agreement import (
    Leaves,
    check_devices,
    check_one_mesh,
    describe,
    differ,
)
from muonclip_jax.sharding.alignment import align_shardings
from muonclip_jax.sharding.blocks import Axes, LeafAxes
from muonclip_jax.sharding.dcn_axes import slow_axes
from muonclip_jax.sharding.sharding import MeshShardings, axes_of, sharding_of

AUTO_WARNING = (
    "Muon's matrices are on a mesh of {devices} devices with Auto axes {axes}, where their "
    "shardings cannot be seen while tracing: every device may repeat all of the orthogonalisation, "
    "or gather inside its iterations. Pass param_shardings=jax.tree.map(lambda x: x.sharding, "
    "params) to scale_by_muon, muon or muonclip."
)


def read_shardings(
    tree: Tree, param_shardings: Tree | None = None, warn: bool = True, required_by: str = ""
) -> MeshShardings | None:
    """Finds mesh and shardings of a tree of arrays.

    Args:
        tree: Arrays, traced or not.
        param_shardings: As in `align_shardings`; None reads them off the arrays.
        warn: Whether to warn where there are many devices and the shardings cannot be known.
        required_by: The setting that makes this an error, if there is one.

    Returns:
        Mesh and shardings, or None where there is one device and no Explicit axis, or all axes are
        manual, or nothing is known.

    Raises:
        TypeError: As in `align_shardings`.
        ValueError: As in `align_shardings`; also where leaves are on different devices or meshes,
            or are still to be summed over mesh axes, or what is required cannot be known.
    """
    leaves = flatten_with_paths(tree)[0]
    seen = [(path, leaf, sharding_of(leaf)) for path, leaf in leaves]
    check_devices(seen)
    mesh = next((sharding.mesh for *_, sharding in seen if sharding), None)
    if param_shardings is None:
        return None if mesh is None else _read_from_types(mesh, seen, warn, required_by)
    check_one_mesh(seen)
    aligned = align_shardings(tree, param_shardings)
    check_one_mesh(aligned, "param_shardings at ")
    given = next((sharding.mesh for *_, sharding in aligned if sharding), None)
    if given is None:
        return None
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if not mesh.empty and differ(mesh, given):
        raise ValueError(
            f"param_shardings is for the mesh {describe(given)}, and the parameters are on "
            f"{describe(mesh)}. Take the shardings from the parameters as they are now: "
            "jax.tree.map(lambda x: x.sharding, params)."
        )
    if mesh.empty or mesh.axis_types == given.axis_types:
        # The same mesh, and this one knows its devices.
        mesh = given
    return _shardings(mesh, _axes_of_leaves(aligned), devices=given)


def _read_from_types(
    mesh: Mesh | AbstractMesh, seen: Leaves, warn: bool, required_by: str
) -> MeshShardings | None:
    unseen: frozenset[str] = frozenset()
    if any(isinstance(leaf, Tracer) for _, leaf, _ in seen):
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        auto = [axis for axis, kind in kinds if kind == AxisType.Auto and mesh.shape[axis] > 1]
        if auto and required_by:
            raise ValueError(
                f"{required_by} needs to know the shardings of the parameters, which cannot be "
                f"seen while tracing on a mesh with Auto axes {tuple(auto)}. Pass "
                "param_shardings=jax.tree.map(lambda x: x.sharding, params)."
            )
        if auto and warn:
            message = AUTO_WARNING.format(devices=mesh.size, axes=tuple(auto))
            warnings.warn(message, stacklevel=3)
        # What the Explicit axes of a mixed mesh tell is still good.
        unseen = frozenset(auto)
    shardings = _shardings(mesh, _axes_of_leaves(seen), unseen)
    if shardings is not None:
        check_one_mesh(seen)
    return shardings


def _axes_of_leaves(leaves: Leaves) -> list[LeafAxes]:
    return [
        axes_of(sharding.spec if sharding else PartitionSpec(), leaf.ndim)
        for _, leaf, sharding in leaves
    ]


def _shardings(
    mesh: Mesh | AbstractMesh,
    leaves: Sequence[LeafAxes],
    unseen: frozenset[str] = frozenset(),
    devices: Mesh | AbstractMesh | None = None,
) -> MeshShardings | None:
    """Puts together what is known; `devices` is a mesh that may know more of its devices.

    Explicit axes count even where all have size one: they are in the types of the arrays, so the
    program of one device has to run where they are manual.
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
            tuple(tuple(axis for axis in axes if axis in ours) for axes in leaf) for leaf in leaves
        ),
        tuple(axis for axis in slow_axes(mesh if devices is None else devices) if axis in ours),
    )
