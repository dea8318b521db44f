"""`orthogonalize_updates`: the polar factor of every matrix of a tree, on one device or a mesh."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from muonclip_jax._arguments import check_flags, check_number, check_type, names_known
from muonclip_jax._devices import varying_axes
from muonclip_jax._tree import ScalarLike, Tree
from muonclip_jax.newton_schulz import PolarPlan, coefficients, plan_polar
from muonclip_jax.routing import MatrixRules, MatrixSpec, as_rules, resolve_muon_specs
from muonclip_jax.sharding.mesh_shardings import (
    Distribution,
    MeshShardings,
    zero1_shardings,
)
from muonclip_jax.sharding.reading import read_shardings
from muonclip_jax.sharding.run import orthogonalize_leaves
from muonclip_jax.transforms._matrix_axes import WeightDimNumOrFn
from muonclip_jax.transforms._states import place_state


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
                beside = place_state(polars, xs, leaves.sharded)
            # <U, O> is the sum of U's singular values where O is its polar factor.
            polars = [jnp.sum(u.conj() * b) * o for u, b, o in zip(xs, beside, polars, strict=True)]
        return jax.tree.unflatten(treedef, polars)


@names_known
def orthogonalize_updates(
    rules: MatrixRules | None = None,
    *,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    ns_coeffs: coefficients.Coefficients = coefficients.DEFAULT_SET,
    ns_steps: int | None = None,
    ns_method: str = coefficients.DEFAULT_METHOD,
    ns_dtype: DTypeLike | None = coefficients.DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    preconditioning: str | None = None,
    eps: ScalarLike = coefficients.DEFAULT_EPS,
    relative_eps: bool = True,
    adaptive: bool = False,
    param_shardings: Tree = None,
    axis_name: str | tuple[str, ...] | None = None,
    distribution: Distribution | None = None,
    platform: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix of the updates by its polar factor.

    `scale_by_muon` is momentum followed by this transformation. Use it alone after a different
    momentum, or after a transformation of the input to Newton-Schulz:

        optax.chain(optax.trace(0.95, nesterov=True), normalize_rows, orthogonalize_updates())

    Args:
        rules: `MatrixRules`: which axes of a leaf form matrices; None is the built-in inference.
        weight_dimension_numbers: As in `scale_by_muon`.
        ns_coeffs: Newton-Schulz coefficients (see `orthogonalize`).
        ns_steps: Number of steps (see `orthogonalize`).
        ns_method: "auto", "standard", "gram" or "svd" (see `orthogonalize`).
        ns_dtype: Dtype of the products (see `orthogonalize`).
        ns_implementation: "xla" or the name of a kernel (see `orthogonalize`).
        preconditioning: The first rescaling (see `orthogonalize`).
        eps: As in `scale_by_muon`. May be traced; everything else is static.
        relative_eps: As in `scale_by_muon`.
        adaptive: Whether to multiply by the dual norm, as in `scale_by_muon`.
        param_shardings: As in `scale_by_muon`.
        axis_name: As in `scale_by_muon`.
        distribution: As in `scale_by_muon`.
        platform: "cpu", "gpu" or "tpu" (see `orthogonalize`).

    Returns:
        A stateless transformation. Updates keep their dtype and are sharded like the parameters.

    Raises:
        ValueError: At construction for an invalid hyperparameter; while tracing for a leaf that is
            not a matrix, with its path.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = orthogonalize_updates(ns_method="svd")
        >>> updates = {"w": jnp.array([[3.0, 0.0, 0.0], [0.0, -0.1, 0.0]])}
        >>> tx.update(updates, tx.init(updates))[0]["w"].tolist()
        [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Bernstein and Newhouse 2024,
        arXiv 2409.20325.
    """
    polar = ns_coeffs, ns_steps, ns_method, ns_dtype, preconditioning, relative_eps
    plan = plan_polar(*polar, ns_implementation, platform)
    leaves = rules, weight_dimension_numbers, param_shardings, axis_name, distribution
    orthogonalizer = Orthogonalizer(plan, eps, adaptive, *leaves)

    def init(params: Tree) -> optax.EmptyState:
        orthogonalizer.read(params, init=True)
        return optax.EmptyState()

    def update(updates: Tree, state: Tree, params: Tree = None, **_: object) -> tuple[Tree, Tree]:
        leaves = orthogonalizer.read(updates)
        return orthogonalizer.polar_factors(
            place_state(updates, updates, leaves.placed), leaves
        ), state

    return optax.GradientTransformationExtraArgs(init, update)
