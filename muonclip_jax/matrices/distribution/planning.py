"""The plan of a whole tree, from shapes, specs and shardings, and what a matrix costs."""

import dataclasses
import functools
import math

import jax.numpy as jnp

from muonclip_jax.layouts import MatrixSpec
from muonclip_jax.matrices.distribution.blocks import Axes, LeafAxes
from muonclip_jax.matrices.distribution.local import plan_local
from muonclip_jax.matrices.distribution.options import Distribution
from muonclip_jax.matrices.distribution.plan import DistributionPlan
from muonclip_jax.matrices.distribution.rounds import plan_distribution
from muonclip_jax.matrices.distribution.slow import sharing_axes
from muonclip_jax.polar import PolarPlan


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
) -> DistributionPlan:
    """Plans the distribution of a tree; everything is hashable, and plans are remembered.

    Args:
        polar: How to orthogonalise.
        shapes: The leaves' shapes.
        dtypes: Their dtypes, by name.
        specs: Their normalised specs.
        held: The axes that shard their dimensions.
        homes: The axes that shall shard those of the results.
        sizes: Names and sizes of the axes.
        options: Who shares the work.
        slow: The axes that cross a slow network.

    Returns:
        The plan.

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
    shared = [
        sharing_axes(names, slow, options.axes, axes, spec.dims)
        for spec, axes in zip(specs, held, strict=True)
    ]
    leaves, results = (
        [
            plan_local(shape, spec, axes, sharing, dict(sizes))
            for shape, spec, axes, sharing in zip(shapes, specs, sharded, shared, strict=True)
        ]
        for sharded in (held, homes)
    )
    return plan_distribution(
        leaves, results, dtypes, sizes, options, functools.partial(_cost, polar, options)
    )


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
