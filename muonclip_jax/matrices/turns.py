"""Matrices one after another: the order of work on a CPU, and what keeps its memory bounded.

One matrix fills the cores of a CPU, so a batch gains nothing there. What has to be kept small is
the program and what is alive at once. Parts of one shape share a *turn*: they are gathered into a
stack of bounded size, a loop replaces matrix by matrix in place, and the results go home. Large
parts (scanned layers) are worked on where they are.

Three things about XLA's CPU compiler shape the code:

1. It orders independent operations for concurrency and lets all of their memory be alive together:
   without a tie, every turn's stack. So each turn is a branch of a conditional that looks at the
   turn before. The other branch is never taken; the compiler cannot know.
2. It compiles every fused loop by itself unless it has met the very same one. `stack[3]` and
   `stack[4]` are two; a position that is data makes them one. Hence `_positions`.
3. Code outside of the loop is proportional to the tree, code inside to the number of turns.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax.matrices.parts import LeafPlan, from_matrices, to_matrices


@dataclass(frozen=True)
class Turn:
    """Equally shaped parts that are worked on together: `(leaf, part)` of each, and its count."""

    parts: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each part begins in the stack."""
        return tuple(itertools.accumulate(self.counts[:-1], initial=0))


@dataclass(frozen=True)
class TurnPlan:
    """All matrices of a tree: how each leaf is cut, and which parts share a turn."""

    leaves: tuple[LeafPlan, ...]
    turns: tuple[Turn, ...]


