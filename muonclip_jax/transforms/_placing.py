"""States and updates placed on a mesh."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from muonclip_jax._tree import Tree
from muonclip_jax.sharding import MeshShardings, on_devices, place, read_shardings

T = TypeVar("T")


def place_tree(tree: T, shardings: MeshShardings | None) -> T:
    if shardings is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [place(x, to) for x, to in zip(leaves, shardings.shardings(), strict=True)]
    )


def mesh_shardings(tree: Tree, param_shardings: Tree) -> MeshShardings | None:
    """The shardings of a tree; None inside of `shard_map`, where arrays are local."""
    shardings = read_shardings(tree, param_shardings, warn=False)
    return None if shardings is None or shardings.inside_manual else shardings


def replicate(tree: T, shardings: MeshShardings | None) -> T:
    """Places small arrays on every device of a mesh."""
    if shardings is None or shardings.inside_manual:
        return tree
    everywhere = NamedSharding(shardings.mesh, PartitionSpec())
    return jax.tree.map(lambda x: place(x, everywhere), tree)


def zeros_on_mesh(
    params: optax.Params, dtype: DTypeLike | None, shardings: MeshShardings | None
) -> optax.Updates:
    """Zeros that depend only on shapes, so a traced `init` does not use its arguments.

    Outside of a trace every device creates its own shard.
    """
    if shardings is None or isinstance(jnp.zeros(()), Tracer):
        return place_tree(
            jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), params), shardings
        )
    leaves, treedef = jax.tree.flatten(params)
    zeros = [
        jnp.zeros(x.shape, dtype or x.dtype, device=on_devices(sharding))
        for x, sharding in zip(leaves, shardings.shardings(), strict=True)
    ]
    return jax.tree.unflatten(treedef, zeros)


def on_mesh(
    tx: optax.GradientTransformation, param_shardings: Tree, *, moments: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with updates, and with `moments` its state, sharded as `param_shardings` says.

    On a mesh with Auto axes, Optax's zeros have no sharding under jit: `init` replicates them, and
    the compiler chooses the sharding after an update. Counts are replicated.
    """
    tx = optax.with_extra_args_support(tx)
    if param_shardings is None:
        return tx

    def placed(state: Any, like: Tree, shardings: MeshShardings | None) -> Any:
        if shardings is None or not moments:
            return state
        by_leaf = jax.tree.unflatten(jax.tree.structure(like), shardings.shardings())
        return optax.tree.map_params(
            tx, place, state, by_leaf, transform_non_params=lambda x: replicate(x, shardings)
        )

    def init_fn(params: optax.Params) -> Any:
        return placed(tx.init(params), params, mesh_shardings(params, param_shardings))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        new, after = tx.update(updates, state, params, **extra_args)
        shardings = mesh_shardings(updates, param_shardings)
        return place_tree(new, shardings), placed(after, updates, shardings)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
