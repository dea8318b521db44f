"""Orthogonalising the leaves of a tree on one device.

The plan of stacks is chosen by platform and memory, never by the caller's tree alone: a CPU works
on matrices in turn, an accelerator on stacks of them at once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from muonclip_jax._devices import device_memory
from muonclip_jax.matrices.parts import plan_leaf
from muonclip_jax.matrices.stacks import StackPlan, map_stacks, plan_stacks
from muonclip_jax.matrices.turns import TurnPlan, map_in_turn, plan_turns
from muonclip_jax.newton_schulz import PolarPlan, apply_polar
from muonclip_jax.routing import MatrixSpec

# A stack is the unit of work and of temporary memory. On a CPU, where matrices are worked on one
# after another, it is a share of the tree: the number of stacks, and with it the program, then
# stays as it is however deep the tree. Smaller ones than the second bound save nothing that counts.
_CPU_STACK_SHARE = 8
_CPU_STACK_BYTES = 24 * 2**20
# Newton-Schulz holds a few copies of a stack; a small device has little room beside the parameters.
_ACCELERATOR_MEMORY_SHARE = 64

#: Of each leaf: shape, dtype, and where its matrices are.
_Shapes: TypeAlias = tuple[tuple[tuple[int, ...], str, MatrixSpec], ...]


@dataclasses.dataclass(frozen=True)
class OneDevicePlan:
    """What one device needs to know of its leaves.

    Attributes:
        specs: The normalised spec of each leaf.
        max_stack_bytes: Bound on a stack; a single matrix may exceed it.
    """

    specs: tuple[MatrixSpec, ...]
    max_stack_bytes: int


def orthogonalize_on_one_device(
    polar: PolarPlan,
    plan: OneDevicePlan,
    combine: Callable[..., jax.Array],
    eps: jax.typing.ArrayLike,
    how: Any,
    count: jax.Array,
    *trees: Sequence[jax.Array],
) -> list[jax.Array]:
    """Replaces every matrix of `combine(how, *leaves)` by its polar factor.

    Args:
        polar: How to orthogonalise; it has its platform (`decide_platform`).
        plan: Where the matrices are.
        combine: Entry by entry, from `how` and an array of each of `trees` to one; a function of a
            module, for it is part of the program.
        eps: Smallest divisor, as in `orthogonalize`.
        how: What `combine` needs besides, arrays or None.
        count: Any number that the compiler does not know, such as the number of steps so far.
        *trees: Leaves of equal shapes, once or several times; the last one's dtype is the result's.

    Returns:
        The polar factors, as the leaves.
    """
    shapes = tuple(
        (leaf.shape, leaf.dtype.name, spec)
        for leaf, spec in zip(trees[-1], plan.specs, strict=True)
    )
    limit = _stack_limit(str(polar.platform), plan.max_stack_bytes)
    return _program(polar, shapes, limit, combine, eps, how, count, trees)


def _stack_limit(platform: str, max_bytes: int) -> int:
    memory = device_memory(platform)
    return max_bytes if memory is None else min(max_bytes, memory // _ACCELERATOR_MEMORY_SHARE)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _program(
    polar: PolarPlan,
    shapes: _Shapes,
    max_bytes: int,
    combine: Callable[..., jax.Array],
    eps: jax.typing.ArrayLike,
    how: Any,
    count: jax.Array,
    trees: Sequence[Sequence[jax.Array]],
) -> list[jax.Array]:
    # An inner jit: a call outside of one compiles as a whole, and once.
    function = functools.partial(_polar, polar, eps)
    combined = functools.partial(combine, how)
    if polar.platform == "cpu":
        return map_in_turn(function, combined, trees, _turns(shapes, max_bytes), count)
    return map_stacks(function, combined, trees, _stacks(shapes, max_bytes))


@functools.lru_cache(maxsize=64)
def _stacks(shapes: _Shapes, max_bytes: int) -> StackPlan:
    leaves = [plan_leaf(shape, spec) for shape, _, spec in shapes]
    return plan_stacks(leaves, [dtype for _, dtype, _ in shapes], max_bytes)


@functools.lru_cache(maxsize=64)
def _turns(shapes: _Shapes, max_bytes: int) -> TurnPlan:
    total = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in shapes)
    leaves = [plan_leaf(shape, spec) for shape, _, spec in shapes]
    share = max(_CPU_STACK_BYTES, total // _CPU_STACK_SHARE)
    return plan_turns(leaves, [dtype for _, dtype, _ in shapes], min(share, max_bytes))


@functools.partial(jax.jit, static_argnums=0)
def _polar(polar: PolarPlan, eps: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
    # An inner jit, so that matrices of one shape are traced once.
    return apply_polar(polar, x, eps)
