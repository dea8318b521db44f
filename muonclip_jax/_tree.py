"""Pytrees of parameters: the paths of their leaves, masks, and the types that signatures share.

A parameter is called "decoder/block_0/attention/query/kernel" in every container: a Linen dict, a
boxed `nn.Partitioned` leaf, an NNX state, a plain dict. JAX's key paths differ between them in one
place only: boxes and NNX variables end in a `.value` attribute. That last attribute is dropped,
and nothing else, because attention modules also have a submodule called "value".
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import optax
from jax.tree_util import GetAttrKey, PyTreeDef

#: A Python number, or a JAX scalar, concrete or traced.
ScalarLike: TypeAlias = float | int | jax.Array
#: A scalar, or a function of the number of updates so far.
ScalarOrSchedule: TypeAlias = ScalarLike | Callable[[Any], Any]
#: Any tree of arrays; leaves may also be `jax.ShapeDtypeStruct`s where only shapes matter.
Tree: TypeAlias = Any

SEPARATOR = "/"
#: The name under which a module records the maximum logits of its heads.
MAX_LOGITS = "max_logits"


@runtime_checkable
class Shaped(Protocol):
    """An array, a tracer or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        ...

    @property
    def dtype(self) -> Any:
        """The array's dtype."""
        ...


def flatten_with_paths(
    tree: Tree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], PyTreeDef]:
    """Flattens `tree` into `(path, leaf)` pairs and its structure, without the `.value` of boxes.

    Example:
        >>> flatten_with_paths({"dense": {"kernel": 1}})[0]
        [('dense/kernel', 1)]
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    found = []
    for keys, leaf in leaves:
        keys = keys[:-1] if len(keys) > 1 and keys[-1] == GetAttrKey("value") else keys
        found.append((jax.tree_util.keystr(keys, simple=True, separator=SEPARATOR), leaf))
    return found, treedef


def array_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Flattens a tree of parameters or gradients into `(path, array)` pairs.

    Raises:
        TypeError: With the path, for a leaf that has no shape or no dtype.

    Example:
        >>> array_leaves({"dense": {"scale": 1.0}})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: 'dense/scale' is 1.0 of type float, expected an array. Write jnp.asarray(1.0)...
    """
    leaves = flatten_with_paths(tree)[0]
    for path, leaf in leaves:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            number = isinstance(leaf, int | float | complex)
            cure = f"Write jnp.asarray({leaf!r}). " if number else ""
            raise TypeError(
                f"{path or 'the tree'!r} is {leaf!r} of type {type(leaf).__name__}, expected an "
                f"array. {cure}Of an Equinox module pass its arrays alone: "
                "eqx.filter(model, eqx.is_inexact_array)."
            )
    return leaves


def containers(path: str) -> Iterator[str]:
    """Yields the path itself, and those of all containers, the innermost first."""
    yield path
    while path:
        path = path.rpartition(SEPARATOR)[0]
        yield path


def is_masked(x: object) -> bool:
    """Whether `x` is the node that Optax leaves in place of a masked leaf."""
    return isinstance(x, optax.MaskedNode)


def tree_from(given: Tree, params: Tree, is_entry: Callable[[Any], bool]) -> Tree:
    """Returns a tree that is given directly or as a function of the parameters.

    A tree may be callable too: an Equinox module that defines `__call__` is a pytree, and so is a
    tree of its shardings. What has the type of the parameters or holds entries is the tree.

    Example:
        >>> tree_from(lambda params: {"w": True}, {"w": 1.0}, lambda x: isinstance(x, bool))
        {'w': True}
    """
    if not callable(given) or type(given) is type(params):
        return given
    if not isinstance(given, jax.tree_util.Partial):
        leaves = jax.tree.leaves(given, is_leaf=is_entry)
        if any(leaf is not None and is_entry(leaf) for leaf in leaves):
            return given
    return given(params)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a path pattern; raises for what is no string or no regular expression."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"A rule's pattern must be a string such as 'attention/query/kernel$', got {pattern!r}."
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"The rule's pattern {pattern!r} is not a regular expression ({error}). Patterns are "
            "searched in paths such as 'decoder/block_0/attention/query/kernel'; escape special "
            "characters with re.escape."
        ) from error


def pattern_for(group: Sequence[str], paths: Sequence[str]) -> str:
    """A pattern that matches the paths of a group and none of the others."""
    pattern = f"^{generalised(group[0])}$"
    if {path for path in paths if re.search(pattern, path)} == set(group):
        return pattern
    escaped = "|".join(re.escape(path).replace(r"\-", "-") for path in group)
    return f"^({escaped})$" if len(group) > 1 else f"^{escaped}$"


def generalised(path: str) -> str:
    """A pattern for a path with any numbers."""
    escaped = re.escape(path).replace(r"\-", "-")
    return re.sub(r"(?<![A-Za-z\d])\d+", lambda _: r"\d+", escaped)


def listed(paths: Iterable[str], limit: int = 8) -> str:
    """Lists paths for a message, at most `limit` of them: "'a', 'b' and 1 more"."""
    paths = list(paths)
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return (", ".join(map(repr, paths[:limit])) or "none") + more


def nothing_matched(what: str, asked: str, paths: Iterable[str]) -> ValueError:
    """Builds the error for what was asked for, such as "The rule" `asked`, and is in no path."""
    return ValueError(
        f"{what} {asked!r} matches no path of the tree. Paths are: {listed(paths, 12)}. "
        "Correct it, or remove it."
    )
