"""Whether all leaves of a tree are on one mesh, as one program needs; errors that name two."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding

#: Path, array and sharding of every leaf; the sharding is None where it is on no mesh.
Leaves: TypeAlias = Sequence[tuple[str, Any, NamedSharding | None]]

_TOGETHER = (
    "All leaves that one transformation trains must be on one mesh. Move them there by "
    "jax.device_put, or train the parts by transformations of their own, each called on its part."
)


def check_devices(leaves: Leaves) -> None:
    """Raises a ValueError where arrays outside of a trace are bound to different devices."""
    devices: dict[frozenset[jax.Device], str] = {}
    for path, leaf, _ in leaves:
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed:
            devices.setdefault(frozenset(leaf.sharding.device_set), path)
    if len(devices) > 1:
        (first, path), (second, other) = list(devices.items())[:2]
        raise ValueError(
            f"{path} is on the devices {_ids(first)}, and {other} on {_ids(second)}. {_TOGETHER}"
        )


def check_one_mesh(leaves: Leaves, prefix: str = "") -> None:
    """Raises a ValueError where shardings are of different meshes, or leave a sum to be taken.

    Args:
        leaves: The leaves.
        prefix: What the error says before a path.
    """
    meshes: dict[Mesh | AbstractMesh, str] = {}
    for path, _, sharding in leaves:
        if sharding is not None:
            check_reduced(prefix + path, sharding)
            meshes.setdefault(sharding.mesh, prefix + path)
    # Those that know their devices first, so that the others' are compared with them.
    order = sorted(meshes, key=lambda mesh: not isinstance(mesh, Mesh))
    for other in order[1:]:
        first = order[0]
        if other.axis_types != first.axis_types or differ(other, first):
            raise ValueError(
                f"{meshes[first]} is on the mesh {describe(first)}, and {meshes[other]} on "
                f"{describe(other)}. {_TOGETHER}"
            )


def check_reduced(path: str, sharding: NamedSharding) -> None:
    """Raises a ValueError where a sum over mesh axes has still to be taken."""
    if sharding.spec.unreduced:
        raise ValueError(
            f"{path} is unreduced over the mesh axes {tuple(sorted(sharding.spec.unreduced))}: the "
            "sum over them has still to be taken. Take it before the update: "
            "jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding), grads, params)."
        )


def differ(mesh: Mesh | AbstractMesh, other: Mesh | AbstractMesh) -> bool:
    """Whether axes differ, or the order of the devices where both know theirs."""
    if tuple(mesh.shape.items()) != tuple(other.shape.items()):
        return True
    if mesh is other or not (isinstance(mesh, Mesh) and isinstance(other, Mesh)):
        return False
    return np.asarray(mesh.devices).tolist() != np.asarray(other.devices).tolist()


def describe(mesh: Mesh | AbstractMesh) -> str:
    """A mesh in an error: its axes with sizes and types, and its devices in their order."""
    axes = ", ".join(
        f"{name!r}: {size} {kind.name}"
        for (name, size), kind in zip(mesh.shape.items(), mesh.axis_types, strict=True)
    )
    return (
        f"({axes}; devices {_ids(np.asarray(mesh.devices).flat)})"
        if isinstance(mesh, Mesh)
        else f"({axes})"
    )


def _ids(devices: Iterable[jax.Device]) -> str:
    ids = [device.id for device in devices]
    ids = sorted(ids) if isinstance(devices, frozenset) else ids
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"
