"""`MeshShardings`: a mesh, and which of its axes shard each dimension of each leaf."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from muonclip_jax._devices import entry_axes

#: Names of mesh axes, the slowest first.
Axes: TypeAlias = tuple[str, ...]
#: Mesh axes that shard each dimension of a leaf.
LeafAxes: TypeAlias = tuple[Axes, ...]
#: Sizes of mesh axes by name.
Sizes: TypeAlias = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class MeshShardings:
    """A mesh as `jax.shard_map` takes it, and the axes that shard each dimension of each leaf."""

    mesh: Mesh | AbstractMesh
    #: Names and sizes of the axes that are not manual, the slowest first.
    sizes: tuple[tuple[str, int], ...]
    leaves: tuple[LeafAxes, ...]
    #: Those of the axes that cross the network between slices.
    dcn: Axes = ()

    def of(self, leaves: Sequence[int]) -> "MeshShardings":
        """The shardings of some of the leaves."""
        return dataclasses.replace(self, leaves=tuple(self.leaves[leaf] for leaf in leaves))

    @property
    def inside_manual(self) -> bool:
        """Whether this is inside a `shard_map` over other axes of the mesh."""
        return AxisType.Manual in self.mesh.axis_types

    @property
    def axis_types(self) -> dict[str, AxisType]:
        """The type of each axis of the mesh."""
        return dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))

    def shardings(self) -> tuple[NamedSharding, ...]:
        """The leaves' shardings."""
        return tuple(NamedSharding(self.mesh, spec) for spec in self.specs())

    def specs(self) -> tuple[PartitionSpec, ...]:
        """The leaves' partition specs."""
        return tuple(PartitionSpec(*(axes or None for axes in leaf)) for leaf in self.leaves)


def place(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Reshards `x`, traced or not, for all types of mesh axes."""
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
    """The same sharding on a mesh that knows its devices: the one that `jax.set_mesh` set."""
    if isinstance(sharding.mesh, Mesh):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.shape != sharding.mesh.shape:
        raise ValueError(
            f"Arrays would be created on the mesh {dict(sharding.mesh.shape)}, whose devices are "
            "unknown: the parameters are from jax.eval_shape, or have an AbstractMesh. Call init "
            "inside of `with jax.set_mesh(mesh):`, or pass it the parameters."
        )
    return NamedSharding(mesh, sharding.spec)


def sharding_of(x: object) -> NamedSharding | None:
    """The known sharding: an array's own, or that of a traced array's type."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return sharding


def axes_of(spec: PartitionSpec, rank: int) -> LeafAxes:
    """The mesh axes that shard each of `rank` dimensions."""
    entries = entries_of(spec)
    return tuple(map(entry_axes, entries + (None,) * (rank - len(entries))))


def entries_of(spec: PartitionSpec) -> tuple[Any, ...]:
    """The entries of a spec, which JAX does not unpack if it has unreduced axes."""
    # Older specs have no `partitions`.
    return tuple(getattr(spec, "partitions", spec))
