"""The matrices and shardings of a tree, read once an update; trees and states placed on a mesh."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from muonclip_jax._arguments import check_flags, check_number, check_type
from muonclip_jax._devices import varying_axes
from muonclip_jax._tree import ScalarLike, Tree
from muonclip_jax.newton_schulz import PolarPlan
from muonclip_jax.routing import MatrixRules, MatrixSpec, as_rules, resolve_muon_specs
from muonclip_jax.sharding.mesh_shardings import (
    Distribution,
    MeshShardings,
    on_devices,
    place,
    zero1_shardings,
)
from muonclip_jax.sharding.reading import read_shardings
from muonclip_jax.sharding.run import orthogonalize_leaves
from muonclip_jax.transforms._matrix_axes import WeightDimNumOrFn

T = TypeVar("T")


def mesh_shardings(tree: Tree, param_shardings: Tree) -> MeshShardings | None:
    """The shardings of a tree; None inside of `shard_map`, where arrays are local."""
    shardings = read_shardings(tree, param_shardings, warn=False)
    return None if shardings is None or shardings.mesh.manual_axes else shardings


def place_tree(tree: T, shardings: MeshShardings | None) -> T:
    return tree if shardings is None else jax.tree.map(place, tree, _by_leaf(tree, shardings))


def _by_leaf(tree: Tree, shardings: MeshShardings) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(tree), shardings.shardings())


def replicate(tree: T, shardings: MeshShardings | None) -> T:
    """Places small arrays on every device of a mesh."""
    if shardings is None or shardings.mesh.manual_axes:
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
    tx: optax.GradientTransformation, param_shardings: Tree
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with updates and state sharded like the parameters.

    Under jit, zeros that `init` makes have no sharding: JAX replicates them, and the compiler
    chooses the sharding after an update. A moment is replicated along dimensions of length one,
    which may be reduced, and so is everything that is no tree like the parameters.
    """
    tx = optax.with_extra_args_support(tx)

    def placed(state: Tree, like: Tree, shardings: MeshShardings | None) -> Tree:
        if shardings is None:
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


class Leaves(NamedTuple):
    """Decisions about the leaves of a tree, made once per update.

    Attributes:
        specs: The normalised spec of each.
        sharded: Shardings of momentum and directions: like the parameters, or further (ZeRO-1).
        shardings: Shardings of parameters and results, on a mesh.
        mapped_axes: Those of `axis_name`.
        placed: `sharded` where momentum and directions are placed on the mesh, and None where they
            are left as JAX shards them.
    """

    specs: list[MatrixSpec]
    sharded: MeshShardings | None
    shardings: MeshShardings | None
    mapped_axes: tuple[str, ...]
    placed: MeshShardings | None


@dataclasses.dataclass(frozen=True)
class Orthogonalizer:
    """The checked settings of the polar factor, and its application to a tree."""

    polar: PolarPlan
    eps: ScalarLike
    adaptive: bool
    rules: MatrixRules | None
    weight_dimension_numbers: WeightDimNumOrFn | None
    param_shardings: Tree
    axis_name: str | tuple[str, ...] | None
    distribution: Distribution | None

    def __post_init__(self) -> None:
        check_number("eps", self.eps, "finite and not negative")
        check_flags(adaptive=self.adaptive)
        as_rules(self.rules)
        check_type("distribution", self.distribution, Distribution | None, "Distribution(...)")
        check_type("axis_name", self.axis_name, str | tuple | None, "'data' or ('data', 'fsdp')")

    def read(self, tree: Tree, init: bool = False) -> Leaves:
        """Decides what the matrices are and how they are sharded, and checks the leaves."""
        found = resolve_muon_specs(tree, self.weight_dimension_numbers, self.rules)
        mapped_axes = (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name or ()
        for path, leaf, _ in found:
            where = path or "The leaf"
            if init:
                try:
                    self.polar.choose_dtype(leaf.dtype)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
            elif differing := tuple(sorted(varying_axes(leaf).intersection(mapped_axes))):
                raise ValueError(
                    f"{where} varies over the mapped axes {differing}, but axis_name requires it "
                    "to be equal along them. Average it first: jax.lax.pmean(grads, "
                    f"{differing}); or leave an axis that shards the parameters out of axis_name."
                )
        specs = [spec for _, _, spec in found]
        zero1 = self.distribution is not None and self.distribution.shard_momentum
        required_by = "Distribution(shard_momentum=True)" * (zero1 and not init)
        sharded = shardings = read_shardings(tree, self.param_shardings, not init, required_by)
        if shardings is not None and zero1:
            sharded = zero1_shardings(shardings, [tuple(x.shape) for _, x, _ in found], specs)
        places = zero1 or self.param_shardings is not None
        return Leaves(specs, sharded, shardings, mapped_axes, sharded if places else None)

    def polar_factors(self, directions: Tree, leaves: Leaves) -> Tree:
        """Replaces each matrix of the directions, sharded as `leaves.sharded`."""
        xs, treedef = jax.tree.flatten(directions)
        polars = orthogonalize_leaves(self.polar, self.eps, xs, *leaves[:4], self.distribution)
        if self.adaptive:
            beside = polars
            if leaves.sharded is not leaves.shardings:
                beside = place_tree(polars, leaves.sharded)
            # <U, O> is the sum of U's singular values where O is its polar factor.
            polars = [jnp.sum(u.conj() * b) * o for u, b, o in zip(xs, beside, polars, strict=True)]
        return jax.tree.unflatten(treedef, polars)
