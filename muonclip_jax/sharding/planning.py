"""Planning a tree: which group of devices processes which matrix, in which round.

Matrices with equally sharded batch axes that are distributed over the same devices form a *pool*
(matrices of a pipeline stage stay on that stage). Of each shape, a multiple of the number of groups
is assigned round-robin, in rounds of bounded size. The remaining matrices of all shapes are
assigned longest-first, or split by columns over groups of devices, whichever is faster. Splitting
costs two collectives of the small Gram matrix per Newton-Schulz step. Matrices that are too large
for one device are always split.

All devices run one program, so round-robin assignment pads 13 equal matrices on 8 devices to 16,
and three devices process padding half of the time. With several shapes, the remainders of all are
assigned together, longest-first, and each device runs the branch of the program for its counts.
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from muonclip_jax.matrices.parts import Run, even_size, runs_of
from muonclip_jax.newton_schulz import PolarPlan
from muonclip_jax.routing import MatrixSpec, normalized_axes
from muonclip_jax.sharding.blocks import Block, LocalLeaf, plan_local
from muonclip_jax.sharding.mesh_shardings import Axes, Distribution, LeafAxes, Sizes

#: More branches than this make the program longer than the balance is worth.
MAX_BRANCHES = 8
#: The cost of what is not done, finite so that no matrix of it costs nothing.
_NEVER = 1e200

#: Rows, columns and dtype of a matrix.
Kind: TypeAlias = tuple[int, int, str]
#: What a device holds of a matrix; its leaf, part and number in the part.
Member: TypeAlias = tuple[Block, int, int, int]
Matrices: TypeAlias = Mapping[Kind, Sequence[Member]]
#: Numbers of matrices of every kind for each group of devices: `counts[group][kind]`.
Counts: TypeAlias = Sequence[Sequence[int]]


class Exchange(NamedTuple):
    """How devices share a stack: different matrices along some mesh axes, columns along others."""

    matrix_axes: Axes
    column_axes: Axes
    sizes: Sizes
    #: Number of groups of devices, each with its own matrices.
    groups: int
    #: Number of devices over which each matrix is split.
    ways: int

    def size(self, axes: Axes) -> int:
        """Number of devices along some axes."""
        return math.prod(self.sizes[axis] for axis in axes)


class Bucket(NamedTuple):
    """Matrices of one shape that are sharded in the same way and are sent together."""

    block: Block
    runs: tuple[Run, ...]
    #: Whether `(slot, group of devices)` has a matrix: in this order, the others are padding.
    real: np.ndarray


#: Matrices of one shape that are worked on together, by how they are sharded.
Job: TypeAlias = list[Bucket]
Round: TypeAlias = tuple[Exchange, list[Job]]
#: An exchange, matrices of some kinds, and who works on how many of them.
_Share: TypeAlias = tuple[Exchange, Matrices, Counts]


def plan_tree(
    polar: PolarPlan,
    shapes: Sequence[tuple[tuple[int, ...], str]],
    specs: Sequence[MatrixSpec],
    in_axes: Sequence[LeafAxes],
    out_axes: Sequence[LeafAxes],
    sizes: Sizes,
    options: Distribution,
    dcn: Axes = (),
) -> tuple[list[LocalLeaf], list[Round]]:
    """Plans the distribution of the matrices of a tree over a mesh, in sequential rounds.

    `shapes` has the shape and dtype of each leaf; `in_axes` the mesh axes that shard its
    dimensions, `out_axes` those of its result, prefixes of them.
    """
    for axis in options.axes or ():
        if axis not in sizes:
            raise ValueError(
                f"Distribution's axes={options.axes} name {axis!r}, and the mesh has the axes "
                f"{', '.join(map(repr, sizes))}. Name some of those, or pass None for all."
            )
    leaves: list[LocalLeaf] = []
    pools: dict[tuple[Axes, frozenset[str]], dict[Kind, list[Member]]] = {}
    for leaf, ((shape, dtype), spec) in enumerate(zip(shapes, specs, strict=True)):
        dims = sum(normalized_axes(spec), ())
        sharded = {name for axis in dims for name in in_axes[leaf][axis]}
        # Not along DCN axes that replicate its matrices.
        useful = [name for name in sizes if name not in dcn or name in sharded]
        shared = frozenset(useful if options.axes is None else options.axes)
        local = plan_local(shape, spec, in_axes[leaf], out_axes[leaf], shared, sizes)
        leaves.append(local)
        apart = shared - local.batch_axes
        axes = tuple(name for name, size in sizes.items() if size > 1 and name in apart)
        pool = pools.setdefault((axes, local.batch_axes), {})
        for number, (part, block) in enumerate(zip(local.plan.parts, local.blocks, strict=True)):
            rows, columns = block.gathered_shape(sizes, sizes)
            if rows * columns * part.count:
                members = pool.setdefault((rows, columns, dtype), [])
                members += [(block, leaf, number, index) for index in range(part.count)]
    cost = functools.partial(_cost, polar, options)
    rounds = []
    for (axes, _), pool in pools.items():
        devices = math.prod(sizes[axis] for axis in axes)
        exchanges = []
        for columns in itertools.chain.from_iterable(
            itertools.combinations(axes, number) for number in range(len(axes) + 1)
        ):
            ways = math.prod(sizes[axis] for axis in columns)
            rest = tuple(axis for axis in axes if axis not in columns)
            exchanges.append(Exchange(rest, columns, sizes, devices // ways, ways))
        # Those with the fewest devices a matrix first, then with the last, fastest axes.
        exchanges.sort(key=lambda x: (x.ways, [-axes.index(a) for a in x.column_axes[::-1]]))
        rounds += _plan_pool(pool, exchanges, cost, options)
    return leaves, rounds


def _cost(polar: PolarPlan, options: Distribution, kind: Kind, ways: int) -> float:
    """Cost of a matrix split `ways` ways, in FLOPs a device, collectives included."""
    rows, columns, dtype = kind
    if polar.method == "svd":
        return _NEVER if ways > 1 else float(rows * rows * columns)
    if ways == 1:
        return float(polar.resolve((rows, columns), dtype).flops)
    plan = dataclasses.replace(polar, method="standard").resolve((rows, columns), dtype)
    # A ring all-reduce sends everything twice, an all-gather once.
    sent = 3 * (ways - 1) / ways * rows * rows * jnp.dtype(plan.dtype).itemsize
    return min(_NEVER, plan.flops / ways + options.flops_per_byte * sent * len(plan.rows))


def _plan_pool(
    pool: Matrices,
    exchanges: Sequence[Exchange],
    cost: Callable[[Kind, int], float],
    options: Distribution,
) -> list[Round]:
    """Plans the rounds of a pool; `cost` is that of a kind of matrix, split a number of ways."""
    size = {kind: kind[0] * kind[1] * jnp.dtype(kind[2]).itemsize for kind in pool}

    def limit(kind: Kind, ways: int) -> int:
        """How many matrices a group of devices has at most: one of them fits on every device."""
        return max(ways, options.max_stack_bytes * ways // size[kind])

    def assign(exchange: Exchange, matrices: Matrices, together: bool) -> list[_Share]:
        """All kinds together, longest first, or one after another, which is round-robin."""
        stacks = [matrices] if together else [{kind: x} for kind, x in matrices.items() if x]
        shares = []
        for some in stacks:
            kinds = [(cost(kind, exchange.ways), limit(kind, exchange.ways)) for kind in some]
            counts = assign_longest_first(list(map(len, some.values())), kinds, exchange.groups)
            shares.append((exchange, some, counts))
        return shares

    def makespan(shares: Sequence[_Share]) -> float:
        """Cost of the busiest group of devices, in all rounds."""
        total = 0.0
        for exchange, matrices, counts in shares:
            if len(set(map(tuple, counts))) > MAX_BRANCHES:
                return math.inf
            total += max(np.dot(counts, [cost(kind, exchange.ways) for kind in matrices]))
        return total

    shares: list[_Share] = []
    even: dict[Kind, Sequence[Member]] = {}
    left: dict[Kind, Sequence[Member]] = {}
    for kind, members in pool.items():
        # Matrices that are sharded alike are neighbours, and so are sent together.
        members = sorted(members, key=lambda member: repr(member[0]))
        sizes = [max(size[kind] / x.ways, options.max_matrix_bytes) for x in exchanges]
        exchange = exchanges[sizes.index(min(sizes))]
        groups = exchange.groups
        # Nearly equal rounds; a shorter one comes last, with the leftovers.
        length = even_size(math.ceil(len(members) / groups), limit(kind, exchange.ways)) * groups
        parts = [members[start : start + length] for start in range(0, len(members), length)]
        if exchange.ways == 1:
            last = parts.pop()
            stop = len(last) // groups * groups
            even[kind], left[kind] = last[:stop], last[stop:]
        for part in parts:
            shares += assign(exchange, {kind: part}, together=True)
    # On a tie the first: it has no branches, and no collectives between the steps.
    everything = {kind: [*even[kind], *left[kind]] for kind in even}
    left = {kind: members for kind, members in left.items() if members}
    choices = [assign(exchanges[0], everything, together) for together in (False, True)]
    choices += [
        assign(exchanges[0], even, False) + assign(exchange, left, together)
        for exchange in exchanges
        for together in (False, True)
    ]
    return [
        (exchange, [_fill(members, counts, k) for k, members in enumerate(matrices.values())])
        for exchange, matrices, counts in shares + min(choices, key=makespan)
    ]


def assign_longest_first(
    numbers: Sequence[int], kinds: Sequence[tuple[float, int]], groups: int
) -> Counts:
    """Assigns the costliest matrices first, each to the group with the least work so far.

    Of one kind that is round-robin. `numbers` has the number of matrices of each kind, `kinds` the
    cost of one and the maximum number per group.

    Example:
        >>> assign_longest_first([3, 2], [(1.0, 3), (2.0, 3)], 4)
        [[2, 0], [1, 0], [0, 1], [0, 1]]

    References:
        Graham 1969, "Bounds on multiprocessing timing anomalies".
    """
    assigned = [[0] * len(numbers) for _ in range(groups)]
    loads = [(0.0, group) for group in range(groups)]
    for kind in sorted(range(len(numbers)), key=lambda kind: -kinds[kind][0]):
        cost, limit = kinds[kind]
        full: list[tuple[float, int]] = []
        for _ in range(numbers[kind]):
            load, group = heapq.heappop(loads)
            assigned[group][kind] += 1
            is_full = assigned[group][kind] == limit
            heapq.heappush(full if is_full else loads, (load + cost, group))
        loads += full
        heapq.heapify(loads)
    # Equal groups side by side keep consecutive matrices together.
    return sorted(assigned, reverse=True)


def _fill(members: Sequence[Member], counts: Counts, kind: int) -> Job:
    """Assigns matrices of a kind one by one to the groups of devices, filling slots in order."""
    shares = np.array([row[kind] for row in counts])
    _, order = np.nonzero(np.arange(max(shares))[:, None] < shares)
    buckets, start = [], 0
    for block, same in itertools.groupby(members, key=lambda member: member[0]):
        matrices = [member[1:] for member in same]
        mine = np.bincount(order[start : start + len(matrices)], minlength=len(shares))
        buckets.append(Bucket(block, runs_of(matrices), np.arange(max(mine))[:, None] < mine))
        start += len(matrices)
    return buckets


def branches_of(jobs: Sequence[Job]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different numbers of matrices of each job that a group has, and the branch of each group.

    Groups without matrices run the most frequent branch: waiting would not be faster, and one
    branch alone needs no conditional. Of one job alone, all groups also process its padding.
    """
    counts = [sum(bucket.real.sum(0) for bucket in job) for job in jobs]
    rows = [tuple(map(int, row)) for row in np.transpose(counts)]
    if len(jobs) == 1:
        rows = [max(rows)] * len(rows)
    branches = [row for row, _ in Counter(row for row in rows if any(row)).most_common()]
    return branches, [branches.index(row) if any(row) else 0 for row in rows]
