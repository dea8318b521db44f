"""Reads the shapes in a checkpoint on disk, and finds the parameters in it."""

import importlib
import json
import re
import zipfile
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np

from muonclip_jax._tree import Shaped, Tree, flatten_with_paths
from muonclip_jax.checkpoint.targets import without_box

#: Path -> shape and dtype.
Shapes: TypeAlias = dict[str, jax.ShapeDtypeStruct]

_ORBAX_METADATA = "_METADATA"  # the file that Orbax writes beside the arrays of an item
# Names that Optax, torch and others give to trees of moments and of accumulated gradients.
_AVERAGES = ("mu", "nu", "trace", "momentum", "m", "v", "exp_avg", "exp_avg_sq", "acc_grads")
_CHOOSE = "Choose one by its path (--params on the command line)."
_OPTIMIZER = re.compile(r"(.*_)?(opt|optim|optimi[sz]er)(_?states?)?", re.IGNORECASE)


def read_shapes(checkpoint: str | Path) -> Shapes:
    """Reads path -> shape and dtype of every array in Orbax folders, `.npz`, or `.safetensors`.

    Of a manager's folder the newest step is read, of a folder of `.safetensors` all files.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"There is no {str(path)!r}. Give Orbax's folder, or an .npz file.")
    if files := [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors")):
        return {name: x for file in files for name, x in _safetensors(file).items()}
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"{str(path)!r} is neither an .npz nor a .safetensors file. Load it, and write its "
                "arrays by path: numpy.savez('params.npz', **arrays)."
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
        why = f"{str(path)!r} is an Orbax checkpoint: pip install orbax-checkpoint."
        raise ImportError(why) from error
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


def _safetensors(path: Path) -> Shapes:
    """Reads the header of a file, its length in eight bytes and JSON; names are as in torch."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    dtypes = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    return {
        name.replace(".", "/"): jax.ShapeDtypeStruct(x["shape"], dtypes.get(x["dtype"], "int32"))
        for name, x in header.items()
        if name != "__metadata__"
    }


def _orbax_items(path: Path) -> dict[str, Path]:
    """The items of a checkpoint by name; "" if there is only one."""
    if (path / _ORBAX_METADATA).exists():
        return {"": path}
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    items = {folder.name: folder for folder in folders if (folder / _ORBAX_METADATA).exists()}
    if items:  # "default" if the manager was told no names
        return {"": items["default"]} if set(items) == {"default"} else items
    # Of a manager: folders named by their step, with a prefix or without.
    steps = {
        int(number[0]): folder
        for folder in folders
        if (number := re.findall(r"\d+$", folder.name)) and any(folder.glob("*/" + _ORBAX_METADATA))
    }
    if not steps:
        raise ValueError(
            f"{str(path)!r} is not an Orbax checkpoint: neither it nor a folder in it has a file "
            f"{_ORBAX_METADATA!r}. Give the folder of a step, or the one that contains the steps."
        )
    return _orbax_items(steps[max(steps)])


def find_params(shapes: Shapes, at: str | None = None) -> tuple[str, Shapes]:
    """Finds the parameters of a checkpoint: their path, and shapes by path below it.

    `at` is their path, "" for everything. None means the subtree named "params" nearest to the
    root; if there is none, everything except optimizer state and counters.
    """
    if at is None:
        found: set[str] = {m[1] for path in shapes if (m := re.match(r"((?:.*?/)?params)/", path))}
        found = {path for path in found if {"mu", "nu"}.isdisjoint(path.split("/"))}
        if not found:
            return _without_state(shapes)
        depth = min(path.count("/") for path in found)
        nearest = sorted(path for path in found if path.count("/") == depth)
        at = nearest[0]
        if len(nearest) > 1:
            raise ValueError(
                "The checkpoint has several subtrees of parameters: "
                f"{', '.join(map(repr, nearest))}. {_CHOOSE}"
            )
    at = at.strip("/")
    start = f"{at}/" if at else ""
    params = {path.removeprefix(start): x for path, x in shapes.items() if path.startswith(start)}
    if not params:
        roots = ", ".join(map(repr, _roots(shapes))) or "nothing"
        raise ValueError(f"The checkpoint has nothing below {at!r}. At its root there is: {roots}.")
    return at, params


def _roots(shapes: Shapes) -> dict[str, Shapes]:
    """The subtrees below each first name of the paths."""
    roots: dict[str, Shapes] = {}
    for path, form in shapes.items():
        root, _, rest = path.partition("/")
        roots.setdefault(root, {})[rest] = form
    return roots


def _without_state(shapes: Shapes) -> tuple[str, Shapes]:
    """Returns everything that is neither optimizer state nor a counter, and its path."""
    roots = _roots(shapes)
    # Those that hold more than counters and random keys.
    numbers = [
        root
        for root, below in roots.items()
        if any(jax.numpy.issubdtype(x.dtype, np.inexact) for x in below.values())
    ]
    states = {
        root
        for root in numbers
        if _OPTIMIZER.fullmatch(root)
        or any(_repeats(roots[root], other, roots[other]) for other in numbers if other != root)
    }
    kept = [root for root in numbers if root not in states]
    if len(kept) == 1 and "" not in roots[kept[0]]:
        inner, params = _without_state(roots[kept[0]])
        if len(params) < len(shapes):
            return "/".join(filter(None, (kept[0], inner))), params
    if not states and len(kept) in (0, len(roots)):
        return "", shapes
    params = {path: x for path, x in shapes.items() if path.partition("/")[0] in kept}
    copies = [frozenset(roots[root]) for root in kept if "" not in roots[root]]
    whole = any(_repeats(roots[root], "", params) for root in states)
    if states and (not params or (len(set(copies)) < len(copies) and not whole)):
        listing = (f"{root!r}{' (optimizer state)' * (root in states)}" for root in roots)
        raise ValueError(
            "The checkpoint has no subtree named 'params', and it is unknown which of these the "
            f"parameters are: {', '.join(listing)}. {_CHOOSE}"
        )
    return "", params


def _repeats(state: Shapes, root: str, params: Shapes) -> bool:
    """Whether `state` has a moment of each of `params`, as "0/mu/dense/kernel"."""
    endings: set[tuple[str, tuple[int, ...]]] = set()
    for path, form in state.items():
        names = path.split("/")
        starts = [i + 1 for i, name in enumerate(names[:-1]) if name in _AVERAGES]
        endings.update(("/".join(names[start:]), form.shape) for start in starts)
    prefixes = ("", f"{root}/" if root else "")
    return any(all((p + path, x.shape) in endings for path, x in params.items()) for p in prefixes)
