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


def mesh_shardings(tree: Tree, param_shardings: Tree) -> MeshShardings | None:
    """The shardings of a tree; None inside of `shard_map`, where arrays are local."""
    shardings = read_shardings(tree, param_shardings, warn=False)
    return None if shardings is None or shardings.inside_manual else shardings


def place_tree(tree: T, shardings: MeshShardings | None) -> T:
    return tree if shardings is None else jax.tree.map(place, tree, _by_leaf(tree, shardings))


def _by_leaf(tree: Tree, shardings: MeshShardings) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(tree), shardings.shardings())


def replicate(tree: T, shardings: MeshShardings | None) -> T:
    """Places small arrays on every device of a mesh."""
    if shardings is None or shardings.inside_manual:
        return tree
    everywhere = NamedSharding(shardings.mesh, PartitionSpec())
    return jax.tree.map(lambda x: place(x, everywhere), tree)


def zeros(forms: Tree) -> Tree:
    """Zeros of shapes and dtypes, on no mesh; each is an array of its own, so it can be donated."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), forms)


def zeros_on_mesh(
    params: optax.Params, dtype: DTypeLike | None, shardings: MeshShardings | None
) -> optax.Updates:
    """Zeros like the parameters; outside of a trace every device creates its own shard."""
    if shardings is None or isinstance(jnp.zeros(()), Tracer):
        return place_tree(optax.tree.zeros_like(params, dtype=dtype), shardings)
    return jax.tree.map(
        lambda x, sharding: jnp.zeros(x.shape, dtype or x.dtype, device=on_devices(sharding)),
        params,
        _by_leaf(params, shardings),
    )


def on_mesh(
    tx: optax.GradientTransformation, param_shardings: Tree, *, moments: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with updates and, with `moments`, its state sharded like the parameters.

    Under jit, zeros that `init` makes have no sharding: JAX replicates them, and the compiler
    chooses the sharding after an update. A moment is replicated along dimensions of length one,
    which may be reduced, and so is everything that is no tree like the parameters.
    """
    tx = optax.with_extra_args_support(tx)

    def placed(state: Tree, like: Tree, shardings: MeshShardings | None) -> Tree:
        if shardings is None or not moments:
            return state
        by_leaf = _by_leaf(like, shardings)

        def place_moment(x: jax.Array, sharding: NamedSharding) -> jax.Array:
            axes = zip(sharding.spec, x.shape, strict=False)
            spec = [names if length > 1 else None for names, length in axes]
            return place(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))

        def is_moments(node: Tree) -> bool:
            return jax.tree.structure(node) == jax.tree.structure(like)

        def place_part(node: Tree) -> Tree:
            if is_moments(node):
                return jax.tree.map(place_moment, node, by_leaf)
            return replicate(node, shardings)

        return jax.tree.map(place_part, state, is_leaf=is_moments)

    def init(params: Tree) -> Tree:
        return placed(tx.init(params), params, mesh_shardings(params, param_shardings))

    def update(updates: Tree, state: Tree, params: Tree = None, **extra: Any) -> tuple[Tree, Tree]:
        new, after = tx.update(updates, state, params, **extra)
        shardings = mesh_shardings(updates, param_shardings)
        return place_tree(new, shardings), placed(after, updates, shardings)

    return optax.GradientTransformationExtraArgs(init, update)
