"""Sharding the momentum over the axes that replicate its parameter."""

import dataclasses
import math
from collections.abc import Sequence

from muonclip_jax.matrices.distribution.sharding import MeshShardings
from muonclip_jax.routing import MatrixSpec, axes_tuple


def spread_momentum(
    shardings: MeshShardings, shapes: Sequence[tuple[int, ...]], specs: Sequence[MatrixSpec]
) -> MeshShardings:
    """Shards every leaf over the axes that replicate it too, for momentum (ZeRO stage 1).

    Args:
        shardings: The parameters'.
        shapes: The leaves' shapes.
        specs: Their normalised specs. Only axes of rows and columns that are in one part are
            sharded further, and only over axes that do not cross a slow network.

    Returns:
        The shardings of the momentum. A leaf keeps the parameter's where no axis can be divided.

    References:
        Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054; Liu et al. 2025, arXiv 2502.16982,
        Algorithm 1.
    """
    leaves = []
    for shape, spec, axes in zip(shapes, specs, shardings.leaves, strict=True):
        cut = {split.axis for split in spec.splits}
        candidates = [axis for dims in spec.dims for axis in axes_tuple(dims) if axis not in cut]
        leaf = list(axes)
        for name, size in shardings.sizes:
            if size == 1 or name in shardings.slow or any(name in names for names in leaf):
                continue
            lengths = {
                axis: shape[axis] // math.prod(dict(shardings.sizes)[other] for other in leaf[axis])
                for axis in candidates
            }
            fitting = [axis for axis in candidates if lengths[axis] % size == 0]
            if fitting:
                longest = max(fitting, key=lengths.__getitem__)
                leaf[longest] = (*leaf[longest], name)
        leaves.append(tuple(leaf))
    return dataclasses.replace(shardings, leaves=tuple(leaves))
