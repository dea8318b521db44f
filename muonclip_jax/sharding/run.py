"""The polar factors of a tree: on one device alone, or shared by the devices of a mesh."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from muonclip_jax._devices import vary_like, varying_axes
from muonclip_jax.matrices.sequential import map_matrices, orthogonalize_on_one_device
from muonclip_jax.newton_schulz._orthogonalize import apply_polar, apply_polar_by_columns
from muonclip_jax.newton_schulz.plan import PolarPlan, decide_platform
from muonclip_jax.routing import MatrixSpec
from muonclip_jax.sharding.blocks import LocalLeaf, from_blocks, local_matrices, to_blocks
from muonclip_jax.sharding.exchange import gather_matrices, members_sent, scatter_results
from muonclip_jax.sharding.mesh_shardings import (
    Axes,
    Distribution,
    LeafAxes,
    MeshShardings,
    spec_of,
)
from muonclip_jax.sharding.planning import Bucket, Exchange, Job, Round, branches_of, plan_tree

# More slices than this make the program long.
_SLICES = 16
_DEFAULT = Distribution()


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
    options = distribution or _DEFAULT
    polar, eps = decide_platform(polar, eps, directions, in_shardings and in_shardings.mesh)
    try:
        mapped = tuple((name, lax.axis_size(name)) for name in axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name} has a name that is not a mapped axis here: {error}. Call "
            "update inside jax.pmap(..., axis_name=...) or jax.shard_map, or leave axis_name out."
        ) from error
    # In a checked `shard_map`, a stack of two leaves varies along the mesh axes of both, and so
    # would the results of both: leaves that vary along different axes share no stack.
    kinds = [varying_axes(leaf) for leaf in directions]
    in_axes = in_shardings.leaves if in_shardings else [((),) * x.ndim for x in directions]
    out_axes = out_shardings.leaves if out_shardings else in_axes
    settings = list(zip(specs, in_axes, out_axes, strict=True))
    results = list(directions)
    for kind in dict.fromkeys(kinds):
        alike = [leaf for leaf, other in enumerate(kinds) if other == kind]
        some, xs = tuple(settings[leaf] for leaf in alike), [directions[leaf] for leaf in alike]
        polars = _orthogonalize(polar, options, mapped, in_shardings, some, eps, xs)
        for leaf, result in zip(alike, polars, strict=True):
            results[leaf] = result
    return results


# A call outside of jit compiles as a whole, and once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _orthogonalize(
    polar: PolarPlan,
    options: Distribution,
    mapped: tuple[tuple[str, int], ...],
    on: MeshShardings | None,
    settings: Sequence[tuple[MatrixSpec, LeafAxes, LeafAxes]],
    eps: jax.typing.ArrayLike,
    leaves: list[jax.Array],
) -> list[jax.Array]:
    specs, in_axes, out_axes = zip(*settings, strict=True)
    sizes, dcn = dict(mapped + (on.sizes if on else ())), on.dcn if on else ()
    if math.prod(sizes.values()) == 1:
        run = functools.partial(orthogonalize_on_one_device, polar, specs, options.max_stack_bytes)
    else:
        shapes = [(x.shape, x.dtype.name) for x in leaves]
        plan = plan_tree(polar, shapes, specs, in_axes, out_axes, sizes, options, dcn)
        run = functools.partial(_run_plan, polar, *plan)
    if on is None:
        return run(eps, leaves)
    # Results are equal along the axes that replicate them, since all of their devices gather the
    # same matrices; JAX cannot see that (check_vma).
    return jax.shard_map(
        run,
        mesh=on.mesh,
        in_specs=(PartitionSpec(), list(map(spec_of, in_axes))),
        out_specs=list(map(spec_of, out_axes)),
        axis_names={name for name, _ in on.sizes},
        check_vma=False,
    )(eps, leaves)


def _run_plan(
    polar: PolarPlan,
    local_leaves: Sequence[LocalLeaf],
    rounds: Sequence[Round],
    eps: jax.typing.ArrayLike,
    leaves: Sequence[jax.Array],
) -> list[jax.Array]:
    """One device's program: gather matrices, orthogonalise them, scatter the results."""
    parts = [local_matrices(x, local) for x, local in zip(leaves, local_leaves, strict=True)]
    # The results of each part, whose matrices are worked on in order.
    done: list[list[list[jax.Array]]] = [[[] for _ in xs] for xs in parts]
    for exchange, jobs in rounds:
        stacks = [
            jnp.concatenate(
                [
                    gather_matrices(_select_blocks(parts, x, exchange), x.block, exchange)
                    for x in job
                ]
            )
            for job in jobs
        ]
        for job, x in zip(jobs, _polar_factors(polar, eps, stacks, exchange, jobs), strict=True):
            for bucket, y in zip(job, lax.split(x, [len(b.real) for b in job]), strict=True):
                scattered = scatter_results(y, bucket, exchange)
                for run, blocks in zip(bucket.runs, scattered, strict=True):
                    done[run.leaf][run.part].append(blocks)
    results = []
    for like, local, xs, ys in zip(leaves, local_leaves, parts, done, strict=True):
        # A part without entries is its own result.
        blocks = [
            jnp.concatenate(pieces or [to_blocks(x, block)])
            for x, block, pieces in zip(xs, local.blocks, ys, strict=True)
        ]
        results.append(from_blocks(blocks, local).astype(like.dtype))
    return results


