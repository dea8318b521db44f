"""Which matrices are worked on in which round.

Matrices whose batch axes are sharded alike and which the same devices share form a pool (those on
another pipeline stage are that stage's own business). A pool's full rounds, a matrix of one shape
for every device, run as they are, but for the last ones where that balances better; what is left of
all shapes is dealt out together (`schedule`); matrices that are too large for a device are split
over groups of them.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp

from muonclip_jax.sharding.blocks import Axes, Sizes
from muonclip_jax.sharding.jobs import Kind, Members, make_round
from muonclip_jax.sharding.local import LocalLeaf
from muonclip_jax.sharding.moves import Exchange
from muonclip_jax.sharding.options import Distribution
from muonclip_jax.sharding.plan import DistributionPlan, Item, Round
from muonclip_jax.sharding.schedule import Hands, deal, spread

#: `(rows, columns, dtype, ways) -> cost` of a matrix that is split `ways` ways, in
#: floating-point operations a device, collectives included.
Cost = Callable[[int, int, str, int], float]


def plan_distribution(
    leaves: Sequence[LocalLeaf],
    dtypes: Sequence[str],
    sizes: tuple[tuple[str, int], ...],
    options: Distribution,
    cost: Cost,
    gathered: Sequence[tuple[tuple[int, Axes], ...]],
) -> DistributionPlan:
    """Plans who works on which matrix.

    Args:
        leaves: What a device holds of each leaf.
        dtypes: Their dtypes, by name.
        sizes: Names and sizes of the mesh axes, the slowest first.
        options: Bounds and the price of a byte.
        cost: What a matrix costs.
        gathered: For each leaf `(dimension, axes)` along which its result is gathered in the end.

    Returns:
        The plan; `map_distributed` follows it.
    """
    pools: dict[tuple[frozenset[str], frozenset[str]], dict[Kind, Members]] = {}
    lengths = dict(sizes)
    for leaf, (local, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        for part, block in enumerate(local.blocks):
            rows, columns = block.whole(lengths)
            count = local.plan.parts[part].count
            if not rows * columns * count:
                continue
            pool = pools.setdefault((local.batch, local.shared), {})
            kind = pool.setdefault((rows, columns, dtype), [])
            kind += [(block, Item(leaf, part, index)) for index in range(count)]
    rounds: list[Round] = []
    mean = 0.0
    for (batch, shared), pool in pools.items():
        axes = tuple(name for name, n in sizes if n > 1 and name in shared and name not in batch)
        rounds += _plan_pool(pool, axes, lengths, options, cost)
        whole = sum(len(members) * cost(*kind, 1) for kind, members in pool.items())
        mean += whole / Exchange(axes, ()).groups(lengths)
    busiest = sum(_busiest(turn, lengths, cost) for turn in rounds)
    return DistributionPlan(sizes, tuple(leaves), tuple(gathered), tuple(rounds), busiest, mean)


def _busiest(turn: Round, sizes: Sizes, cost: Cost) -> float:
    """What the busiest device does in a round."""
    ways = turn.exchange.ways(sizes)
    return max(
        sum(
            count * cost(job.rows, job.columns, job.dtype, ways)
            for count, job in zip(hand, turn.jobs, strict=True)
        )
        for hand in turn.branches
    )


def _plan_pool(
    pool: dict[Kind, Members],
    axes: Axes,
    sizes: Sizes,
    options: Distribution,
    cost: Cost,
) -> Iterator[Round]:
    whole = Exchange(axes, ())
    groups = whole.groups(sizes)
    last: dict[Kind, Members] = {}
    left: dict[Kind, Members] = {}
    limits: dict[Kind, int] = {}
    for kind, members in pool.items():
        # Neighbours in a stack are held alike, so that they travel together.
        members = sorted(members, key=lambda member: repr(member[0]))
        rows, columns, dtype = kind
        size = rows * columns * jnp.dtype(dtype).itemsize
        if size > options.max_matrix_bytes:
            yield from _split_rounds(kind, members, axes, sizes, options, size)
            continue
        limits[kind] = max(1, options.max_stack_bytes // size)
        # Chunks of nearly equal size, as many as it takes to hold all rounds and the leftovers; a
        # shorter one comes last, for the leftovers are worked on with it.
        depth = math.ceil(len(members) / groups)
        length = math.ceil(depth / math.ceil(depth / limits[kind])) * groups
        *bounds, start = range(0, len(members), length)
        for bound in bounds:
            chunk = members[bound : bound + length]
            yield make_round(whole, [kind], [chunk], _even(chunk, groups))
        stop = start + (len(members) - start) // groups * groups
        last[kind], left[kind] = members[start:stop], members[stop:]
    yield from _last_rounds(last, left, limits, axes, sizes, cost)


def _last_rounds(
    last: dict[Kind, Members],
    left: dict[Kind, Members],
    limits: dict[Kind, int],
    axes: Axes,
    sizes: Sizes,
    cost: Cost,
) -> Iterator[Round]:
    """The last full rounds and the leftovers: one stack, unless the leftovers are split."""
    whole = Exchange(axes, ())
    groups = whole.groups(sizes)
    rooms = {kind: limit - len(last[kind]) // groups for kind, limit in limits.items()}
    exchange, hands = _deal_leftovers(left, limits, rooms, axes, sizes, cost)
    rest = {kind: last[kind] + left[kind] for kind in last if last[kind] or left[kind]}
    costs = [cost(*kind, 1) for kind in rest]
    counts = [len(members) for members in rest.values()]
    together = deal(counts, costs, groups, [limits[kind] for kind in rest])
    apart_cost = hands.makespan + sum(
        len(last[kind]) // groups * price for kind, price in zip(rest, costs, strict=True)
    )
    if not together.padded and together.makespan < apart_cost:
        yield make_round(whole, list(rest), list(rest.values()), together)
        return
    apart = [kind for kind in last if exchange.split or not left[kind]]
    for kind in apart:
        if last[kind]:
            yield make_round(whole, [kind], [last[kind]], _even(last[kind], groups))
    kinds = [kind for kind in left if left[kind]]
    if kinds:
        depth = [0 if kind in apart else len(last[kind]) // len(hands.counts) for kind in kinds]
        yield make_round(
            exchange,
            kinds,
            [([] if kind in apart else last[kind]) + left[kind] for kind in kinds],
            Hands(
                tuple(tuple(map(operator.add, hand, depth)) for hand in hands.counts),
                hands.makespan,
                hands.padded,
            ),
        )


def _deal_leftovers(
    left: dict[Kind, Members],
    limits: dict[Kind, int],
    rooms: dict[Kind, int],
    axes: Axes,
    sizes: Sizes,
    cost: Cost,
) -> tuple[Exchange, Hands]:
    """Deals what is left: shares of matrices, or whole ones into the room beside the last round."""
    kinds = [kind for kind in left if left[kind]]
    counts = [len(left[kind]) for kind in kinds]
    best: tuple[float, int, Exchange, Hands] | None = None
    for exchange in _exchanges(axes):
        ways, groups = exchange.ways(sizes), exchange.groups(sizes)
        costs = [cost(*kind, ways) for kind in kinds]
        most = [limits[kind] * ways if exchange.split else rooms[kind] for kind in kinds]
        # On a tie, the even spread, for it has no branches.
        for hands in (spread(counts, costs, groups), deal(counts, costs, groups, most)):
            if best is None or (hands.makespan, ways) < best[:2]:
                best = (hands.makespan, ways, exchange, hands)
    assert best is not None
    return best[2], best[3]


def _split_rounds(
    kind: Kind,
    members: Members,
    axes: Axes,
    sizes: Sizes,
    options: Distribution,
    size: int,
) -> Iterator[Round]:
    """Rounds of matrices that are too large for one device."""
    exchange = min(
        _exchanges(axes),
        key=lambda exchange: (
            max(size / exchange.ways(sizes), options.max_matrix_bytes),
            exchange.ways(sizes),
        ),
    )
    groups = exchange.groups(sizes)
    limit = max(1, options.max_stack_bytes * exchange.ways(sizes) // size)
    for start in range(0, len(members), limit * groups):
        chunk = members[start : start + limit * groups]
        yield make_round(exchange, [kind], [chunk], _even(chunk, groups))


def _even(members: Members, groups: int) -> Hands:
    return spread([len(members)], [1.0], groups)


def _exchanges(axes: Axes) -> list[Exchange]:
    """Every way to use some axes for splitting; the fastest axes, which come last, first."""
    choices = [
        Exchange(tuple(axis for axis in axes if axis not in split), split)
        for number in range(len(axes) + 1)
        for split in itertools.combinations(axes, number)
    ]
    return sorted(choices, key=lambda choice: [-axes.index(axis) for axis in choice.split[::-1]])
