"""The polar factors of a tree: on one device alone, or shared by the devices of a mesh."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from muonclip_jax._devices import vary_like
from muonclip_jax.matrices import map_matrices, orthogonalize_on_one_device
from muonclip_jax.newton_schulz import (
    PolarPlan,
    apply_polar,
    apply_polar_by_columns,
    decide_platform,
)
from muonclip_jax.routing import MatrixSpec
from muonclip_jax.sharding.blocks import from_blocks, local_matrices, to_blocks
from muonclip_jax.sharding.exchange import gather_matrices, members_sent, scatter_results
from muonclip_jax.sharding.mesh_shardings import Axes, MeshShardings
from muonclip_jax.sharding.options import Distribution
from muonclip_jax.sharding.plan import Bucket, Exchange, Job, MeshPlan, Round
from muonclip_jax.sharding.planning import plan_for

# More slices than this make the program long.
_SLICES = 16

#: How to orthogonalise; the plan of the mesh, None for one device; the specs; the bound on a stack.
_Settings: TypeAlias = tuple[PolarPlan, MeshPlan | None, tuple[MatrixSpec, ...], int]


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
    """Replaces every matrix of `directions` by its polar factor, distributed over devices.

    `specs` are normalised. `in_shardings` is None without a mesh, or if all its axes are manual;
    results are sharded as `out_shardings`, over prefixes of the axes that shard the leaves, or like
    the leaves. Along `axis_name`, axes that are already mapped, the leaves are equal.

    Raises:
        ValueError: If `distribution` has an axis that the mesh does not have, or an axis of
            `axis_name` is not mapped.
    """
    # In a checked `shard_map`, a stack of two leaves varies along the mesh axes of both, and so
    # would the results of both: leaves that vary along different axes share no stack.
    kinds = [getattr(jax.typeof(leaf), "manual_axis_type", None) for leaf in directions]
    if len(set(kinds)) > 1:
        results = list(directions)
        for kind in dict.fromkeys(kinds):
            alike = [leaf for leaf, other in enumerate(kinds) if other == kind]
            polars = orthogonalize_leaves(
                polar,
                eps,
                [directions[leaf] for leaf in alike],
                [specs[leaf] for leaf in alike],
                in_shardings and in_shardings.of(alike),
                out_shardings and out_shardings.of(alike),
                axis_name,
                distribution,
            )
            for leaf, result in zip(alike, polars, strict=True):
                results[leaf] = result
        return results
    options = distribution or Distribution()
    polar, eps = decide_platform(polar, eps, directions, in_shardings and in_shardings.mesh)
    sizes = tuple((name, _mapped_size(name)) for name in axis_name)
    sizes += in_shardings.sizes if in_shardings else ()
    plan = None
    if math.prod(size for _, size in sizes) > 1:
        in_axes = in_shardings.leaves if in_shardings else tuple(((),) * x.ndim for x in directions)
        plan = plan_for(
            polar,
            tuple((x.shape, x.dtype.name) for x in directions),
            tuple(specs),
            in_axes,
            out_shardings.leaves if out_shardings else in_axes,
            sizes,
            options,
            in_shardings.dcn if in_shardings else (),
        )
    settings = (polar, plan, tuple(specs), options.max_stack_bytes)
    if in_shardings is None:
        return _run_locally(settings, eps, *directions)
    names = frozenset(name for name, _ in in_shardings.sizes)
    out_specs = (out_shardings or in_shardings).specs()
    return _run_on_mesh(
        settings, in_shardings.mesh, names, in_shardings.specs(), out_specs, eps, list(directions)
    )


def _mapped_size(name: str) -> int:
    try:
        return lax.axis_size(name)
    except NameError as error:
        raise ValueError(
            f"axis_name={name!r} is not the name of a mapped axis here. Call update inside "
            f"jax.pmap(..., axis_name={name!r}) or jax.shard_map over it, or leave axis_name out."
        ) from error


# A call outside of jit compiles as a whole, and once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run_on_mesh(
    settings: _Settings,
    mesh: Mesh | AbstractMesh,
    names: frozenset[str],
    in_specs: tuple[PartitionSpec, ...],
    out_specs: tuple[PartitionSpec, ...],
    eps: jax.typing.ArrayLike,
    leaves: list[jax.Array],
) -> list[jax.Array]:
    # Results are equal along the axes that replicate them, since all of their devices gather the
    # same matrices; JAX cannot see that (check_vma).
    return jax.shard_map(
        functools.partial(_run_locally, settings),
        mesh=mesh,
        in_specs=(PartitionSpec(), *in_specs),
        out_specs=list(out_specs),
        axis_names=set(names),
        check_vma=False,
    )(eps, *leaves)


def _run_locally(
    settings: _Settings, eps: jax.typing.ArrayLike, *leaves: jax.Array
) -> list[jax.Array]:
    """One device's program: gather matrices, orthogonalise them, scatter the results."""
    polar, plan, specs, max_stack_bytes = settings
    if plan is None:
        return orthogonalize_on_one_device(polar, eps, leaves, specs, max_stack_bytes)
    sizes = dict(plan.sizes)
    parts = [local_matrices(x, local) for x, local in zip(leaves, plan.leaves, strict=True)]
    # The results of each part, whose matrices are worked on in order.
    done: list[list[list[jax.Array]]] = [[[] for _ in xs] for xs in parts]
    for round_ in plan.rounds:
        exchange = round_.exchange
        gathered = [
            [
                gather_matrices(
                    _select_blocks(settings, parts, bucket, exchange), bucket.block, exchange, sizes
                )
                for bucket in job.buckets
            ]
            for job in round_.jobs
        ]
        polars = _orthogonalize_stacks(polar, eps, list(map(jnp.concatenate, gathered)), round_)
        for job, result in zip(round_.jobs, polars, strict=True):
            result, start = result.astype(_sent_dtype(polar, job, exchange)), 0
            for bucket in job.buckets:
                slots = lax.slice_in_dim(result, start, start + bucket.slots)
                start += bucket.slots
                scattered = scatter_results(slots, bucket, exchange, sizes)
                for run, blocks in zip(bucket.runs, scattered, strict=True):
                    done[run.leaf][run.part].append(blocks)
    results = []
    for like, local, xs, ys in zip(leaves, plan.leaves, parts, done, strict=True):
        # A part without entries is its own result.
        blocks = [
            jnp.concatenate(pieces or [to_blocks(x, local, part)])
            for part, (x, pieces) in enumerate(zip(xs, ys, strict=True))
        ]
        results.append(from_blocks(blocks, local).astype(like.dtype))
    return results


