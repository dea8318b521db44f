"""The plan of a whole tree, from shapes, specs and shardings, and what a matrix costs."""

import dataclasses
import functools
import math

import jax.numpy as jnp

from muonclip_jax.newton_schulz import PolarPlan
from muonclip_jax.routing import MatrixSpec
from muonclip_jax.sharding.blocks import Axes, LeafAxes
from muonclip_jax.sharding.cut import Cut
from muonclip_jax.sharding.dcn_axes import sharing_axes
from muonclip_jax.sharding.local import plan_local
from muonclip_jax.sharding.options import Distribution
from muonclip_jax.sharding.plan import DistributionPlan
from muonclip_jax.sharding.rounds import plan_distribution

# By so much the busiest device may exceed the mean before an axis is cut, and so much a cut must
# save: it has collectives between the steps.
_EVEN = 1.1


@functools.lru_cache(maxsize=64)
def plan_for(
    polar: PolarPlan,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[str, ...],
    specs: tuple[MatrixSpec, ...],
    held: tuple[LeafAxes, ...],
    homes: tuple[LeafAxes, ...],
    sizes: tuple[tuple[str, int], ...],
    options: Distribution,
    slow: Axes = (),
    cuts: tuple[Cut, ...] = (),
) -> DistributionPlan:
    """Plans the distribution of a tree; everything is hashable, and plans are remembered.

    Where devices would have little or nothing to do, an axis is cut in two if that makes the
    busiest one's work less.

    Args:
        polar: How to orthogonalise.
        shapes: The leaves' shapes.
        dtypes: Their dtypes, by name.
        specs: Their normalised specs.
        held: The axes that shard their dimensions.
        homes: The axes that shall shard those of the results: the first ones of `held`.
        sizes: Names and sizes of the axes.
        options: Who shares the work.
        slow: The axes that cross a slow network.
        cuts: The ways in which an axis may be cut.

    Returns:
        The plan. One with a cut speaks of the axes after it.

    Raises:
        ValueError: If `options` names an axis that there is not.
    """
    names = tuple(name for name, _ in sizes)
    for axis in options.axes or ():
        if axis not in names:
            raise ValueError(
                f"Distribution's axes={options.axes} name {axis!r}, and the mesh has the axes "
                f"{', '.join(map(repr, names))}. Name some of those, or pass None for all."
            )

    def plan_on(
        held: tuple[LeafAxes, ...],
        homes: tuple[LeafAxes, ...],
        sizes: tuple[tuple[str, int], ...],
        options: Distribution,
    ) -> DistributionPlan:
        names = tuple(name for name, _ in sizes)
        leaves = [
            plan_local(
                shape,
                spec,
                axes,
                sharing_axes(names, slow, options.axes, axes, spec.dims),
                dict(sizes),
            )
            for shape, spec, axes in zip(shapes, specs, held, strict=True)
        ]
        gathered = [
            tuple(
                (dimension, axes[len(kept) :])
                for dimension, (axes, kept) in enumerate(zip(leaf, home, strict=True))
                if len(axes) > len(kept)
            )
            for leaf, home in zip(held, homes, strict=True)
        ]
        return plan_distribution(
            leaves, dtypes, sizes, options, functools.partial(_cost, polar, options), gathered
        )

    plan = plan_on(held, homes, sizes, options)
    if plan.busiest <= _EVEN * plan.mean:
        return plan
    best = plan
    for cut in cuts:
        other = plan_on(
            tuple(map(cut.leaf, held)),
            tuple(map(cut.leaf, homes)),
            cut.sizes(sizes),
            dataclasses.replace(options, axes=options.axes and cut.axes(options.axes)),
        )
        groups, within = cut.axes((cut.axis,))
        splits = [turn.exchange.split for turn in other.rounds]
        # Only neighbours share a matrix: another cut has groups of that size.
        is_strided = any(groups in split and within not in split for split in splits)
        if not is_strided and other.busiest < best.busiest:
            best = dataclasses.replace(other, cut=cut)
    return best if best.busiest * _EVEN < plan.busiest else plan


def _cost(
    polar: PolarPlan, options: Distribution, rows: int, columns: int, dtype: str, ways: int
) -> float:
    """FLOPs a device for one matrix split `ways` ways, with collectives at their price."""
    if polar.method == "svd":
        return math.inf if ways > 1 else float(rows * rows * columns)
    if ways == 1:
        return float(polar.resolve((rows, columns), dtype).flops)
    plan = dataclasses.replace(polar, method="standard").resolve((rows, columns), dtype)
    # A ring all-reduce sends everything twice, a gather once.
    sent = 3 * (ways - 1) / ways * rows * rows * jnp.dtype(plan.dtype).itemsize
    return plan.flops / ways + options.flops_per_byte * sent * len(plan.rows)
