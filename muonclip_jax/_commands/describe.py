"""`describe`: labels of the parameters in a checkpoint, attention blocks, and the cost of Muon."""

import importlib
import json
import os
import pkgutil
import re
import sys
import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax._tree import Shaped, Tree, flatten_with_paths
from muonclip_jax.checkpoint.targets import without_box
from muonclip_jax.clipping import describe_attention
from muonclip_jax.heads.finding import find_blocks
from muonclip_jax.matrices import describe_cost
from muonclip_jax.routing import MatrixRules, describe_labels

#: Path -> shape and dtype.
Shapes: TypeAlias = dict[str, jax.ShapeDtypeStruct]

_ORBAX_METADATA = "_METADATA"  # the file that Orbax writes beside the arrays of an item
# Names that Optax, torch and others give to optimizer states, and inside them to trees of moments.
_OPTIMIZER = re.compile(r"(.*_)?(opt|optim|optimi[sz]er)(_?states?)?", re.IGNORECASE)
_MOMENTS = {"mu", "nu", "trace", "momentum", "exp_avg", "exp_avg_sq", "acc_grads"}
_CHOOSE = "Choose one by its path (--params on the command line)."
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def describe(
    checkpoint: str | Path, params: str | None = None, rules: str | None = None, **cost: Any
) -> str:
    """Returns three tables of a checkpoint, for the arguments of the command."""
    routing = None
    if rules is not None:
        sys.path.insert(0, os.getcwd())
        routing = pkgutil.resolve_name(rules)
        if not isinstance(routing, MatrixRules):
            raise TypeError(
                f"rules={rules!r} is {routing!r}. Write 'package.module:name', where the name is a "
                "muonclip_jax.MatrixRules in a module that can be imported here."
            )
    saved = read_shapes(checkpoint)
    at, shapes = find_params(saved, params)
    roots = {path.partition("/")[0] for path in shapes}
    left = dict.fromkeys(root for path in saved if (root := path.partition("/")[0]) not in roots)
    extent = f"all but {', '.join(map(repr, left))}" if left else "all of it"
    extent += "" if params is not None else ": no 'params' in it"
    sections = {
        f"Parameters: {f'{at!r} of {checkpoint}' if at else f'{checkpoint} ({extent})'}": (
            describe_labels(shapes, routing)
        ),
        "Attention blocks, and what QK-Clip scales in them": (
            describe_attention(shapes)
            if find_blocks(shapes, None)
            else "none was found: there is nothing for QK-Clip to clip"
        ),
        "Newton-Schulz, a step": describe_cost(shapes, routing, **cost),
    }
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{body}" for title, body in sections.items())


def read_shapes(checkpoint: str | Path) -> Shapes:
    """Reads path -> shape and dtype of every array in Orbax folders, `.npz`, or `.safetensors`.

    Of a manager's folder the newest step is read, of a folder of `.safetensors` all files.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"There is no {str(path)!r}. Give Orbax's folder, or an .npz file.")
    if files := [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors")):
        return {name: x for file in files for name, x in _read_safetensors(file).items()}
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"{str(path)!r} is neither an .npz nor a .safetensors file. Load it, and write its "
                "arrays by path: numpy.savez('params.npz', **arrays)."
            )
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
        # NumPy writes as bytes what it has no name for.
        dtypes = {name: "bfloat16" if x.dtype == "V2" else x.dtype for name, x in arrays.items()}
        return {name: jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name, x in arrays.items()}
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


def _read_safetensors(path: Path) -> Shapes:
    """Reads the header of a file, its length in eight bytes and JSON; names are as in torch."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {
        name.replace(".", "/"): jax.ShapeDtypeStruct(x["shape"], _DTYPES.get(x["dtype"], "int32"))
        for name, x in header.items()
    }


def _orbax_items(path: Path) -> dict[str, Path]:
    """The items of a checkpoint, or of a manager's newest step, by name; "" for a single one."""
    if (path / _ORBAX_METADATA).exists():
        return {"": path}
    items = {file.parent.name: file.parent for file in sorted(path.glob(f"*/{_ORBAX_METADATA}"))}
    if items:  # "default" if the manager was told no names
        return {"": items["default"]} if set(items) == {"default"} else items
    # Of a manager: folders named by their step, with a prefix or without.
    folders = [file.parents[1] for file in path.glob(f"*/*/{_ORBAX_METADATA}")]
    steps = {int(m[0]): folder for folder in folders if (m := re.search(r"\d+$", folder.name))}
    if not steps:
        raise ValueError(
            f"{str(path)!r} is not an Orbax checkpoint: neither it nor a folder in it has a file "
            f"{_ORBAX_METADATA!r}. Give the folder of a step, or the one that contains the steps."
        )
    return _orbax_items(steps[max(steps)])


def find_params(shapes: Shapes, at: str | None = None) -> tuple[str, Shapes]:
    """Finds the parameters of a checkpoint: their path, and shapes by path below it.

    `at` is their path, "" for everything. None means the subtree named "params" nearest to the
    root; if there is none, everything but counters, random keys and roots named as an optimizer's.
    """
    roots: dict[str, set[str]] = {}
    for path in shapes:
        root, _, rest = path.partition("/")
        roots.setdefault(root, set()).add(rest)
    if at is None:
        matches = [m[1] for path in shapes if (m := re.match(r"((?:.*?/)?params)/", path))]
        found = {path for path in matches if {"mu", "nu"}.isdisjoint(path.split("/"))}
        nearest = [path for path in found if path.count("/") == min(p.count("/") for p in found)]
        if len(nearest) > 1:
            raise ValueError(
                "The checkpoint has several subtrees of parameters: "
                f"{', '.join(map(repr, sorted(nearest)))}. {_CHOOSE}"
            )
        if nearest:
            at = str(nearest[0])
        else:
            shapes, at = _without_optimizer(shapes, roots)
    start = at.strip("/")
    start = f"{start}/" if start else ""
    params = {path.removeprefix(start): x for path, x in shapes.items() if path.startswith(start)}
    if not params:
        names = ", ".join(map(repr, roots)) or "nothing"
        raise ValueError(f"The checkpoint has nothing below {at!r}. At its root there is: {names}.")
    return start.rstrip("/"), params


def _without_optimizer(shapes: Shapes, roots: dict[str, set[str]]) -> tuple[Shapes, str]:
    """Leaves out counters, random keys and optimizer state; the path of the rest if it has one."""
    numbers = {path: x for path, x in shapes.items() if jnp.issubdtype(x.dtype, np.inexact)}
    names = dict.fromkeys(path.partition("/")[0] for path in numbers)
    kept = [root for root in names if not _OPTIMIZER.fullmatch(root)]
    params = {path: x for path, x in numbers.items() if path.partition("/")[0] in kept}
    trees = [frozenset(roots[root]) for root in kept if roots[root] != {""}]
    has_copies = len(kept) < len(names) and len(set(trees)) < len(trees)
    if not params or has_copies or any(not _MOMENTS.isdisjoint(p.split("/")) for p in params):
        raise ValueError(
            "The checkpoint has no subtree named 'params', and it is unknown which of these the "
            f"parameters are: {', '.join(map(repr, roots))}. {_CHOOSE}"
        )
    return params, kept[0] if len(kept) == 1 < len(roots) and trees else ""
