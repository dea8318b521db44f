"""Where the language model's parameters lie on a mesh of the axes "fsdp" and "tp"."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

#: Which axis of the mesh shards which dimension: heads and hidden units over "tp", the other one
#: over "fsdp". What matches nothing is whole everywhere.
SPECS = (
    (r"(query|key|value)/kernel$", P("fsdp", "tp", None)),
    (r"out/kernel$", P("tp", None, "fsdp")),
    (r"(gate|up|head)/kernel$", P("fsdp", "tp")),
    (r"down/kernel$", P("tp", "fsdp")),
    (r"embedding$", P("tp", "fsdp")),
)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """Returns the tree of shardings for a tree of parameters, or of their shapes."""
    return jax.tree.map_with_path(lambda path, leaf: _sharding(mesh, path, leaf), params)


def _sharding(mesh: Mesh, key_path: Any, leaf: Any) -> NamedSharding:
    """Returns where a parameter lies; a dimension that an axis does not divide is left whole."""
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    spec = next((spec for pattern, spec in SPECS if re.search(pattern, path)), P())
    fitting = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, leaf.shape, strict=False)
    ]
    return NamedSharding(mesh, P(*fitting))
