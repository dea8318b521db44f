"""Orthogonalising the leaves of a tree: one device alone, or the devices of a mesh together."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from muonclip_jax.matrices.distribution.blocks import Axes
from muonclip_jax.matrices.distribution.cut import Cut, possible_cuts
from muonclip_jax.matrices.distribution.map import map_distributed
from muonclip_jax.matrices.distribution.options import Distribution
from muonclip_jax.matrices.distribution.plan import DistributionPlan, Job, Round
from muonclip_jax.matrices.distribution.planning import plan_for
from muonclip_jax.matrices.distribution.sharding import MeshShardings, place
from muonclip_jax.matrices.one_device import OneDevicePlan, orthogonalize_on_one_device
from muonclip_jax.newton_schulz import PolarPlan, apply_polar
from muonclip_jax.newton_schulz.partitioned import apply_polar_partitioned
from muonclip_jax.routing import MatrixSpec

# On a CPU one product fills the cores, so a stack is worked on matrix by matrix: up to this many
# written out, more in a loop.
_UNROLLED_ON_CPU = 4


def orthogonalize_leaves(
    polar: PolarPlan,
    eps: jax.typing.ArrayLike,
    combine: Callable[..., jax.Array],
    how: Any,
    count: jax.Array,
    trees: Sequence[Sequence[jax.Array]],
    specs: Sequence[MatrixSpec],
    shardings: MeshShardings | None,
    homes: MeshShardings | None = None,
    axis_name: Axes = (),
    options: Distribution | None = None,
) -> list[jax.Array]:
    """Replaces every matrix of `combine(how, *leaves)` by its polar factor.

    Args:
        polar: How to orthogonalise; it has its platform (`decide_platform`).
        eps: Smallest divisor, as in `orthogonalize`.
        combine: As for `orthogonalize_on_one_device`.
        how: What `combine` needs besides, arrays or None, the same on all devices.
        count: As for `orthogonalize_on_one_device`.
        trees: Leaves of equal shapes, once or several times; the last one's dtype is the result's.
        specs: The normalised spec of each.
        shardings: The mesh, and how it shards the leaves; None where there is none, or `axis_name`
            alone counts.
        homes: How the results shall be sharded; None is as the leaves are.
        axis_name: Names of axes that are mapped already (by `pmap` or `shard_map`) and along which
            the leaves are equal.
        options: Who shares the work; None is `Distribution()`.

    Returns:
        The results.

    Raises:
        ValueError: If `options` names an axis that there is not, or `axis_name` is not mapped.
    """
    options = Distribution() if options is None else options
    mapped = tuple((name, _mapped_size(name)) for name in axis_name)
    sizes = mapped + (shardings.sizes if shardings else ())
    if math.prod(size for _, size in sizes) == 1:
        plan = OneDevicePlan(tuple(specs), options.max_stack_bytes)
    else:
        leaves = trees[-1]
        held = shardings.leaves if shardings else tuple(((),) * leaf.ndim for leaf in leaves)
        plan = plan_for(
            polar,
            tuple(leaf.shape for leaf in leaves),
            tuple(leaf.dtype.name for leaf in leaves),
            tuple(specs),
            held,
            homes.leaves if homes else held,
            sizes,
            options,
            shardings.slow if shardings else (),
            possible_cuts(shardings.mesh, sizes, shardings.slow) if shardings else (),
        )
    if shardings is None:
        return _local_program(polar, plan, combine, eps, how, count, *trees)
    homes = homes or shardings
    cut = plan.cut if isinstance(plan, DistributionPlan) else None
    seen, seen_homes = (_cut(one, cut) for one in (shardings, homes))
    results = _program(
        polar,
        plan,
        combine,
        seen.mesh,
        frozenset(name for name, _ in seen.sizes),
        seen.specs(),
        seen_homes.specs(),
        eps,
        how,
        count,
        [list(tree) for tree in trees],
    )
    if cut:
        # What comes after shall see the caller's mesh.
        results = [place(x, home) for x, home in zip(results, homes.shardings(), strict=True)]
    return results


def _cut(shardings: MeshShardings, cut: Cut | None) -> MeshShardings:
    if cut is None:
        return shardings
    assert isinstance(shardings.mesh, Mesh)
    return MeshShardings(
        cut.mesh(shardings.mesh),
        cut.sizes(shardings.sizes),
        tuple(map(cut.leaf, shardings.leaves)),
        shardings.slow,
    )


def _mapped_size(name: str) -> int:
    try:
        return lax.axis_size(name)
    except NameError as error:
        raise ValueError(
            f"axis_name={name!r} is not the name of a mapped axis here. Call update inside "
            f"jax.pmap(..., axis_name={name!r}) or jax.shard_map over it, or leave axis_name out."
        ) from error


def _work(polar: PolarPlan, eps: jax.typing.ArrayLike, stack: jax.Array, split: Axes) -> jax.Array:
    if split:
        return apply_polar_partitioned(polar, stack, split, eps)
    count = stack.shape[0]
    if polar.platform != "cpu" or count == 1:
        return apply_polar(polar, stack, eps)
    if count <= _UNROLLED_ON_CPU:
        return jnp.stack([apply_polar(polar, x, eps) for x in stack])
    return lax.map(lambda x: apply_polar(polar, x, eps), stack)


def _local_program(
    polar: PolarPlan,
    plan: DistributionPlan | OneDevicePlan,
    combine: Callable[..., jax.Array],
    eps: jax.typing.ArrayLike,
    how: Any,
    count: jax.Array,
    *trees: Sequence[jax.Array],
) -> list[jax.Array]:
    if isinstance(plan, OneDevicePlan):
        return orthogonalize_on_one_device(polar, plan, combine, eps, how, count, *trees)
    return map_distributed(
        lambda stack, split: _work(polar, eps, stack, split),
        functools.partial(combine, how),
        trees,
        plan,
        functools.partial(_sent, polar),
    )


def _sent(polar: PolarPlan, job: Job, turn: Round) -> str:
    """Results travel home in what they were computed in, where that is narrower."""
    if turn.exchange.split and polar.method != "svd":
        polar = dataclasses.replace(polar, method="standard")
    resolved = polar.resolve((job.rows, job.columns), job.dtype)
    _, work = resolved.dtypes(jnp.dtype(job.dtype))
    return job.dtype if work.itemsize >= jnp.dtype(job.dtype).itemsize else work.name


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _program(
    polar: PolarPlan,
    plan: DistributionPlan | OneDevicePlan,
    combine: Callable[..., jax.Array],
    mesh: Mesh | AbstractMesh,
    names: frozenset[str],
    specs: tuple[PartitionSpec, ...],
    homes: tuple[PartitionSpec, ...],
    eps: jax.typing.ArrayLike,
    how: Any,
    count: jax.Array,
    trees: list[list[jax.Array]],
) -> list[jax.Array]:
    # Results are equal along the axes that replicate them because all of them gather the same
    # matrices; JAX cannot see that (check_vma).
    return jax.shard_map(
        functools.partial(_local_program, polar, plan, combine),
        mesh=mesh,
        in_specs=(*[PartitionSpec()] * 3, *[list(specs)] * len(trees)),
        out_specs=list(homes),
        axis_names=set(names),
        check_vma=False,
    )(eps, how, count, *trees)
