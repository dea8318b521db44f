"""The tree of maxima, whatever recorded it, as block -> arrays.

Flax returns what was sown as nested dicts of tuples under the name `max_logits`, NNX as a state of
boxed tuples; a loop of one's own may have an array for each block, in a tree that mirrors the
modules or in a flat dict by path. All of it becomes a dict from the block's path, such as
"decoder/block_0/attention", to arrays `(..., *stack, heads)`.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax

from muonclip_jax._tree import MAX_LOGITS, Tree, join, path_names
from muonclip_jax.attention import finite_first
from muonclip_jax.clipping.gamma import at_least_float32

_OUTER = ("params", "intermediates")

#: Module path -> the arrays that were recorded there.
Recorded: TypeAlias = dict[str, list[Any]]


def _module(names: Sequence[str]) -> str:
    names = list(names)
    while names and names[0] in _OUTER:
        names = names[1:]
    return join(names)


def read_maxima(max_logits: Tree) -> tuple[Recorded, bool]:
    """Returns what was recorded for each module, and whether it is called `max_logits`.

    Where any leaf is called `max_logits`, only such leaves count. Otherwise every leaf must be an
    array at the path of its attention block, "" for a model that is itself the attention. Outer
    "params" and "intermediates" levels, boxes and NNX states are seen through.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones(4)
        >>> sown = {"intermediates": {"block": {"attn": {"max_logits": (x,)}}}}
        >>> trees = sown, {"block": {"attn": x}}, {"block/attn": x}
        >>> [list(read_maxima(tree)[0]) for tree in trees]
        [['block/attn'], ['block/attn'], ['block/attn']]
    """
    leaves = jax.tree_util.tree_flatten_with_path(max_logits)[0]
    named = [(join(path_names(path)).split("/"), leaf) for path, leaf in leaves]
    found: Recorded = {}
    for names, leaf in named:
        if MAX_LOGITS in names:
            last = len(names) - 1 - names[::-1].index(MAX_LOGITS)
            found.setdefault(_module(names[:last]), []).append(leaf)
    sown = bool(found)
    if not found and leaves and leaves[0][0]:
        found = {_module(names): [leaf] for names, leaf in named}
    if not found:
        raise ValueError(
            f"max_logits holds no maxima. Expected leaves named {MAX_LOGITS!r}, as in what Flax "
            "returns as intermediates, or an array of (heads,) at each attention block, as in "
            f"{{'decoder/block_0/attention': array}}; got {max_logits!r:.80}. Record them with "
            "muonclip_jax.dot_product_attention, or capture them with muonclip_jax.linen or "
            "muonclip_jax.nnx."
        )
    for module, recorded in found.items():
        if not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in recorded):
            raise ValueError(
                f"The maxima of {module!r} are {recorded}; expected arrays of (heads,). Write "
                "jnp.asarray(...)."
            )
    return found, sown


def trailing_shape(arrays: Sequence[Any]) -> tuple[int, ...]:
    """Returns the shape with the fewest axes among the recordings of one module."""
    return min((tuple(x.shape) for x in arrays), key=len)


def merge_recordings(arrays: Sequence[Any], shape: tuple[int, ...], path: str) -> jax.Array:
    """Returns the maximum over recordings and over the axes before `shape`, in float32 or wider.

    Finite maxima come first: what went wrong in one piece of a batch does not hide the others.

    `arrays` are the recordings of the module at `path`, each `(..., *stack, heads)`, and `shape` is
    `(*stack, heads)`.
    """
    reduced: list[jax.Array] = []
    for x in arrays:
        leading = len(x.shape) - len(shape)
        if leading < 0 or tuple(x.shape[leading:]) != shape:
            raise ValueError(
                f"The maxima of attention block {path!r} have shape {tuple(x.shape)}; its kernels "
                f"say that they must end in {shape}: stacked layers, then query heads."
            )
        if leading >= 2 and x.shape[-3] == shape[-1]:
            raise ValueError(
                f"The maxima of attention block {path!r} have shape {tuple(x.shape)}, which may be "
                f"whole logits (..., query heads, queries, keys) too. Expected {shape}: take the "
                "maximum over all other axes first."
            )
        reduced.append(finite_first.max_over(at_least_float32(x), range(leading)))
    return functools.reduce(finite_first.maximum, reduced)
