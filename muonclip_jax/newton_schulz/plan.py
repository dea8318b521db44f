"""The validated arguments of `orthogonalize`, and the choices for one shape and dtype."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh

from muonclip_jax._arguments import check_choice
from muonclip_jax._devices import PLATFORMS, check_lowering, plan_platform
from muonclip_jax.kernels import SYMMETRIC, load_kernel
from muonclip_jax.newton_schulz.coefficients import (
    DEFAULT_DTYPE,
    DEFAULT_METHOD,
    DEFAULT_SET,
    GROWTH,
    Coefficients,
    Rows,
    choose_restarts,
    find_sign_flip,
    guard_rows,
    resolve_coefficients,
)

#: The names that `ns_dtype`, `ns_method`, `preconditioning` and `ns_implementation` allow.
NS_DTYPES = tuple(GROWTH)
NS_METHODS = ("auto", "standard", "gram", "svd")
PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten", "schatten8")
IMPLEMENTATIONS = ("xla", *SYMMETRIC)
_NARROW = ("bfloat16", "float16")

# What a platform computes in when `ns_dtype` is None, for real input of at most 32 bits; the Gram
# form where it is safe in that, else in float32 (docs/performance.md has the errors of each). GPUs
# multiply both 16-bit types at one rate, and normalised matrices fit float16's range, so its three
# more bits are free there: below its smallest normal number, 6.1e-5, rounding errs by at most 2^-25
# an entry, over a whole matrix of norm one by sqrt(m n) 2^-25, less than 2^-11 up to m n = 2^28.
_DEFAULT_DTYPE = {"gpu": "float16", "tpu": "bfloat16"}
# What a product in float32 costs in those of 16 bits: passes of a TPU's bfloat16 unit at
# Precision.HIGHEST; the peak rates of an H100 (989 and 67 TFLOP/s).
_FLOAT32_COST = {"tpu": 6, "gpu": 15}
# "auto" takes the Gram form in 16 bits from this ratio of sides on. Nearer to a square it saves at
# most 10 % of the FLOPs, and of 6,000 Gaussian matrices of 16 x 24 the largest singular value is
# 1.4, where the polynomial ends at 1.2; at 16 x 32 none passes 1.203.
_LEAST_RATIO = 2


@dataclasses.dataclass(frozen=True)
class ResolvedPlan:
    """The choices for one shape and dtype."""

    method: str  # "standard", "gram" or "svd"
    dtype: str  # of the products, e.g. "float16" or "complex64"
    preconditioning: str
    relative_eps: bool
    symmetric: str  # how symmetric products are computed (`iteration`)
    rows: Rows  # guarded against divergence in that dtype
    restarts: tuple[int, ...]  # after which steps the Gram form restarts
    extra_squares: int  # of the Gram matrix beside those of the steps, for a norm
    flops: float  # a matrix; infinite where the Gram form is unsafe


@dataclasses.dataclass(frozen=True)
class PolarPlan:
    """The arguments of `plan_polar`, validated; `dtype` and `platform` may still be open (None)."""

    rows: Rows
    method: str
    dtype: str | None
    preconditioning: str
    relative_eps: bool = True
    implementation: str = "xla"
    platform: str | None = None

    def choose_dtype(self, x_dtype: jax.typing.DTypeLike, platform: str = "cpu") -> str:
        """Chooses what to compute in, as the name of a real dtype.

        Raises:
            ValueError: If input of this dtype cannot be computed in the plan's.
        """
        x_dtype = jnp.dtype(x_dtype)
        is_complex = jnp.issubdtype(x_dtype, jnp.complexfloating)
        if self.dtype is None:
            if x_dtype.name in ("float64", "complex128"):
                return "float64"
            chosen = _DEFAULT_DTYPE.get(platform, "float32")
            is_safe = self.method != "gram" or choose_restarts(self.rows, chosen) is not None
            return chosen if is_safe and self.method != "svd" and not is_complex else "float32"
        if self.dtype in _NARROW and (self.method == "svd" or is_complex):
            what = 'ns_method="svd"' if self.method == "svd" else f"input of dtype {x_dtype}"
            raise ValueError(
                f"ns_dtype={self.dtype!r} is not possible for {what}: it computes in float32 or "
                "float64. Pass ns_dtype=None or 'float32'."
            )
        if self.dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != jnp.float64:
            raise ValueError(
                "ns_dtype='float64' needs 64-bit types, which are disabled in JAX. Set "
                "jax.config.update('jax_enable_x64', True), or pass ns_dtype='float32'."
            )
        return self.dtype

    def resolve(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> ResolvedPlan:
        """Decides method, dtype and restarts for matrices `(..., m, n)` of a dtype.

        "auto" uses the cheaper form, but the Gram form only in a dtype in which it is stable.
        """
        platform = plan_platform(self.platform)
        if self.implementation != "xla":
            load_kernel("symmetric", self.implementation, platform)
        m, n = min(shape[-2:]), max(shape[-2:])
        if self.method == "auto":
            standard, gram = (
                dataclasses.replace(self, method=method).resolve(shape, dtype)
                for method in ("standard", "gram")
            )
            factor = _FLOAT32_COST[platform] if gram.dtype != standard.dtype else 1
            near_square = n < _LEAST_RATIO * m and gram.dtype in _NARROW
            return gram if factor * gram.flops < standard.flops and not near_square else standard
        is_gram, real = self.method == "gram", self.choose_dtype(dtype, platform)
        computed = real
        if jnp.issubdtype(dtype, jnp.complexfloating):
            computed = "complex128" if real == "float64" else "complex64"
        on_cpu = self.implementation == "xla" and platform == "cpu"
        rows = () if self.method == "svd" else guard_rows(self.rows, real)
        restarts = choose_restarts(self.rows, real) if is_gram else ()
        passes = len(restarts or ()) + 1 if is_gram else len(rows)
        # Rounded to 16 bits, a product and its square, both scaled, are not one the square of the
        # other, and the steps are steep: there the norm needs a square of its own.
        extra = int(self.preconditioning == "schatten8" and real in _NARROW and len(rows) > 0)
        # A step of the Gram form computes Q, W and R; a segment's first has no product for Q, its
        # last has none for W and R.
        cubes = extra + sum(1 for _, _, c in rows if c) + 3 * (len(rows) - passes)
        return ResolvedPlan(
            method=self.method,
            dtype=computed,
            preconditioning=self.preconditioning,
            relative_eps=self.relative_eps,
            symmetric="triangle" if on_cpu else self.implementation,
            rows=rows,
            restarts=restarts or (),
            extra_squares=extra,
            flops=math.inf if restarts is None else 4 * m**2 * n * passes + 2 * m**3 * cubes,
        )


def plan_polar(
    ns_coeffs: Coefficients = DEFAULT_SET,
    ns_steps: int | None = None,
    ns_method: str = DEFAULT_METHOD,
    ns_dtype: jax.typing.DTypeLike | None = DEFAULT_DTYPE,
    preconditioning: str | None = None,
    relative_eps: bool = True,
    ns_implementation: str = "xla",
    platform: str | None = None,
) -> PolarPlan:
    """Validates the arguments of `orthogonalize`, which describes them, as a hashable plan.

    Without `relative_eps`, `eps` is added to the norm without scaling, as in Optax.
    """
    rows, source = resolve_coefficients(ns_coeffs, ns_steps)
    try:
        dtype = None if ns_dtype is None else jnp.dtype(ns_dtype).name
    except TypeError:
        dtype = str(ns_dtype)
    preconditioning = source.preconditioning if preconditioning is None else preconditioning
    check_choice("ns_method", ns_method, NS_METHODS)
    check_choice("ns_dtype", dtype or NS_DTYPES[0], NS_DTYPES)
    check_choice("preconditioning", preconditioning, PRECONDITIONINGS)
    check_choice("ns_implementation", ns_implementation, IMPLEMENTATIONS)
    if source.preconditioning == "aol" and preconditioning != "aol":
        raise ValueError(
            f"ns_coeffs={ns_coeffs!r} needs preconditioning='aol', got "
            f"{preconditioning!r}. Pass preconditioning=None, or another set. To use its rows "
            f"with another one, pass them as numbers: COEFFICIENT_SETS[{ns_coeffs!r}].rows."
        )
    bad = find_sign_flip(rows)
    if bad is not None and ns_method != "svd":
        raise ValueError(
            f"ns_coeffs={ns_coeffs!r} make the singular value {bad:.3g} negative (or past every "
            "bound): the update would point the wrong way. Coefficients must keep (0, 1] positive, "
            "like (2, -1.5, 0.5) and every named set."
        )
    if ns_method == "gram" and choose_restarts(rows, dtype or "float32") is None:
        stable = [repr(name) for name in NS_DTYPES if choose_restarts(rows, name) is not None]
        instead = f"ns_dtype={' or '.join(stable)}, " if stable else ""
        raise ValueError(
            'ns_method="gram" is unstable with these coefficients in '
            f"{dtype or 'float32'}: it amplifies rounding until singular values leave the range of "
            f"the polynomial. Pass {instead}ns_method='standard', or ns_method='auto', which uses "
            "the Gram form where it is stable."
        )
    check_choice("platform", platform, ("cpu", "gpu", "tpu", "cuda", "rocm", None))
    settings = rows, ns_method, dtype, preconditioning, relative_eps, ns_implementation
    plan = PolarPlan(*settings, platform and PLATFORMS.get(platform, platform))
    if ns_method == "svd":
        plan.choose_dtype("float32")
    return plan


def decide_platform(
    plan: PolarPlan,
    eps: jax.typing.ArrayLike,
    arrays: Sequence[object],
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[PolarPlan, jax.typing.ArrayLike]:
    """Completes a plan with the platform that `plan_platform` finds.

    Unless the caller chose it, a program with the returned `eps` cannot be lowered for another one.
    """
    given = plan.platform is not None or plan.method == "svd"
    platform = plan_platform(plan.platform, mesh, arrays)
    if not given and any(isinstance(array, Tracer) for array in arrays):
        eps = eps + check_lowering(platform)
    return dataclasses.replace(plan, platform=platform), eps
