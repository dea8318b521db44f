"""`scale_by_muon`: momentum, then the polar factor of every matrix."""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from muonclip_jax._arguments import check_flag, names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree
from muonclip_jax.newton_schulz import (
    DEFAULT_DTYPE,
    DEFAULT_EPS,
    DEFAULT_METHOD,
    DEFAULT_SET,
    plan_polar,
)
from muonclip_jax.routing import MatrixRules
from muonclip_jax.sharding import Distribution, check_momentum
from muonclip_jax.transforms._checks import (
    check_fraction,
    check_moment_dtype,
    check_moments,
    transformation,
    value_at,
)
from muonclip_jax.transforms._orthogonalize_updates import (
    DEFAULT_DISTRIBUTION,
    Orthogonalizer,
    WeightDimNumOrFn,
)
from muonclip_jax.transforms._placing import place_tree, replicate, zeros_on_mesh

#: Weights of momentum and gradient in what is orthogonalised; without Nesterov, of momentum alone.
_Weights: TypeAlias = tuple[ScalarLike, ...]


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
        count: `int32` scalar, the number of updates so far.
        mu: The momentum, in the tree, shapes and shardings of the parameters.
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates


@names_known
def scale_by_muon(
    ns_coeffs: Any = DEFAULT_SET,
    ns_steps: int | None = None,
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarLike = DEFAULT_EPS,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str | None = None,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    bias_correction: bool = False,
    ns_method: str = DEFAULT_METHOD,
    ns_dtype: DTypeLike | None = DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    relative_eps: bool = True,
    rules: MatrixRules | None = None,
    param_shardings: Tree = None,
    axis_name: str | tuple[str, ...] | None = None,
    distribution: Distribution | None = None,
    platform: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix of the momentum by its polar factor.

    With gradient `G`, momentum `M` and `polar(U S V^H) = U V^H`, a step is

        M <- beta M + (1 - beta) G
        U <- beta M + (1 - beta) G      (nesterov)     or  M
        O <- polar(U)

    The momentum is the exponential average without bias correction: its direction is that of the
    heavy-ball form `M <- beta M + G` of the reference implementations, and the polar factor sees
    nothing but direction.

    Every leaf is orthogonalised, so route the others elsewhere (`optax.multi_transform` with
    `label_params`). Momentum is accumulated in float32 or wider and stored as `mu_dtype`; updates
    keep the gradient's dtype. `beta` and `eps` may be traced; everything else is static: where it
    is given, `optax.inject_hyperparams` needs its name in `static_args`.

    Args:
        ns_coeffs: Newton-Schulz coefficients: a name, a triple or rows (see `orthogonalize`). The
            default, "keller_jordan", is the reference implementations'.
        ns_steps: Number of steps; None takes all rows of a set, five of a triple.
        beta: Decay of the momentum, in [0, 1); may be a schedule of the number of updates.
        eps: Smallest divisor of a matrix once its largest entry is one: it guards the zero
            matrix alone.
        mu_dtype: Dtype of the stored momentum; None is the parameter's. "bfloat16" halves its
            memory; float16 loses entries below 6e-8.
        nesterov: Whether the momentum is Nesterov's.
        adaptive: Whether to multiply by the dual norm `<U, O>`, as in Bernstein and Newhouse 2024.
        preconditioning: The first rescaling (see `orthogonalize`).
        weight_dimension_numbers: Where the matrices are: one `MuonDimensionNumbers` or
            `MatrixSpec` for all leaves, a full, prefix or masked tree of them, or a function from
            the tree of updates to such a tree. None: `rules` decide; where they say None, a leaf
            of rank 2 is the matrix of its axes (0, 1).
        bias_correction: Whether to divide momentum and gradient by `1 - beta^t`, as
            `optax.contrib.muon` does (with `t + 1` for a Nesterov momentum); `beta` is the
            present one of a schedule.
        ns_method: "auto", "standard", "gram" or "svd" (see `orthogonalize`).
        ns_dtype: Dtype of the products (see `orthogonalize`).
        ns_implementation: "xla" or the name of a kernel (see `orthogonalize`).
        relative_eps: False adds `eps`, as it is, to the norm, as `optax.contrib.muon` does;
            gradients near it then give smaller updates.
        rules: `MatrixRules`; None is the built-in inference.
        param_shardings: Shardings of the parameters: a tree of `NamedSharding` such as
            `jax.tree.map(lambda x: x.sharding, params)`, or a function from a tree of parameters
            to one. Needed where the mesh has Auto axes; with Explicit axes it is read off the
            arrays. The devices then share the matrices. It may be the tree of all parameters
            where this transformation sees some of them.
        axis_name: Names of mapped axes, of `jax.pmap` or `jax.shard_map`, along which gradients
            are equal by now (by `lax.pmean`): the devices along them share the matrices.
        distribution: Which axes of the mesh share the work, and bounds on memory (see
            `Distribution`).
        platform: "cpu", "gpu" or "tpu": what the program is for (see `orthogonalize`); None is the
            platform of the mesh's devices, else JAX's default.

    Returns:
        A transformation with state `MuonState`.

    Raises:
        ValueError: At construction for a bad hyperparameter; while tracing for a leaf that is no
            matrix, with its path.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> params = {"w": jnp.eye(2, 3)}
        >>> tx = optax.chain(scale_by_muon(), optax.scale_by_learning_rate(0.02))
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["w"].shape
        (2, 3)

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Bernstein and Newhouse 2024,
        arXiv 2409.20325; Liu et al. 2025, arXiv 2502.16982.
    """
    check_fraction("beta", beta, "the momentum's decay, such as 0.95", schedule=True)
    check_flag("nesterov", nesterov)
    check_flag("bias_correction", bias_correction)
    check_moment_dtype(mu_dtype, "beta", beta)
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
    dims = weight_dimension_numbers
    orthogonalizer = Orthogonalizer(
        polar,
        eps,
        adaptive,
        rules,
        dims,
        param_shardings,
        axis_name,
        distribution or DEFAULT_DISTRIBUTION,
    )
    shard_momentum = orthogonalizer.distribution.shard_momentum

    def init_fn(params: optax.Params) -> MuonState:
        check_moments(params, mu_dtype)
        leaves = orthogonalizer.read(params, init=True)
        if param_shardings is None and not shard_momentum:
            mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        else:
            mu = zeros_on_mesh(params, mu_dtype, leaves.sharded)
        # Where an update leaves it, so that the second step has the types of the first.
        return MuonState(count=replicate(jnp.zeros([], jnp.int32), leaves.shardings), mu=mu)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MuonState]:
        del params, extra_args
        before, leaves = state.mu, orthogonalizer.read(updates)
        if param_shardings is not None:
            before = place_tree(before, leaves.sharded)
        elif leaves.sharded is not None:
            check_momentum(before, leaves.sharded)
        if param_shardings is not None or shard_momentum:
            updates = place_tree(updates, leaves.sharded)
        count = jnp.asarray(optax.safe_increment(jnp.asarray(state.count)))
        decay = value_at(beta, state.count)
        averaging = (decay, 1 - decay)
        # M <- beta M + (1 - beta) G
        mu = jax.tree.map(functools.partial(_average, weights=averaging), before, updates)
        weights: _Weights = averaging if nesterov else (1.0,)
        if bias_correction:
            # With Nesterov, the momentum's is that of the next step.
            ahead = jnp.asarray(optax.safe_increment(count))
            counts = (ahead, count) if nesterov else (count,)
            weights = tuple(
                weight / _correction(decay, after)
                for weight, after in zip(weights, counts, strict=True)
            )
        # U <- beta M + (1 - beta) G  (Nesterov), or M
        directions = jax.tree.map(functools.partial(_direction, weights), mu, updates)
        polars = orthogonalizer.polar_factors(directions, leaves)
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        if shard_momentum:
            mu = place_tree(mu, leaves.sharded)
        return polars, MuonState(count=count, mu=mu)

    return transformation("scale_by_muon", init_fn, update_fn)


def _average(m: jax.Array, g: jax.Array, weights: _Weights) -> jax.Array:
    """The weighted sum of `m` and `g`, accumulated in float32 or wider."""
    dtype = jnp.promote_types(jnp.promote_types(m.dtype, g.dtype), jnp.float32)
    return jnp.asarray(weights[0] * m.astype(dtype) + weights[1] * g.astype(dtype), dtype)


def _direction(weights: _Weights, m: jax.Array, g: jax.Array) -> jax.Array:
    """What is orthogonalised, entry by entry: the momentum, or one step ahead of it."""
    if len(weights) == 1:
        return (weights[0] * m).astype(g.dtype)
    return _average(m, g, weights).astype(g.dtype)


def _correction(beta: ScalarLike, count: jax.Array) -> jax.Array:
    wide = jax.dtypes.canonicalize_dtype(jnp.float64)
    return 1 - jax.lax.pow(jnp.asarray(beta, wide), count)
