"""The products on Hopper GPUs: what the kernel takes, and its launch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from muonclip_jax.kernels.symmetric.hopper import product_kernel
from muonclip_jax.kernels.symmetric.problem import NARROW, Problem, dtype_refusal, result_type
from muonclip_jax.kernels.symmetric.tilings import (
    BLOCK,
    MULTIPROCESSORS,
    TILINGS,
    Tiling,
    choose_tiling,
)


def refusal(problem: Problem) -> str | None:
    """Returns why this implementation does not take a problem, or None where it does."""
    columns = problem.rows if problem.columns is None else problem.columns
    if problem.rows < 256 or columns < 128 or problem.depth < BLOCK:
        return (
            f"its tiles are up to 256 x 128 and {BLOCK} deep, and the result is {problem.rows} x "
            f"{columns}, summed over {problem.depth}"
        )
    if {problem.out_dtype, problem.addend_dtype or problem.dtype} != {problem.dtype}:
        return (
            "operands, addend and result share one dtype here, and were "
            f"{problem.dtype}, {problem.addend_dtype} and {problem.out_dtype}"
        )
    return dtype_refusal(problem, NARROW)


def _pad(x: jax.Array | None) -> Any:
    """Pads a stack of matrices with zeros to whole blocks."""
    if x is None or not any(size % BLOCK for size in x.shape[1:]):
        return x
    return jnp.pad(x, [(0, 0), *((0, -size % BLOCK) for size in x.shape[1:])])


def _call(
    x: jax.Array,
    y: jax.Array,
    addend: jax.Array | None,
    factors: jax.Array,
    out: jax.ShapeDtypeStruct,
    *,
    tiling: Tiling,
    table: tuple[list[int], list[int]],
    symmetric: bool,
    interpret: object,
) -> jax.Array:
    """Launches the kernel over the tiles of a table."""
    row, column = table
    work = x.shape[0] * len(row)
    programs = min(MULTIPROCESSORS, work)
    kernel = plgpu.kernel(
        functools.partial(
            product_kernel,
            tiling=tiling,
            tiles=len(row),
            work=work,
            programs=programs,
            symmetric=symmetric,
        ),
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="symmetric_product" if symmetric else "matmul_add",
    )
    addends = [] if addend is None else [addend]
    return kernel(jnp.asarray([*row, *column], jnp.int32), factors, x, y, *addends)


def run(
    x: Float[Array, "B m n"],
    y: Float[Array, "B m n"],
    addend: Float[Array, "B m m"] | None,
    factors: Float[Array, "2"],
    out_dtype: str,
    *,
    tiling: Tiling | None = None,
    interpret: object = False,
) -> Float[Array, "B m m"]:
    """Computes one triangle of `alpha x y^T + beta addend` and writes both.

    Args:
        x: `(B, m, n)`, bfloat16 or float16.
        y: `(B, m, n)` with `x y^T` symmetric.
        addend: `(B, m, m)`, symmetric, or None.
        factors: `alpha` and `beta`.
        out_dtype: The result's dtype, that of `x`.
        tiling: One of `TILINGS`, where not the one that `choose_tiling` picks.
        interpret: What `pallas_call` takes, to run on any platform.

    Returns:
        `(B, m, m)`, symmetric to the bit.
    """
    batch, rows, _ = x.shape
    # The copy engine clips at the ends of arrays, but not inside a swizzled row.
    x, y, addend = (_pad(each) for each in (x, y, addend))
    tiling = choose_tiling(batch, rows) if tiling is None else tiling
    out = _call(
        x,
        y,
        addend,
        factors,
        result_type(x, x.shape[1], out_dtype),
        tiling=tiling,
        table=tiling.table(x.shape[1]),
        symmetric=True,
        interpret=interpret,
    )
    return out[:, :rows, :rows]


def run_matmul_add(
    x: Float[Array, "B m k"],
    y: Float[Array, "B k n"],
    addend: Float[Array, "B m n"] | None,
    factors: Float[Array, "2"],
    out_dtype: str,
    *,
    tiling: Tiling = TILINGS[0],
    interpret: object = False,
) -> Float[Array, "B m n"]:
    """Computes `alpha x y + beta addend`, with no symmetry.

    XLA computes the sum in a kernel of its own: it writes the product in float32 and reads it back,
    which at 2048 rows of a product 8192 columns wide is a quarter of the product's time.

    Args:
        x: `(B, m, k)`, bfloat16 or float16.
        y: `(B, k, n)`.
        addend: `(B, m, n)` or None.
        factors: `alpha` and `beta`.
        out_dtype: The result's dtype, that of `x`.
        tiling: One of `TILINGS`.
        interpret: What `pallas_call` takes, to run on any platform.

    Returns:
        `(B, m, n)`.
    """
    rows, columns = x.shape[1], y.shape[2]
    x, y, addend = (_pad(each) for each in (x, y, addend))
    out = _call(
        x,
        y,
        addend,
        factors,
        result_type(x, y.shape[2], out_dtype),
        tiling=tiling,
        table=tiling.everything(x.shape[1], y.shape[2]),
        symmetric=False,
        interpret=interpret,
    )
    return out[:, :rows, :columns]