def _select_blocks(
    parts: Sequence[Sequence[jax.Array]], bucket: Bucket, exchange: Exchange
) -> jax.Array:
    """The blocks of a bucket that this device sends."""
    members, replicating = members_sent(bucket, exchange)
    sources = [parts[run.leaf][run.part] for run in bucket.runs]
    if not replicating:
        pairs = zip(sources, bucket.runs, strict=True)
        stack = jnp.concatenate(
            [to_blocks(lax.slice_in_dim(x, run.start, run.stop), bucket.block) for x, run in pairs]
        )
        if bucket.real.ravel()[: len(stack)].all():
            padding = members.size - len(stack)
            return jnp.pad(stack, [(0, padding)] + [(0, 0)] * (stack.ndim - 1))
        return stack[members[0]]
    # For every place along the replicating axes and every matrix: its run, and its index.
    starts = np.cumsum([0, *(run.stop - run.start for run in bucket.runs)])
    numbers = np.searchsorted(starts, members, side="right") - 1
    indices = members - (starts[:-1] - [run.start for run in bucket.runs])[numbers]
    me = lax.axis_index(replicating)

    def select_one(source: jax.Array) -> Callable[[jax.Array], jax.Array]:
        x = vary_like(source, me)
        # Without the barrier, XLA moves the slice, which all branches have, behind them, and what a
        # branch then returns is a copy of the whole parameter.
        return lambda index: lax.optimization_barrier(
            to_blocks(lax.dynamic_slice_in_dim(x, index, 1), bucket.block)
        )

    pieces = []
    for among, columns in itertools.groupby(
        range(members.shape[1]), key=lambda column: sorted({*numbers[:, column].tolist()})
    ):
        some = list(columns)
        number, index = jnp.asarray(np.array([numbers[:, some], indices[:, some]], np.int32))[:, me]
        if len(among) == 1 and len(some) > _SLICES:
            pieces.append(to_blocks(sources[among[0]][index], bucket.block))
            continue
        branches = [select_one(sources[each]) for each in among]
        branch = jnp.searchsorted(jnp.asarray(among), number)
        pieces += [lax.switch(branch[i], branches, index[i]) for i in range(len(some))]
    return jnp.concatenate(pieces)


def _polar_factors(
    polar: PolarPlan,
    eps: jax.typing.ArrayLike,
    stacks: Sequence[jax.Array],
    exchange: Exchange,
    jobs: Sequence[Job],
) -> list[jax.Array]:
    """Orthogonalises the matrices that this device received, and as little padding as possible.

    Results are in the dtype of the computation, if it is narrower than that of the stacks.
    """
    me = lax.axis_index(exchange.matrix_axes)
    if exchange.column_axes and polar.method != "svd":
        polar = dataclasses.replace(polar, method="standard")

    def polar_of(stack: jax.Array) -> jax.Array:
        if exchange.column_axes:
            return apply_polar_by_columns(polar, stack, exchange.column_axes, eps)
        if polar.platform == "cpu":
            return map_matrices(lambda x: apply_polar(polar, x, eps), stack)
        return apply_polar(polar, stack, eps)

    def work(counts: tuple[int, ...], stacks: list[jax.Array]) -> list[jax.Array]:
        return [
            jnp.concatenate([polar_of(x[:count]), x[count:]]) if count else x
            for count, x in zip(counts, stacks, strict=True)
        ]

    # This device's own matrices first, and back in the end; other slots may hold anything.
    packed, unpack = [], []
    for x, job in zip(stacks, jobs, strict=True):
        real = np.concatenate([bucket.real for bucket in job])
        order = np.argsort(~real, axis=0, kind="stable").T.astype(np.int32)
        most = real.sum(0).max()
        unpack.append(np.argsort(order, axis=1).clip(max=most - 1).astype(np.int32))
        packed.append(x if len(job) == 1 else x[jnp.asarray(order[:, :most])[me]])
    counts, branch = branches_of(jobs)
    branches = [functools.partial(work, row) for row in counts]
    if len(branches) > 1:
        packed = lax.switch(jnp.asarray(np.array(branch, np.int32))[me], branches, packed)
    else:
        packed = branches[0](packed)
    results = []
    for x, job, order in zip(packed, jobs, unpack, strict=True):
        dtype = jnp.dtype(polar.resolve(x.shape, x.dtype).dtype)
        y = x if len(job) == 1 else x[jnp.asarray(order)[me]]
        results.append(y.astype(dtype) if dtype.itemsize < y.dtype.itemsize else y)
    return results
