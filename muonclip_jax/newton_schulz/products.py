"""The matrix products of Newton-Schulz, most of which have a Hermitian result.

`x x^H` of the iterate is Hermitian, and so is every product of polynomials of that matrix, since
they commute: `b R + c R R`, `Q Z + a Q`. XLA computes them in full, unless a CPU saves a quarter;
a kernel that the caller names (`kernels/`) computes one triangle and writes both.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from muonclip_jax._devices import plan_platform
from muonclip_jax.kernels import SYMMETRIC, load_kernel

#: The names that `ns_implementation` allows.
IMPLEMENTATIONS = ("xla", *SYMMETRIC)

#: On a CPU a Hermitian product of at least this many rows is computed as an upper triangle of 2 x 2
#: blocks, and the fourth block is a transpose: a quarter of the work less, 10 to 20 % of the time
#: of a whole polar factor at 768 rows. More blocks save little more and compile twice as long;
#: small matrices lose.
SPLIT_FROM = 512


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns what products of `dtype` accumulate in: float32 or wider."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def adjoint(x: jax.Array) -> jax.Array:
    """Returns the conjugate transpose over the last two axes."""
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `x y`, accumulated and returned in `accumulator`."""
    return jnp.matmul(
        x,
        y,
        # TPUs and GPUs would otherwise round float32 operands to bfloat16 or TF32.
        precision=lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else lax.Precision.DEFAULT,
        preferred_element_type=accumulator(x.dtype),
    )


def matmul_add(
    x: jax.Array, y: jax.Array, addend: jax.Array | None, alpha: float, beta: float
) -> jax.Array:
    """Computes `alpha x y + beta addend`, rounded once, at the end."""
    return _add(matmul(x, y), addend, alpha, beta).astype(x.dtype)


def gram(
    x: Inexact[Array, "*batch m n"],
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str = "xla",
    platform: str | None = None,
) -> Inexact[Array, "*batch m m"]:
    """Computes `x x^H`.

    Args:
        x: `(..., m, n)`; products accumulate in float32, or wider where `x` is.
        out_dtype: The result's dtype, that of `x` by default. XLA computes any other.
        implementation: A name of `IMPLEMENTATIONS`.
        platform: What it will run on; None is what `plan_platform` finds.

    Returns:
        The Hermitian matrices `(..., m, m)`. A kernel's are so to the bit.

    Raises:
        NotImplementedError: If the named kernel does not take the dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> gram(jnp.array([[1.0, 2.0], [0.0, 3.0]])).tolist()
        [[5.0, 6.0], [6.0, 9.0]]
    """
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    with jax.named_scope("gram"):
        if implementation == "xla" or out != x.dtype:
            return _hermitian(x, adjoint(x), x, platform).astype(out)
        return _by_kernel(implementation, x, x, None, 1.0, 0.0)


def symmetric_product(
    x: Inexact[Array, "*batch m m"],
    y: Inexact[Array, "*batch m m"],
    addend: Inexact[Array, "*batch m m"] | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    implementation: str = "xla",
    platform: str | None = None,
) -> Inexact[Array, "*batch m m"]:
    """Computes `alpha x y + beta addend` of Hermitian matrices that commute.

    Args:
        x: Hermitian `(..., m, m)`.
        y: Hermitian `(..., m, m)` of the same dtype, with `x y = y x`. Neither is checked. Kernels
            compute the upper triangle of `x y^T` and mirror it.
        addend: Hermitian `(..., m, m)`, or None for no addend. Kernels read its upper triangle.
        alpha: Real factor of the product.
        beta: Real factor of the addend.
        implementation: A name of `IMPLEMENTATIONS`.
        platform: What it will run on; None is what `plan_platform` finds.

    Returns:
        The Hermitian matrices `(..., m, m)`. A kernel's are so to the bit.

    Raises:
        NotImplementedError: If the named kernel does not take the dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> r = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> symmetric_product(r, r, r, alpha=0.5, beta=-1.0).tolist()
        [[0.5, 1.0], [1.0, 0.5]]
    """
    with jax.named_scope("symmetric_product"):
        if implementation == "xla":
            return _add(_hermitian(x, y, y, platform), addend, alpha, beta).astype(x.dtype)
        return _by_kernel(implementation, x, y, addend, alpha, beta)


