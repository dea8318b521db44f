"""`describe`: labels of the parameters in a checkpoint, attention blocks, and the cost of Muon."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from muonclip_jax._commands.reading import Shapes, find_params, read_shapes
from muonclip_jax.clipping import describe_attention
from muonclip_jax.heads.finding import find_blocks
from muonclip_jax.matrices import describe_cost
from muonclip_jax.routing import MatrixRules, describe_labels


def describe(
    checkpoint: str | Path,
    params: str | None = None,
    rules: str | None = None,
    *,
    platform: str | None = None,
    **newton_schulz: Any,
) -> str:
    """Returns three tables of a checkpoint: labels, attention blocks and cost.

    Args:
        checkpoint: As for `read_shapes`.
        params: Path of the parameters in it, as for `find_params`.
        rules: Where the `MatrixRules` are, "package.module:name"; None for the built-in ones.
        platform: "cpu", "gpu" or "tpu" for the cost; None is the one that JAX runs on.
        newton_schulz: `ns_coeffs`, `ns_steps`, `ns_method` and `ns_dtype`, as for `muonclip`.
    """
    routing = None if rules is None else load_rules(rules)
    saved = read_shapes(checkpoint)
    at, shapes = find_params(saved, params)
    where = f"{at!r} of {checkpoint}" if at else f"{checkpoint} ({_extent(saved, shapes, params)})"
    sections = {
        f"Parameters: {where}": describe_labels(shapes, routing),
        "Attention blocks, and what QK-Clip scales in them": (
            describe_attention(shapes)
            if find_blocks(shapes, None)
            else "none was found: there is nothing for QK-Clip to clip"
        ),
        "Newton-Schulz, a step": describe_cost(shapes, routing, platform=platform, **newton_schulz),
    }
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{body}" for title, body in sections.items())


def _extent(saved: Shapes, shapes: Shapes, params: str | None) -> str:
    """Describes which part of a checkpoint was used as parameters."""
    left = dict.fromkeys(path.partition("/")[0] for path in saved if path not in shapes)
    if left:
        return f"all but {', '.join(map(repr, left))}: no 'params' in it"
    return "all of it: no 'params' in it" if params is None else "all of it"


def load_rules(name: str) -> MatrixRules:
    """Imports a `MatrixRules` by "package.module:name", from the current folder too."""
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError(
            f"rules must be 'package.module:name', got {name!r}: the module is imported, and the "
            "name is a MatrixRules in it."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = getattr(importlib.import_module(module), attribute, None)
    if found is None:
        raise ValueError(f"The module {module!r} has no {attribute!r}.")
    if not isinstance(found, MatrixRules):
        raise TypeError(
            f"{name!r} is a {type(found).__name__}, expected a muonclip_jax.MatrixRules."
        )
    return found
