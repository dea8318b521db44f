"""Checks that a checkpoint matches a restore target."""

from collections.abc import Collection

import jax

from muonclip_jax._tree import SEPARATOR, Shaped, Tree, flatten_with_paths


def owner_of(path: str, params: Collection[str]) -> str | None:
    """Returns the parameter whose path is a suffix of `path`, the longest if several are, or None.

    A last "value" is ignored: it is from a box, restored as a dict without a target.

    Example:
        >>> owner_of("0/mu/dense/kernel", {"kernel", "dense/kernel"})
        'dense/kernel'
    """
    for ending in (path, without_box(path)):
        names = ending.split(SEPARATOR)
        for start in range(1, len(names)):
            if (owner := SEPARATOR.join(names[start:])) in params:
                return owner
    return None


def without_box(path: str) -> str:
    """Returns `path` without the "value" of a box at its end."""
    return path.removesuffix(SEPARATOR + "value")


def _forms(tree: Tree, which: str) -> dict[str, jax.ShapeDtypeStruct]:
    forms = {}
    for path, leaf in flatten_with_paths(tree, is_leaf=lambda x: isinstance(x, Shaped))[0]:
        if not isinstance(leaf, Shaped):
            raise TypeError(
                f"The {which} has {leaf!r} at {path!r}, expected a leaf with a shape and a "
                "dtype: an array, a jax.ShapeDtypeStruct or a checkpoint's metadata of one."
            )
        forms[without_box(path)] = jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    return forms


def check_saved(saved: Tree, target: Tree) -> None:
    """Raises if a checkpoint does not match the restore target.

    Mesh, shardings and number of devices may differ: a restore uses the shardings of the target.
    Paths, shapes and dtypes may not differ. Call it before restoring, because a library may
    silently cast, pad or omit leaves.

    Args:
        saved: The metadata of the checkpoint (with Orbax `manager.item_metadata(step)`) or a
            restored pytree; every leaf needs a shape and a dtype.
        target: The pytree to restore, of arrays or `jax.ShapeDtypeStruct`, such as
            `abstract_state(tx, params)`.

    Raises:
        ValueError: If a leaf is in only one of the two, or has another shape or dtype. The message
            has the paths, at most eight of a kind.
        TypeError: If a leaf has no shape or dtype, or `saved` is None.

    Example:
        >>> saved = {"w": jax.ShapeDtypeStruct((4, 4), "float32")}
        >>> check_saved(saved, {"w": jax.ShapeDtypeStruct((4, 2), "float32")})
        Traceback (most recent call last):
        ...
        ValueError: The checkpoint does not match the restore target.
        - 'w' has shape (4, 4) in the checkpoint, (4, 2) in the target.
        Nothing was restored. Build model and optimizer as they were when it was saved, or restore \
the checkpoint as it is and convert it (muonclip_jax.checkpoint.from_optax_state).
    """
    if saved is None:
        raise TypeError(
            "The checkpoint's metadata is None: the library has no handler to read it. An Orbax "
            "manager that has not saved yet needs item_handlers=StandardCheckpointHandler()."
        )
    there, wanted = _forms(saved, "checkpoint"), _forms(target, "target")
    kinds = [
        [f"{path!r} is only in the checkpoint" for path in there if path not in wanted],
        [f"{path!r} is only in the target" for path in wanted if path not in there],
    ]
    for what in ("shape", "dtype"):
        pairs = [
            (p, getattr(there[p], what), getattr(wanted[p], what)) for p in wanted if p in there
        ]
        kinds.append(
            [
                f"{path!r} has {what} {before} in the checkpoint, {after} in the target"
                for path, before, after in pairs
                if before != after
            ]
        )
    findings = [finding for kind in kinds for finding in kind[:8]]
    findings += [f"{len(kind) - 8} more of this kind" for kind in kinds if len(kind) > 8]
    if findings:
        listing = "".join(f"- {finding}.\n" for finding in findings)
        raise ValueError(
            f"The checkpoint does not match the restore target.\n{listing}Nothing was restored. "
            "Build model and optimizer as they were when it was saved, or restore the checkpoint "
            "as it is and convert it (muonclip_jax.checkpoint.from_optax_state)."
        )
