"""A mesh, which of its axes shard each dimension of each leaf, and the options of a caller.

Devices of one slice (a TPU pod, the GPUs of one NVLink domain) communicate over its own network;
slices communicate over the data-centre network (DCN), tens of times slower. JAX numbers the slices:
`device.slice_index`. A mesh axis is a DCN axis if all devices along it are in different slices. An
axis with several devices per slice is not: without it, work would be replicated inside of slices
too. Process numbers do not help, since one slice has many hosts.

Matrices that are replicated along a DCN axis are not distributed over it: every slice processes all
of them without communication. Matrices that are sharded over a DCN axis must be sent over it
anyway; they are distributed over it, which sends less than an all-gather.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from muonclip_jax._arguments import check_flags, check_number, check_type
from muonclip_jax._devices import entry_axes
from muonclip_jax._tree import Tree, flatten_with_paths
from muonclip_jax.routing import MatrixSpec, normalized_axes

#: Names of mesh axes, the slowest first.
Axes: TypeAlias = tuple[str, ...]
#: Mesh axes that shard each dimension of a leaf.
LeafAxes: TypeAlias = tuple[Axes, ...]
#: Sizes of mesh axes by name.
Sizes: TypeAlias = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How orthogonalisation is distributed over the devices of a mesh.

    Attributes:
        axes: The mesh axes over which matrices are distributed. Along other axes the work is
            replicated, and matrices sharded over them are all-gathered. None means all axes, except
            that only matrices sharded over a DCN axis (along which `device.slice_index` differs)
            are distributed over it, since they must cross the slow network anyway.
        max_matrix_bytes: A matrix larger than this (in the gradient's dtype) is never gathered on
            one device: its columns are distributed over a group of devices.
        max_stack_bytes: Maximum size of the stack of whole matrices that a device processes at
            once, which bounds temporary memory; a single matrix may exceed it. Without a mesh it is
            an upper bound; stacks are smaller on CPUs and on devices with little memory.
        flops_per_byte: Number of floating-point operations that take as long as sending one byte to
            another device. If there are fewer matrices than devices, the columns of each matrix are
            distributed along some mesh axes where this is faster by this estimate. Infinity never
            splits matrices for speed. The default is typical of current accelerators in 16-bit
            arithmetic.
        shard_momentum: Whether to also shard the momentum over the mesh axes along which its
            parameter is replicated (ZeRO-1); updates are sharded like the parameters.

    Raises:
        ValueError: At construction, for a bound that is not positive, or a repeated axis.
        TypeError: At construction, for a value of another type.

    Example:
        >>> Distribution(axes=("fsdp",)).axes
        ('fsdp',)
    """

    axes: Axes | None = None
    max_matrix_bytes: int = 2**30
    max_stack_bytes: int = 2**28
    flops_per_byte: float = 2000.0
    shard_momentum: bool = False

    def __post_init__(self) -> None:
        check_type("Distribution's axes", self.axes, tuple | None, "a tuple of names of mesh axes")
        if len(set(self.axes or ())) < len(self.axes or ()):
            raise ValueError(
                f"Distribution's axes must be different names of mesh axes, got {self.axes}."
            )
        for name, within, instead in (
            ("max_matrix_bytes", "positive", "2**30"),
            ("max_stack_bytes", "positive", "2**28"),
            ("flops_per_byte", "not negative", "a peak rate over a link's bandwidth or infinity"),
        ):
            value = getattr(self, name)
            check_number(f"Distribution's {name}", value, within, f"Write, for example, {instead}.")
        check_flags(shard_momentum=self.shard_momentum)


@dataclasses.dataclass(frozen=True)
class MeshShardings:
    """A mesh as `jax.shard_map` takes it, and the axes that shard each dimension of each leaf."""

    mesh: Mesh | AbstractMesh
    #: Names and sizes of the axes that are not manual, the slowest first.
    sizes: tuple[tuple[str, int], ...]
    leaves: tuple[LeafAxes, ...]
    #: Those of the axes that cross the network between slices.
    dcn: Axes = ()

    def shardings(self) -> list[NamedSharding]:
        """The leaves' shardings."""
        return [NamedSharding(self.mesh, spec_of(leaf)) for leaf in self.leaves]


def place(x: jax.Array, sharding: NamedSharding, *, is_traced: bool) -> jax.Array:
    """Reshards `x` for all types of mesh axes; in a trace also a constant, on an abstract mesh."""
    if not (is_traced or isinstance(x, Tracer)):
        return jax.device_put(x, on_devices(sharding))
    mesh, constrain = sharding.mesh, jax.lax.with_sharding_constraint
    for kind, move in ((mesh.explicit_axes, jax.reshard), (mesh.auto_axes, constrain)):
        if kind:
            spec = spec_of(axes_of(sharding.spec, x.ndim, kind))
            x = move(x, NamedSharding(mesh, spec))
    return x


