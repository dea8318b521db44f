"""The leaves of one attention block: finding a projection's kernel, taking stacked axes away."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from muonclip_jax.heads.builtin import KERNEL_NAMES

#: A block's leaves by their path inside the block. Only `.shape` is looked at.
Leaves = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A leaf of which only the shape is known."""

    shape: tuple[int, ...]


class MisfitError(Exception):
    """One way to read a block's shapes does not work out; the message says why."""


class RefusalError(MisfitError):
    """The block is understood, and it cannot be clipped."""


def unstack(
    shape: tuple[int, ...], stack_axes: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape of one layer and the stacked axes counted from the front.

    Example:
        >>> unstack((12, 64, 4, 16), (0,), (12,))
        ((64, 4, 16), (0,))

    Raises:
        MisfitError: If the shape has no such axes or they have other sizes.
    """
    rank = len(shape)
    axes = tuple(sorted(axis % rank for axis in stack_axes)) if rank else ()
    if len(set(axes)) < len(stack_axes) or any(not -rank <= axis < rank for axis in stack_axes):
        raise MisfitError(f"shape {shape} has no axes {stack_axes} to stack layers on")
    if tuple(shape[axis] for axis in axes) != sizes:
        raise MisfitError(f"shape {shape} is not stacked {sizes} on axes {axes}")
    return tuple(n for axis, n in enumerate(shape) if axis not in axes), axes


def under(leaves: Leaves, path: str) -> dict[str, Any]:
    """Returns the leaves of one submodule by their path in it; "" is the leaf at `path` itself.

    Example:
        >>> under({"query/kernel": 1, "query/bias": 2, "out/kernel": 3}, "query")
        {'kernel': 1, 'bias': 2}
    """
    found = {name[len(path) + 1 :]: x for name, x in leaves.items() if name.startswith(path + "/")}
    return {"": leaves[path]} | found if path in leaves else found


def children(leaves: Leaves) -> tuple[str, ...]:
    """Returns the names directly below a block.

    Example:
        >>> children({"query/kernel": 1, "query/bias": 2, "wk": 3})
        ('query', 'wk')
    """
    return tuple(dict.fromkeys(path.partition("/")[0] for path in leaves))


def kernel_of(leaves: Leaves, path: str) -> tuple[str, Any] | None:
    """Returns the name and the leaf of a projection's kernel, if it has one."""
    found = under(leaves, path)
    return next(((name, found[name]) for name in KERNEL_NAMES if name in found), None)
