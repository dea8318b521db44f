"""Reads the shapes in a checkpoint on disk, and finds the parameters in it."""

import importlib
import re
import zipfile
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np

from muonclip_jax._tree import SEPARATOR, Shaped, Tree, flatten_with_paths
from muonclip_jax.checkpoint.targets import without_box

#: Path -> shape and dtype.
Shapes: TypeAlias = dict[str, jax.ShapeDtypeStruct]

# The file that Orbax writes beside the arrays of an item, and the item of a manager that was told
# no names.
_ORBAX_METADATA, _ORBAX_DEFAULT = "_METADATA", "default"
# Names that Optax, torch and others give to trees of moments and of accumulated gradients.
_AVERAGES = ("mu", "nu", "trace", "momentum", "m", "v", "exp_avg", "exp_avg_sq", "acc_grads")
_OPTIMIZER = re.compile(r"(.*_)?(opt|optim|optimi[sz]er)(_?states?)?")


def read_shapes(checkpoint: str | Path) -> Shapes:
    """Reads path -> shape and dtype of every array; those of an `.npz` file are read one by one.

    An Orbax folder may be from a checkpointer, one step of a manager, or all steps of a manager, of
    which the newest is read.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {str(path)!r}. Give the folder that Orbax saved to, or an .npz file."
        )
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"{str(path)!r} is not an .npz file. Give one from numpy.savez, or an Orbax folder."
            )
        with np.load(path) as archive:
            arrays = ((name, archive[name]) for name in archive.files)
            # What NumPy has no name for is written as bytes.
            return {
                name: jax.ShapeDtypeStruct(x.shape, "bfloat16" if x.dtype == "V2" else x.dtype)
                for name, x in arrays
            }
    items = _orbax_items(path)
    try:
        ocp = importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} is an Orbax checkpoint, and Orbax is not installed: pip install "
            "orbax-checkpoint."
        ) from error
    saved: dict[str, Tree] = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for name, folder in items.items():
            metadata = checkpointer.metadata(folder.resolve()).item_metadata
            if metadata is None:
                raise ValueError(
                    f"Orbax cannot read the metadata in {str(folder)!r}. Was it saved whole, by "
                    "StandardSave or PyTreeSave?"
                )
            saved[name] = metadata.tree
    leaves = flatten_with_paths(saved.get("", saved), is_leaf=lambda x: isinstance(x, Shaped))[0]
    return {
        without_box(path): jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        for path, x in leaves
        if isinstance(x, Shaped)
    }


def _orbax_items(path: Path) -> dict[str, Path]:
    """The items of a checkpoint by name; "" if there is only one."""
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
            f"{str(path)!r} is not an Orbax checkpoint: neither it nor a folder in it has a file "
            f"{_ORBAX_METADATA!r}. Give the folder of a step, or the one that contains the steps."
        )
    return _orbax_items(max(steps)[1])


def find_params(shapes: Shapes, at: str | None = None) -> tuple[str, Shapes]:
    """Finds the parameters of a checkpoint: their path, and shapes by path below it.

    `at` is their path, "" for everything. None means the subtree named "params" nearest to the
    root; if there is none, everything except optimizer state and counters.

    Raises:
        ValueError: If there is nothing at that path, or the choice is ambiguous: several subtrees
            named "params", or copies such as an average of the weights.
    """
    if at is None:
        at = _params_path(shapes)
        if at is None:
            return _without_state(shapes)
    at = at.strip(SEPARATOR)
    start = f"{at}{SEPARATOR}" if at else ""
    params = {path.removeprefix(start): x for path, x in shapes.items() if path.startswith(start)}
    if not params:
        raise ValueError(
            f"The checkpoint has nothing below {at!r}. At its root there is: "
            f"{', '.join(map(repr, _roots(shapes))) or 'nothing'}."
        )
    return at, params


def _params_path(shapes: Shapes) -> str | None:
    """Returns the subtree "params" nearest to the root that is not inside moments."""
    found = {m[1] for path in shapes if (m := re.match(r"((?:.*?/)?params)/", path))}
    found = {path for path in found if not {"mu", "nu"}.intersection(path.split(SEPARATOR))}
    depth = min((path.count(SEPARATOR) for path in found), default=0)
    nearest = sorted(path for path in found if path.count(SEPARATOR) == depth)
    if len(nearest) > 1:
        raise ValueError(
            f"The checkpoint has several subtrees of parameters: {', '.join(map(repr, nearest))}. "
            "Choose one by its path (--params on the command line)."
        )
    return nearest[0] if nearest else None


def _roots(shapes: Shapes) -> dict[str, Shapes]:
    """The subtrees below each first name of the paths."""
    roots: dict[str, Shapes] = {}
    for path, form in shapes.items():
        root, _, rest = path.partition(SEPARATOR)
        roots.setdefault(root, {})[rest] = form
    return roots


def _without_state(shapes: Shapes) -> tuple[str, Shapes]:
    """Returns everything that is neither optimizer state nor a counter, and its path."""
    roots = _roots(shapes)
    # Those that hold more than counters and random keys.
    numbers = {
        root: below
        for root, below in roots.items()
        if any(jax.numpy.issubdtype(x.dtype, np.inexact) for x in below.values())
    }
    states = [root for root in numbers if _is_state(root, numbers)]
    kept = [root for root in numbers if root not in states]
    if len(kept) == 1 and "" not in roots[kept[0]]:
        inner, params = _without_state(roots[kept[0]])
        if len(params) < len(shapes):
            return SEPARATOR.join(filter(None, (kept[0], inner))), params
    if not states and len(kept) in (0, len(roots)):
        return "", shapes
    params = {path: x for path, x in shapes.items() if path.partition(SEPARATOR)[0] in kept}
    copies = [frozenset(roots[root]) for root in kept if "" not in roots[root]]
    whole = any(_repeats(roots[root], params) for root in states)
    if states and (not params or (len(set(copies)) < len(copies) and not whole)):
        listing = ", ".join(
            f"{root!r}{' (optimizer state)' if root in states else ''}" for root in roots
        )
        raise ValueError(
            "The checkpoint has no subtree named 'params', and it is unknown which of these "
            f"the parameters are: {listing}. Give its path (--params on the command line)."
        )
    return "", params


def _is_state(root: str, roots: dict[str, Shapes]) -> bool:
    """Whether a subtree is optimizer state, by its name or by the moments of another in it."""
    others = [(name, below) for name, below in roots.items() if name != root]
    named = [{f"{name}/{path}": x for path, x in below.items()} for name, below in others]
    return _OPTIMIZER.fullmatch(root.lower()) is not None or any(
        _repeats(roots[root], params) for params in (*named, *(below for _, below in others))
    )


def _repeats(state: Shapes, params: Shapes) -> bool:
    """Whether `state` has a moment of each of `params`, as "0/mu/dense/kernel"."""
    endings = {
        (SEPARATOR.join(names[start:]), form.shape)
        for path, form in state.items()
        for names in [path.split(SEPARATOR)]
        for start in range(1, len(names))
        if names[start - 1] in _AVERAGES
    }
    return all((path, form.shape) in endings for path, form in params.items())
