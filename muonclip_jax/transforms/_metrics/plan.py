"""What is measured in a tree: its matrices in stacks of one shape, and its attention blocks.

Figures of all matrices lie in one array, leaf after leaf, part after part, matrix after matrix. So
the state of `metrics` has a handful of arrays however deep the model is, and the same structure for
every tree, the empty one of `optax.tree.map_params` included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax._tree import Tree
from muonclip_jax.clipping.matching import NamedLeaves, named_leaves
from muonclip_jax.heads.finding import FoundBlock, Rule, find_blocks
from muonclip_jax.matrices import LeafPlan, StackPlan, plan_leaf, plan_stacks, to_matrices
from muonclip_jax.routing import MatrixRules, resolve_specs

# A stack is copied and scaled in float32, so it is the unit of temporary memory. As a share of the
# tree it keeps the program short however deep the tree; smaller stacks than the second bound save
# nothing that counts.
_STACK_SHARE = 12
_STACK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MatrixPlan:
    """The matrices of a tree.

    Attributes:
        paths: Path of every leaf that has some.
        positions: Where each of those leaves is among all leaves of the tree.
        stacks: How they are cut, and which matrices share a stack.
    """

    paths: tuple[str, ...]
    positions: tuple[int, ...]
    stacks: StackPlan

    @property
    def counts(self) -> tuple[int, ...]:
        """How many matrices each leaf has."""
        return tuple(sum(part.count for part in leaf.parts) for leaf in self.stacks.leaves)

    @property
    def total(self) -> int:
        """How many matrices there are."""
        return sum(self.counts)


def plan_matrices(tree: Tree, rules: MatrixRules | None) -> MatrixPlan:
    """Plans the matrices of a tree of parameters or updates: those that the rules give to Muon."""
    found = [
        (path, position, plan_leaf(leaf.shape, spec))
        for position, (path, leaf, spec) in enumerate(resolve_specs(tree, rules=rules))
        if spec is not None
    ]
    leaves = [plan for _, _, plan in found]
    numbers = sum(part.count * part.fan_in * part.fan_out for plan in leaves for part in plan.parts)
    # Updates and momentum of all dtypes are measured in float32.
    max_bytes = max(_STACK_BYTES, 4 * numbers // _STACK_SHARE)
    stacks = plan_stacks(leaves, ["float32"] * len(leaves), max_bytes)
    return MatrixPlan(
        tuple(path for path, _, _ in found), tuple(position for _, position, _ in found), stacks
    )


def blocks_of(tree: Tree, rules: tuple[Rule, ...] | None) -> tuple[NamedLeaves, list[FoundBlock]]:
    """Finds the attention blocks of a tree, none in a tree without parameters."""
    named = named_leaves(tree)
    if not named.paths:
        return named, []
    return named, find_blocks(named.by_path, rules, strict=not named.masked)


def measure_stacks(
    function: Callable[[jax.Array], tuple[jax.Array, ...]],
    leaves: Sequence[jax.Array],
    plan: StackPlan,
    figures: int,
) -> list[jax.Array]:
    """Measures every matrix of a tree, one call a stack.

    Args:
        function: From a stack `(count, rows, columns)` of wide matrices to its figures, each
            `(count,)`.
        leaves: The leaves that the plan was made for.
        plan: The plan.
        figures: How many figures there are.

    Returns:
        Each figure of all matrices, in the order of leaves, parts and matrices, float32. Matrices
        without entries have zeros.
    """
    parts = [to_matrices(x, leaf) for x, leaf in zip(leaves, plan.leaves, strict=True)]
    starts = _starts(plan.leaves)
    measured = jnp.zeros((figures, starts[-1][-1]), jnp.float32)
    for stack in plan.stacks:
        pieces = []
        for run in stack.runs:
            piece = parts[run.leaf][run.part][run.start : run.stop].astype(_wide(leaves[run.leaf]))
            pieces.append(piece.mT if run.transposed else piece)
        values = jnp.stack(function(jnp.concatenate(pieces)))
        done = 0
        for run in stack.runs:
            count, start = run.stop - run.start, starts[run.leaf][run.part] + run.start
            measured = measured.at[:, start : start + count].set(values[:, done : done + count])
            done += count
    return list(measured)


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _starts(leaves: Sequence[LeafPlan]) -> list[list[int]]:
    """Where each part of each leaf begins among all matrices; the last entry is their number."""
    starts, total = [], 0
    for leaf in leaves:
        starts.append([])
        for part in leaf.parts:
            starts[-1].append(total)
            total += part.count
    return [*starts, [total]]
