"""States and updates on a mesh: zeros made where they are to lie, and trees brought there."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax.matrices import MeshShardings, on_devices, place, read_shardings


def place_tree(tree: optax.Updates, shardings: MeshShardings | None) -> optax.Updates:
    if shardings is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [place(x, to) for x, to in zip(leaves, shardings.shardings(), strict=True)]
    )


def zeros_on_mesh(
    params: optax.Params, dtype: Any, shardings: MeshShardings | None
) -> optax.Updates:
    """Zeros made from shapes alone, so that a traced `init` needs nothing from its arguments.

    Outside of a trace every device makes its own part, and no device ever has the whole.
    """
    leaves, treedef = jax.tree.flatten(params)
    dtypes = [x.dtype if dtype is None else dtype for x in leaves]
    if shardings is None or isinstance(jnp.zeros(()), Tracer):
        zeros = [jnp.zeros(x.shape, kind) for x, kind in zip(leaves, dtypes, strict=True)]
        return place_tree(jax.tree.unflatten(treedef, zeros), shardings)
    zeros = [
        jnp.zeros(x.shape, kind, device=on_devices(home))
        for x, kind, home in zip(leaves, dtypes, shardings.shardings(), strict=True)
    ]
    return jax.tree.unflatten(treedef, zeros)


def init_on_mesh(
    tx: optax.GradientTransformation, param_shardings: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with a state that is sharded as `param_shardings` says, counts replicated.

    Optax makes zeros like the parameters. Under jit, where the axes of a mesh are Auto, those do
    not say how they are sharded, and the zeros are replicated.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> Any:
        state = tx.init(params)
        if param_shardings is None:
            return state
        shardings = read_shardings(params, param_shardings, warn=False)
        if shardings is None or shardings.inside_manual:
            return state
        everywhere = NamedSharding(shardings.mesh, PartitionSpec())
        return optax.tree.map_params(
            tx,
            place,
            state,
            jax.tree.unflatten(jax.tree.structure(params), shardings.shardings()),
            transform_non_params=lambda x: place(x, everywhere),
        )

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)
