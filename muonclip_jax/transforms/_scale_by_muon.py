"""`scale_by_muon`: momentum, then the polar factor of every matrix."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from muonclip_jax._arguments import check_decay, check_flags, names_known, value_at
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree
from muonclip_jax.newton_schulz import coefficients, plan_polar
from muonclip_jax.routing import MatrixRules
from muonclip_jax.sharding.mesh_shardings import Distribution, check_momentum
from muonclip_jax.transforms._matrix_axes import WeightDimNumOrFn
from muonclip_jax.transforms._orthogonalize_updates import Orthogonalizer
from muonclip_jax.transforms._states import check_moments, place_state, transformation


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
        count: `int32` scalar, the number of updates so far.
        mu: The momentum, with the structure, shapes and shardings of the parameters.
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates


@names_known
def scale_by_muon(
    ns_coeffs: coefficients.Coefficients = coefficients.DEFAULT_SET,
    ns_steps: int | None = None,
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarLike = coefficients.DEFAULT_EPS,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str | None = None,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    bias_correction: bool = False,
    ns_method: str = coefficients.DEFAULT_METHOD,
    ns_dtype: DTypeLike | None = coefficients.DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    relative_eps: bool = True,
    rules: MatrixRules | None = None,
    param_shardings: Tree = None,
    axis_name: str | tuple[str, ...] | None = None,
    distribution: Distribution | None = None,
    platform: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix of the gradients by the polar factor of its momentum.

    With gradient `G`, momentum `M` and `polar(U S V^H) = U V^H`, a step is

        M <- beta M + (1 - beta) G
        U <- beta M + (1 - beta) G      (nesterov)     or  M
        O <- polar(U)

    The momentum is an exponential average without bias correction. The heavy-ball form
    `M <- beta M + G` of the reference implementations differs only in scale, which does not change
    the polar factor.

    Every leaf is orthogonalised, so route other leaves to another optimizer
    (`optax.multi_transform` with `label_params`). Momentum is accumulated in float32 or wider and
    stored as `mu_dtype`; updates keep the gradient's dtype. `beta` and `eps` may be traced; all
    other arguments are static: if given, list them in `static_args` of `optax.inject_hyperparams`.

    Args:
        ns_coeffs: Newton-Schulz coefficients: a name, a triple or rows (see `orthogonalize`). The
            default, "keller_jordan", is that of the reference implementations.
        ns_steps: Number of steps; None means all rows of a set, or five steps of a triple.
        beta: Decay rate of the momentum, in [0, 1); may be a schedule of the update count.
        eps: Smallest divisor of a matrix whose largest entry is one; it only prevents division by
            zero.
        mu_dtype: Dtype of the stored momentum; None means the parameter's. "bfloat16" halves its
            memory; float16 rounds entries below 6e-8 to zero.
        nesterov: Whether to use Nesterov momentum.
        adaptive: Whether to multiply by the dual norm `<U, O>`, as in Bernstein and Newhouse 2024.
        preconditioning: The first rescaling (see `orthogonalize`).
        weight_dimension_numbers: Matrix axes of the leaves: one `MuonDimensionNumbers` or
            `MatrixSpec` for all leaves, a full, prefix or masked pytree of them, or a function from
            the updates to such a pytree. With None, `rules` decide; a leaf of rank 2 that the
            inference gives to AdamW is a matrix with axes (0, 1), one that a rule does an error.
        bias_correction: Whether to divide momentum and gradient by `1 - beta^t`, as
            `optax.contrib.muon` does (with `t + 1` for Nesterov momentum); with a schedule, `beta`
            is its current value.
        ns_method: "auto", "standard", "gram" or "svd" (see `orthogonalize`).
        ns_dtype: Dtype of the products (see `orthogonalize`).
        ns_implementation: "xla" or the name of a kernel (see `orthogonalize`).
        relative_eps: False adds `eps` to the norm without scaling, as `optax.contrib.muon` does;
            gradients of that size then give smaller updates.
        rules: `MatrixRules`; None means the built-in inference.
        param_shardings: Shardings of the parameters: a pytree of `NamedSharding` such as
            `jax.tree.map(lambda x: x.sharding, params)`, or a function from parameters to one.
            Required to distribute the matrices over a mesh with Auto axes; with Explicit axes the
            shardings are read from the arrays. It may contain more leaves than this transformation
            receives.
        axis_name: Names of mapped axes (`jax.pmap` or `jax.shard_map`) over which gradients are
            already averaged by `lax.pmean`; the matrices are distributed over the devices along
            them.
        distribution: Over which mesh axes the matrices are distributed, and bounds on memory (see
            `Distribution`).
        platform: "cpu", "gpu" or "tpu": the target platform (see `orthogonalize`); None means that
            of the mesh's devices, else JAX's default.

    Returns:
        A transformation with state `MuonState`.

    Raises:
        ValueError: At construction for an invalid hyperparameter; while tracing for a leaf that is
            not a matrix, with its path.

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
    check_decay("beta", beta, mu_dtype, schedule=True)
    check_flags(nesterov=nesterov, bias_correction=bias_correction)
    polar = ns_coeffs, ns_steps, ns_method, ns_dtype, preconditioning, relative_eps
    plan = plan_polar(*polar, ns_implementation, platform)
    leaves = rules, weight_dimension_numbers, param_shardings, axis_name, distribution
    orthogonalizer = Orthogonalizer(plan, eps, adaptive, *leaves)

    def init(params: Tree) -> MuonState:
        check_moments(params, mu_dtype)
        leaves = orthogonalizer.read(params, init=True)
        zeros = functools.partial(optax.tree.zeros_like, params, dtype=mu_dtype)
        mu = zeros()
        if leaves.placed is not None:
            mu = place_state(jax.eval_shape(zeros), params, leaves.placed)
        # Where an update leaves it, so that the second step has the types of the first.
        count = place_state(jnp.zeros([], jnp.int32), params, leaves.shardings)
        return MuonState(count, mu)

    def update(updates: Tree, state: Tree, params: Tree = None, **_: object) -> tuple[Tree, Tree]:
        leaves = orthogonalizer.read(updates)
        if param_shardings is None and leaves.sharded is not None:
            check_momentum(state.mu, leaves.sharded)
        before, updates = place_state((state.mu, updates), updates, leaves.placed)
        count = optax.safe_increment(state.count)
        decay = value_at(beta, state.count)
        weights = (decay, 1 - decay)
        # M <- beta M + (1 - beta) G
        mu = jax.tree.map(functools.partial(_average, weights), before, updates)
        # U <- beta M + (1 - beta) G  (Nesterov), or M
        weights = weights if nesterov else (1.0,)
        if bias_correction:
            # Divided by 1 - beta^t; with Nesterov, the t of M is that of the next step.
            power = functools.partial(jax.lax.pow, jnp.asarray(decay, jnp.result_type(float)))
            counts = (jnp.asarray(optax.safe_increment(count)), jnp.asarray(count))[-len(weights) :]
            weights = tuple(w / (1 - power(t)) for w, t in zip(weights, counts, strict=True))
        average = functools.partial(_average, weights)
        directions = jax.tree.map(lambda m, g: average(m, g).astype(g.dtype), mu, updates)
        polars = orthogonalizer.polar_factors(directions, leaves)
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        return polars, MuonState(count, place_state(mu, updates, leaves.placed))

    return transformation("scale_by_muon", init, update)


def _average(weights: tuple[ScalarLike, ...], m: jax.Array, g: jax.Array) -> jax.Array:
    """The weighted sum of `m` and `g`, or `m` with its weight alone, in float32 or wider."""
    dtype = jnp.promote_types(jnp.promote_types(m.dtype, g.dtype), jnp.float32)
    average = weights[0] * m.astype(dtype)
    if len(weights) > 1:
        average = average + weights[1] * g.astype(dtype)
    return jnp.asarray(average, dtype)
