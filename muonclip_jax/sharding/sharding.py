"""How leaves lie on a mesh, as values: `MeshShardings`, what an array tells, and placing one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from muonclip_jax._devices import entry_axes
from muonclip_jax.sharding.blocks import Axes, LeafAxes


@dataclasses.dataclass(frozen=True)
class MeshShardings:
    """A mesh and the axes of it that shard every leaf.

    Attributes:
        mesh: The mesh, as `jax.shard_map` takes it.
        sizes: Names and sizes of the axes that are not manual already, the slowest first.
        leaves: For every leaf, the axes that shard each of its dimensions.
        slow: Those of the axes that cross a slow network.
    """

    mesh: Mesh | AbstractMesh
    sizes: tuple[tuple[str, int], ...]
    leaves: tuple[LeafAxes, ...]
    slow: Axes = ()

    def of(self, leaves: Sequence[int]) -> "MeshShardings":
        """The shardings of some of the leaves."""
        return dataclasses.replace(self, leaves=tuple(self.leaves[leaf] for leaf in leaves))

    @property
    def inside_manual(self) -> bool:
        """Whether this is inside of a `shard_map` over other axes of the mesh."""
        return AxisType.Manual in self.mesh.axis_types

    def shardings(self) -> tuple[NamedSharding, ...]:
        """The leaves' shardings."""
        return tuple(NamedSharding(self.mesh, spec) for spec in self.specs())

    def specs(self) -> tuple[PartitionSpec, ...]:
        """The leaves' partition specs."""
        return tuple(PartitionSpec(*(axes or None for axes in leaf)) for leaf in self.leaves)


def place(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Brings `x` to a sharding, whether it is traced or not and whatever the types of the axes."""
    if not isinstance(x, Tracer):
        return jax.device_put(x, on_devices(sharding))
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    for kind, move in (
        (AxisType.Explicit, jax.reshard),
        (AxisType.Auto, jax.lax.with_sharding_constraint),
    ):
        if kind in kinds.values():
            spec = [
                tuple(axis for axis in axes if kinds[axis] == kind) or None
                for axes in axes_of(sharding.spec, x.ndim)
            ]
            x = move(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    return x


def on_devices(sharding: NamedSharding) -> NamedSharding:
    """The same sharding on a mesh that knows its devices: the one that `jax.set_mesh` set.

    Raises:
        ValueError: If no such mesh is set.
    """
    if isinstance(sharding.mesh, Mesh):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.shape != sharding.mesh.shape:
        raise ValueError(
            f"Arrays are to be made on the mesh {dict(sharding.mesh.shape)}, whose devices are not "
            "known: their shapes come from jax.eval_shape, or name an AbstractMesh. Call init "
            "inside of `with jax.set_mesh(mesh):`, or give it the parameters themselves."
        )
    return NamedSharding(mesh, sharding.spec)


def alike(leaves: Sequence[jax.Array]) -> list[list[int]]:
    """Groups leaves by the manual axes that they differ along, where JAX keeps account of those.

    In a `shard_map` with `check_vma` a stack of two leaves differs along whatever one of them
    differs along, and so would all its results: a dense kernel that shares a stack with experts
    would come out as one that its `out_specs` may not call replicated.
    """
    groups: dict[Any, list[int]] = {}
    for number, leaf in enumerate(leaves):
        groups.setdefault(getattr(jax.typeof(leaf), "manual_axis_type", None), []).append(number)
    return list(groups.values())


def sharding_of(x: Any) -> NamedSharding | None:
    """What is known now: of an array, where it lies; of a traced one, what its type says."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return sharding


def axes_of(spec: PartitionSpec, rank: int) -> LeafAxes:
    """The mesh axes that shard each of `rank` dimensions."""
    entries = entries_of(spec)
    return tuple(map(entry_axes, entries + (None,) * (rank - len(entries))))


def entries_of(spec: PartitionSpec) -> tuple[Any, ...]:
    """The entries of a spec, which JAX does not unpack where it has axes to be reduced over too."""
    # Older specs have no `partitions`.
    return tuple(getattr(spec, "partitions", spec))