def _hermitian(
    x: jax.Array, y: jax.Array, adjoint_of_y: jax.Array, platform: str | None
) -> jax.Array:
    """Computes `x y`, known to be Hermitian, in the way that suits a platform."""
    rows = x.shape[-2]
    if rows < SPLIT_FROM or x.dtype.itemsize < 4 or plan_platform(platform) != "cpu":
        return matmul(x, y)
    half = rows // 2
    upper = matmul(x[..., :half, :], y)
    # Cut between rows, which lie together: a cut between columns is a slow copy.
    corner = matmul(x[..., half:, :], adjoint(adjoint_of_y[..., half:, :]))
    # Written into one array: XLA's CPU compiler would compile every concatenation by itself.
    square = jnp.pad(upper, [(0, 0)] * (x.ndim - 2) + [(0, rows - half), (0, 0)])
    square = square.at[..., half:, :half].set(adjoint(upper[..., half:]))
    return square.at[..., half:, half:].set(corner)


def _add(product: jax.Array, addend: jax.Array | None, alpha: float, beta: float) -> jax.Array:
    result = product if alpha == 1 else alpha * product
    if addend is None:
        return result
    addend = addend.astype(result.dtype)
    return result + (addend if beta == 1 else beta * addend)


def _by_kernel(
    name: str, x: jax.Array, y: jax.Array, addend: jax.Array | None, alpha: float, beta: float
) -> jax.Array:
    """Computes `alpha x y^T + beta addend` by a kernel."""
    kernel = load_kernel("symmetric", name, SYMMETRIC[name])
    if x.dtype.name not in kernel.DTYPES:
        raise NotImplementedError(
            f"The kernel {name!r} multiplies {' and '.join(kernel.DTYPES)}, and these products are "
            f"in {x.dtype}. Pass ns_implementation='xla', or another ns_dtype."
        )
    if any(jax.typeof(x).sharding.spec):
        raise NotImplementedError(
            f"The kernel {name!r} multiplies the matrices of one device, and Explicit mesh axes "
            f"shard these: {jax.typeof(x)}. Call it inside jax.shard_map, or pass 'xla'."
        )
    if 0 in x.shape:
        return jnp.zeros((*x.shape[:-1], x.shape[-2]), x.dtype)

    def stacked(array: jax.Array | None) -> Any:
        flat = (math.prod(x.shape[:-2]), *x.shape[-2:-1])
        return None if array is None else array.reshape(*flat, array.shape[-1])

    # As data, so that one compiled kernel serves all steps of an iteration.
    factors = jnp.asarray([alpha, beta], jnp.float32)
    result = _differentiable(name, stacked(x), stacked(y), stacked(addend), factors)
    return result.reshape(*x.shape[:-1], x.shape[-2])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(
    name: str, x: jax.Array, y: jax.Array, addend: jax.Array | None, factors: jax.Array
) -> jax.Array:
    """Runs a kernel; its derivative is that of XLA's product."""
    kernel = load_kernel("symmetric", name, SYMMETRIC[name])
    return kernel.symmetric_product(x, y, addend, factors)


@_differentiable.defjvp
def _differentiable_jvp(name: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    def meaning(x: jax.Array, y: jax.Array, addend: jax.Array | None, factors: jax.Array) -> Any:
        result = factors[0] * matmul(x, jnp.swapaxes(y, -1, -2))
        if addend is not None:
            result = result + factors[1] * addend.astype(result.dtype)
        return result.astype(x.dtype)

    return _differentiable(name, *primals), jax.jvp(meaning, primals, tangents)[1]
