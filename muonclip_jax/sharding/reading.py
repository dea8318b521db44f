"""Shardings of the leaves of a tree: from their types, or given by the caller and aligned by path.

While tracing, an array on a mesh with Explicit axes has its sharding in its type. On a mesh with
Auto axes the compiler decides later, and the type only contains the mesh: there the shardings must
be given, as the tree `jax.tree.map(lambda x: x.sharding, params)`.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from muonclip_jax._tree import Tree, flatten_with_paths, tree_from
from muonclip_jax.sharding.mesh_shardings import (
    Axes,
    MeshShardings,
    axes_of,
    dcn_axes,
    sharding_of,
)

#: Where leaves are: a mesh, or the devices of arrays outside of a trace.
Place: TypeAlias = Mesh | AbstractMesh | frozenset[jax.Device]
#: Path, array (or its shape) and sharding of a leaf; the sharding is None where it is on no mesh.
PlacedLeaf: TypeAlias = tuple[str, Any, NamedSharding | None]

_TOGETHER = (
    "All leaves that one transformation trains must be on one mesh. Move them there by "
    "jax.device_put, or train the parts by transformations of their own, each called on its part."
)


def read_shardings(
    tree: Tree, param_shardings: Tree | None = None, warn: bool = True, required_by: str = ""
) -> MeshShardings | None:
    """Finds mesh and shardings of a tree of arrays.

    Without `param_shardings` they are read from the arrays. With `warn`, warns if there are several
    devices and the shardings are unknown; for a setting `required_by` that is an error. Returns
    None if there is one device and no Explicit axis, or all axes are manual, or the shardings are
    unknown.

    Raises:
        TypeError: As in `align_shardings`.
        ValueError: As in `align_shardings`; also if leaves are on different devices or meshes, or
            are unreduced over mesh axes, or required shardings are unknown.
    """
    seen: list[PlacedLeaf] = [(at, x, sharding_of(x)) for at, x in flatten_with_paths(tree)[0]]
    arrays = [
        (at, x) for at, x, _ in seen if isinstance(x, jax.Array) and not isinstance(x, Tracer)
    ]
    _check_together({frozenset(x.sharding.device_set): at for at, x in arrays if x.committed})
    mesh = next((sharding.mesh for *_, sharding in seen if sharding), None)
    placed, devices, unseen = seen, mesh, ()  # a mesh may know its devices where it is given alone
    if param_shardings is not None:
        placed = align_shardings(tree, param_shardings)
        _check_together({to.mesh: f"param_shardings at {at}" for at, _, to in placed if to})
        devices = next((sharding.mesh for *_, sharding in placed if sharding), None)
        mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    elif mesh is not None:
        unseen = _unseen_axes(mesh, seen, warn, required_by)
    if mesh is None or devices is None:
        return None
    if not mesh.empty and _differ(mesh, devices):
        raise ValueError(
            f"param_shardings is for {_describe(devices)}, and the parameters are on "
            f"{_describe(mesh)}. Use the current shardings of the parameters: "
            "jax.tree.map(lambda x: x.sharding, params)."
        )
    if mesh.empty or mesh.axis_types == devices.axis_types:
        mesh = devices
    ours = tuple(axis for axis in mesh.axis_names if axis not in (*mesh.manual_axes, *unseen))
    # Explicit axes matter even if all have size one: they are in the types of the arrays, so the
    # program of one device must run where they are manual.
    if all(axis not in mesh.explicit_axes and mesh.shape[axis] == 1 for axis in ours):
        return None
    _check_together({sharding.mesh: at for at, _, sharding in seen if sharding})
    for at, _, sharding in seen:
        check_reduced(at, sharding)
    specs = [(leaf.ndim, to.spec if to else PartitionSpec()) for _, leaf, to in placed]
    return MeshShardings(
        mesh,
        tuple((axis, mesh.shape[axis]) for axis in ours),
        tuple(axes_of(spec, rank, ours) for rank, spec in specs),
        tuple(axis for axis in dcn_axes(devices) if axis in ours),
    )


def _unseen_axes(
    mesh: Mesh | AbstractMesh, seen: Sequence[PlacedLeaf], warn: bool, required_by: str
) -> Axes:
    """The Auto axes of a mesh if leaves are traced, since their types do not contain them."""
    auto = tuple(axis for axis in mesh.auto_axes if mesh.shape[axis] > 1)
    if not auto or not any(isinstance(leaf, Tracer) for _, leaf, _ in seen):
        return ()
    if required_by:
        raise ValueError(
            f"{required_by} needs the shardings of the parameters, which are not known "
            f"while tracing on a mesh with Auto axes {auto}. Pass "
            "param_shardings=jax.tree.map(lambda x: x.sharding, params)."
        )
    if warn:
        warnings.warn(
            f"Muon's matrices are on a mesh of {mesh.size} devices with Auto axes {auto}, where "
            "their shardings cannot be seen while tracing: every device may repeat all of the "
            "orthogonalisation, or gather inside its iterations. Pass "
            "param_shardings=jax.tree.map(lambda x: x.sharding, params) to scale_by_muon, muon or "
            "muonclip.",
            stacklevel=3,
        )
    return auto


def _check_together(places: Mapping[Place, str]) -> None:
    """Raises a ValueError if leaves, one by its path for each place, are in different places."""
    # Meshes that know their devices first, so that the others' are compared with them.
    ordered = sorted(places, key=lambda place: isinstance(place, AbstractMesh))
    for other in ordered[1:]:
        types = [getattr(place, "axis_types", None) for place in (ordered[0], other)]
        if types[0] != types[1] or _differ(other, ordered[0]):
            raise ValueError(
                f"{places[ordered[0]]} is on {_describe(ordered[0])}, and {places[other]} on "
                f"{_describe(other)}. {_TOGETHER}"
            )


def _differ(place: Place, other: Place) -> bool:
    """Whether devices or axes differ, or the order of devices if both meshes know theirs."""
    if isinstance(place, frozenset) or isinstance(other, frozenset):
        return place != other
    if tuple(place.shape.items()) != tuple(other.shape.items()):
        return True
    if isinstance(place, AbstractMesh) or isinstance(other, AbstractMesh):
        return False
    return not np.array_equal(place.devices, other.devices)


def _describe(place: Place) -> str:
    if isinstance(place, AbstractMesh):
        return f"the mesh {place}"
    is_set = isinstance(place, frozenset)
    ids = sorted(x.id for x in place) if is_set else [x.id for x in place.devices.flat]
    devices = f"the devices [{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"
    return devices if is_set else f"the mesh {place}, {devices}"


def align_shardings(
    params: Tree, param_shardings: Tree, mesh: Mesh | None = None
) -> list[PlacedLeaf]:
    """Finds the sharding of every leaf in a tree of shardings, by path.

    `param_shardings` is a pytree of `NamedSharding` with an entry for every leaf or subtree of
    `params`; a single one for all; or a function from `params` to such a pytree. It may have
    entries for leaves that are masked in `params`, and `PartitionSpec`s if `mesh` is given. The
    sharding is None where the entry is None or a single device.

    Raises:
        TypeError: If an entry is not a sharding.
        ValueError: If a leaf has no entry, or its entry does not fit its shape.
    """
    param_shardings = tree_from(param_shardings, params, is_entry)
    entries = dict(flatten_with_paths(param_shardings, is_leaf=is_entry)[0])
    aligned = []
    for path, leaf in flatten_with_paths(params)[0]:
        covering = path
        while covering and covering not in entries:
            covering = covering.rpartition("/")[0]
        if covering not in entries:
            raise ValueError(
                f"{path} of shape {tuple(leaf.shape)} has no entry in param_shardings, whose "
                f"entries are {', '.join(map(repr, list(entries)[:8])) or 'none'}. Pass the tree "
                "jax.tree.map(lambda x: x.sharding, params) of all parameters."
            )
        aligned.append((path, leaf, _checked(path, tuple(leaf.shape), entries[covering], mesh)))
    return aligned


def is_entry(x: object) -> bool:
    """Whether `x` is an entry of a tree of shardings, and not a subtree."""
    return x is None or isinstance(x, Sharding | PartitionSpec)


def check_reduced(path: str, sharding: NamedSharding | None) -> None:
    """Raises a ValueError if a sharding is unreduced over mesh axes."""
    if sharding is not None and sharding.spec.unreduced:
        raise ValueError(
            f"{path} is unreduced over the mesh axes {tuple(sorted(sharding.spec.unreduced))}: the "
            "sum over them is missing. Compute it before the update: "
            "jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding), grads, params)."
        )


def _checked(
    path: str, shape: tuple[int, ...], entry: object, mesh: Mesh | AbstractMesh | None
) -> NamedSharding | None:
    """Returns the sharding that an entry of `param_shardings` gives a leaf."""
    if isinstance(entry, NamedSharding):
        mesh, entry = entry.mesh, entry.spec
    if entry is None or (isinstance(entry, Sharding) and entry.num_devices == 1):
        return None
    if mesh is None or not isinstance(entry, PartitionSpec):
        raise TypeError(
            f"param_shardings has {entry!r} at {path!r}, expected a jax.sharding.NamedSharding. "
            "Write NamedSharding(mesh, PartitionSpec(...)), or take it from the parameter: "
            "x.sharding."
        )
    try:
        sharding = NamedSharding(mesh, entry)
        sharding.check_compatible_aval(shape)
        sharding.shard_shape(shape)
    except Exception as error:  # JAX's for duplicates is private
        raise ValueError(
            f"param_shardings has {entry} at {path!r}, which does not fit the shape {shape} on a "
            f"mesh of {dict(mesh.shape)}. Give each dimension mesh axes that divide it, each axis "
            f"once, or None. JAX says: {error}"
        ) from error
    check_reduced(f"param_shardings at {path}", sharding)
    if PartitionSpec.UNCONSTRAINED in tuple(entry):
        raise ValueError(
            f"param_shardings has {entry} at {path!r}, which leaves a dimension unconstrained. "
            "Give the mesh axes that shard it, or None."
        )
    return sharding
