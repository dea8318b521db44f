"""Orthogonalising the leaves of a tree: one device alone, or the devices of a mesh together."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from muonclip_jax.matrices.one_device import orthogonalize_on_one_device
from muonclip_jax.newton_schulz import (
    PolarPlan,
    apply_polar,
    apply_polar_by_columns,
    decide_platform,
)
from muonclip_jax.routing import MatrixSpec
from muonclip_jax.sharding.blocks import Axes
from muonclip_jax.sharding.cut import Cut, possible_cuts
from muonclip_jax.sharding.map import map_distributed
from muonclip_jax.sharding.options import Distribution
from muonclip_jax.sharding.plan import DistributionPlan, Job, Round
from muonclip_jax.sharding.planning import plan_for
from muonclip_jax.sharding.sharding import MeshShardings, alike, place

# On a CPU one product fills the cores, so a stack is worked on matrix by matrix: up to this many
# written out, more in a loop.
_UNROLLED_ON_CPU = 4


def orthogonalize_leaves(
    polar: PolarPlan,
    eps: jax.typing.ArrayLike,
    directions: Sequence[jax.Array],
    specs: Sequence[MatrixSpec],
    in_shardings: MeshShardings | None = None,
    out_shardings: MeshShardings | None = None,
    axis_name: Axes = (),
    distribution: Distribution | None = None,
) -> list[jax.Array]:
    """Replaces every matrix of `directions` by its polar factor; devices share the matrices.

    Args:
        polar: How to orthogonalise.
        eps: Smallest divisor, as in `orthogonalize`.
        directions: The leaves.
        specs: The normalised spec of each.
        in_shardings: How the leaves are sharded (`read_shardings`); None where there is no mesh, or
            where all its axes are manual.
        out_shardings: How the results are to be sharded: over fewer mesh axes than the leaves. None
            is as the leaves are.
        axis_name: Names of axes that are mapped already (by `pmap` or `shard_map`) and along which
            the leaves are equal.
        distribution: How the devices share the work; None is `Distribution()`.

    Returns:
        The polar factors, in the shapes and dtypes of the leaves.

    Raises:
        ValueError: If `distribution` names an axis that the mesh does not have, or an axis of
            `axis_name` is not mapped.
    """
    options = Distribution() if distribution is None else distribution
    mesh = in_shardings and in_shardings.mesh
    polar, eps = decide_platform(polar, eps, directions, mesh)
    results: dict[int, jax.Array] = {}
    for group in alike(directions):
        polars = _orthogonalize_alike(
            polar,
            eps,
            [directions[leaf] for leaf in group],
            [specs[leaf] for leaf in group],
            in_shardings and in_shardings.of(group),
            out_shardings and out_shardings.of(group),
            axis_name,
            options,
        )
        results.update(zip(group, polars, strict=True))
    return [results[leaf] for leaf in range(len(directions))]


def _orthogonalize_alike(
    polar: PolarPlan,
    eps: jax.typing.ArrayLike,
    leaves: Sequence[jax.Array],
    specs: Sequence[MatrixSpec],
    shardings: MeshShardings | None,
    homes: MeshShardings | None,
    axis_name: Axes,
    options: Distribution,
) -> list[jax.Array]:
    mapped = tuple((name, _mapped_size(name)) for name in axis_name)
    sizes = mapped + (shardings.sizes if shardings else ())
    if math.prod(size for _, size in sizes) == 1:
        plan = OneDevicePlan(tuple(specs), options.max_stack_bytes)
    else:
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
        return _local_program(polar, plan, eps, *leaves)
    homes = homes or shardings
    cut = plan.cut if isinstance(plan, DistributionPlan) else None
    seen, seen_homes = (_cut(one, cut) for one in (shardings, homes))
    results = _program(
        polar,
        plan,
        seen.mesh,
        frozenset(name for name, _ in seen.sizes),
        seen.specs(),
        seen_homes.specs(),
        eps,
        list(leaves),
    )
    if cut:
        # What comes after shall see the caller's mesh.
        results = [place(x, home) for x, home in zip(results, homes.shardings(), strict=True)]
    return results


@dataclasses.dataclass(frozen=True)
class OneDevicePlan:
    """The specs of the leaves, and the bound on a stack."""

    specs: tuple[MatrixSpec, ...]
    max_stack_bytes: int


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
        return apply_polar_by_columns(polar, stack, split, eps)
    count = stack.shape[0]
    if polar.platform != "cpu" or count == 1:
        return apply_polar(polar, stack, eps)
    if count <= _UNROLLED_ON_CPU:
        return jnp.stack([apply_polar(polar, x, eps) for x in stack])
    return lax.map(lambda x: apply_polar(polar, x, eps), stack)


def _local_program(
    polar: PolarPlan,
    plan: DistributionPlan | OneDevicePlan,
    eps: jax.typing.ArrayLike,
    *leaves: jax.Array,
) -> list[jax.Array]:
    if isinstance(plan, OneDevicePlan):
        return orthogonalize_on_one_device(polar, eps, leaves, plan.specs, plan.max_stack_bytes)
    return map_distributed(
        lambda stack, split: _work(polar, eps, stack, split),
        lambda x: x,
        [leaves],
        plan,
        functools.partial(_sent, polar),
    )


def _sent(polar: PolarPlan, job: Job, turn: Round) -> str:
    """Results travel home in what they were computed in, where that is narrower."""
    if turn.exchange.split and polar.method != "svd":
        polar = dataclasses.replace(polar, method="standard")
    resolved = polar.resolve((job.rows, job.columns), job.dtype)
    work = jnp.dtype(resolved.dtype)
    return job.dtype if work.itemsize >= jnp.dtype(job.dtype).itemsize else work.name


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _program(
    polar: PolarPlan,
    plan: DistributionPlan | OneDevicePlan,
    mesh: Mesh | AbstractMesh,
    names: frozenset[str],
    specs: tuple[PartitionSpec, ...],
    homes: tuple[PartitionSpec, ...],
    eps: jax.typing.ArrayLike,
    leaves: list[jax.Array],
) -> list[jax.Array]:
    # Results are equal along the axes that replicate them because all of them gather the same
    # matrices; JAX cannot see that (check_vma).
    return jax.shard_map(
        functools.partial(_local_program, polar, plan),
        mesh=mesh,
        in_specs=(PartitionSpec(), *specs),
        out_specs=list(homes),
        axis_names=set(names),
        check_vma=False,
    )(eps, *leaves)
