"""Every way to read a block whose number of heads nobody has said."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from muonclip_jax.heads.kernels import Choice
from muonclip_jax.heads.layouts import AttentionLayout, Projection
from muonclip_jax.heads.leaves import Leaves, MisfitError, kernel_of


def query_shape(layout: AttentionLayout, leaves: Leaves) -> tuple[int, ...]:
    """Returns the shape of the kernel that makes queries, () where there is none."""
    found = kernel_of(leaves, _query(layout).path)
    return tuple(found[1].shape) if found else ()


def choices_of(
    layout: AttentionLayout, leaves: Leaves, stackings: Iterable[tuple[int, ...]]
) -> Iterator[Choice]:
    """Yields every number of heads, on every stack, that the query's features allow.

    Args:
        layout: The block's layout.
        leaves: Its leaves by their path inside it.
        stackings: Axes that may be stacked, counted in every leaf.
    """
    query, shape = _query(layout), query_shape(layout, leaves)
    candidates = [len(p.input_axis) for p in layout.projections if isinstance(p.input_axis, tuple)]
    for axes, number in itertools.product(stackings, range(max(candidates, default=1))):
        if any(not -len(shape) <= axis < len(shape) for axis in axes):
            continue
        stack = tuple(shape[axis] for axis in sorted(axis % len(shape) for axis in axes))
        choice = Choice(layout, leaves, axes, stack, 1, number)
        try:
            total = choice.kernel(query.path, query.input_axis).total
        except MisfitError:
            continue
        for heads in (n for n in range(1, total + 1) if total % n == 0):
            yield dataclasses.replace(choice, heads=heads)


def _query(layout: AttentionLayout) -> Projection:
    return next(p for p in layout.projections if {"query", "query_alone"} & set(p.parts))
