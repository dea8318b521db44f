"""`describe`: labels of the parameters in a checkpoint, attention blocks, and the cost of Muon."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from muonclip_jax._commands.reading import find_params, read_shapes
from muonclip_jax.clipping import describe_attention
from muonclip_jax.heads.finding import find_blocks
from muonclip_jax.matrices import describe_cost
from muonclip_jax.routing import MatrixRules, describe_labels


def describe(
    checkpoint: str | Path, params: str | None = None, rules: str | None = None, **cost: Any
) -> str:
    """Returns three tables of a checkpoint, for the arguments of the command."""
    routing = None if rules is None else _load_rules(rules)
    saved = read_shapes(checkpoint)
    at, shapes = find_params(saved, params)
    left = dict.fromkeys(path.partition("/")[0] for path in saved if path not in shapes)
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


def _load_rules(name: str) -> MatrixRules:
    """Imports a `MatrixRules`, from the current folder too."""
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError(
            f"rules must be 'package.module:name', got {name!r}: the module is imported, and the "
            "name is a MatrixRules in it."
        )
    sys.path.insert(0, os.getcwd())
    found = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(found, MatrixRules):
        raise TypeError(f"{name!r} is {found!r}, expected a muonclip_jax.MatrixRules.")
    return found
