"""Carrying out a `DistributionPlan` where a mesh's axes are manual: one device's program."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax._devices import all_gather, vary_like
from muonclip_jax.sharding.blocks import Block, Sizes
from muonclip_jax.sharding.hands import Work, concatenate, work_by_hand
from muonclip_jax.sharding.local import LocalLeaf, block_of, leaf_of, matrices_of
from muonclip_jax.sharding.moves import (
    Exchange,
    bring_home,
    by_free_and_held,
    held_and_free,
    make_whole,
    position,
)
from muonclip_jax.sharding.plan import DistributionPlan, Group, Item, Job, Round

# More matrices than this to be chosen one by one make the program long: then the whole stack is put
# together and cut.
_CHOSEN = 16


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a leaf in all trees; called with how to cut some matrices out, it combines those.

    Attributes:
        arrays: The part in every tree.
        combine: From what is cut out of each to blocks.
    """

    arrays: Sequence[jax.Array]
    combine: Callable[..., jax.Array]

    def __call__(self, cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return self.combine(*map(cut, self.arrays))

    def vary_like(self, other: jax.Array) -> "_Part":
        """The same, known to vary over the mesh axes that `other` varies over."""
        return _Part([vary_like(x, other) for x in self.arrays], self.combine)


def _itself(x: jax.Array) -> jax.Array:
    return x


def _as_it_is(job: Job, turn: Round) -> str:
    del turn
    return job.dtype


def map_distributed(
    work: Work,
    combine: Callable[..., jax.Array],
    trees: Sequence[Sequence[jax.Array]],
    plan: DistributionPlan,
    sent: Callable[[Job, Round], str] = _as_it_is,
) -> list[jax.Array]:
    """Replaces every matrix of `combine(*leaves)` by `work` of it, the devices sharing the work.

    Args:
        work: What to do with a stack of wide matrices.
        combine: Entry by entry, from arrays of each of `trees` to one; it is applied to what a
            device gives away or works on, so that the combined tree is never alive as a whole.
        trees: This device's piece of every leaf, once or several times.
        plan: The plan.
        sent: The dtype in which the results of a job travel home.

    Returns:
        This device's piece of every result, gathered as the plan says.
    """
    sizes = dict(plan.sizes)
    parts = [
        _parts_of(combine, leaves, local)
        for *leaves, local in zip(*trees, plan.leaves, strict=True)
    ]
    # For every part, what came back of it: (index of the first matrix, matrices).
    done: dict[tuple[int, int], list[tuple[int, jax.Array]]] = {}
    for turn in plan.rounds:
        stacks, exchanged = [], []
        for job in turn.jobs:
            received = [
                make_whole(
                    _given(parts, group, job.dtype, turn.exchange, sizes),
                    group.block,
                    turn.exchange,
                    sizes,
                )
                for group in job.groups
            ]
            exchanged.append([x.shape[0] for x in received])
            stacks.append(concatenate(received))
        results = work_by_hand(work, stacks, turn)
        for job, lengths, result in zip(turn.jobs, exchanged, results, strict=True):
            result = result.astype(sent(job, turn))
            bounds = itertools.accumulate(lengths, initial=0)
            for group, (start, stop) in zip(job.groups, itertools.pairwise(bounds), strict=True):
                owners = [item and (item.leaf, item.part) for item in group.order]
                for home, places in bring_home(
                    result[start:stop], group.block, turn.exchange, sizes, owners
                ):
                    for first, run, offset in _runs([group.order[place] for place in places]):
                        if first is not None:
                            piece = lax.slice_in_dim(home, offset, offset + run)
                            key = first.leaf, first.part
                            done.setdefault(key, []).append((first.index, piece))
    results = []
    for leaf, (local, like) in enumerate(zip(plan.leaves, trees[-1], strict=True)):
        pieces = [
            concatenate([x for _, x in sorted(done[leaf, part], key=operator.itemgetter(0))])
            if (leaf, part) in done
            else jnp.zeros((count.count, *block.shape), like.dtype)
            for part, (count, block) in enumerate(zip(local.plan.parts, local.blocks, strict=True))
        ]
        result = leaf_of(pieces, local)
        for axis, names in plan.gathered[leaf]:
            result = all_gather(result, names, axis)
        # As it was sent until here.
        results.append(result.astype(like.dtype))
    return results


def _parts_of(
    combine: Callable[..., jax.Array], leaves: Sequence[jax.Array], local: LocalLeaf
) -> list[_Part]:
    if local.gathered:
        # Combined first, so that one array is gathered and not several.
        leaves, combine = [combine(*leaves)], _itself
    matrices = zip(*(matrices_of(x, local) for x in leaves), strict=True)
    return [
        _Part(arrays, lambda *pieces, part=part: block_of(combine(*pieces), local, part))
        for part, arrays in enumerate(matrices)
    ]


def _runs(order: Sequence[Item | None]) -> Iterator[tuple[Item | None, int, int]]:
    """Consecutive entries that lie consecutively in a part too: first, length and offset."""
    start = 0
    for stop in range(1, len(order) + 1):
        if stop < len(order) and _follows(order[stop - 1], order[stop]):
            continue
        yield order[start], stop - start, start
        start = stop


def _follows(item: Item | None, successor: Item | None) -> bool:
    if item is None or successor is None:
        return item is successor
    return successor == Item(item.leaf, item.part, item.index + 1)


def _given(
    parts: Sequence[Sequence[_Part]],
    group: Group,
    dtype: str,
    exchange: Exchange,
    sizes: Sizes,
) -> jax.Array:
    """What this device gives of a group: its own choice of places along the replicating axes."""
    _, free = held_and_free(group.block, exchange.positions)
    if not free:
        return _gather(parts, group.order, group.block, dtype)
    numbers = by_free_and_held(group.block, exchange, sizes)
    slots = len(group.order) // numbers.size
    # table[place along free axes][slot, place along held axes]: the matrix.
    table = [
        [group.order[slot * numbers.size + int(n)] for slot in range(slots) for n in row]
        for row in numbers
    ]
    me = position(free)
    if len(table[0]) > _CHOSEN:
        stack = _gather(parts, [item for row in table for item in row], group.block, dtype)
        return lax.dynamic_slice_in_dim(stack, me * len(table[0]), len(table[0]))
    return concatenate(
        [
            _chosen(parts, column, me)
            if any(column)
            else _gather(parts, (None,), group.block, dtype)
            for column in zip(*table, strict=True)
        ]
    )


def _chosen(
    parts: Sequence[Sequence[_Part]], choices: Sequence[Item | None], me: jax.Array
) -> jax.Array:
    """The matrix `choices[me]`, with an axis of length one before it; any where it is None."""
    sources = sorted({(item.leaf, item.part) for item in choices if item is not None})
    number = {source: index for index, source in enumerate(sources)}
    rows = [(0, 0) if x is None else (number[x.leaf, x.part], x.index) for x in choices]
    source, index = jnp.asarray(np.array(rows, np.int32))[me]

    def of(leaf: int, part: int) -> Callable[[jax.Array], jax.Array]:
        whole = parts[leaf][part].vary_like(me)
        # Without the barrier, XLA moves the slice, which all branches have, behind them, and what
        # a branch then returns is a copy of the whole parameter.
        return lambda index: lax.optimization_barrier(
            whole(lambda x: lax.dynamic_slice_in_dim(x, index, 1))
        )

    return lax.switch(source, [of(*source) for source in sources], index)


def _gather(
    parts: Sequence[Sequence[_Part]], order: Sequence[Item | None], block: Block, dtype: str
) -> jax.Array:
    return concatenate(
        [
            jnp.zeros((run, *block.shape), dtype)
            if first is None
            else parts[first.leaf][first.part](
                functools.partial(
                    lax.slice_in_dim, start_index=first.index, limit_index=first.index + run
                )
            )
            for first, run, _ in _runs(order)
        ]
    )
