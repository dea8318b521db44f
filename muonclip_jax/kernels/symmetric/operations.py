"""The operations `alpha x x^H + beta addend` and `alpha x y + beta addend`, Hermitian results.

Newton-Schulz is made of them: `x x^H` of the iterate, and then polynomials of that one matrix,
`b R + c R R`, `Q Z + a Q`. Polynomials of one Hermitian matrix commute, so every product of two is
Hermitian as well, and half of it tells the rest. The kernels compute one triangle and write both;
scaling and addend are applied before anything leaves the chip.

`alpha` and `beta` reach a kernel as data: one compiled kernel serves all steps of an iteration.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Inexact

from muonclip_jax._typing import ScalarLike
from muonclip_jax.kernels.symmetric import reference
from muonclip_jax.kernels.symmetric.dispatch import KERNELS, MATMUL_ADD, choose
from muonclip_jax.kernels.symmetric.problem import problem_of


def gram(
    x: Inexact[Array, "*batch m n"],
    addend: Inexact[Array, "*batch m m"] | None = None,
    *,
    alpha: ScalarLike = 1.0,
    beta: ScalarLike = 0.0,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
    platform: str | None = None,
) -> Inexact[Array, "*batch m m"]:
    """Computes `alpha x x^H + beta addend`.

    Args:
        x: `(..., m, n)`; products accumulate in float32, or wider where `x` is.
        addend: Hermitian `(..., m, m)`, or None for no addend. Kernels read its upper triangle.
        alpha: Real factor of the product, a number or a scalar array.
        beta: Real factor of the addend.
        out_dtype: The result's dtype, that of `x` by default.
        implementation: "xla", "pallas", a kernel's name, or None, which chooses and never fails.
        platform: What it will run on; None is JAX's default.

    Returns:
        The Hermitian matrices `(..., m, m)`. A kernel's are so to the bit.

    Raises:
        ValueError: If shapes do not fit, or there is no implementation of that name.
        NotImplementedError: If the named implementation cannot compute this.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0]])
        >>> gram(x, jnp.eye(2), alpha=2.0, beta=-1.0).tolist()
        [[9.0, 12.0], [12.0, 17.0]]
    """
    return _symmetric(x, None, addend, alpha, beta, out_dtype, implementation, platform)


def symmetric_product(
    x: Inexact[Array, "*batch m m"],
    y: Inexact[Array, "*batch m m"],
    addend: Inexact[Array, "*batch m m"] | None = None,
    *,
    alpha: ScalarLike = 1.0,
    beta: ScalarLike = 0.0,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
    platform: str | None = None,
) -> Inexact[Array, "*batch m m"]:
    """Computes `alpha x y + beta addend` of Hermitian matrices that commute.

    Args:
        x: Hermitian `(..., m, m)`.
        y: Hermitian `(..., m, m)` of the same dtype, with `x y = y x`. Neither is checked. Kernels
            compute the upper triangle of `x y^T` and mirror it.
        addend: Hermitian `(..., m, m)`, or None for no addend. Kernels read its upper triangle.
        alpha: Real factor of the product, a number or a scalar array.
        beta: Real factor of the addend.
        out_dtype: The result's dtype, that of `x` by default.
        implementation: "xla", "pallas", a kernel's name, or None, which chooses and never fails.
        platform: What it will run on; None is JAX's default.

    Returns:
        The Hermitian matrices `(..., m, m)`. A kernel's are so to the bit.

    Raises:
        ValueError: If shapes or dtypes do not fit, or there is no implementation of that name.
        NotImplementedError: If the named implementation cannot compute this.

    Example:
        >>> import jax.numpy as jnp
        >>> r = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> symmetric_product(r, r, r, alpha=0.5, beta=-1.0).tolist()
        [[0.5, 1.0], [1.0, 0.5]]
    """
    if y.dtype != x.dtype:
        raise ValueError(
            f"The factors have dtypes {x.dtype} and {y.dtype}, expected one. Cast one of them."
        )
    return _symmetric(x, y, addend, alpha, beta, out_dtype, implementation, platform)


def matmul_add(
    x: Inexact[Array, "*batch m k"],
    y: Inexact[Array, "*batch k n"],
    addend: Inexact[Array, "*batch m n"] | None = None,
    *,
    alpha: ScalarLike = 1.0,
    beta: ScalarLike = 0.0,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Inexact[Array, "*batch m n"]:
    """Computes `alpha x y + beta addend` with no symmetry.

    XLA adds in a pass of its own over a product in float32; a kernel adds before it writes.

    Args:
        x: `(..., m, k)`.
        y: `(..., k, n)`.
        addend: `(..., m, n)`, or None for no addend.
        alpha: Real factor of the product, a number or a scalar array.
        beta: Real factor of the addend.
        out_dtype: The result's dtype, that of `x` by default.
        implementation: "xla", "mosaic_gpu", "pallas", or None, which is "xla".

    Returns:
        The matrices `(..., m, n)`.

    Raises:
        ValueError: If there is no implementation of that name.
        NotImplementedError: If the named implementation cannot compute this.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0]])
        >>> matmul_add(jnp.array([[3.0]]), x, x, beta=0.5).tolist()
        [[3.5, 7.0]]
    """
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype).name
    columns = y.shape[-1]
    chosen = choose(problem_of(x, addend, out, columns), implementation)
    with jax.named_scope("matmul_add"):
        if chosen == "xla":
            return reference.matmul_add(x, y, addend, alpha, beta, out)
        flat = [_stacked(each) for each in (x, y, addend)]
        result = _product("matmul_add", chosen, out, *flat, _factors(alpha, beta))
        return result.reshape(*x.shape[:-1], columns)


def _stacked(x: jax.Array | None) -> Any:
    """Makes all leading axes one."""
    return None if x is None else x.reshape(-1, *x.shape[-2:])


def _factors(alpha: ScalarLike, beta: ScalarLike) -> jax.Array:
    return jnp.stack([jnp.asarray(each, jnp.float32) for each in (alpha, beta)])


def _symmetric(
    x: jax.Array,
    y: jax.Array | None,
    addend: jax.Array | None,
    alpha: ScalarLike,
    beta: ScalarLike,
    out_dtype: jax.typing.DTypeLike | None,
    implementation: str | None,
    platform: str | None,
) -> jax.Array:
    *stack, rows, _ = x.shape
    name = "gram" if y is None else "symmetric_product"
    square = (*stack, rows, rows)
    for what, array in (("y", y), ("addend", addend)):
        if array is not None and array.shape != square:
            raise ValueError(
                f"{name} was given x of shape {x.shape} and {what} of shape {array.shape}, "
                f"expected {square}."
            )
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype).name
    chosen = choose(problem_of(x, addend, out), implementation, platform)
    with jax.named_scope(name):
        if chosen == "xla":
            product = functools.partial(
                reference.hermitian, adjoint_of_y=x if y is None else y, platform=platform
            )
            other = reference.adjoint(x) if y is None else y
            return reference.matmul_add(x, other, addend, alpha, beta, out, product)
        flat = [_stacked(each) for each in (x, x if y is None else y, addend)]
        result = _product("symmetric", chosen, out, *flat, _factors(alpha, beta))
        return result.reshape(square)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _product(
    operation: str,
    name: str,
    out_dtype: str,
    x: jax.Array,
    y: jax.Array,
    addend: jax.Array | None,
    factors: jax.Array,
) -> jax.Array:
    """Runs a kernel; its derivative is the reference's."""
    return _mapped(operation, name, out_dtype)(x, y, addend, factors)