def _select_blocks(
    settings: _Settings, parts: Sequence[Sequence[jax.Array]], bucket: Bucket, exchange: Exchange
) -> jax.Array:
    """The blocks of a bucket that this device sends."""
    _, plan, *_ = settings
    assert plan is not None
    members, replicating = members_sent(bucket, exchange, dict(plan.sizes))

    def blocks_of(number: int, x: jax.Array) -> jax.Array:
        run = bucket.runs[number]
        return to_blocks(x, plan.leaves[run.leaf], run.part)

    if not replicating:
        runs = [lax.slice_in_dim(parts[x.leaf][x.part], x.start, x.stop) for x in bucket.runs]
        stack = jnp.concatenate([blocks_of(number, x) for number, x in enumerate(runs)])
        if bucket.places == tuple(range(len(stack))):
            padding = members.size - len(stack)
            return jnp.pad(stack, [(0, padding)] + [(0, 0)] * (stack.ndim - 1))
        return stack[members[0]]
    # For every place along the replicating axes and every matrix: its run, and its index.
    bounds = np.cumsum([0, *(run.stop - run.start for run in bucket.runs)])
    numbers = np.searchsorted(bounds, members, side="right") - 1
    indices = members - bounds[numbers] + np.array([run.start for run in bucket.runs])[numbers]
    me = lax.axis_index(replicating)

    def select_one(number: int) -> Callable[[jax.Array], jax.Array]:
        x = vary_like(parts[bucket.runs[number].leaf][bucket.runs[number].part], me)
        # Without the barrier, XLA moves the slice, which all branches have, behind them, and what a
        # branch then returns is a copy of the whole parameter.
        return lambda index: lax.optimization_barrier(
            blocks_of(number, lax.dynamic_slice_in_dim(x, index, 1))
        )

    pieces = []
    for among, columns in itertools.groupby(
        range(members.shape[1]), key=lambda column: sorted({*numbers[:, column].tolist()})
    ):
        some = list(columns)
        number, index = jnp.asarray(np.array([numbers[:, some], indices[:, some]], np.int32))[:, me]
        if len(among) == 1 and len(some) > _SLICES:
            run = bucket.runs[among[0]]
            pieces.append(blocks_of(among[0], parts[run.leaf][run.part][index]))
            continue
        branches = [select_one(each) for each in among]
        branch = jnp.searchsorted(jnp.asarray(among), number)
        pieces += [lax.switch(branch[i], branches, index[i]) for i in range(len(some))]
    return jnp.concatenate(pieces)


