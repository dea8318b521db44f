"""`Distribution`: what a caller may say about how devices share the work."""

from dataclasses import dataclass

from muonclip_jax.sharding.mesh_shardings import Axes


@dataclass(frozen=True)
class Distribution:
    """How the devices of a mesh share the orthogonalisation.

    Attributes:
        axes: The mesh axes whose devices share the work. Along the others the work is repeated, and
            a matrix that they shard is gathered. None is all axes; but DCN axes (along which every
            device has another `device.slice_index`) share only the matrices that they shard, which
            have to cross the slow network in any case.
        max_matrix_bytes: A matrix larger than this (in the gradient's dtype) is never whole on one
            device: a group of devices shares its columns.
        max_stack_bytes: Bound on the stack of whole matrices that a device works on at once; a
            single matrix may exceed it. It bounds temporary memory. Without a mesh it is an upper
            bound too; stacks are smaller on a CPU and on a device of little memory.
        flops_per_byte: How many floating-point operations take as long as sending a byte to another
            device. Where there are fewer matrices than devices, the devices along some mesh axes
            share the columns of each matrix if that is faster by this measure. Infinity never
            splits for speed. The default is near that of current accelerators in 16-bit arithmetic.
        shard_momentum: Whether to shard the momentum also over the axes that replicate its
            parameter (ZeRO-1); updates are sharded as the parameters are.

    Raises:
        ValueError: At construction, for a bound that is not positive, or an axis named twice.
        TypeError: At construction, for axes that are no tuple.

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
        if self.axes is not None:
            if not isinstance(self.axes, tuple):
                raise TypeError(
                    "Distribution's axes must be a tuple of names of mesh axes or None, got "
                    f"{self.axes!r}. Write, for example, ('fsdp',)."
                )
            if len(set(self.axes)) < len(self.axes):
                raise ValueError(
                    f"Distribution's axes must be different names of mesh axes, got {self.axes}."
                )
        for name in ("max_matrix_bytes", "max_stack_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"Distribution's {name} must be a positive number of bytes, got "
                    f"{getattr(self, name)}. Write, for example, 2**30."
                )
        if not self.flops_per_byte >= 0:
            raise ValueError(
                f"Distribution's flops_per_byte must not be negative, got {self.flops_per_byte}. "
                "Write a peak rate over a link's bandwidth, such as 2000, or float('inf')."
            )
