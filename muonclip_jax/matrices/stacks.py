"""Same-shaped matrices from all over a tree as stacks that one batched call works on.

A network has hundreds of matrices and a handful of shapes. One Newton-Schulz per leaf makes a
program as long as the tree is deep; one per shape keeps it short, and the stack is also what
devices share. Newton-Schulz commutes with transposition, so a tall matrix joins the wide ones.

The plan is made of shapes alone and holds no arrays: which matrices form a stack, never more of
them than `max_bytes` allows, so temporary memory stays bounded however large the tree is.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from muonclip_jax.matrices.parts import LeafPlan, from_matrices, to_matrices


@dataclass(frozen=True)
class Run:
    """Consecutive matrices of one part of one leaf: `part[start:stop]`."""

    leaf: int
    part: int
    start: int
    stop: int
    transposed: bool


@dataclass(frozen=True)
class Stack:
    """Matrices that are worked on together, each `(rows, columns)` with `rows <= columns`."""

    rows: int
    columns: int
    dtype: str
    runs: tuple[Run, ...]

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return sum(run.stop - run.start for run in self.runs)


@dataclass(frozen=True)
class StackPlan:
    """All matrices of a tree: how each leaf is cut, and which matrices share a stack."""

    leaves: tuple[LeafPlan, ...]
    stacks: tuple[Stack, ...]


def plan_stacks(
    leaves: Sequence[LeafPlan], dtypes: Sequence[str], max_bytes: int | None = None
) -> StackPlan:
    """Plans the stacks of a tree.

    Args:
        leaves: The plan of each leaf.
        dtypes: The dtype of each leaf, by name; only equal ones share a stack.
        max_bytes: Bound on the size of a stack in bytes; a single matrix may exceed it. None: one
            stack for each shape and dtype.

    Returns:
        The plan; `map_stacks` follows it. Matrices without entries are in no stack.

    Example:
        >>> from muonclip_jax.routing import MatrixSpec
        >>> from muonclip_jax.matrices.parts import plan_leaf
        >>> leaves = [plan_leaf((8, 2), MatrixSpec()), plan_leaf((2, 8), MatrixSpec())]
        >>> [(stack.rows, stack.columns, stack.count) for stack in
        ...  plan_stacks(leaves, ["float32", "float32"]).stacks]
        [(2, 8, 2)]
    """
    runs: dict[tuple[int, int, str], list[Run]] = {}
    for leaf, (plan, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        for index, part in enumerate(plan.parts):
            if part.count * part.fan_in * part.fan_out == 0:
                continue
            rows, columns = sorted((part.fan_in, part.fan_out))
            run = Run(leaf, index, 0, part.count, transposed=part.fan_in > part.fan_out)
            runs.setdefault((rows, columns, dtype), []).append(run)
    stacks = []
    for (rows, columns, dtype), members in runs.items():
        limit = None
        if max_bytes is not None:
            limit = max(1, max_bytes // (rows * columns * jnp.dtype(dtype).itemsize))
        stacks += [Stack(rows, columns, dtype, chunk) for chunk in _chunks(members, limit)]
    return StackPlan(leaves=tuple(leaves), stacks=tuple(stacks))


def map_stacks(
    function: Callable[[jax.Array], jax.Array],
    combine: Callable[..., jax.Array],
    trees: Sequence[Sequence[jax.Array]],
    plan: StackPlan,
) -> list[jax.Array]:
    """Applies `function` to every stack of `combine(*leaves)`.

    Args:
        function: From `(count, rows, columns)` to the same shape and dtype.
        combine: Entry by entry, from arrays of each of `trees` to one; it is applied stack by
            stack, so that the combined tree is never alive as a whole.
        trees: The arrays that the plan was made for, once or several times.
        plan: The plan.

    Returns:
        The combined leaves, every matrix of them replaced.
    """
    parts = [
        [to_matrices(x, leaf) for x, leaf in zip(tree, plan.leaves, strict=True)] for tree in trees
    ]
    # Runs of a part arrive in order of `start`, for that is the order they were planned in.
    done: dict[tuple[int, int], list[jax.Array]] = {}
    for stack in plan.stacks:
        result = function(_gather(combine, parts, stack.runs))
        bounds = itertools.accumulate((run.stop - run.start for run in stack.runs), initial=0)
        for run, (start, stop) in zip(stack.runs, itertools.pairwise(bounds), strict=True):
            piece = jax.lax.slice_in_dim(result, start, stop)
            done.setdefault((run.leaf, run.part), []).append(piece.mT if run.transposed else piece)
    return [
        from_matrices(
            [
                _concatenate(done[leaf, part])
                if (leaf, part) in done
                else combine(*(tree[leaf][part] for tree in parts))
                for part in range(len(leaf_plan.parts))
            ],
            leaf_plan,
        )
        for leaf, leaf_plan in enumerate(plan.leaves)
    ]


def _chunks(runs: Sequence[Run], limit: int | None) -> Iterator[tuple[Run, ...]]:
    if limit is None:
        yield tuple(runs)
        return
    total = sum(run.stop - run.start for run in runs)
    # Chunks of nearly equal size: 13 matrices under a limit of 8 are 7 and 6, not 8 and 5.
    size = math.ceil(total / math.ceil(total / limit))
    chunk: list[Run] = []
    room = size
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + room)
            chunk.append(Run(run.leaf, run.part, start, stop, run.transposed))
            room -= stop - start
            start = stop
            if room == 0:
                yield tuple(chunk)
                chunk, room = [], size
    if chunk:
        yield tuple(chunk)


def _gather(
    combine: Callable[..., jax.Array],
    parts: Sequence[Sequence[Sequence[jax.Array]]],
    runs: Sequence[Run],
) -> jax.Array:
    pieces = []
    for run in runs:
        piece = combine(
            *(jax.lax.slice_in_dim(tree[run.leaf][run.part], run.start, run.stop) for tree in parts)
        )
        pieces.append(piece.mT if run.transposed else piece)
    return _concatenate(pieces)


def _concatenate(pieces: Sequence[jax.Array]) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
