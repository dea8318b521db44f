"""Same-shaped matrices of a tree in stacks, each of them one batched call.

With one Newton-Schulz per leaf, program size grows with the depth of a network; with one per shape
it does not. A bound on the size of a stack bounds temporary memory.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.matrices.parts import (
    LeafPlan,
    Run,
    even_size,
    runs_by_shape,
    runs_of,
    to_matrices,
)


class StackPlan(NamedTuple):
    """How each leaf is split, and which matrices share a stack: the runs of each stack."""

    leaves: tuple[LeafPlan, ...]
    stacks: tuple[tuple[Run, ...], ...]


def plan_stacks(leaves: Sequence[LeafPlan], dtypes: Sequence[str], max_bytes: int) -> StackPlan:
    """Plans the stacks of a tree, from plans and dtypes of its leaves.

    A stack has one dtype and at most `max_bytes`, or a single matrix. Matrices without entries are
    in no stack.
    """
    stacks = []
    for limit, parts in runs_by_shape(leaves, dtypes, max_bytes):
        matrices = [(run.leaf, run.part, number) for run in parts for number in range(run.stop)]
        size = even_size(len(matrices), limit)
        starts = range(0, len(matrices), size)
        stacks += [runs_of(matrices[start : start + size]) for start in starts]
    return StackPlan(tuple(leaves), tuple(stacks))


def map_parts(
    function: Callable[[jax.Array], jax.Array], leaves: Sequence[jax.Array], plan: StackPlan
) -> list[list[jax.Array]]:
    """`function` of all stacks of wide matrices, as one array for each part of each leaf."""
    parts = [to_matrices(x, leaf) for x, leaf in zip(leaves, plan.leaves, strict=True)]
    # Runs of a part arrive in order of `start`, for that is the order they were planned in.
    done: dict[tuple[int, int], list[jax.Array]] = {}
    for runs in plan.stacks:
        pieces = [lax.slice_in_dim(parts[run.leaf][run.part], run.start, run.stop) for run in runs]
        tall = [x.shape[-2] > x.shape[-1] for x in pieces]
        wide = [x.mT if turned else x for x, turned in zip(pieces, tall, strict=True)]
        results = lax.split(function(jnp.concatenate(wide)), list(map(len, pieces)))
        for run, turned, y in zip(runs, tall, results, strict=True):
            done.setdefault((run.leaf, run.part), []).append(y.mT if turned else y)
    for (leaf, part), pieces in done.items():
        parts[leaf][part] = jnp.concatenate(pieces)
    return parts
