"""The polar factor of a stack of matrices: the plan, and the function of plan and array.

Every matrix is `X = U S V^H`. Muon wants `U V^H`, the same singular vectors with all singular
values one. Newton-Schulz comes near that with products alone: it applies an odd polynomial, step by
step, to all singular values at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Inexact

from muonclip_jax.kernels.platform import default_platform
from muonclip_jax.polar.coefficients import changes_direction, resolve_coefficients
from muonclip_jax.polar.generators import Rows
from muonclip_jax.polar.gram import gram_flops, gram_newton_schulz
from muonclip_jax.polar.newton_schulz import newton_schulz, plain_flops
from muonclip_jax.polar.precision import (
    NS_DTYPES,
    NS_METHODS,
    choose_dtype,
    choose_method,
    guarded_rows,
)
from muonclip_jax.polar.preconditioning import (
    PRECONDITIONINGS,
    divide_by_largest_entry,
    normalize,
)
from muonclip_jax.polar.restarts import choose_restarts
from muonclip_jax.polar.shares import whole_on
from muonclip_jax.polar.svd import svd_polar


@dataclasses.dataclass(frozen=True)
class PolarPlan:
    """How to orthogonalise: everything that does not depend on the array, validated.

    Attributes:
        rows: Coefficients `(a, b, c)`, one triple a step.
        method: A name of `NS_METHODS`.
        dtype: A name of `NS_DTYPES`, or None for the rule of the platform.
        preconditioning: A name of `PRECONDITIONINGS`.
        relative_eps: Whether `eps` bounds the norm in units of a matrix's largest entry.
        implementation: Who computes the symmetric products: "xla", or None for a Pallas kernel
            where one is expected to save time.
    """

    rows: Rows
    method: str
    dtype: str | None
    preconditioning: str
    relative_eps: bool = True
    implementation: str | None = "xla"

    def resolve(
        self, shape: tuple[int, ...], dtype: Any, platform: str | None = None
    ) -> "ResolvedPlan":
        """Decides method, dtype and restarts for one shape.

        Args:
            shape: `(..., m, n)`.
            dtype: The input's dtype.
            platform: E.g. "gpu"; None is the platform that JAX computes on now.

        Returns:
            The decisions, with what they cost.
        """
        platform = default_platform() if platform is None else platform
        m, n = shape[-2:]
        method = choose_method(self.rows, self.method, dtype, self.dtype, platform, m, n)
        name = choose_dtype(dtype, self.dtype, method, platform)
        if method == "svd":
            return ResolvedPlan(method, name, (), (), 0)
        rows = guarded_rows(self.rows, name)
        restarts = choose_restarts(rows, name) if method == "gram" else ()
        flops = gram_flops(rows, m, n, restarts) if method == "gram" else plain_flops(rows, m, n)
        return ResolvedPlan(method, name, rows, restarts, flops)


@dataclasses.dataclass(frozen=True)
class ResolvedPlan:
    """What one shape's computation does.

    Attributes:
        method: "standard", "gram" or "svd".
        dtype: What the products compute in, as the name of a real dtype.
        rows: The coefficients, after the guard against divergence in that dtype.
        restarts: The numbers of steps after which the Gram form restarts.
        flops: Floating-point operations a matrix.
    """

    method: str
    dtype: str
    rows: Rows
    restarts: tuple[int, ...]
    flops: int

    def dtypes(self, dtype: Any) -> tuple[jnp.dtype, jnp.dtype]:
        """Dtypes to normalise in (at least) and to multiply in, for input of `dtype`."""
        double = self.dtype == "float64"
        if jnp.issubdtype(dtype, jnp.complexfloating):
            wide = jnp.dtype("complex128" if double else "complex64")
            return wide, wide
        return jnp.dtype("float64" if double else "float32"), jnp.dtype(self.dtype)


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name}={value!r} is not known. Pass one of {options}.")
    return value


def plan_polar(
    ns_coeffs: Any = "keller_jordan",
    ns_steps: Any = None,
    ns_method: str = "auto",
    ns_dtype: Any = None,
    preconditioning: str | None = None,
    relative_eps: bool = True,
    ns_implementation: str | None = "xla",
) -> PolarPlan:
    """Validates the arguments of `orthogonalize` once, and remembers what they mean.

    Args:
        ns_coeffs: A name, a triple `(a, b, c)`, or rows of shape `(T, 3)`.
        ns_steps: Number of steps; None takes all rows of a set and five of a triple.
        ns_method: "auto", "standard", "gram" or "svd".
        ns_dtype: What the products compute in; None is the rule of `orthogonalize`.
        preconditioning: The first rescaling; None is the one that the set was made for.
        relative_eps: Whether `eps` bounds the norm in units of a matrix's largest entry, which
            keeps the result independent of scale, or is added to it as it is, as in Optax.
        ns_implementation: "xla" or None, see `orthogonalize`.

    Returns:
        A frozen, hashable plan for `apply_polar`.

    Raises:
        TypeError: If coefficients or steps have the wrong type or are traced.
        ValueError: If a name, a shape or a combination is wrong.

    Example:
        >>> plan_polar("turbo").preconditioning
        'aol'
    """
    rows, source = resolve_coefficients(ns_coeffs, ns_steps)
    method = _choice("ns_method", ns_method, NS_METHODS)
    dtype = None
    if ns_dtype is not None:
        try:
            dtype = jnp.dtype(ns_dtype).name
        except TypeError:
            dtype = ns_dtype
        dtype = _choice("ns_dtype", dtype, NS_DTYPES)
    if ns_implementation not in (None, "xla"):
        raise ValueError(
            f"ns_implementation={ns_implementation!r} is not known. Pass 'xla', or None for a "
            "Pallas kernel wherever one is expected to save time."
        )
    if preconditioning is None:
        preconditioning = source.preconditioning
    _choice("preconditioning", preconditioning, PRECONDITIONINGS)
    if source.preconditioning_required and preconditioning != source.preconditioning:
        raise ValueError(
            f"ns_coeffs={ns_coeffs!r} is made for preconditioning={source.preconditioning!r}, got "
            f"{preconditioning!r}. Pass preconditioning=None, or another set. To combine the rows "
            f"otherwise, pass them as numbers: COEFFICIENT_SETS[{ns_coeffs!r}].rows."
        )
    bad = changes_direction(rows)
    if bad is not None and method != "svd":
        raise ValueError(
            f"ns_coeffs={ns_coeffs!r} turn the singular value {bad:.3g} negative (or past every "
            "bound): the update would point the wrong way. Coefficients must keep (0, 1] positive, "
            "as (2, -1.5, 0.5) and every named set do."
        )
    return PolarPlan(rows, method, dtype, preconditioning, relative_eps, ns_implementation)


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
    plan: PolarPlan, x: Inexact[Array, "*batch m n"], eps: jax.typing.ArrayLike = 1e-7
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
    x, restore = _replicate_matrix_axes(x)
    resolved = plan.resolve(x.shape, x.dtype)
    wide, work = resolved.dtypes(x.dtype)
    y = x.astype(jnp.promote_types(wide, x.dtype))
    if resolved.method == "svd":
        return restore(svd_polar(divide_by_largest_entry(y).astype(wide)).astype(x.dtype))
    tall = x.shape[-2] > x.shape[-1]
    y = jnp.swapaxes(y, -1, -2) if tall else y
    y = normalize(y, plan.preconditioning, eps, plan.relative_eps).astype(wide)
    shares = whole_on(plan.implementation)
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
    ns_coeffs: Any = "keller_jordan",
    ns_steps: Any = None,
    ns_method: str = "auto",
    ns_dtype: Any = None,
    preconditioning: str | None = None,
    eps: jax.typing.ArrayLike = 1e-7,
    ns_implementation: str | None = "xla",
) -> Inexact[Array, "*batch m n"]:
    r"""Brings the singular values of each matrix near one: an approximate polar factor.

    For `X = U S V^H` returns `U f(S) V^H`, where `f` composes the odd quintics
    `a x + b x^3 + c x^5` of the coefficient rows on singular values divided by a bound on the
    largest. The result does not depend on the scale of `x`, and the zero matrix gives zero.

    Args:
        x: `(..., m, n)`, real or complex; leading axes are batch.
        ns_coeffs: A name of `COEFFICIENT_SETS` or `ALIASES`, a triple `(a, b, c)`, or rows of shape
            `(T, 3)` such as `polar_express_coefficients()` returns.
        ns_steps: Number of steps. None takes all rows of a set and five of a triple; fewer than the
            rows take the first ones; more repeat the last one where the set's source does.
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
        ns_implementation: Who computes the symmetric products. "xla", or None, which takes a Pallas
            kernel that computes one triangle of them, on a Hopper GPU or a TPU, where counts of its
            tiles say that it saves time. The kernels are held against float64 in JAX's interpreter
            and accepted by the real compilers; they have not been timed on their machines, so they
            are not the default.

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
    )
    return apply_polar(plan, jnp.asarray(x), eps)
