"""`orthogonalize_updates`: the polar factor of every matrix, without momentum."""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from muonclip_jax._arguments import check_flags, check_number, check_type, names_known
from muonclip_jax._devices import varying_axes
from muonclip_jax._tree import ScalarLike, Tree
from muonclip_jax.newton_schulz import (
    DEFAULT_DTYPE,
    DEFAULT_EPS,
    DEFAULT_METHOD,
    DEFAULT_SET,
    Coefficients,
    PolarPlan,
    plan_polar,
)
from muonclip_jax.routing import MatrixRules, MatrixSpec, as_rules, resolve_muon_specs
from muonclip_jax.sharding import (
    Distribution,
    MeshShardings,
    orthogonalize_leaves,
    read_shardings,
    zero1_shardings,
)
from muonclip_jax.transforms._placing import place_tree

#: One spec for all leaves, a tree of them (full, prefix or masked), or a function of the tree.
WeightDimNumOrFn: TypeAlias = Any

#: The distribution that None stands for.
DEFAULT_DISTRIBUTION = Distribution()


@names_known
def orthogonalize_updates(
    rules: MatrixRules | None = None,
    *,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    ns_coeffs: Coefficients = DEFAULT_SET,
    ns_steps: int | None = None,
    ns_method: str = DEFAULT_METHOD,
    ns_dtype: DTypeLike | None = DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    preconditioning: str | None = None,
    eps: ScalarLike = DEFAULT_EPS,
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
    polar_settings = ns_coeffs, ns_steps, ns_method, ns_dtype, preconditioning, relative_eps
    orthogonalizer = Orthogonalizer(
        plan_polar(*polar_settings, ns_implementation, platform),
        eps,
        adaptive,
        rules,
        weight_dimension_numbers,
        param_shardings,
        axis_name,
        distribution or DEFAULT_DISTRIBUTION,
    )

    def init_fn(params: optax.Params) -> optax.EmptyState:
        orthogonalizer.read(params, init=True)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Tree, params: optax.Params | None = None, **extra: object
    ) -> tuple[optax.Updates, Tree]:
        del params, extra
        leaves = orthogonalizer.read(updates)
        if orthogonalizer.places:
            updates = place_tree(updates, leaves.sharded)
        return orthogonalizer.polar_factors(updates, leaves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Leaves(NamedTuple):
    """Decisions about the leaves of a tree, made once per update.

    Attributes:
        specs: Path, leaf and normalised spec of each.
        shardings: Shardings of parameters and results, on a mesh.
        sharded: Shardings of momentum and directions: like the parameters, or further (ZeRO-1).
    """

    specs: list[tuple[str, Any, MatrixSpec]]
    shardings: MeshShardings | None
    sharded: MeshShardings | None


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
    distribution: Distribution

    def __post_init__(self) -> None:
        check_number("eps", self.eps, "finite and not negative")
        check_flags(adaptive=self.adaptive)
        as_rules(self.rules)
        check_type("distribution", self.distribution, Distribution, "Distribution(...) or None")
        check_type("axis_name", self.axis_name, str | tuple | None, "'data' or ('data', 'fsdp')")

    @property
    def places(self) -> bool:
        """Whether momentum and directions are placed on the mesh, or left as JAX shards them."""
        return self.param_shardings is not None or self.distribution.shard_momentum

    def read(self, tree: optax.Updates, init: bool = False) -> Leaves:
        """Decides what the matrices are and how they are sharded; at `init` checks dtypes too."""
        specs = resolve_muon_specs(tree, self.weight_dimension_numbers, self.rules)
        for path, leaf, _ in specs if init else ():
            try:
                self.polar.check_input(leaf.dtype)
            except ValueError as error:
                raise ValueError(f"{path or 'The leaf'}: {error}") from None
        zero1 = self.distribution.shard_momentum
        required_by = "Distribution(shard_momentum=True)" * (zero1 and not init)
        shardings = read_shardings(tree, self.param_shardings, not init, required_by)
        if shardings is None or not zero1:
            return Leaves(specs, shardings, shardings)
        shapes = [tuple(leaf.shape) for _, leaf, _ in specs]
        sharded = zero1_shardings(shardings, shapes, [spec for _, _, spec in specs])
        return Leaves(specs, shardings, sharded)

    def polar_factors(self, directions: optax.Updates, leaves: Leaves) -> optax.Updates:
        """Replaces each matrix of the directions, sharded as `leaves.sharded`."""
        name = self.axis_name
        mapped_axes = (name,) if isinstance(name, str) else name or ()
        for path, leaf, _ in leaves.specs if mapped_axes else ():
            if differing := tuple(sorted(varying_axes(leaf).intersection(mapped_axes))):
                raise ValueError(
                    f"{path or 'The leaf'} varies over the mapped axes {differing}, but axis_name "
                    f"requires it to be equal along them. Average it first: jax.lax.pmean(grads, "
                    f"{differing}); or leave an axis that shards the parameters out of axis_name."
                )
        xs, treedef = jax.tree.flatten(directions)
        polars = orthogonalize_leaves(
            self.polar,
            self.eps,
            xs,
            [spec for _, _, spec in leaves.specs],
            leaves.sharded,
            leaves.shardings,
            mapped_axes,
            self.distribution,
        )
        if self.adaptive:
            beside = polars
            if leaves.sharded is not leaves.shardings:
                beside = place_tree(polars, leaves.sharded)
            # <U, O> is the sum of U's singular values where O is its polar factor.
            polars = [jnp.sum(u.conj() * b) * o for u, b, o in zip(xs, beside, polars, strict=True)]
        return jax.tree.unflatten(treedef, polars)
