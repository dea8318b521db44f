"""Restoring and converting optimizer states, with any checkpoint library.

A state does not depend on mesh, number of devices or `Distribution`: a checkpoint can be restored
with others. Parameters and moments are named by paths such as
"inner_states/muon/inner_state/0/mu/dense/kernel", which are the same for a state, for the nested
dicts and lists that Orbax restores without a target, and for the metadata of a checkpoint.
"""

from muonclip_jax.checkpoint.moments import from_optax_state as from_optax_state
from muonclip_jax.checkpoint.targets import (
    abstract_params as abstract_params,
    abstract_state as abstract_state,
    check_saved as check_saved,
)
