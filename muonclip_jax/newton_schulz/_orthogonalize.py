"""The polar factor of a stack of matrices.

Muon replaces a matrix `X = U S V^H` by its polar factor `U V^H`. Newton-Schulz approximates it with
matrix products: each step applies an odd polynomial to all singular values.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Inexact

from muonclip_jax.newton_schulz import coefficients, iteration
from muonclip_jax.newton_schulz.coefficients import Coefficients
from muonclip_jax.newton_schulz.plan import PolarPlan, ResolvedPlan, decide_platform, plan_polar


def apply_polar(
    plan: PolarPlan,
    x: Inexact[Array, "*batch m n"],
    eps: jax.typing.ArrayLike = coefficients.DEFAULT_EPS,
) -> Inexact[Array, "*batch m n"]:
    """Orthogonalises each matrix of `x` according to `plan`."""
    if x.ndim < 2:
        raise ValueError(
            f"orthogonalize needs an array of shape (..., m, n), got shape {x.shape}. A vector has "
            "no polar factor; train it with AdamW."
        )
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"orthogonalize needs a floating-point or complex array, got dtype {x.dtype}. Convert "
            "it first: x.astype(jnp.float32)."
        )
    if not x.size:
        return x
    sharding = jax.typeof(x).sharding
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    if any(spec[-2:]):
        # A product over an axis that an Explicit mesh axis shards is ambiguous to JAX.
        whole = NamedSharding(sharding.mesh, PartitionSpec(*spec[:-2], None, None))
        x = jax.sharding.reshard(x, whole)
        return jax.sharding.reshard(apply_polar(plan, x, eps), sharding)
    ones = tuple(axis for axis in range(x.ndim - 2) if x.shape[axis] == 1 and not spec[axis])
    if ones:
        # A batch of one is no batch: XLA's CPU compiler takes up to twice as long for it. One that
        # an Explicit mesh axis shards would come back with another type.
        return jnp.expand_dims(apply_polar(plan, jnp.squeeze(x, ones), eps), ones)
    if x.shape[-2] > x.shape[-1]:
        return apply_polar(plan, x.mT, eps).mT
    resolved = plan.resolve(x.shape, x.dtype)
    if resolved.method == "svd":
        return _svd(x, resolved).astype(x.dtype)
    plain, gram = iteration.newton_schulz, iteration.gram_newton_schulz
    return (gram if resolved.method == "gram" else plain)(x, resolved, eps).astype(x.dtype)


def _svd(x: jax.Array, plan: ResolvedPlan) -> jax.Array:
    """Computes `U V^H` of `X = U S V^H`, without singular values that are zero up to rounding."""
    X, _ = iteration.scale_by_power_of_two(x.astype(jnp.promote_types(plan.dtype, x.dtype)))
    u, s, vh = jnp.linalg.svd(X.astype(plan.dtype), full_matrices=False)
    rounding = max(X.shape[-2:]) * jnp.finfo(plan.dtype).eps
    keep = (s > rounding * s[..., :1]).astype(plan.dtype)
    return jnp.matmul(u * keep[..., None, :], vh, precision=lax.Precision.HIGHEST)


def apply_polar_by_columns(
    plan: PolarPlan,
    x: Inexact[Array, "*batch m share"],
    axes: tuple[str, ...],
    eps: jax.typing.ArrayLike = coefficients.DEFAULT_EPS,
) -> Inexact[Array, "*batch m share"]:
    """Orthogonalises matrices whose columns are sharded over `axes`.

    The matrices are at least as wide as high. This always uses the plain iteration, because the
    Gram form has only small products, whose results must be communicated. For "svd" the matrix is
    all-gathered.
    """
    share = x.shape[-1]
    if plan.method == "svd":
        whole = apply_polar(plan, lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True), eps)
        start = lax.axis_index(axes) * share
        return lax.dynamic_slice_in_dim(whole, start, share, axis=x.ndim - 1)
    plain = dataclasses.replace(plan, method="standard")
    resolved = plain.resolve((*x.shape[:-1], share * lax.axis_size(axes)), x.dtype)
    return iteration.newton_schulz(x, resolved, eps, axes).astype(x.dtype)


def orthogonalize(
    x: Inexact[Array, "*batch m n"],
    *,
    ns_coeffs: Coefficients = coefficients.DEFAULT_SET,
    ns_steps: int | None = None,
    ns_method: str = coefficients.DEFAULT_METHOD,
    ns_dtype: jax.typing.DTypeLike | None = coefficients.DEFAULT_DTYPE,
    preconditioning: str | None = None,
    eps: jax.typing.ArrayLike = coefficients.DEFAULT_EPS,
    ns_implementation: str = "xla",
    platform: str | None = None,
) -> Inexact[Array, "*batch m n"]:
    r"""Computes an approximate polar factor of each matrix by Newton-Schulz.

    For `X = U S V^H` returns `U f(S) V^H`, where `f` is the composition of the odd quintics
    `a x + b x^3 + c x^5` of the coefficient rows, applied to the singular values divided by a bound
    on the largest. The result does not depend on the scale of `x`, and the zero matrix gives zero.

    Args:
        x: `(..., m, n)`, real or complex; leading axes are batch.
        ns_coeffs: A name of `COEFFICIENT_SETS` or `ALIASES`, a triple `(a, b, c)`, or rows of shape
            `(T, 3)`. The default, "keller_jordan", is the reference implementations';
            docs/settings.md compares sets by training, docs/performance.md by quality and cost.
        ns_steps: Number of steps. None means all rows of a set, or five steps of a triple. Fewer
            steps use the first rows; more are allowed only for sets whose source defines them.
        ns_method: "standard" (plain), "gram" (iterates on the small Gram matrix; fewer operations
            for non-square matrices), "auto" (whichever is cheaper and safe in its dtype), or "svd"
            (the exact polar factor, independent of coefficients and preconditioning).
        ns_dtype: Dtype of the products: "float32", "bfloat16", "float16", "float64"; they
            accumulate in float32 or wider. None means the input's own precision for 64-bit and
            complex input; else float32 on a CPU, float16 on a GPU, and on a TPU bfloat16 (float32
            for the Gram form). docs/performance.md has the error of each.
        preconditioning: "frobenius", "spectral", "aol", "schatten" (Schatten-4, as in Optax) or
            "schatten8". None means the one for which the set was derived: "aol" for "turbo",
            "schatten8" for "minimax4", else "frobenius".
        eps: Smallest divisor of a matrix whose largest entry is one; it only prevents division by
            zero.
        ns_implementation: Implementation of the symmetric products: "xla", or a Pallas kernel that
            computes one triangle of them, "mosaic_gpu" (Hopper GPUs, 16 bits) or "mosaic_tpu"
            (TPUs, bfloat16 and float32; not timed). On an H100 the first takes half of XLA's time
            from 2048 rows on or in batches, and as long for a single small matrix.
        platform: "cpu", "gpu" or "tpu": the platform for which dtype and form are chosen. None
            means the platform of the mesh's devices, else that of concrete arrays, else JAX's
            default. Lowering a program traced with None for another platform (`jax.export`) is an
            error; with "cpu" it computes in float32 and can be lowered for any platform.

    Returns:
        An array with the shape and dtype of `x`.

    Raises:
        TypeError: If `x` is not a floating-point array, or an argument has the wrong type.
        ValueError: If a name, shape or combination is invalid.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
        >>> orthogonalize(x, ns_method="svd").tolist()
        [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Bernstein and Newhouse 2024.
    """
    plan = plan_polar(
        ns_coeffs,
        ns_steps,
        ns_method,
        ns_dtype,
        preconditioning,
        ns_implementation=ns_implementation,
        platform=platform,
    )
    x = jnp.asarray(x)
    plan, eps = decide_platform(plan, eps, [x], jax.typeof(x).sharding.mesh)
    return apply_polar(plan, x, eps)
