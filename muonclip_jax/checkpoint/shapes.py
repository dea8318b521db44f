"""Shapes and dtypes of a checkpoint on disk, read without its arrays."""

import importlib
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from muonclip_jax._tree import SEPARATOR, Shaped, flatten_with_paths
from muonclip_jax.checkpoint.names import without_box

#: Path -> shape and dtype.
Shapes = dict[str, jax.ShapeDtypeStruct]

# The file that Orbax writes beside the arrays of an item, and the item of a manager that was told
# no names.
_ORBAX_METADATA, _ORBAX_DEFAULT = "_METADATA", "default"
_PARAMS = "params"
# Trees in the shape of the parameters, inside an optimizer's state.
_MOMENTS = ("mu", "nu")
# Names that Optax, torch and others give to trees of moments and of accumulated gradients.
_AVERAGES = (*_MOMENTS, "trace", "momentum", "m", "v", "exp_avg", "exp_avg_sq", "acc_grads")
# What people call an optimizer's state.
_OPTIMIZER = re.compile(r"(.*_)?(opt|optim|optimi[sz]er)(_?states?)?")


def read_shapes(checkpoint: str | Path) -> Shapes:
    """Reads what a checkpoint holds; no array is loaded.

    Args:
        checkpoint: A folder of Orbax: what a checkpointer saved, a step of a manager, or all steps
            of one, of which the newest is read. Or an `.npz` file.

    Returns:
        Path -> shape and dtype of every array. Boxes ("value" at the end of a path) are seen
        through.

    Raises:
        FileNotFoundError: If there is nothing at that path.
        ValueError: If what is there is no checkpoint.
        ImportError: If it is a folder and Orbax is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/params.npz", **{"up/kernel": np.zeros((4, 8), np.float32)})
        ...     read_shapes(f"{folder}/params.npz")
        {'up/kernel': ShapeDtypeStruct(shape=(4, 8), dtype=float32)}
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {str(path)!r}. Give the folder that Orbax saved to, or an .npz file."
        )
    if path.is_file():
        return _read_npz(path)
    items = _orbax_items(path)
    try:
        ocp = importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} is a checkpoint of Orbax, which is not installed: pip install "
            "orbax-checkpoint."
        ) from error
    shapes: Shapes = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for name, folder in items.items():
            metadata = checkpointer.metadata(folder.resolve()).item_metadata
            if metadata is None:
                raise ValueError(
                    f"Orbax cannot read the metadata in {str(folder)!r}. Was it saved whole, by "
                    "StandardSave or PyTreeSave?"
                )
            tree = metadata.tree
            prefix = f"{name}{SEPARATOR}" if name else ""
            for leaf_path, leaf in flatten_with_paths(tree, is_leaf=_is_form)[0]:
                if _is_form(leaf):
                    shapes[prefix + without_box(leaf_path)] = _form(leaf)
    return shapes


def find_params(shapes: Shapes, at: str | None = None) -> tuple[str, Shapes]:
    """Finds the parameters among what a checkpoint holds.

    Args:
        shapes: From `read_shapes`.
        at: Path of the subtree of parameters, "" for everything. None: the subtree that is called
            "params" nearest to the root; where none is, all but optimizer state and counters.

    Returns:
        The path of the subtree, and the parameters by their path in it.

    Raises:
        ValueError: If there is nothing at that path, or more than one subtree to choose from:
            several called "params", or copies such as an average of the weights.

    Example:
        >>> form = jax.ShapeDtypeStruct((2, 3), "float32")
        >>> find_params({"state/params/dense/kernel": form, "state/step": form})[0]
        'state/params'
    """
    if at is None:
        at = _params_path(shapes)
        if at is None:
            return _without_state(shapes)
    prefix = at.strip(SEPARATOR) + SEPARATOR if at.strip(SEPARATOR) else ""
    params = {
        path.removeprefix(prefix): form for path, form in shapes.items() if path.startswith(prefix)
    }
    if not params:
        tops = ", ".join(dict.fromkeys(repr(path.split(SEPARATOR)[0]) for path in shapes))
        raise ValueError(
            f"The checkpoint has nothing below {at!r}. At its root there is: {tops or 'nothing'}."
        )
    return prefix.rstrip(SEPARATOR), params


def _params_path(shapes: Shapes) -> str | None:
    found: dict[str, int] = {}
    for path in shapes:
        names = path.split(SEPARATOR)[:-1]
        if _PARAMS in names:
            depth = names.index(_PARAMS)
            if not set(_MOMENTS) & set(names[:depth]):
                found[SEPARATOR.join(names[: depth + 1])] = depth
    nearest = [path for path, depth in found.items() if depth == min(found.values())]
    if len(nearest) > 1:
        raise ValueError(
            f"The checkpoint has several subtrees of parameters: {', '.join(map(repr, nearest))}. "
            "Say which one by its path (--params on the command line)."
        )
    return nearest[0] if nearest else None


def _without_state(shapes: Shapes) -> tuple[str, Shapes]:
    """Returns what is neither optimizer state nor a counter, and where it is."""
    roots: dict[str, Shapes] = {}
    for path, form in shapes.items():
        root, _, rest = path.partition(SEPARATOR)
        roots.setdefault(root, {})[rest] = form
    numbers = {root: below for root, below in roots.items() if _has_numbers(below)}
    states = [root for root, below in numbers.items() if _is_state(root, below, numbers)]
    kept = [root for root in numbers if root not in states]
    if len(kept) == 1 and "" not in roots[kept[0]]:
        inner, params = _without_state(roots[kept[0]])
        if len(params) < len(shapes):
            return SEPARATOR.join(filter(None, (kept[0], inner))), params
    if not states:
        return "", shapes if len(kept) in (0, len(roots)) else _below(shapes, kept)
    params = _below(shapes, kept)
    copies = [frozenset(roots[root]) for root in kept if "" not in roots[root]]
    whole = any(_repeats(roots[root], params) for root in states)
    if not params or (len(set(copies)) < len(copies) and not whole):
        listing = ", ".join(
            f"{root!r}{' (optimizer state)' if root in states else ''}" for root in roots
        )
        raise ValueError(
            f"The checkpoint has nothing called {_PARAMS!r}, and it cannot be told which of these "
            f"the parameters are: {listing}. Say it by the path (--params on the command line)."
        )
    return "", params


def _below(shapes: Shapes, roots: Collection[str]) -> Shapes:
    return {path: x for path, x in shapes.items() if path.partition(SEPARATOR)[0] in roots}


def _has_numbers(shapes: Shapes) -> bool:
    """Whether there is more than counters and random keys."""
    return any(jax.numpy.issubdtype(form.dtype, np.inexact) for form in shapes.values())


def _is_state(root: str, below: Shapes, roots: dict[str, Shapes]) -> bool:
    """Whether a subtree is optimizer state: by its name, or for it holds another one's moments.

    Moments repeat the parameters' paths and shapes below names of their own ("0/mu/dense/kernel").
    """
    if _OPTIMIZER.fullmatch(root.lower()):
        return True
    others = [(name, other) for name, other in roots.items() if name != root]
    named = [{f"{name}/{path}": form for path, form in other.items()} for name, other in others]
    return any(_repeats(below, other) for other in [*named, *(other for _, other in others)])


def _repeats(state: Shapes, params: Shapes) -> bool:
    endings = {
        (SEPARATOR.join(names[start:]), form.shape)
        for path, form in state.items()
        for names in [path.split(SEPARATOR)]
        for start in range(1, len(names))
        if names[start - 1] in _AVERAGES
    }
    return all((path, form.shape) in endings for path, form in params.items())


def _orbax_items(path: Path) -> dict[str, Path]:
    """The items of a checkpoint by name; "" is the only one."""
    if (path / _ORBAX_METADATA).exists():
        return {"": path}
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    items = {folder.name: folder for folder in folders if (folder / _ORBAX_METADATA).exists()}
    if items:
        return {"": items[_ORBAX_DEFAULT]} if set(items) == {_ORBAX_DEFAULT} else items
    # Of a manager: folders named by their step, with a prefix or without.
    steps = [
        (int(number[0]), folder)
        for folder in folders
        if (number := re.findall(r"\d+$", folder.name)) and any(folder.glob("*/" + _ORBAX_METADATA))
    ]
    if not steps:
        raise ValueError(
            f"{str(path)!r} is no checkpoint of Orbax: neither it nor a folder in it has a file "
            f"{_ORBAX_METADATA!r}. Give the folder of a step, or the one that holds the steps."
        )
    return _orbax_items(max(steps)[1])


def _read_npz(path: Path) -> Shapes:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{str(path)!r} is no .npz file. Give one of numpy.savez, or a folder of Orbax."
        )
    shapes: Shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
            # What NumPy has no name for is written as bytes.
            known = "bfloat16" if dtype == np.dtype("V2") else dtype
            shapes[name.removesuffix(".npy")] = jax.ShapeDtypeStruct(shape, known)
    return shapes


def _is_form(x: Any) -> bool:
    return isinstance(x, Shaped)


def _form(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
