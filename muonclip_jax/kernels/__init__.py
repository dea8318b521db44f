"""Pallas kernels, each an alternative implementation of an operation that XLA computes too.

A kernel is imported only when it is selected. Pallas is experimental: if the installed JAX lacks a
feature that a kernel needs, selecting it is an error, and everything else works.
"""

import functools
import importlib
import math
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: For each operation the names of its kernels, and what they run on.
SYMMETRIC = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}
MAX_LOGITS = {"mosaic_tpu": "tpu"}

# Rows of tiles in a band of `triangle`.
_BAND = 8


def load_kernel(operation: str, name: str, platform: str) -> ModuleType:
    """Imports the kernel `name` of an operation ("symmetric" or "max_logits"), or raises."""
    wanted = {"symmetric": SYMMETRIC, "max_logits": MAX_LOGITS}[operation][name]
    if platform != wanted:
        raise NotImplementedError(
            f"The kernel {name!r} runs on a {wanted.upper()}, and this computation is for "
            f"{platform!r}. Pass 'xla'."
        )
    try:
        return importlib.import_module(f"muonclip_jax.kernels.{operation}_{wanted}")
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(
            f"The kernel {name!r} needs a feature of Pallas that JAX {jax.__version__} does not "
            f"have: {error}. Pass 'xla'."
        ) from error


def multiply_symmetric(
    name: str,
    x: jax.Array,
    y: jax.Array,
    addend: jax.Array | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> jax.Array:
    """Computes a symmetric `alpha x y^T + beta addend` by a kernel of `SYMMETRIC`.

    A kernel's module has `DTYPES`, its supported dtypes, and
    `symmetric_product(x, y, addend, factors)` for `x` and `y` of shape `(B, m, n)` with symmetric
    `x y^T`, a symmetric addend `(B, m, m)` or None, whose upper triangle is read, and
    `[alpha, beta]` in float32. It computes one triangle of `(B, m, m)` and writes both, so the
    result is exactly symmetric, in the dtype of `x`.
    """
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

    def stacked(array: jax.Array) -> jax.Array:
        return array.reshape(math.prod(x.shape[:-2]), *array.shape[-2:])

    # The factors are data, so that one compiled kernel serves all steps of an iteration.
    factors = jnp.asarray([alpha, beta], jnp.float32)
    addend = None if addend is None else stacked(addend)
    result = _differentiable(name, stacked(x), stacked(y), addend, factors)
    return result.reshape(*x.shape[:-1], x.shape[-2])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(
    name: str, x: jax.Array, y: jax.Array, addend: jax.Array | None, factors: jax.Array
) -> jax.Array:
    """Runs a kernel, with the derivative of XLA's product."""
    return load_kernel("symmetric", name, SYMMETRIC[name]).symmetric_product(x, y, addend, factors)


@_differentiable.defjvp
def _differentiable_jvp(
    name: str, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    def by_xla(
        x: jax.Array, y: jax.Array, addend: jax.Array | None, factors: jax.Array
    ) -> jax.Array:
        precision = lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else lax.Precision.DEFAULT
        wide = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        result = factors[0] * wide(x, jnp.swapaxes(y, -1, -2), precision=precision)
        if addend is not None:
            result = result + factors[1] * addend
        return result.astype(x.dtype)

    return _differentiable(name, *primals), jax.jvp(by_xla, primals, tangents)[1]


@functools.lru_cache(maxsize=64)
def triangle(tiles: int) -> np.ndarray:
    """Lists the square tiles on or above the diagonal of `tiles x tiles`: rows, then columns.

    They are ordered in bands of a few rows, so that concurrent programs read the same operands.
    """
    found = sorted(
        (row // _BAND, column, row) for column in range(tiles) for row in range(column + 1)
    )
    table = np.asarray([(row, column) for _, column, row in found], np.int32).T.copy()
    table.setflags(write=False)
    return table
