"""The maxima of a micro-batch, held against what the state was given room for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax._tree import MAX_LOGITS, Shaped, Tree, flatten_with_paths


def _positions(leaves: list[tuple[str, Any]]) -> list[int]:
    """Returns which leaves are maxima: those called `max_logits`, or all where none is."""
    named = [i for i, (path, _) in enumerate(leaves) if MAX_LOGITS in path.split("/")]
    return named or list(range(len(leaves)))


def forms_of(example: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns path -> form of the maxima in a tree that shows what they will look like.

    Args:
        example: A tree as `update` will get it, with arrays or shapes; None for no maxima.

    Returns:
        Shapes `(*stack, heads)` in float32 or wider, for the leaves that are maxima.

    Raises:
        ValueError: If a maximum of the example has no shape or no dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> forms_of({"attention": {"max_logits": (jnp.ones(4),), "weights": (jnp.ones((9, 9)),)}})
        {'attention/max_logits/0': ShapeDtypeStruct(shape=(4,), dtype=float32)}
    """
    leaves, _ = flatten_with_paths(example)
    forms: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in (leaves[i] for i in _positions(leaves)):
        if not isinstance(leaf, Shaped):
            raise ValueError(
                f"max_logits shows accumulate what the maxima look like; at {path!r} it has "
                f"{leaf!r}. Expected an array or jax.ShapeDtypeStruct((heads,), jnp.float32)."
            )
        forms[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
    return forms


def read_recorded(
    max_logits: Tree, known: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[Any], Tree]]:
    """Returns a micro-batch's maxima by path, and how to put others in their places.

    Args:
        max_logits: What `update` got.
        known: Path -> what the state holds for it.

    Returns:
        Path -> maxima with the paths and shapes of `known`, and a function from such a dict to a
        tree like `max_logits`.

    Raises:
        ValueError: If these are not the maxima that the state has room for.

    Example:
        >>> import jax.numpy as jnp
        >>> tree = {"attention": {"max_logits": (jnp.ones(2),)}}
        >>> recorded, rebuild = read_recorded(tree, forms_of(tree))
        >>> rebuild({path: 3 * x for path, x in recorded.items()})
        {'attention': {'max_logits': (Array([3., 3.], dtype=float32),)}}
    """
    leaves, structure = flatten_with_paths(max_logits)
    positions = _positions(leaves)
    recorded = {leaves[i][0]: leaves[i][1] for i in positions}
    if recorded and not known:
        forms = ", ".join(
            f"{path!r}: jax.ShapeDtypeStruct({jnp.shape(x)}, jnp.float32)"
            for path, x in list(recorded.items())[:4]
        )
        more = ", ..." if len(recorded) > 4 else ""
        raise ValueError(
            "accumulate got max_logits and was not told at construction what they look like, so "
            "its state has no room for them. Write accumulate(tx, every, max_logits=example) with "
            "a tree like these, of arrays or shapes, for example from jax.eval_shape of the "
            f"forward pass: {{{forms}{more}}}."
        )
    if known and not recorded:
        raise ValueError(
            f"accumulate was told to expect maxima at {sorted(known)} and this update brings "
            f"none. Call tx.update(grads, state, params, max_logits=max_logits) for every "
            "micro-batch, or leave max_logits out of accumulate(...)."
        )
    if recorded.keys() != known.keys():
        raise ValueError(
            "The maxima of this update are not those that accumulate was told to expect: only one "
            f"of the two has {sorted(recorded.keys() ^ known.keys())}. Capture them in the same "
            "way as the example in accumulate(tx, every, max_logits=example)."
        )
    for path, x in recorded.items():
        if jnp.shape(x) != known[path].shape:
            raise ValueError(
                f"The maxima at {path!r} have shape {jnp.shape(x)}; accumulate was told to expect "
                f"{known[path].shape}. Correct the example in accumulate(tx, every, "
                "max_logits=example)."
            )

    def rebuild(maxima: dict[str, Any]) -> Tree:
        rebuilt = [leaf for _, leaf in leaves]
        for i in positions:
            rebuilt[i] = maxima[leaves[i][0]]
        return jax.tree.unflatten(structure, rebuilt)

    return recorded, rebuild
