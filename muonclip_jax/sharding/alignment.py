"""Which sharding belongs to which leaf: a tree of shardings aligned with parameters by path."""

import math
from typing import Any, TypeAlias

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from muonclip_jax._tree import Tree, flatten_with_paths, tree_from
from muonclip_jax.sharding.mesh_shardings import axes_of, entries_of

#: Path, array (or its shape) and sharding of a leaf; the sharding is None where it is on no mesh.
PlacedLeaf: TypeAlias = tuple[str, Any, NamedSharding | None]


def align_shardings(params: Tree, param_shardings: Tree) -> list[PlacedLeaf]:
    """Finds the sharding of every leaf in a tree of shardings, by path.

    Args:
        params: The parameters, or a masked pytree of them; only shapes are used.
        param_shardings: A pytree of `NamedSharding` with an entry for every leaf or subtree of
            `params`; a single one for all; or a function from `params` to such a pytree. It may
            have entries for leaves that are masked in `params`.

    Returns:
        `(path, leaf, sharding)` for every leaf; the sharding is None where the entry is None or a
        single device.

    Raises:
        TypeError: If an entry is not a sharding.
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
        aligned.append((path, leaf, _checked(path, tuple(leaf.shape), entries[covering])))
    return aligned


def is_entry(x: object) -> bool:
    """Whether `x` is an entry of a tree of shardings, and not a subtree."""
    return x is None or isinstance(x, Sharding | PartitionSpec)


def check_reduced(path: str, sharding: NamedSharding) -> None:
    """Raises a ValueError if a sharding is unreduced over mesh axes."""
    if sharding.spec.unreduced:
        raise ValueError(
            f"{path} is unreduced over the mesh axes {tuple(sorted(sharding.spec.unreduced))}: the "
            "sum over them is missing. Compute it before the update: "
            "jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding), grads, params)."
        )


def _checked(path: str, shape: tuple[int, ...], entry: object) -> NamedSharding | None:
    if not isinstance(entry, NamedSharding):
        if entry is None or (isinstance(entry, Sharding) and entry.num_devices == 1):
            return None
        raise TypeError(
            f"param_shardings has {entry!r} at {path!r}, expected a jax.sharding.NamedSharding. "
            "Write NamedSharding(mesh, PartitionSpec(...)), or take it from the parameter: "
            "x.sharding."
        )
    check_reduced(f"param_shardings at {path}", entry)
    if PartitionSpec.UNCONSTRAINED in entries_of(entry.spec):
        raise ValueError(
            f"param_shardings has {entry.spec} at {path!r}, which leaves a dimension "
            "unconstrained. Give the mesh axes that shard it, or None."
        )
    if len(entry.spec) > len(shape):
        raise ValueError(
            f"param_shardings has {entry.spec} at {path!r}, for {len(entry.spec)} "
            f"dimensions, and the parameter has shape {shape}. Write a PartitionSpec with at most "
            f"{len(shape)} entries."
        )
    for number, axes in enumerate(axes_of(entry.spec, len(shape))):
        ways = math.prod(entry.mesh.shape[axis] for axis in axes)
        if shape[number] % ways:
            raise ValueError(
                f"param_shardings shards dimension {number} of {path!r}, shape {shape}, over "
                f"{axes} into {ways} shards, which do not divide {shape[number]}. Shard a "
                "dimension that they divide, or none."
            )
    return entry
