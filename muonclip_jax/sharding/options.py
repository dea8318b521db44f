"""`Distribution`: what a caller may say about how devices share the work."""

from dataclasses import dataclass

from muonclip_jax.sharding.blocks import Axes


@dataclass(frozen=True)
class Distribution:
    """How the devices of a mesh share the orthogonalisation.

    Attributes:
        axes: The mesh axes whose devices share the work. Along the others the work is repeated, and
            a matrix that they shard is gathered. None is all of them, but for axes that cross the
            slow network between slices (along which every device has another
            `device.slice_index`): those share only matrices that they shard, which have to cross in
            any case.
        max_matrix_bytes: A matrix larger than this (in the gradient's dtype) is never made whole on
            one device: a group of devices shares its columns.
        max_stack_bytes: Bound on the stack of whole matrices that a device works on at once; a
            single matrix may exceed it. It bounds temporary memory. On one device without a mesh it
            is an upper bound too; stacks are smaller on a CPU and on a device of little memory.
        flops_per_byte: What a byte sent between devices is worth, in floating-point operations.
            Where a mesh has more devices than matrices, a matrix is split over a group of devices
            if that is cheaper by this measure: those along an axis or, where all axes are Auto and
            no mesh is set (`jax.set_mesh`), some neighbours along one. Infinity never splits for
            speed. The default is near what current accelerators have in 16-bit arithmetic.
        shard_momentum: Whether to shard the momentum also over the axes that replicate its
            parameter (ZeRO stage 1); updates still come home as the parameters are.

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
