"""Restoring and converting optimizer states, with any checkpoint library.

A state contains `count`, `mu`, and Adam's `nu`, with the structure of the parameters. It does not
depend on mesh, number of devices or `Distribution`, so a checkpoint can be restored with others.

1. `abstract_params` and `abstract_state` describe shapes, dtypes and shardings on the current mesh.
2. `check_saved` compares a checkpoint with the restore target, by path.
3. `from_optax_state` converts moments of another transformation, such as `optax.contrib.muon`.

All use paths such as "inner_states/muon/inner_state/0/mu/dense/kernel", which are the same for a
state, for the nested dicts and lists that Orbax restores without a target, and for the metadata of
a checkpoint.
"""

from muonclip_jax.checkpoint.moments import from_optax_state as from_optax_state
from muonclip_jax.checkpoint.saved import check_saved as check_saved
from muonclip_jax.checkpoint.targets import (
    abstract_params as abstract_params,
    abstract_state as abstract_state,
)
