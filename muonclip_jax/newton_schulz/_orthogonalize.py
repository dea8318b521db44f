"""The polar factor of a stack of matrices: the plan, and the function of plan and array.

Every matrix is `X = U S V^H`. Muon wants `U V^H`, the same singular vectors with all singular
values one. Newton-Schulz comes near that with products alone: it applies an odd polynomial, step by
step, to all singular values at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Inexact

from muonclip_jax.newton_schulz.defaults import (
    DEFAULT_DTYPE,
    DEFAULT_EPS,
    DEFAULT_METHOD,
    DEFAULT_SET,
)
from muonclip_jax.newton_schulz.gram import gram_newton_schulz
from muonclip_jax.newton_schulz.newton_schulz import newton_schulz
from muonclip_jax.newton_schulz.plan import PolarPlan, decide_platform, plan_polar
from muonclip_jax.newton_schulz.preconditioning import normalize, scale_by_power_of_two
from muonclip_jax.newton_schulz.shares import whole_on
from muonclip_jax.newton_schulz.svd import svd_polar


def _replicate_matrix_axes(
    x: jax.Array,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Gathers matrices that Explicit mesh axes divide; returns also what divides them again.

    A product over a divided axis is ambiguous there (JAX asks for an output sharding). Under Auto
    axes the partitioner decides, and nothing is done.
    """
    sharding = jax.typeof(x).sharding
    if len(sharding.spec) != x.ndim or not any(sharding.spec[-2:]):
        return x, lambda y: y
    whole = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-2], None, None))
    return jax.sharding.reshard(x, whole), lambda y: jax.sharding.reshard(y, sharding)


def apply_polar(
    plan: PolarPlan, x: Inexact[Array, "*batch m n"], eps: jax.typing.ArrayLike = DEFAULT_EPS
) -> Inexact[Array, "*batch m n"]:
    """Orthogonalises each matrix of `x` as `plan` says.

    Args:
        plan: From `plan_polar`.
        x: `(..., m, n)`, real or complex.
        eps: Smallest divisor once the largest entry is one; it guards the zero matrix alone.

    Returns:
        As `x`, in shape and dtype.

    Raises:
        TypeError: If `x` is not a floating-point array.
        ValueError: If `x` has fewer than two axes.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.diag(jnp.array([1.0, 0.1, 0.01]))
        >>> y = apply_polar(plan_polar("you"), x)
        >>> bool(jnp.all(jnp.diag(y) > 0.5))
        True
    """
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
    named = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)
    ones = tuple(axis for axis in range(x.ndim - 2) if x.shape[axis] == 1 and not named[axis])
    if ones:
        # A batch of one is no batch: XLA's CPU compiler takes up to twice as long for it. One that
        # an Explicit mesh axis shards would come back with another type.
        return jnp.expand_dims(apply_polar(plan, jnp.squeeze(x, ones), eps), ones)
    x, restore = _replicate_matrix_axes(x)
    resolved = plan.resolve(x.shape, x.dtype)
    wide, work = resolved.dtypes(x.dtype)
    y = x.astype(jnp.promote_types(wide, x.dtype))
    if resolved.method == "svd":
        return restore(svd_polar(scale_by_power_of_two(y)[0].astype(wide)).astype(x.dtype))
    tall = x.shape[-2] > x.shape[-1]
    y = jnp.swapaxes(y, -1, -2) if tall else y
    y = normalize(y, plan.preconditioning, eps, plan.relative_eps).astype(wide)
    shares = whole_on(plan.implementation, plan.platform)
    if resolved.method == "gram":
        y = gram_newton_schulz(
            y, resolved.rows, plan.preconditioning, work, resolved.restarts, shares
        )
    else:
        y = newton_schulz(y, resolved.rows, plan.preconditioning, work, shares)
    return restore((jnp.swapaxes(y, -1, -2) if tall else y).astype(x.dtype))


def orthogonalize(
    x: Inexact[Array, "*batch m n"],
    *,
    ns_coeffs: Any = DEFAULT_SET,
    ns_steps: Any = None,
    ns_method: str = DEFAULT_METHOD,
    ns_dtype: Any = DEFAULT_DTYPE,
    preconditioning: str | None = None,
    eps: jax.typing.ArrayLike = DEFAULT_EPS,
    ns_implementation: str = "xla",
    platform: str | None = None,
) -> Inexact[Array, "*batch m n"]:
    r"""Brings the singular values of each matrix near one: an approximate polar factor.

    For `X = U S V^H` returns `U f(S) V^H`, where `f` composes the odd quintics
    `a x + b x^3 + c x^5` of the coefficient rows on singular values divided by a bound on the
    largest. The result does not depend on the scale of `x`, and the zero matrix gives zero.

    Args:
        x: `(..., m, n)`, real or complex; leading axes are batch.
        ns_coeffs: A name of `COEFFICIENT_SETS` or `ALIASES`, a triple `(a, b, c)`, or rows of shape
            `(T, 3)` such as `polar_express_coefficients()` returns. The default is the best for
            its cost of the sets that no matrix makes diverge (docs/performance.md);
            "keller_jordan" is that of the reference implementations.
        ns_steps: Number of steps. None takes all rows of a set and five of a triple; fewer than the
            rows take the first ones; more go on as the set's source does, if it does.
        ns_method: "standard" (plain), "gram" (iterates on the small Gram matrix; fewer operations
            on oblong matrices), "auto" (whichever is cheaper and safe in its dtype), or "svd" (the
            exact polar factor; coefficients and preconditioning play no part).
        ns_dtype: What the products compute in: "float32", "bfloat16", "float16", "float64". They
            accumulate in float32 or wider. None takes the input's own precision for 64-bit and
            complex input; else float32 on a CPU, float16 on a GPU, and on a TPU bfloat16 (float32
            for the Gram form). Rounding to unit `u` (6e-8, 5e-4, 4e-3) moves the result by no more
            than a small multiple of `u f'(0)` in Frobenius norm, where `f'(0)`, the product of the
            rows' `a`, is 485 for "keller_jordan": a rounded input has new, tiny singular
            directions, and the steps make them grow. Where the spectrum is not that steep it is
            far less: measured relative errors are in `precision.py`.
        preconditioning: "frobenius", "spectral", "aol", "schatten" (Schatten-4, as in Optax) or
            "schatten8". None takes the one that the set was made for: "aol" for "turbo",
            "schatten8" for "minimax4", else "frobenius".
        eps: Smallest divisor once the largest entry is one; it guards the zero matrix alone.
        ns_implementation: Who computes the symmetric products: "xla", or a Pallas kernel that
            computes one triangle of them, "mosaic_gpu" (Hopper GPUs, 16 bits) or "mosaic_tpu"
            (TPUs, bfloat16 and float32). Tests compare the kernels with float64 in JAX's
            interpreter; they have not been timed on their machines.
        platform: "cpu", "gpu" or "tpu": what dtype, form and order of work are chosen for. None is
            the platform of the mesh's devices where the mesh is known, else that of concrete
            arrays, else that of `jax.default_device` or JAX's default backend. A program that was
            traced with None is refused when it is lowered for another platform (`jax.export`);
            with "cpu" it computes in float32 and can be lowered for any.

    Returns:
        As `x`, in shape and dtype.

    Raises:
        TypeError: If `x` is no floating-point array, or an argument has the wrong type.
        ValueError: If a name, shape or combination is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
        >>> orthogonalize(x, ns_method="svd").tolist()
        [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Bernstein and Newhouse,
        arXiv 2409.20325; the coefficient sets name theirs.
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
