"""How to orthogonalise: what does not depend on the array, validated once and remembered."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from muonclip_jax._devices import check_lowering, check_platform, plan_platform
from muonclip_jax.kernels import load_kernel
from muonclip_jax.newton_schulz.coefficients import changes_direction, resolve_coefficients
from muonclip_jax.newton_schulz.defaults import DEFAULT_DTYPE, DEFAULT_METHOD, DEFAULT_SET
from muonclip_jax.newton_schulz.generators import Rows
from muonclip_jax.newton_schulz.gram import gram_flops
from muonclip_jax.newton_schulz.newton_schulz import plain_flops
from muonclip_jax.newton_schulz.precision import (
    NS_DTYPES,
    NS_METHODS,
    choose_dtype,
    choose_method,
    guarded_rows,
    is_gram_stable,
)
from muonclip_jax.newton_schulz.preconditioning import PRECONDITIONINGS, squares_apart
from muonclip_jax.newton_schulz.products import IMPLEMENTATIONS
from muonclip_jax.newton_schulz.restarts import choose_restarts


@dataclasses.dataclass(frozen=True)
class PolarPlan:
    """How to orthogonalise: everything that does not depend on the array, validated.

    Attributes:
        rows: Coefficients `(a, b, c)`, one triple a step.
        method: A name of `NS_METHODS`.
        dtype: A name of `NS_DTYPES`, or None for the rule of the platform.
        preconditioning: A name of `PRECONDITIONINGS`.
        relative_eps: Whether `eps` bounds the norm in units of a matrix's largest entry.
        implementation: Who computes the symmetric products: a name of `products.IMPLEMENTATIONS`.
        platform: What it will run on, e.g. "gpu"; None is what `plan_platform` finds.
    """

    rows: Rows
    method: str
    dtype: str | None
    preconditioning: str
    relative_eps: bool = True
    implementation: str = "xla"
    platform: str | None = None

    def check_input(self, dtype: Any) -> None:
        """Refuses input that cannot be computed in the plan's dtype.

        Raises:
            ValueError: As `choose_dtype`.
        """
        method = "standard" if self.method == "auto" else self.method
        choose_dtype(self.rows, dtype, self.dtype, method, "cpu")

    def resolve(
        self, shape: tuple[int, ...], dtype: Any, platform: str | None = None
    ) -> "ResolvedPlan":
        """Decides method, dtype and restarts for one shape.

        Args:
            shape: `(..., m, n)`.
            dtype: The input's dtype.
            platform: E.g. "gpu", in place of the plan's.

        Returns:
            The decisions, with what they cost.

        Raises:
            NotImplementedError: If the plan names a kernel that is not for the platform.
        """
        platform = plan_platform(platform or self.platform)
        if self.implementation != "xla":
            load_kernel("symmetric", self.implementation, platform)
        m, n = shape[-2:]
        method = choose_method(self.rows, self.method, dtype, self.dtype, platform, m, n)
        name = choose_dtype(self.rows, dtype, self.dtype, method, platform)
        if method == "svd":
            return ResolvedPlan(method, name, (), (), 0)
        rows = guarded_rows(self.rows, name, method)
        restarts = choose_restarts(rows, name) if method == "gram" else ()
        flops = gram_flops(rows, m, n, restarts) if method == "gram" else plain_flops(rows, m, n)
        apart = squares_apart(self.preconditioning, name)
        return ResolvedPlan(method, name, rows, restarts, flops + apart * 2 * min(m, n) ** 3, apart)


@dataclasses.dataclass(frozen=True)
class ResolvedPlan:
    """What one shape's computation does.

    Attributes:
        method: "standard", "gram" or "svd".
        dtype: What the products compute in, as the name of a real dtype.
        rows: The coefficients, after the guard against divergence in that dtype.
        restarts: The numbers of steps after which the Gram form restarts.
        flops: Floating-point operations a matrix.
        squares_apart: Squares of the Gram matrix beside those of the steps, for a norm.
    """

    method: str
    dtype: str
    rows: Rows
    restarts: tuple[int, ...]
    flops: int
    squares_apart: int = 0

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
    ns_coeffs: Any = DEFAULT_SET,
    ns_steps: Any = None,
    ns_method: str = DEFAULT_METHOD,
    ns_dtype: Any = DEFAULT_DTYPE,
    preconditioning: str | None = None,
    relative_eps: bool = True,
    ns_implementation: str = "xla",
    platform: str | None = None,
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
        ns_implementation: See `orthogonalize`.
        platform: See `orthogonalize`.

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
    _choice("ns_implementation", ns_implementation, IMPLEMENTATIONS)
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
    if method == "gram":
        _check_gram(rows, dtype)
    if method == "svd" and dtype is not None:
        choose_dtype(rows, "float32", dtype, method, "cpu")
    return PolarPlan(
        rows,
        method,
        dtype,
        preconditioning,
        relative_eps,
        ns_implementation,
        check_platform(platform),
    )


def _check_gram(rows: Rows, dtype: str | None) -> None:
    """Refuses the Gram form where rounding makes it diverge."""
    if is_gram_stable(rows, dtype or "float32"):
        return
    stable = [repr(name) for name in NS_DTYPES if is_gram_stable(rows, name)]
    instead = f"ns_dtype={' or '.join(stable)}, " if stable else ""
    raise ValueError(
        f'ns_method="gram" is unstable with these coefficients in '
        f"{dtype or 'float32'}: it amplifies rounding until singular values leave the range of the "
        f"polynomial. Pass {instead}ns_method='standard', or ns_method='auto', which takes the "
        "Gram form where it is stable."
    )


def decide_platform(
    plan: PolarPlan, eps: jax.typing.ArrayLike, arrays: Sequence[Any], mesh: Any = None
) -> tuple[PolarPlan, jax.typing.ArrayLike]:
    """Completes a plan with the platform, as `plan_platform` decides it.

    Args:
        plan: From `plan_polar`.
        eps: As for `apply_polar`.
        arrays: What is to be orthogonalised.
        mesh: The mesh that it runs on, where there is one.

    Returns:
        The plan, and `eps`. Where the platform is not the caller's choice, a program that uses this
        `eps` cannot be lowered for another one.
    """
    given = plan.platform is not None or plan.method == "svd"
    plan = dataclasses.replace(plan, platform=plan_platform(plan.platform, mesh, arrays))
    if given or not any(isinstance(array, Tracer) for array in arrays):
        return plan, eps
    return plan, eps + check_lowering(str(plan.platform))
