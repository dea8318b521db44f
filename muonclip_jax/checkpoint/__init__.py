"""Optimizer states across checkpoints, meshes and libraries, for any checkpoint library.

A state is a tree in the shape of the parameters: `count`, `mu`, and Adam's `nu`. It holds no plan
and no device, so a checkpoint outlives a change of mesh, of device count and of distribution.

1. `abstract_params` and `abstract_state` describe what to restore and where on the current mesh.
2. `check_saved` compares what was saved with what is asked for, by path.
3. `from_optax_state` takes moments over from another transformation, such as `optax.contrib.muon`.

All work on names of paths, such as "inner_states/muon/inner_state/0/mu/dense/kernel", which are
the same for a state, for the nested dicts and lists that Orbax restores without a target, and for
the metadata of a checkpoint.
"""

from muonclip_jax.checkpoint.moments import from_optax_state as from_optax_state
from muonclip_jax.checkpoint.saved import check_saved as check_saved
from muonclip_jax.checkpoint.targets import (
    abstract_params as abstract_params,
    abstract_state as abstract_state,
)