def _reference(
    operation: str,
    out_dtype: str,
    x: jax.Array,
    y: jax.Array,
    addend: jax.Array | None,
    factors: jax.Array,
) -> jax.Array:
    if operation == "symmetric":
        y = reference.adjoint(y)
    return reference.matmul_add(x, y, addend, factors[0], factors[1], out_dtype)


@_product.defjvp
def _product_jvp(
    operation: str, name: str, out_dtype: str, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    value = _product(operation, name, out_dtype, *primals)
    meaning = functools.partial(_reference, operation, out_dtype)
    return value, jax.jvp(meaning, primals, tangents)[1]


@functools.lru_cache(maxsize=64)
def _mapped(operation: str, name: str, out_dtype: str) -> Any:
    """Returns a kernel whose `vmap` is a longer stack."""

    @custom_vmap
    def run(x: Any, y: Any, addend: Any, factors: Any) -> jax.Array:
        kernels = KERNELS if operation == "symmetric" else MATMUL_ADD
        return kernels[name].run(x, y, addend, factors, out_dtype)

    @run.def_vmap
    def _run_mapped(size: int, mapped: Any, *operands: Any) -> tuple[jax.Array, bool]:
        *matrices, factors = operands
        if mapped[-1]:
            axes = [0 if each else None for each in jax.tree.leaves(mapped)]
            leaves, structure = jax.tree.flatten(operands)

            def one(*each: jax.Array) -> jax.Array:
                return _reference(operation, out_dtype, *jax.tree.unflatten(structure, each))

            return jax.vmap(one, axes)(*leaves), True
        stacks = []
        for array, is_mapped in zip(matrices, mapped[:-1], strict=True):
            if array is not None:
                if not is_mapped:
                    array = jnp.broadcast_to(array, (size, *array.shape))
                array = array.reshape(-1, *array.shape[2:])
            stacks.append(array)
        result = run(*stacks, factors)
        return result.reshape(size, -1, *result.shape[1:]), True

    return run
