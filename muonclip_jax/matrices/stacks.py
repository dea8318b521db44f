"""Stacks of same-shaped matrices across a tree, each processed by one batched call.

With one Newton-Schulz per leaf, program size grows with the depth of a network; with one per shape
it does not. A bound on the size of a stack bounds temporary memory.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.matrices.parts import LeafPlan, from_matrices, parts_by_shape, to_matrices


@dataclass(frozen=True)
class Run:
    """Consecutive matrices of one part of one leaf: `part[start:stop]`."""

    leaf: int
    part: int
    start: int
    stop: int
    transposed: bool


@dataclass(frozen=True)
class StackPlan:
    """How each leaf is split, and which matrices share a stack: the runs of each stack."""

    leaves: tuple[LeafPlan, ...]
    stacks: tuple[tuple[Run, ...], ...]


def plan_stacks(leaves: Sequence[LeafPlan], dtypes: Sequence[str], max_bytes: int) -> StackPlan:
    """Plans the stacks of a tree, from plans and dtypes of its leaves.

    A stack has one dtype and at most `max_bytes`, or a single matrix. Matrices without entries are
    in no stack.
    """
    stacks = []
    for (rows, columns, dtype), members in parts_by_shape(leaves, dtypes).items():
        limit = max(1, max_bytes // (rows * columns * jnp.dtype(dtype).itemsize))
        runs = [
            Run(leaf, part, 0, count, leaves[leaf].parts[part].fan_in > rows)
            for leaf, part, count in members
        ]
        stacks += _chunks(runs, limit)
    return StackPlan(tuple(leaves), tuple(stacks))


def map_stacks(
    function: Callable[[jax.Array], jax.Array], leaves: Sequence[jax.Array], plan: StackPlan
) -> list[jax.Array]:
    """Replaces every matrix of the leaves by `function` of its stack `(count, rows, columns)`."""
    parts = map_parts(function, leaves, plan)
    return [from_matrices(x, leaf) for x, leaf in zip(parts, plan.leaves, strict=True)]


def map_parts(
    function: Callable[[jax.Array], jax.Array], leaves: Sequence[jax.Array], plan: StackPlan
) -> list[list[jax.Array]]:
    """`function` of all stacks, as one array for each part of each leaf."""
    parts = [to_matrices(x, leaf) for x, leaf in zip(leaves, plan.leaves, strict=True)]
    # Runs of a part arrive in order of `start`, for that is the order they were planned in.
    done: dict[tuple[int, int], list[jax.Array]] = {}
    for runs in plan.stacks:
        pieces = [lax.slice_in_dim(parts[run.leaf][run.part], run.start, run.stop) for run in runs]
        wide = [x.mT if run.transposed else x for x, run in zip(pieces, runs, strict=True)]
        result, start = function(jnp.concatenate(wide)), 0
        for x, run in zip(pieces, runs, strict=True):
            y = lax.slice_in_dim(result, start, start + len(x))
            start += len(x)
            done.setdefault((run.leaf, run.part), []).append(y.mT if run.transposed else y)
    for (leaf, part), pieces in done.items():
        parts[leaf][part] = jnp.concatenate(pieces)
    return parts


def _chunks(runs: Sequence[Run], limit: int) -> Iterator[tuple[Run, ...]]:
    total = sum(run.stop for run in runs)
    # Nearly equal sizes: 13 matrices under a limit of 8 are 7 and 6, not 8 and 5.
    size = math.ceil(total / math.ceil(total / limit))
    matrices = [(run, index) for run in runs for index in range(run.stop)]
    for start in range(0, total, size):
        by_run = itertools.groupby(matrices[start : start + size], key=lambda pair: pair[0])
        indices = [(run, [index for _, index in pairs]) for run, pairs in by_run]
        yield tuple(
            dataclasses.replace(run, start=among[0], stop=among[-1] + 1) for run, among in indices
        )
