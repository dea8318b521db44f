"""Reduction of the maxima of several micro-batches and shards: finite values take precedence.

The clip needs one number per head for the global batch, which is often processed in parts, and a
part may overflow. QK-Clip ignores a maximum that is not finite, so with an ordinary maximum one NaN
would switch the clip off while logits grow. Therefore the result is the largest finite maximum; if
there is none, NaN takes precedence over +inf, and +inf over -inf.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from muonclip_jax._tree import MAX_LOGITS, Tree, flatten_with_paths


def _finite_first(
    x: Float[Array, "..."], maximum: Callable[[Float[Array, "2 ..."]], Float[Array, "2 ..."]]
) -> Float[Array, "..."]:
    """Reduces finite values (else -inf) and ranks (NaN 2, +inf 1, else 0) by one plain maximum."""
    finite = jnp.isfinite(x)
    rank = jnp.where(jnp.isnan(x), 2, jnp.where(~finite & (x > 0), 1, 0)).astype(x.dtype)
    values, rank = maximum(jnp.stack([jnp.where(finite, x, -jnp.inf), rank]))
    # No intermediate array holds an infinity that the result does not: jax.debug_infs sees them.
    missing = ~jnp.isfinite(values)
    values = jnp.where(missing & (rank == 1), jnp.inf, values)
    return jnp.where(missing & (rank == 2), jnp.nan, values)


def finite_max(x: Float[Array, "..."], axes: Sequence[int]) -> Float[Array, "..."]:
    """Returns the maximum over axes from the front, with finite values first.

    Example:
        >>> finite_max(jnp.array([[1.0, jnp.nan], [jnp.nan, jnp.nan]]), (0,)).tolist()
        [1.0, nan]
    """
    return _finite_first(x, lambda parts: parts.max(tuple(axis + 1 for axis in axes)))


def only_max_logits(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the maxima in nested intermediates, one array per module."""
    found = {}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            found |= {name: inner} if (inner := only_max_logits(child)) else {}
        elif name == MAX_LOGITS:
            found[name] = merge_max_logits(*child) if isinstance(child, tuple) else child
    return found


def merge_max_logits(*trees: Tree) -> Tree:
    """Returns the elementwise maximum of several trees of maxima, for example of micro-batches.

    The result is the largest finite maximum, because QK-Clip ignores a head whose maximum is not
    finite. If no tree has a finite one, NaN takes precedence over +inf, and +inf over -inf.

    Args:
        *trees: Pytrees with the same structure and shapes, as returned by Flax or otherwise.

    Returns:
        A pytree with the same structure.

    Raises:
        ValueError: If no tree is given, or if their structures or shapes differ.

    Example:
        >>> first = {"attention": {"max_logits": jnp.array([3.0, jnp.nan])}}
        >>> second = {"attention": {"max_logits": jnp.array([2.0, 7.0])}}
        >>> merge_max_logits(first, second)["attention"]["max_logits"].tolist()
        [3.0, 7.0]
    """
    if not trees:
        raise ValueError("merge_max_logits() needs at least one tree of maxima, got none.")
    first, *others = ({path: jnp.shape(x) for path, x in flatten_with_paths(t)[0]} for t in trees)
    for number, other in enumerate(others, start=2):
        for path in sorted(first | other):
            if first.get(path) != other.get(path):
                raise ValueError(
                    f"The trees of maxima must have the same structure and shapes; at {path!r} "
                    f"tree 1 has {first.get(path, 'nothing')} and tree {number} "
                    f"{other.get(path, 'nothing')}. Capture every micro-batch in the same way."
                )
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *xs: finite_max(jnp.stack(xs), (0,)), *trees)


def reduce_max_logits(tree: Tree, axis_name: str | tuple[str, ...]) -> Tree:
    """Reduces the maxima over mapped axes, with one collective for the whole tree.

    For use inside `jax.shard_map`, `jax.pmap` or `jax.vmap(axis_name=...)`, where every shard has
    the maxima of its own part of the batch. Values that are not finite are treated as by
    `merge_max_logits`.

    Args:
        tree: Maxima of this shard, leaves of any shape.
        axis_name: The mapped axis or axes over which the batch is sharded.

    Returns:
        A pytree with the same structure and dtypes, equal on all shards.

    Example:
        >>> maxima = {"attention": {"max_logits": jnp.array([[1.0, 8.0], [5.0, 2.0]])}}
        >>> reduced = jax.vmap(lambda t: reduce_max_logits(t, "batch"), axis_name="batch")(maxima)
        >>> reduced["attention"]["max_logits"].tolist()
        [[5.0, 8.0], [5.0, 8.0]]
    """
    if not jax.tree.leaves(tree):
        return tree
    packed, unpack = ravel_pytree(tree)
    return unpack(_finite_first(packed, lambda parts: jax.lax.pmax(parts, axis_name)))
