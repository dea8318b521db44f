"""`Distribution`: options for distributing orthogonalisation over devices."""

from dataclasses import dataclass

from muonclip_jax._arguments import check_flags, check_number, check_type
from muonclip_jax.sharding.mesh_shardings import Axes


@dataclass(frozen=True)
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
