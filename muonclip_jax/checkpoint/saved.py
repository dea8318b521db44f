"""Whether what was saved is what is asked for."""

from typing import Any

import jax

from muonclip_jax._tree import Shaped, Tree, flatten_with_paths
from muonclip_jax.checkpoint.names import without_box


def check_saved(saved: Tree, target: Tree) -> None:
    """Raises where a checkpoint is not the tree that is to be restored.

    Mesh, sharding and number of devices may differ: a restore brings every leaf where the target
    has it. Paths, shapes and dtypes may not, and none of these is mended in silence.

    Args:
        saved: What the checkpoint holds: its metadata (of Orbax, `manager.item_metadata(step)`),
            or a restored tree; anything whose leaves have a shape and a dtype.
        target: The tree to restore, of arrays or `jax.ShapeDtypeStruct`, such as
            `abstract_state(tx, params)`.

    Raises:
        ValueError: If a leaf is in one of the two only, or has another shape or dtype; with
            the paths, the first eight of a kind.
        TypeError: If a leaf has no shape or no dtype, or `saved` is None.

    Example:
        >>> saved = {"w": jax.ShapeDtypeStruct((4, 4), jax.numpy.float32)}
        >>> check_saved(saved, {"w": jax.ShapeDtypeStruct((4, 2), jax.numpy.float32)})
        Traceback (most recent call last):
        ...
        ValueError: The checkpoint is not what is to be restored.
        - 'w' has shape (4, 4) in the checkpoint, (4, 2) in the target.
        Nothing was restored. Build model and optimizer as they were when it was saved, or restore \
the checkpoint as it is and convert it (muonclip_jax.checkpoint.from_optax_state).
    """
    if saved is None:
        raise TypeError(
            "The checkpoint's metadata is None: the library was not told how to read it. An Orbax "
            "manager that has not saved yet needs item_handlers=StandardCheckpointHandler()."
        )
    there, wanted = _forms(saved, "checkpoint"), _forms(target, "target")
    findings = [
        *_named([f"{path!r} is in the checkpoint only" for path in there if path not in wanted]),
        *_named([f"{path!r} is in the target only" for path in wanted if path not in there]),
    ]
    both = [path for path in wanted if path in there]
    for number, what in enumerate(("shape", "dtype")):
        differing = [
            f"{path!r} has {what} {there[path][number]} in the checkpoint, "
            f"{wanted[path][number]} in the target"
            for path in both
            if there[path][number] != wanted[path][number]
        ]
        findings += _named(differing)
    if findings:
        listing = "".join(f"- {finding}.\n" for finding in findings)
        raise ValueError(
            f"The checkpoint is not what is to be restored.\n{listing}Nothing was restored. Build "
            "model and optimizer as they were when it was saved, or restore the checkpoint as it "
            "is and convert it (muonclip_jax.checkpoint.from_optax_state)."
        )


def _named(findings: list[str], limit: int = 8) -> list[str]:
    more = len(findings) - limit
    return findings[:limit] + ([f"{more} more of this kind"] if more > 0 else [])


def _forms(tree: Tree, which: str) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves, _ = flatten_with_paths(tree, is_leaf=_is_form)
    forms = {}
    for path, leaf in leaves:
        if not _is_form(leaf):
            raise TypeError(
                f"The {which} has {leaf!r} at {path!r}, expected something with a shape and a "
                "dtype: an array, a jax.ShapeDtypeStruct or a checkpoint's metadata of one."
            )
        forms[without_box(path)] = (tuple(leaf.shape), _dtype_name(leaf))
    return forms


def _dtype_name(leaf: Any) -> str:
    # Through a struct, which takes the dtypes of random keys as well.
    return jax.ShapeDtypeStruct((), leaf.dtype).dtype.name


def _is_form(x: Any) -> bool:
    return isinstance(x, Shaped)
