"""How the devices of a mesh share the orthogonalisation of a tree.

Left to the partitioner, a replicated matrix is worked on by every device and a sharded one costs
collectives in every iteration. Here the *matrices* are shared: each device gets whole ones, works
on them alone, and sends the results home.

Everything but the last step follows from shapes, shardings and the mesh, and holds no arrays:

1. `sharding`, `alignment`, `reading`, `momentum`: how the leaves lie on the mesh.
2. `local`: what one device holds of each parameter, as `blocks` of matrices.
3. `rounds`, `jobs`, `schedule`: who works on which matrix; a `plan` says it, and `planning` makes
   the one of a whole tree under a caller's `options`, on the mesh as it is or with an axis `cut`
   in two.
4. `run`: one program on every device, which follows the plan (`map`): `moves` make matrices whole,
   each device works on its hand (`hands`), and moves bring the results home.
"""

from muonclip_jax.sharding.alignment import (
    align_shardings as align_shardings,
    is_entry as is_entry,
)
from muonclip_jax.sharding.momentum import (
    check_momentum as check_momentum,
    zero1_shardings as zero1_shardings,
)
from muonclip_jax.sharding.options import Distribution as Distribution
from muonclip_jax.sharding.reading import read_shardings as read_shardings
from muonclip_jax.sharding.run import (
    orthogonalize_leaves as orthogonalize_leaves,
)
from muonclip_jax.sharding.sharding import (
    MeshShardings as MeshShardings,
    alike as alike,
    on_devices as on_devices,
    place as place,
)
