"""Floor 6: optimizer states across checkpoints, meshes and libraries, for any checkpoint library.

A state is a tree in the shape of the parameters: `count`, `mu`, and Adam's `nu`. No plan and no
device is in it, so that a checkpoint outlives a change of mesh, of device count and of how the
work is shared. What a restore needs is told here:

1. `abstract_params` and `abstract_state`: what to restore, and where it shall lie on the mesh of
   now. Orbax takes such a tree as its target, and reads for every device the part it needs.
2. `check_saved`: whether what was saved is what is asked for, by the path of the leaf. To be
   called before a restore, for a library may cast, pad or leave out in silence.
3. `from_optax_state`: the state of another transformation, of `optax.contrib.muon` above all, by
   which parameter each moment belongs to.

4. `read_shapes` and `find_params`: what a checkpoint on disk holds, without loading an array.

All work on names of paths, such as "inner_states/muon/inner_state/0/mu/dense/kernel", which are
the same for a state, for the nested dicts and lists that Orbax restores without a target, and for
the metadata of a checkpoint.
"""

from muonclip_jax.checkpoint.moments import from_optax_state as from_optax_state
from muonclip_jax.checkpoint.saved import check_saved as check_saved
from muonclip_jax.checkpoint.shapes import (
    find_params as find_params,
    read_shapes as read_shapes,
)
from muonclip_jax.checkpoint.targets import (
    abstract_params as abstract_params,
    abstract_state as abstract_state,
)
