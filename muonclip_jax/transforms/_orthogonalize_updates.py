"""`orthogonalize_updates`: the polar factor of every matrix, without momentum."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._arguments import check_flag, check_type, names_known
from muonclip_jax._devices import varying_axes
from muonclip_jax._tree import ScalarLike
from muonclip_jax.newton_schulz import (
    DEFAULT_DTYPE,
    DEFAULT_EPS,
    DEFAULT_METHOD,
    DEFAULT_SET,
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
from muonclip_jax.transforms._checks import check_non_negative
from muonclip_jax.transforms._placing import place_tree

#: One spec for all leaves, a tree of them (full, prefix or masked), or a function of the tree.
WeightDimNumOrFn: TypeAlias = Any
#: Path, leaf and normalised spec of every leaf.
Specs: TypeAlias = list[tuple[str, Any, MatrixSpec]]


@names_known
def orthogonalize_updates(
    rules: MatrixRules | None = None,
    *,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    ns_coeffs: Any = DEFAULT_SET,
    ns_steps: int | None = None,
    ns_method: str = DEFAULT_METHOD,
    ns_dtype: Any = DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    preconditioning: str | None = None,
    eps: ScalarLike = DEFAULT_EPS,
    relative_eps: bool = True,
    adaptive: bool = False,
    param_shardings: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    distribution: Distribution | None = None,
    platform: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix of the updates by its polar factor.

    `scale_by_muon` is momentum followed by this transformation. By itself it goes behind another
    momentum, or behind a transformation that changes what is orthogonalised:

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
        A stateless transformation. Updates keep their dtype and are sharded as the parameters.

    Raises:
        ValueError: At construction for a bad hyperparameter; while tracing for a leaf that is not a
            matrix, with its path.

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
    check_non_negative("eps", eps)
    check_flag("adaptive", adaptive)
    as_rules(rules)
    check_type("distribution", distribution, Distribution | None, "Distribution(...)")
    check_type("axis_name", axis_name, str | tuple | None, "'data' or ('data', 'fsdp')")
    polar = plan_polar(
        ns_coeffs,
        ns_steps,
        ns_method,
        ns_dtype,
        preconditioning,
        relative_eps,
        ns_implementation,
        platform,
    )
    options = Distribution() if distribution is None else distribution
    mapped_axes = (axis_name,) if isinstance(axis_name, str) else axis_name or ()

    def init_fn(params: optax.Params) -> optax.EmptyState:
        for path, leaf, _ in resolve_muon_specs(params, weight_dimension_numbers, rules):
            try:
                polar.check_input(leaf.dtype)
            except ValueError as error:
                raise ValueError(f"{path or 'The leaf'}: {error}") from None
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        specs = resolve_muon_specs(updates, weight_dimension_numbers, rules)
        _check_equal_along(mapped_axes, specs)
        required_by = "Distribution(shard_momentum=True)" * options.shard_momentum
        shardings = read_shardings(updates, param_shardings, required_by=required_by)
        sharded = shardings
        if shardings is not None and options.shard_momentum:
            sharded = direction_shardings(shardings, specs)
        if param_shardings is not None or options.shard_momentum:
            updates = place_tree(updates, sharded)
        directions, treedef = jax.tree.flatten(updates)
        polars = orthogonalize_leaves(
            polar,
            eps,
            directions,
            [spec for _, _, spec in specs],
            sharded,
            shardings,
            mapped_axes,
            options,
        )
        if adaptive:
            beside = polars
            if sharded is not shardings:
                beside = place_tree(polars, sharded)
            # <U, O> is the sum of U's singular values where O is its polar factor.
            polars = [
                jnp.sum(u.conj() * b) * o
                for u, b, o in zip(directions, beside, polars, strict=True)
            ]
        return jax.tree.unflatten(treedef, polars), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def direction_shardings(shardings: MeshShardings, specs: Specs) -> MeshShardings:
    """Shards momentum and directions over the axes that replicate the parameters too (ZeRO-1)."""
    return zero1_shardings(
        shardings, [tuple(leaf.shape) for _, leaf, _ in specs], [spec for _, _, spec in specs]
    )


def _check_equal_along(axes: tuple[str, ...], specs: Specs) -> None:
    """Raises where JAX knows that gradients differ along axes whose devices share the work."""
    for path, leaf, _ in specs:
        if differing := sorted(varying_axes(leaf).intersection(axes)):
            raise ValueError(
                f"{path or 'The leaf'} differs along the mapped axes {tuple(differing)}, which "
                "axis_name says it is equal along. Average it before: "
                f"jax.lax.pmean(grads, {tuple(differing)}); or leave an axis that shards the "
                "parameters out of axis_name."
            )
