"""States: where they are on a mesh, dtypes of moments, and errors for those of other optimizers."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from muonclip_jax._arguments import MOMENTS
from muonclip_jax._tree import Tree, array_leaves, flatten_with_paths
from muonclip_jax.sharding.mesh_shardings import MeshShardings, on_devices, place
from muonclip_jax.sharding.reading import read_shardings

#: Errors that a state of another structure leads to, somewhere inside Optax or here.
_FOREIGN = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def mesh_shardings(tree: Tree, param_shardings: Tree) -> MeshShardings | None:
    """The shardings of a tree; None inside of `shard_map`, where arrays are local."""
    shardings = read_shardings(tree, param_shardings, warn=False)
    return None if shardings is None or shardings.mesh.manual_axes else shardings


def place_state(state: Tree, like: Tree, shardings: MeshShardings | None) -> Tree:
    """Shards every part of `state` that has the structure of `like`, and replicates the rest.

    Of a moment that is reduced, dimensions of length one are replicated too. A
    `jax.ShapeDtypeStruct` stands for zeros: outside of a trace every device creates its own shard.
    """
    is_traced = isinstance(jnp.zeros(()), Tracer)
    structure = jax.tree.structure(like)

    def put(x: Tree, to: NamedSharding | None) -> jax.Array:
        if isinstance(x, jax.ShapeDtypeStruct):
            device = None if to is None or is_traced else on_devices(to)
            x = jnp.zeros(x.shape, x.dtype, device=device)
        return x if to is None else place(x, to, is_traced=is_traced)

    if shardings is None:
        return jax.tree.map(lambda x: put(x, None), state)
    mesh, by_leaf = shardings.mesh, jax.tree.unflatten(structure, shardings.shardings())
    everywhere = None if mesh.manual_axes else NamedSharding(mesh, PartitionSpec())

    def put_like(x: Tree, p: Tree, to: NamedSharding) -> jax.Array:
        if x.shape == p.shape:
            return put(x, to)
        spec = [axes if n > 1 else None for axes, n in zip(to.spec, x.shape, strict=False)]
        return put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def is_like(node: Tree) -> bool:
        return jax.tree.structure(node) == structure

    def put_node(node: Tree) -> Tree:
        if is_like(node):
            return jax.tree.map(put_like, node, like, by_leaf)
        return put(node, everywhere)

    return jax.tree.map(put_node, state, is_leaf=is_like)


def on_mesh(
    tx: optax.GradientTransformation, param_shardings: Tree
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with updates and state sharded like the parameters.

    Under jit, zeros that `init` makes have no sharding: JAX replicates them, and the compiler
    chooses the sharding after an update. (`place_state` makes zeros of shapes that `init` returns.)
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Tree) -> Tree:
        return place_state(tx.init(params), params, mesh_shardings(params, param_shardings))

    def update(updates: Tree, state: Tree, params: Tree = None, **extra: Any) -> tuple[Tree, Tree]:
        results = tx.update(updates, state, params, **extra)
        return place_state(results, updates, mesh_shardings(updates, param_shardings))

    return optax.GradientTransformationExtraArgs(init, update)


def check_moments(params: optax.Params, mu_dtype: DTypeLike | None) -> None:
    """Raises for leaves whose moment cannot be stored as `mu_dtype`, at `init`."""
    given = mu_dtype not in (None, float, complex)
    for path, leaf in array_leaves(params):
        dtype, where = jnp.dtype(leaf.dtype), path or "The leaf"
        if dtype.name not in MOMENTS:
            raise TypeError(
                f"{where} has dtype {dtype.name}; an optimizer's moments need parameters of dtype "
                f"{', '.join(MOMENTS)}. Convert it, or keep it out of the optimizer, for example "
                "by optax.masked."
            )
        stored = dtype if mu_dtype is None else jnp.dtype(mu_dtype)
        if (stored.kind == "c") != (dtype.kind == "c"):
            raise ValueError(
                f"{where} has dtype {dtype.name}, and mu_dtype={stored.name!r} is "
                f"{'complex' if stored.kind == 'c' else 'real'}. Pass mu_dtype=None, which keeps "
                "each leaf's own dtype."
            )
        if given and jax.dtypes.canonicalize_dtype(stored) != stored:
            raise ValueError(
                f"mu_dtype={stored.name!r} needs 64-bit types, which are disabled in JAX. Set "
                "jax.config.update('jax_enable_x64', True), or pass mu_dtype='float32'."
            )


def check_inner(name: str, tx: object) -> optax.GradientTransformationExtraArgs:
    """Returns what the transformation `name` wraps; raises if it is no transformation."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"{name} takes a gradient transformation such as muonclip_jax.muonclip(1e-3), got "
            f"{type(tx).__name__}. Of optax.MultiSteps, give the transformation inside it."
        )
    return optax.with_extra_args_support(tx)


def differences(
    given: dict[str, Any], expected: dict[str, Any], names: tuple[str, str], what: str = "shape"
) -> list[str]:
    """How two trees differ in paths and in `what` of their leaves, at most eight differences."""
    here, there = names
    found: list[str] = []
    for path in given | expected:
        if path not in given or path not in expected:
            found.append(f"{path!r} is only in {here if path in given else there}")
            continue
        for name in what.split():
            x, y = (getattr(tree[path], name, ()) for tree in (given, expected))
            if x != y:
                found.append(f"{path!r} has {name} {x} in {here}, {y} in {there}")
    found.sort(key=lambda text: " is only in " not in text)
    return found[:8] + [f"{len(found) - 8} more"] * (len(found) > 8)


def transformation(
    name: str, init: Callable[..., Any], update: Callable[..., Any], *, one_tree: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation whose errors identify a state of another transformation.

    States are compared only after an error, so this does not slow down a step. With `one_tree`,
    gradients and parameters must have the same paths and shapes.
    """

    def update_fn(
        updates: Tree, state: Tree, params: Tree = None, **extra: object
    ) -> tuple[Tree, Tree]:
        if one_tree and params is not None:
            trees = dict(array_leaves(updates)), dict(array_leaves(params))
            if found := differences(*trees, ("the gradients", "the parameters")):
                raise ValueError(
                    f"The gradients do not match the parameters: {'; '.join(found)}. Differentiate "
                    "with respect to the parameters passed to update, with zeros for leaves "
                    "without a gradient; reduce a remaining mapped axis first, by jax.lax.pmean or "
                    "a mean."
                )
        try:
            return update(updates, state, params, **extra)
        except _FOREIGN as error:
            found = []
            # Where init fails too, the error is not the state's.
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new = jax.eval_shape(init, updates if params is None else params)
                given, own = (dict(flatten_with_paths(tree)[0]) for tree in (state, new))
                found = differences(given, own, ("this state", "a new one"))
                if not found and jax.tree.structure(state) != jax.tree.structure(new):
                    found = [f"it is a {type(state).__name__}, expected a {type(new).__name__}"]
            if not found:
                raise
            raise ValueError(
                f"The state is not one that {name}'s init creates for these parameters: "
                f"{'; '.join(found)}. It is from another transformation, other rules, other "
                "parameters, or with the clip switched on or off. Start from tx.init(params), or "
                "convert its moments: "
                "muonclip_jax.checkpoint.from_optax_state(state, tx, params)."
            ) from error

    return optax.GradientTransformationExtraArgs(init, update_fn)