def _orthogonalize_stacks(
    polar: PolarPlan, eps: jax.typing.ArrayLike, stacks: list[jax.Array], round_: Round
) -> list[jax.Array]:
    """Orthogonalises the matrices that this device received, and as little padding as possible."""
    me = lax.axis_index(round_.exchange.matrix_axes)

    def work(counts: tuple[int, ...], stacks: list[jax.Array]) -> list[jax.Array]:
        return [
            jnp.concatenate([_polars(polar, eps, x[:count], round_), x[count:]]) if count else x
            for count, x in zip(counts, stacks, strict=True)
        ]

    # This device's own matrices first, and back in the end; other slots may hold anything.
    packings = [_packing(job) for job in round_.jobs]
    stacks = [
        x if packing is None else x[jnp.asarray(packing[0])[me]]
        for x, packing in zip(stacks, packings, strict=True)
    ]
    branches = [functools.partial(work, counts) for counts in round_.branches]
    if len(branches) > 1:
        stacks = lax.switch(jnp.asarray(np.array(round_.branch, np.int32))[me], branches, stacks)
    else:
        stacks = branches[0](stacks)
    return [
        x if packing is None else x[jnp.asarray(packing[1])[me]]
        for x, packing in zip(stacks, packings, strict=True)
    ]


def _packing(job: Job) -> tuple[np.ndarray, np.ndarray] | None:
    """For every group, the order of slots with padding last, and its inverse; or None."""
    slots, most = sum(bucket.slots for bucket in job.buckets), max(map(len, job.slots))
    if len(job.buckets) == 1:
        return None
    packed = np.array([[*row, *sorted({*range(slots)}.difference(row))] for row in job.slots])
    inverse = np.argsort(packed, axis=1).clip(max=most - 1)
    return packed[:, :most].astype(np.int32), inverse.astype(np.int32)


def _polars(
    polar: PolarPlan, eps: jax.typing.ArrayLike, stack: jax.Array, round_: Round
) -> jax.Array:
    if round_.exchange.column_axes:
        return apply_polar_by_columns(polar, stack, round_.exchange.column_axes, eps)
    if polar.platform == "cpu":
        return map_matrices(lambda x: apply_polar(polar, x, eps), stack)
    return apply_polar(polar, stack, eps)


def _sent_dtype(polar: PolarPlan, job: Job, exchange: Exchange) -> str:
    """The dtype in which results are sent: that of the computation, if it is narrower."""
    if exchange.column_axes and polar.method != "svd":
        polar = dataclasses.replace(polar, method="standard")
    work = jnp.dtype(polar.resolve(job.shape, job.dtype).dtype)
    return job.dtype if work.itemsize >= jnp.dtype(job.dtype).itemsize else work.name
