"""The leaves of a tree as routing sees them: path, shape, what kind of numbers, names of axes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muonclip_jax._tree import SEPARATOR, Tree, array_leaves
from muonclip_jax.heads.names import GENERIC, LeafName, read_path, spelling


class Leaf(NamedTuple):
    """All that a decision may depend on, hashable.

    Args:
        path: Its path.
        shape: Its shape.
        trained: Whether it holds floating-point or complex numbers.
        axes: The names that its framework gives its axes, in one spelling, or None.
    """

    path: str
    shape: tuple[int, ...]
    trained: bool = True
    axes: tuple[str, ...] | None = None

    @property
    def name(self) -> LeafName:
        """The names along its path."""
        return read_path(self.path)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules that hold it, the innermost first; "" is the whole tree."""
        return _modules(self.path)


def read_tree(params: Tree) -> tuple[tuple[Leaf, ...], list[Any]]:
    """Returns the leaves of a tree, and the same leaves as they are.

    Names of axes come from haliax (`NamedArray.axes`), Flax Linen's boxes (`names`) and NNX
    variables (`sharding_names`), told by their attributes: none of the packages is imported.

    Raises:
        TypeError: If a leaf is no array.
    """
    flat = array_leaves(params)
    names: list[tuple[str, ...] | None] = []
    for node in jax.tree.leaves(params, is_leaf=lambda x: _axis_names(x) is not None):
        named = _axis_names(node)
        names += [named] * (1 if named is None else len(jax.tree.leaves(node)))
    leaves = []
    for (path, x), named in zip(flat, names, strict=True):
        shape = tuple(x.shape)
        trained = jnp.issubdtype(x.dtype, jnp.inexact)
        fits = named is not None and len(named) == len(shape)
        leaves.append(Leaf(path, shape, bool(trained), named if fits else None))
    return tuple(leaves), [x for _, x in flat]


def _axis_names(node: Any) -> tuple[str, ...] | None:
    if isinstance(node, jax.Array | dict | list | tuple):
        return None
    axes = getattr(node, "axes", None)
    if isinstance(axes, tuple) and hasattr(node, "array"):
        names = tuple(getattr(axis, "name", None) for axis in axes)
    elif callable(getattr(node, "get_metadata", None)):
        metadata = node.get_metadata()
        names = next(
            filter(None, map(metadata.get, ("sharding_names", "out_sharding", "sharding"))), ()
        )
    elif callable(getattr(node, "unbox", None)):
        names = getattr(node, "names", None)
    else:
        return None
    if not isinstance(names, tuple | list) or not names:
        return None
    return tuple(spelling(name) if isinstance(name, str) else "" for name in names)


@functools.lru_cache(maxsize=65536)
def _modules(path: str) -> tuple[str, ...]:
    parts = path.split(SEPARATOR)
    # haliax and Equinox wrap an array once more, as "weight/0" and "weight/array".
    end = len(parts) - 1
    if end and (parts[end].isdigit() or parts[end] == "array") and parts[end - 1] in GENERIC:
        end -= 1
    return tuple(SEPARATOR.join(parts[:n]) for n in range(end, -1, -1))
