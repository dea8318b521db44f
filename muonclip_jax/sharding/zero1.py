"""ZeRO-1: the momentum is also sharded over mesh axes along which its parameter is replicated."""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import AxisType

from muonclip_jax._tree import Tree, flatten_with_paths
from muonclip_jax.routing import MatrixSpec, axes_tuple
from muonclip_jax.sharding.mesh_shardings import LeafAxes, MeshShardings, axes_of, sharding_of


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
    sizes = dict(shardings.sizes)
    auto = {name for name, kind in shardings.axis_types.items() if kind == AxisType.Auto}
    leaves = []
    for shape, spec, axes in zip(shapes, specs, shardings.leaves, strict=True):
        splits = {split.axis for split in spec.splits}
        candidates = [axis for dims in spec.dims for axis in axes_tuple(dims) if axis not in splits]
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
    kinds = shardings.axis_types

    def explicit(axes: LeafAxes) -> LeafAxes:
        return tuple(
            tuple(name for name in names if kinds.get(name) == AxisType.Explicit) for names in axes
        )

    leaves = flatten_with_paths(momentum)[0]
    for (path, leaf), wanted in zip(leaves, map(explicit, shardings.leaves), strict=True):
        known = sharding_of(leaf)
        axes = () if known is None else explicit(axes_of(known.spec, leaf.ndim))
        # An unsharded dimension takes over the sharding of the gradient's.
        if any(mine and mine != other for mine, other in zip(axes, wanted, strict=False)):
            raise ValueError(
                f"{path}: the Explicit mesh axes shard the momentum's dimensions over {axes}, and "
                f"with this gradient they must be {wanted}. Give gradients the shardings of the "
                "parameters: jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding), "
                "grads, params)."
            )
