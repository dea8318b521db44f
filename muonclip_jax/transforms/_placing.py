"""States and updates on a mesh: zeros made where they are to lie, and trees brought there."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax.sharding import MeshShardings, on_devices, place, read_shardings

T = TypeVar("T")


def place_tree(tree: T, shardings: MeshShardings | None) -> T:
    if shardings is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [place(x, to) for x, to in zip(leaves, shardings.shardings(), strict=True)]
    )


def replicate(tree: T, shardings: MeshShardings | None) -> T:
    """Places small arrays on every device of a mesh; inside of `shard_map` they are there."""
    if shardings is None or shardings.inside_manual:
        return tree
    everywhere = NamedSharding(shardings.mesh, PartitionSpec())
    return jax.tree.map(lambda x: place(x, everywhere), tree)


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


def on_mesh(
    tx: optax.GradientTransformation, param_shardings: Any, *, moments: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with updates and state that are sharded as `param_shardings` says.

    Where the axes of a mesh are Auto, Optax's zeros under jit do not say how they are sharded and
    are replicated, and the compiler chooses how an update leaves them.

    Args:
        tx: The transformation; its state holds trees of parameters, and counts.
        param_shardings: As for `scale_by_muon`.
        moments: Whether the state is placed too; its counts are replicated.
    """
    tx = optax.with_extra_args_support(tx)
    if param_shardings is None:
        return tx

    def placed(tree: Any, like: optax.Params) -> Any:
        shardings = read_shardings(like, param_shardings, warn=False)
        if shardings is None or shardings.inside_manual or not moments:
            return tree
        everywhere = NamedSharding(shardings.mesh, PartitionSpec())
        return optax.tree.map_params(
            tx,
            place,
            tree,
            jax.tree.unflatten(jax.tree.structure(like), shardings.shardings()),
            transform_non_params=lambda x: place(x, everywhere),
        )

    def init_fn(params: optax.Params) -> Any:
        return placed(tx.init(params), params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        shardings = read_shardings(updates, param_shardings, warn=False)
        new, after = tx.update(updates, state, params, **extra_args)
        if shardings is None or shardings.inside_manual:
            return new, after
        return place_tree(new, shardings), placed(after, updates)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