def on_devices(sharding: NamedSharding) -> NamedSharding:
    """The same sharding on a mesh that knows its devices: the one that `jax.set_mesh` set."""
    known, entries = sharding.mesh, list(sharding.spec)
    # As compiled programs return it on Auto axes; a step would be compiled again for its own state.
    while not known.explicit_axes and entries[-1:] == [None]:
        entries.pop()
    mesh = known if isinstance(known, Mesh) else jax.sharding.get_mesh()
    if mesh.shape != known.shape:
        raise ValueError(
            f"Arrays would be created on the mesh {dict(known.shape)}, whose devices are "
            "unknown: the parameters are from jax.eval_shape, or have an AbstractMesh. Call init "
            "inside of `with jax.set_mesh(mesh):`, or pass it the parameters."
        )
    return NamedSharding(mesh, PartitionSpec(*entries))


def sharding_of(x: object) -> NamedSharding | None:
    """The known sharding: an array's own, or that of a traced array's type."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return sharding


def axes_of(spec: PartitionSpec, rank: int, among: Axes) -> LeafAxes:
    """The mesh axes, of those given, that shard each of `rank` dimensions."""
    entries = (*spec, *[None] * (rank - len(spec)))
    return tuple(tuple(axis for axis in entry_axes(x) if axis in among) for x in entries)


def spec_of(leaf: LeafAxes) -> PartitionSpec:
    """The spec of a leaf whose dimensions are sharded by these axes."""
    return PartitionSpec(*(axes or None for axes in leaf))


def slice_of(device: object) -> int:
    """The index of a device's slice; 0 if the platform has none."""
    return getattr(device, "slice_index", None) or 0


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
    numbers = np.vectorize(slice_of, otypes=[int])(mesh.devices)
    return tuple(
        name
        for axis, name in enumerate(mesh.axis_names)
        if numbers.shape[axis] > 1 and np.all(np.diff(np.sort(numbers, axis=axis), axis=axis))
    )


def zero1_shardings(
    shardings: MeshShardings, shapes: Sequence[tuple[int, ...]], specs: Sequence[MatrixSpec]
) -> MeshShardings:
    """Shards the momentum also over mesh axes along which its parameter is replicated (ZeRO-1).

    Only row and column axes that are not split are sharded further, and not over DCN axes. A leaf
    without a divisible axis keeps the parameter's sharding.

    References:
        Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054; Liu et al. 2025, arXiv 2502.16982,
        Algorithm 1.
    """
    sizes, auto = dict(shardings.sizes), set(shardings.mesh.auto_axes)
    leaves = []
    for shape, spec, axes in zip(shapes, specs, shardings.leaves, strict=True):
        splits = {split.axis for split in spec.splits}
        candidates = [axis for axis in sum(normalized_axes(spec), ()) if axis not in splits]
        leaf = list(axes)
        # JAX lists the Explicit axes of a dimension before the Auto ones.
        for name in sorted(sizes, key=auto.__contains__):
            if sizes[name] == 1 or name in shardings.dcn or any(name in names for names in leaf):
                continue
            lengths = {
                axis: shape[axis] // math.prod(sizes[other] for other in leaf[axis])
                for axis in candidates
                if name in auto or not auto.intersection(leaf[axis])
            }
            fitting = [axis for axis, length in lengths.items() if length % sizes[name] == 0]
            if fitting:
                longest = max(fitting, key=lengths.__getitem__)
                leaf[longest] = (*leaf[longest], name)
        leaves.append(tuple(leaf))
    return dataclasses.replace(shardings, leaves=tuple(leaves))


def check_momentum(momentum: Tree, shardings: MeshShardings) -> None:
    """Raises a ValueError if Explicit axes shard a momentum differently from its gradient."""
    explicit = shardings.mesh.explicit_axes
    leaves = flatten_with_paths(momentum)[0]
    for (path, leaf), to in zip(leaves, shardings.shardings(), strict=True):
        known, wanted = sharding_of(leaf), axes_of(to.spec, leaf.ndim, explicit)
        axes = () if known is None else axes_of(known.spec, leaf.ndim, explicit)
        # An unsharded dimension takes over the sharding of the gradient's.
        if any(mine and mine != other for mine, other in zip(axes, wanted, strict=False)):
            raise ValueError(
                f"{path}: the Explicit mesh axes shard the momentum's dimensions over {axes}, and "
                f"with this gradient they must be {wanted}. Give gradients the shardings of the "
                "parameters: jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding), "
                "grads, params)."
            )
