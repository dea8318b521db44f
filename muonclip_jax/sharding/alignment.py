"""Which sharding belongs to which leaf: a tree of shardings aligned with parameters by path."""

import math
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from muonclip_jax._tree import Tree, flatten_with_paths, tree_from
from muonclip_jax.sharding.agreement import check_reduced
from muonclip_jax.sharding.sharding import axes_of, entries_of


def align_shardings(params: Tree, param_shardings: Tree) -> list[tuple[str, Any, Any]]:
    """Finds the sharding of every leaf in a tree of shardings, by path.

    Args:
        params: The tree of parameters, or a masked one; only shapes are looked at.
        param_shardings: A tree of `NamedSharding` with an entry for every leaf of `params`, or for
            a subtree that holds it; a single one for all; or a function from `params` to such a
            tree. It may have entries for leaves that are masked here.

    Returns:
        `(path, leaf, sharding)` for every leaf; the sharding is None where the entry is None or a
        single device.

    Raises:
        TypeError: If an entry is no sharding.
        ValueError: If a leaf has no entry, or its entry does not fit its shape.
    """
    param_shardings = tree_from(param_shardings, params, is_entry)
    entries = dict(flatten_with_paths(param_shardings, is_leaf=is_entry)[0])
    aligned = []
    for path, leaf in flatten_with_paths(params)[0]:
        covering = path
        while covering and covering not in entries:
            covering = covering.rpartition("/")[0]
        if covering not in entries:
            raise ValueError(
                f"{path} of shape {tuple(leaf.shape)} has no entry in param_shardings, whose "
                f"entries are {', '.join(map(repr, list(entries)[:8])) or 'none'}. Pass the tree "
                "jax.tree.map(lambda x: x.sharding, params) of all parameters."
            )
        aligned.append((path, leaf, _checked(path, leaf, entries[covering])))
    return aligned


def is_entry(x: Any) -> bool:
    """Tells what is an entry of a tree of shardings, and no branch of it."""
    return x is None or isinstance(x, Sharding | PartitionSpec)


def _checked(path: str, leaf: Any, sharding: Any) -> NamedSharding | None:
    if sharding is None or (
        isinstance(sharding, Sharding)
        and not isinstance(sharding, NamedSharding)
        and sharding.num_devices == 1
    ):
        return None
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"param_shardings has {sharding!r} at {path!r}, expected a jax.sharding.NamedSharding. "
            "Write NamedSharding(mesh, PartitionSpec(...)), or take it from the parameter: "
            "x.sharding."
        )
    check_reduced(f"param_shardings at {path}", sharding)
    shape = tuple(leaf.shape)
    if PartitionSpec.UNCONSTRAINED in entries_of(sharding.spec):
        raise ValueError(
            f"param_shardings has {sharding.spec} at {path!r}, which leaves a dimension open. "
            "Name the mesh axes that shard it, or None."
        )
    if len(sharding.spec) > len(shape):
        raise ValueError(
            f"param_shardings has {sharding.spec} at {path!r}, for {len(sharding.spec)} "
            f"dimensions, and the parameter has shape {shape}. Write a PartitionSpec with at most "
            f"{len(shape)} entries."
        )
    lengths = dict(sharding.mesh.shape)
    for number, axes in enumerate(axes_of(sharding.spec, len(shape))):
        ways = math.prod(lengths[axis] for axis in axes)
        if shape[number] % ways:
            raise ValueError(
                f"param_shardings shards dimension {number} of {path!r}, shape {shape}, over "
                f"{axes} into {ways} shards, which do not divide {shape[number]}. Shard a "
                "dimension that they divide, or none."
            )
    return sharding
