"""Carrying out a `DistributionPlan` where a mesh's axes are manual: one device's program."""

import itertools
import operator
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.matrices.distribution.blocks import Block
from muonclip_jax.matrices.distribution.hands import Work, concatenate, work_by_hand
from muonclip_jax.matrices.distribution.local import blocks_of, leaf_of
from muonclip_jax.matrices.distribution.moves import bring_home, make_whole
from muonclip_jax.matrices.distribution.plan import DistributionPlan, Item


def map_distributed(
    work: Work, leaves: Sequence[jax.Array], plan: DistributionPlan
) -> list[jax.Array]:
    """Replaces every matrix of a tree by what `work` makes of it, the devices sharing the work.

    Args:
        work: What to do with a stack of wide matrices.
        leaves: This device's piece of every parameter.
        plan: The plan.

    Returns:
        This device's piece of every result, as `plan.homes` says.
    """
    sizes = dict(plan.sizes)
    parts = [blocks_of(x, local) for x, local in zip(leaves, plan.leaves, strict=True)]
    # For every part, what came back of it: (index of the first matrix, matrices).
    done: dict[tuple[int, int], list[tuple[int, jax.Array]]] = {}
    for turn in plan.rounds:
        stacks, exchanged = [], []
        for job in turn.jobs:
            received = [
                make_whole(
                    _gather(parts, group.order, group.block), group.block, turn.exchange, sizes
                )
                for group in job.groups
            ]
            exchanged.append([x.shape[0] for x in received])
            stacks.append(concatenate(received))
        results = work_by_hand(work, stacks, turn)
        for job, lengths, result in zip(turn.jobs, exchanged, results, strict=True):
            bounds = itertools.accumulate(lengths, initial=0)
            for group, (start, stop) in zip(job.groups, itertools.pairwise(bounds), strict=True):
                home = bring_home(result[start:stop], group.home, turn.exchange, sizes)
                for first, run, offset in _runs(group.order):
                    if first is not None:
                        piece = lax.slice_in_dim(home, offset, offset + run)
                        done.setdefault((first.leaf, first.part), []).append((first.index, piece))
    results = []
    for leaf, (home, blocks) in enumerate(zip(plan.homes, parts, strict=True)):
        pieces = [
            concatenate([x for _, x in sorted(done[leaf, part], key=operator.itemgetter(0))])
            if (leaf, part) in done
            else jnp.zeros((count.count, *block.shape), blocks[part].dtype)
            for part, (count, block) in enumerate(zip(home.plan.parts, home.blocks, strict=True))
        ]
        results.append(leaf_of(pieces, home))
    return results


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


def _gather(
    parts: Sequence[Sequence[jax.Array]], order: Sequence[Item | None], block: Block
) -> jax.Array:
    dtype = next(parts[item.leaf][item.part].dtype for item in order if item is not None)
    return concatenate(
        [
            jnp.zeros((run, *block.shape), dtype)
            if first is None
            else lax.slice_in_dim(parts[first.leaf][first.part], first.index, first.index + run)
            for first, run, _ in _runs(order)
        ]
    )
