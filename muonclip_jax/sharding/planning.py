"""Planning a tree: which group of devices processes which matrix, in which round.

Matrices with equally sharded batch axes that are distributed over the same devices form a *pool*
(matrices of a pipeline stage stay on that stage). Of each shape, a multiple of the number of groups
is assigned round-robin, in rounds of bounded size. The remaining matrices of all shapes are
assigned longest-first, or split by columns over groups of devices, whichever is faster. Splitting
costs two collectives of the small Gram matrix per Newton-Schulz step. Matrices that are too large
for one device are always split.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax.numpy as jnp

from muonclip_jax.matrices import Run
from muonclip_jax.newton_schulz import PolarPlan
from muonclip_jax.routing import MatrixSpec, axes_tuple
from muonclip_jax.sharding.assignment import (
    Assignment,
    assign_longest_first,
    assign_round_robin,
    branches_of,
)
from muonclip_jax.sharding.blocks import Block, LocalLeaf, plan_local
from muonclip_jax.sharding.mesh_shardings import Axes, LeafAxes, Sizes
from muonclip_jax.sharding.options import Distribution
from muonclip_jax.sharding.plan import Bucket, Exchange, Job, MeshPlan, Round

#: Rows, columns and dtype of a matrix.
Kind: TypeAlias = tuple[int, int, str]
#: Matrices of one kind: what a device holds of each, and its leaf, part and number in the part.
Members: TypeAlias = list[tuple[Block, int, int, int]]
Matrices: TypeAlias = Mapping[Kind, Members]
#: How to share which matrices.
Rounds: TypeAlias = list[tuple[Exchange, Matrices, Assignment]]
#: `(rows, columns, dtype, ways)` to the cost of a matrix that is split `ways` ways, in
#: floating-point operations a device, collectives included.
Cost: TypeAlias = Callable[[int, int, str, int], float]


@functools.lru_cache(maxsize=64)
def plan_for(
    polar: PolarPlan,
    shapes: tuple[tuple[tuple[int, ...], str], ...],
    specs: tuple[MatrixSpec, ...],
    in_axes: tuple[LeafAxes, ...],
    out_axes: tuple[LeafAxes, ...],
    sizes: tuple[tuple[str, int], ...],
    options: Distribution,
    dcn: Axes = (),
) -> MeshPlan:
    """Plans the distribution of the matrices of a tree over a mesh.

    `shapes` has the shape and dtype of each leaf; `in_axes` the mesh axes that shard its
    dimensions, `out_axes` those of its result, prefixes of them.
    """
    lengths = dict(sizes)
    for axis in options.axes or ():
        if axis not in lengths:
            raise ValueError(
                f"Distribution's axes={options.axes} name {axis!r}, and the mesh has the axes "
                f"{', '.join(map(repr, lengths))}. Name some of those, or pass None for all."
            )
    leaves: list[LocalLeaf] = []
    pools: dict[tuple[Axes, frozenset[str]], dict[Kind, Members]] = {}
    for leaf, ((shape, dtype), spec) in enumerate(zip(shapes, specs, strict=True)):
        shared = _sharing_axes(lengths, dcn, options.axes, in_axes[leaf], spec)
        local = plan_local(shape, spec, in_axes[leaf], out_axes[leaf], shared, lengths)
        leaves.append(local)
        apart = shared - local.batch_axes
        axes = tuple(name for name, size in sizes if size > 1 and name in apart)
        pool = pools.setdefault((axes, local.batch_axes), {})
        for number, (part, block) in enumerate(zip(local.plan.parts, local.blocks, strict=True)):
            rows, columns = block.gathered_shape(lengths, lengths)
            if rows * columns * part.count:
                members = pool.setdefault((rows, columns, dtype), [])
                members += [(block, leaf, number, index) for index in range(part.count)]
    cost = functools.partial(_cost, polar, options)
    rounds = [
        _make_round(*arguments)
        for (axes, _), pool in pools.items()
        for arguments in _plan_pool(pool, axes, lengths, options, cost)
    ]
    return MeshPlan(sizes, tuple(leaves), tuple(rounds))


def _sharing_axes(
    sizes: Sizes, dcn: Axes, chosen: Axes | None, leaf: LeafAxes, spec: MatrixSpec
) -> frozenset[str]:
    """The mesh axes over which a leaf is distributed: not DCN axes that replicate its matrices."""
    if chosen is not None:
        return frozenset(chosen)
    sharded = {name for dims in spec.dims for axis in axes_tuple(dims) for name in leaf[axis]}
    return frozenset(name for name in sizes if name not in dcn or name in sharded)


def _cost(
    polar: PolarPlan, options: Distribution, rows: int, columns: int, dtype: str, ways: int
) -> float:
    if polar.method == "svd":
        return math.inf if ways > 1 else float(rows * rows * columns)
    if ways == 1:
        return float(polar.resolve((rows, columns), dtype).flops)
    plan = dataclasses.replace(polar, method="standard").resolve((rows, columns), dtype)
    # A ring all-reduce sends everything twice, an all-gather once.
    sent = 3 * (ways - 1) / ways * rows * rows * jnp.dtype(plan.dtype).itemsize
    return plan.flops / ways + options.flops_per_byte * sent * len(plan.rows)


def _plan_pool(
    pool: Matrices, axes: Axes, sizes: Sizes, options: Distribution, cost: Cost
) -> Rounds:
    rounds: Rounds = []
    even: dict[Kind, Members] = {}
    left: dict[Kind, Members] = {}
    limits: dict[Kind, int] = {}
    exchanges = _exchanges(axes, sizes)
    for kind, members in pool.items():
        # Matrices that are sharded alike are neighbours, and so are sent together.
        members = sorted(members, key=lambda member: repr(member[0]))
        rows, columns, dtype = kind
        size = rows * columns * jnp.dtype(dtype).itemsize
        exchange = min(
            exchanges, key=lambda it: max(size / it.ways(sizes), options.max_matrix_bytes)
        )
        ways, groups = exchange.ways(sizes), exchange.groups(sizes)
        limit = max(1, options.max_stack_bytes * ways // size)
        # Nearly equal rounds; a shorter one comes last, with the leftovers.
        depth = math.ceil(len(members) / groups)
        length = math.ceil(depth / math.ceil(depth / limit)) * groups
        parts = [members[start : start + length] for start in range(0, len(members), length)]
        if ways == 1:
            last = parts.pop()
            stop = len(last) // groups * groups
            even[kind], left[kind], limits[kind] = last[:stop], last[stop:], limit
        rounds += [
            (exchange, {kind: part}, assign_round_robin(len(part), 1.0, groups)) for part in parts
        ]
    return rounds + _last_rounds(even, left, limits, exchanges, sizes, cost)


def _last_rounds(
    even: Matrices,
    left: Matrices,
    limits: Mapping[Kind, int],
    exchanges: Sequence[Exchange],
    sizes: Sizes,
    cost: Cost,
) -> Rounds:
    """The fastest rounds for the last full round-robin round and the remaining matrices."""

    def round_robin(exchange: Exchange, matrices: Matrices) -> tuple[float, Rounds]:
        ways, groups = exchange.ways(sizes), exchange.groups(sizes)
        rounds: Rounds = [
            (exchange, {kind: x}, assign_round_robin(len(x), cost(*kind, ways), groups))
            for kind, x in matrices.items()
            if x
        ]
        return sum(assignment.makespan for *_, assignment in rounds), rounds

    def longest_first(exchange: Exchange, matrices: Matrices) -> tuple[float, Rounds]:
        ways, groups = exchange.ways(sizes), exchange.groups(sizes)
        assigned = assign_longest_first(
            list(map(len, matrices.values())),
            [cost(*kind, ways) for kind in matrices],
            groups,
            [limits[kind] * ways for kind in matrices],
        )
        if assigned is None:
            return math.inf, []
        return assigned.makespan, [(exchange, matrices, assigned)]

    whole = exchanges[0]
    together = {kind: even[kind] + left[kind] for kind in even}
    evenly, rounds = round_robin(whole, even)
    left = {kind: members for kind, members in left.items() if members}
    # On a tie the first: it has no branches, and no collectives between the steps.
    choices = [round_robin(whole, together), longest_first(whole, together)]
    for exchange in exchanges:
        for assign in (round_robin, longest_first):
            makespan, last = assign(exchange, left)
            choices.append((evenly + makespan, rounds + last))
    return min(choices, key=lambda choice: choice[0])[1]


def _exchanges(axes: Axes, sizes: Sizes) -> list[Exchange]:
    """All choices of axes to split columns: fewest devices first, then the last, fastest axes."""
    choices = [
        Exchange(tuple(axis for axis in axes if axis not in columns), columns)
        for number in range(len(axes) + 1)
        for columns in itertools.combinations(axes, number)
    ]
    return sorted(
        choices,
        key=lambda it: (it.ways(sizes), [-axes.index(axis) for axis in it.column_axes[::-1]]),
    )


def _make_round(exchange: Exchange, matrices: Matrices, assignment: Assignment) -> Round:
    """The round in which devices work on the given matrices."""
    counts = assignment.counts
    if len(matrices) == 1:
        branches, branch = (max(counts),), (0,) * len(counts)
    else:
        branches, branch = branches_of(counts)
    jobs = tuple(
        _make_job(kind, members, [row[number] for row in counts])
        for number, (kind, members) in enumerate(matrices.items())
    )
    return Round(exchange, jobs, branches, branch)


def _make_job(kind: Kind, members: Members, counts: Sequence[int]) -> Job:
    """Assigns matrices one by one to the groups of devices, filling slots in order."""
    groups = range(len(counts))
    order = iter(group for slot in range(max(counts)) for group in groups if slot < counts[group])
    buckets, slots, offset = [], [[] for _ in groups], 0
    for block, same in itertools.groupby(members, key=lambda member: member[0]):
        runs = _runs(block, [where for _, *where in same])
        shares = Counter(itertools.islice(order, sum(run.stop - run.start for run in runs)))
        depth = max(shares.values())
        places = tuple(
            slot * len(groups) + group
            for slot in range(depth)
            for group in groups
            if slot < shares[group]
        )
        buckets.append(Bucket(block, runs, depth, places))
        for group in groups:
            slots[group] += range(offset, offset + shares[group])
        offset += depth
    return Job(kind[:2], kind[2], tuple(buckets), tuple(map(tuple, slots)))


def _runs(block: Block, matrices: Sequence[Sequence[int]]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for leaf, part, index in matrices:
        if runs and (runs[-1].leaf, runs[-1].part, runs[-1].stop) == (leaf, part, index):
            runs[-1] = dataclasses.replace(runs[-1], stop=index + 1)
        else:
            runs.append(Run(leaf, part, index, index + 1, block.transposed))
    return tuple(runs)