def plan_turns(leaves: Sequence[LeafPlan], dtypes: Sequence[str], max_bytes: int) -> TurnPlan:
    """Plans the turns of a tree.

    Args:
        leaves: The plan of each leaf.
        dtypes: The dtype of each leaf, by name; only equal ones share a turn.
        max_bytes: Bound on the size of a stack in bytes; a part that exceeds it takes a turn of
            its own, without a stack.

    Returns:
        The plan; `map_in_turn` follows it. Matrices without entries have no turn.

    Example:
        >>> from muonclip_jax.routing import MatrixSpec
        >>> from muonclip_jax.matrices.parts import plan_leaf
        >>> leaves = [plan_leaf((8, 2), MatrixSpec())] * 3
        >>> [turn.parts for turn in plan_turns(leaves, ["float32"] * 3, 128).turns]
        [((0, 0), (1, 0)), ((2, 0),)]
    """
    kinds: dict[tuple[int, int, str], list[tuple[int, int, int]]] = {}
    for leaf, (plan, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        for index, part in enumerate(plan.parts):
            if part.count * part.fan_in * part.fan_out:
                kind = (part.fan_in, part.fan_out, dtype)
                kinds.setdefault(kind, []).append((leaf, index, part.count))
    turns = []
    for (rows, columns, dtype), members in kinds.items():
        limit = max(1, max_bytes // (rows * columns * jnp.dtype(dtype).itemsize))
        large = [member for member in members if member[2] > limit]
        small = [member for member in members if member[2] <= limit]
        turns += [_turn([member]) for member in large]
        # Of nearly equal size: 13 matrices under a limit of 8 are 7 and 6, not 8 and 5.
        total = sum(count for _, _, count in small)
        size = -(-total // max(1, -(-total // limit)))
        chunk: list[tuple[int, int, int]] = []
        for member in small:
            if chunk and sum(count for _, _, count in chunk) + member[2] > size:
                turns.append(_turn(chunk))
                chunk = []
            chunk.append(member)
        if chunk:
            turns.append(_turn(chunk))
    return TurnPlan(leaves=tuple(leaves), turns=tuple(turns))


def map_in_turn(
    function: Callable[[jax.Array], jax.Array],
    combine: Callable[..., jax.Array],
    trees: Sequence[Sequence[jax.Array]],
    plan: TurnPlan,
    count: jax.Array,
) -> list[jax.Array]:
    """Applies `function` to every matrix of `combine(*leaves)`, turn by turn.

    Args:
        function: From a matrix `(fan_in, fan_out)` to the same shape and dtype.
        combine: Entry by entry, from arrays of each of `trees` to one.
        trees: The arrays that the plan was made for, once or several times.
        plan: The plan.
        count: Any number that the compiler does not know, such as the number of steps so far.

    Returns:
        The combined leaves, every matrix of them replaced.
    """
    parts = [
        [to_matrices(x, leaf) for x, leaf in zip(tree, plan.leaves, strict=True)] for tree in trees
    ]
    go = _always(count)
    positions = _positions(plan.turns, go)
    done: dict[tuple[int, int], jax.Array] = {}
    for turn in plan.turns:
        operands = [[tree[leaf][part] for tree in parts] for leaf, part in turn.parts]
        offsets = [positions[offset] for offset in turn.offsets] if len(turn.parts) > 1 else []

        def work(operands: list[list[jax.Array]], offsets: list[jax.Array]) -> jax.Array:
            combined = [combine(*pieces) for pieces in operands]
            return _in_place(function, _gather(combined, offsets))

        def idle(operands: list[list[jax.Array]], offsets: list[jax.Array]) -> jax.Array:
            # Not an operand: one of those would have to be copied before it could be a result.
            del offsets
            # Like an operand all the same: in a `shard_map` its type says along which axes of the
            # mesh it differs, and both branches must agree in that.
            like = jnp.zeros_like(operands[0][-1][:1])
            return jnp.broadcast_to(like, (sum(len(x[-1]) for x in operands), *like.shape[1:]))

        stack = lax.cond(go, work, idle, operands, offsets)
        go = _always(stack[0, 0, 0])
        # Cut out here, the pieces are read by whatever uses them, without a copy in between.
        done.update(zip(turn.parts, _scatter(stack, turn.counts, offsets), strict=True))
    return [
        from_matrices(
            [
                done[leaf, part]
                if (leaf, part) in done
                else combine(*(tree[leaf][part] for tree in parts))
                for part in range(len(leaf_plan.parts))
            ],
            leaf_plan,
        )
        for leaf, leaf_plan in enumerate(plan.leaves)
    ]


def _turn(members: Sequence[tuple[int, int, int]]) -> Turn:
    return Turn(
        parts=tuple((leaf, part) for leaf, part, _ in members),
        counts=tuple(count for _, _, count in members),
    )


def _positions(turns: Sequence[Turn], always: jax.Array) -> dict[int, jax.Array]:
    """The offsets of all turns as data, which no compiler folds into the code that uses them."""
    offsets = sorted({offset for turn in turns if len(turn.parts) > 1 for offset in turn.offsets})
    if not offsets:
        return {}
    values = lax.cond(
        always,
        lambda: [jnp.int32(offset) for offset in offsets],
        lambda: [jnp.int32(-1 - offset) for offset in offsets],
    )
    return dict(zip(offsets, values, strict=True))


def _always(number: jax.Array) -> jax.Array:
    """A predicate that is true for every number and NaN, and that the compiler cannot fold."""
    number = jnp.real(number).astype(jnp.float32)
    # No number is below -1 once clamped. XLA keeps no ranges of floats, so it does not find out.
    return ~(lax.clamp(np.float32(-1), number, np.float32(1)) < -2)


def _gather(pieces: Sequence[jax.Array], offsets: Sequence[jax.Array]) -> jax.Array:
    if len(pieces) == 1:
        return pieces[0]
    count, (_, *shape) = sum(map(len, pieces)), pieces[0].shape
    stack = jnp.zeros((count, *shape), pieces[0].dtype)
    for piece, offset in zip(pieces, offsets, strict=True):
        stack = _write(stack, piece, offset)
    return stack


def _scatter(
    stack: jax.Array, counts: Sequence[int], offsets: Sequence[jax.Array]
) -> list[jax.Array]:
    if len(counts) == 1:
        return [stack]
    return [_read(stack, offset, count) for offset, count in zip(offsets, counts, strict=True)]


def _read(stack: jax.Array, offset: jax.Array, count: int) -> jax.Array:
    # Unlike `stack[offset]`, without code for negative offsets.
    return lax.dynamic_slice_in_dim(stack, offset, count, allow_negative_indices=False)


def _write(stack: jax.Array, piece: jax.Array, offset: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(
        stack, piece, offset, axis=0, allow_negative_indices=False
    )


def _in_place(function: Callable[[jax.Array], jax.Array], stack: jax.Array) -> jax.Array:
    if len(stack) == 1:
        return function(stack[0])[None]

    def replace(index: jax.Array, stack: jax.Array) -> jax.Array:
        return _write(stack, function(_read(stack, index, 1)[0])[None], index)

    return lax.fori_loop(np.int32(0), np.int32(len(stack)), replace, stack)
