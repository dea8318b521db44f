"""The symmetric product on GPUs before Hopper, through Triton.

One program a tile of the upper triangle. A program reads the rows that make its tile, keeps the
tile in registers, and stores it twice: as it is, and transposed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from muonclip_jax.kernels.symmetric.problem import NARROW, Problem, dtype_refusal, result_type
from muonclip_jax.kernels.symmetric.triangle import tiles_along, triangle

_SIZE, _DEPTH, _WARPS, _STAGES = 128, 32, 8, 4


def refusal(problem: Problem) -> str | None:
    """Returns why this implementation does not take a problem, or None where it does."""
    largest = problem.batch * problem.rows * max(problem.rows, problem.depth)
    if largest > np.iinfo(np.int32).max:
        return f"it addresses entries by 32-bit numbers, and an array has {largest}"
    # A float32 dot in Triton is a TF32 one, or slower than XLA's.
    return dtype_refusal(problem, NARROW)


def _kernel(
    table_ref, factors_ref, x_ref, y_ref, *refs, rows: int, depth: int, size: int, block: int
):
    out_ref, addend_ref = refs[-1], refs[0] if len(refs) == 2 else None
    matrix, tile = pl.program_id(1), pl.program_id(0)
    row, column = table_ref[0, tile], table_ref[1, tile]
    ragged = rows % size != 0

    def positions(index: jax.Array) -> jax.Array:
        return index * size + jnp.arange(size)

    def load(ref, index: jax.Array, step: jax.Array) -> jax.Array:
        inner = step * block + jnp.arange(block)
        mask = None
        if ragged or depth % block:
            mask = (positions(index) < rows)[:, None] & (inner < depth)[None, :]
        place = ref.at[matrix, pl.ds(index * size, size), pl.ds(step * block, block)]
        return plt.load(place, mask=mask, other=None if mask is None else 0.0)

    def multiply(step: jax.Array, total: jax.Array) -> jax.Array:
        x, y = load(x_ref, row, step), load(y_ref, column, step)
        return total + plt.dot(x, y.T)

    result = lax.fori_loop(
        0, tiles_along(depth, block), multiply, jnp.zeros((size, size), jnp.float32)
    )
    result *= factors_ref[0]
    down, across = positions(row)[:, None], positions(column)[None, :]
    inside = (down < rows) & (across < rows) if ragged else None
    place = (matrix, pl.ds(row * size, size), pl.ds(column * size, size))
    if addend_ref is not None:
        addend = plt.load(addend_ref.at[place], mask=inside)
        result += factors_ref[1] * addend.astype(jnp.float32)
    # On the diagonal both triangles are in one tile, and the upper one decides.
    result = jnp.where((row != column) | (down <= across), result, result.T)
    result = result.astype(out_ref.dtype)
    plt.store(out_ref.at[place], result, mask=inside)
    mirror = (matrix, pl.ds(column * size, size), pl.ds(row * size, size))
    plt.store(out_ref.at[mirror], result.T, mask=None if inside is None else inside.T)


def run(
    x: Float[Array, "B m n"],
    y: Float[Array, "B m n"],
    addend: Float[Array, "B m m"] | None,
    factors: Float[Array, "2"],
    out_dtype: str,
    *,
    interpret: bool = False,
    size: int = _SIZE,
) -> Float[Array, "B m m"]:
    """Computes one triangle of `alpha x y^T + beta addend` and writes both.

    Args:
        x: `(B, m, n)`, bfloat16 or float16.
        y: `(B, m, n)` with `x y^T` symmetric.
        addend: `(B, m, m)`, symmetric, or None.
        factors: `alpha` and `beta`.
        out_dtype: The result's dtype.
        interpret: Run on any platform, slowly.
        size: Side of the tiles, a power of two.

    Returns:
        `(B, m, m)`, symmetric to the bit.
    """
    batch, rows, depth = x.shape
    tiles = tiles_along(rows, size)
    table = jnp.asarray(triangle(tiles, tiles))
    addends = [] if addend is None else [addend]
    kernel = functools.partial(_kernel, rows=rows, depth=depth, size=size, block=_DEPTH)
    return pl.pallas_call(
        kernel,
        out_shape=result_type(x, rows, out_dtype),
        grid=(table.shape[1], batch),
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="symmetric_product",
    )(table, factors, x, y, *addends)
