"""How the devices of a mesh share the orthogonalisation of a tree.

Left to the partitioner, a replicated matrix is orthogonalised by every device, and a sharded one
costs collectives in every Newton-Schulz step. Here the devices share the *matrices*: each gathers
whole ones, orthogonalises them alone and sends the results back.

First a plan, from shapes, shardings and the mesh, without arrays; then one program that follows it:

1. `reading`, `mesh_shardings`, `dcn_axes`, `zero1`: how the leaves are sharded.
2. `blocks`, `assignment`, `planning`: which matrices there are and which devices work on which,
   under a caller's `options`; a frozen `plan`.
3. `run`, with the all-to-alls in `exchange`.
"""

from muonclip_jax.sharding.mesh_shardings import (
    MeshShardings as MeshShardings,
    on_devices as on_devices,
    place as place,
)
from muonclip_jax.sharding.options import Distribution as Distribution
from muonclip_jax.sharding.reading import (
    align_shardings as align_shardings,
    is_entry as is_entry,
    read_shardings as read_shardings,
)
from muonclip_jax.sharding.run import orthogonalize_leaves as orthogonalize_leaves
from muonclip_jax.sharding.zero1 import (
    check_momentum as check_momentum,
    zero1_shardings as zero1_shardings,
)
