"""The tree of maxima, whatever recorded it, as block -> array.

Flax returns what was sown as nested dicts of tuples, NNX as a state of boxed tuples, a plain
function whatever the user likes. All of it becomes a dict from the block's path, such as
"decoder/block_0/attention", to one array `(*stack, heads)`.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from muonclip_jax._paths import MAX_LOGITS, join, path_names
from muonclip_jax._typing import Tree
from muonclip_jax.attention import finite_first

_OUTER = ("params", "intermediates")

#: Module path -> the arrays that were recorded there.
Recorded: TypeAlias = dict[str, list[Any]]


def _module(names: Sequence[str]) -> str:
    names = list(names)
    while names and names[0] in _OUTER:
        names = names[1:]
    return join(names)


def _is_flat(tree: Tree, is_array) -> bool:
    return isinstance(tree, Mapping) and bool(tree) and all(map(is_array, tree.values()))


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def read_maxima(max_logits: Tree) -> Recorded:
    """Returns what was recorded for each module, in the order of recording.

    Only leaves whose last name is `max_logits` count, unless the tree is a flat dict from module
    paths to arrays. Outer "params" and "intermediates" levels, boxes and NNX states are seen
    through.

    Args:
        max_logits: What Flax returned as `intermediates`, or a flat dict from
            "decoder/block_0/attention" to `(heads,)`.

    Returns:
        Module path -> the arrays recorded there. The path is "" for a model that is itself the
        attention.

    Example:
        >>> import jax.numpy as jnp
        >>> maxima = read_maxima({"intermediates": {"attn": {"max_logits": (jnp.ones(4),)}}})
        >>> {path: [x.shape for x in arrays] for path, arrays in maxima.items()}
        {'attn': [(4,)]}

    Raises:
        ValueError: If nothing in the tree is a maximum.
    """
    found: Recorded = {}
    leaves = jax.tree_util.tree_flatten_with_path(max_logits)[0]
    named = [(_split(path_names(key_path)), leaf) for key_path, leaf in leaves]
    for names, leaf in named:
        if MAX_LOGITS in names:
            last = len(names) - 1 - names[::-1].index(MAX_LOGITS)
            found.setdefault(_module(names[:last]), []).append(leaf)
    for module, recorded in found.items():
        if not all(_is_array(x) for x in recorded):
            raise ValueError(
                f"The maxima of {module!r} are {recorded}; expected arrays of (heads,). Write "
                "jnp.asarray(...)."
            )
    if not found and _is_flat(max_logits, _is_array):
        found = {_module(names): [leaf] for names, leaf in named}
    if not found:
        shown = ", ".join(repr(join(names)) for names, _ in named[:8]) or "nothing at all"
        raise ValueError(
            f"max_logits holds no maxima. Expected leaves named {MAX_LOGITS!r}, as in what Flax "
            "returns as intermediates, or a flat dict {'decoder/block_0/attention': array of "
            f"(heads,)}}; got {shown}. Record them with muonclip_jax.dot_product_attention, or "
            "capture them with muonclip_jax.linen or muonclip_jax.nnx."
        )
    return found


def _split(names: Iterable[str]) -> list[str]:
    return [part for name in names for part in name.split("/")]


def trailing_shape(arrays: Sequence[Any]) -> tuple[int, ...]:
    """Returns the shape with the fewest axes among the recordings of one module."""
    return min((tuple(x.shape) for x in arrays), key=len)


def merge_recordings(arrays: Sequence[Any], shape: tuple[int, ...], path: str) -> jax.Array:
    """Returns the maximum over recordings and over the axes before `shape`, in float32.

    Finite maxima come first: what went wrong in one piece of a batch does not hide the others.

    Args:
        arrays: Recordings of one module, each `(..., *stack, heads)`.
        shape: `(*stack, heads)`.
        path: The module, for the message.

    Raises:
        ValueError: If a recording does not end in `shape`.
    """
    reduced: list[jax.Array] = []
    for x in arrays:
        leading = len(x.shape) - len(shape)
        if leading < 0 or tuple(x.shape[leading:]) != shape:
            raise ValueError(
                f"The maxima of attention block {path!r} have shape {tuple(x.shape)}; its kernels "
                f"say that they must end in {shape}: stacked layers, then query heads."
            )
        reduced.append(finite_first.max_over(jnp.asarray(x, jnp.float32), range(leading)))
    return functools.reduce(finite_first.maximum, reduced)
