"""The symmetric product on TPUs.

The grid iterates over matrices, tiles of the upper triangle and, innermost, the depth. A tile has
one step more than blocks of depth: the second-last step writes the tile and the last writes its
transpose. For Pallas these are two blocks of one output, so it overlaps both writes with the next
tile's products, clips them at the end of the array, and loads nothing for the extra step.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas.tpu import VMEM, CompilerParams, PrefetchScalarGridSpec
from jaxtyping import Array, Float

from muonclip_jax.kernels import triangle

DTYPES = ("bfloat16", "float32")
# A tile of s x s needs s / 2 operations a byte read in bfloat16: 512 is past what separates
# memory-bound from compute-bound on a v5e (240) and a v5p (166). Smaller ones waste less of a small
# matrix's diagonal.
_TILES = (512, 384, 256, 128)
_DEPTH = {"bfloat16": 1024, "float32": 512}
_VMEM_BYTES = 48 << 20


def _tile_size(rows: int) -> int:
    """Returns the size of the tiles for `rows`: with few padded entries, then few reads."""

    def work(size: int) -> float:
        tiles = pl.cdiv(rows, size)
        return tiles * (tiles + 1) * size**2 * (_TILES[0] / size) ** 0.5

    return min(_TILES, key=work)


def _kernel(table_ref, factors_ref, x_ref, y_ref, *refs, depth: int, steps: int, block: int):
    addend_ref = refs[0] if len(refs) == 3 else None
    out_ref, sum_ref = refs[-2:]
    tile, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _clear():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step < steps)
    def _multiply():
        x, y = x_ref[...], y_ref[...]
        if depth % block:
            # What lies past the end of the array is anything, NaN included.
            inside = lax.broadcasted_iota(jnp.int32, (1, block), 1) < depth - step * block
            x, y = jnp.where(inside, x, 0), jnp.where(inside, y, 0)
        wide = x.dtype == jnp.float32
        sum_ref[...] += lax.dot_general(
            x,
            y,
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST if wide else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )

    @pl.when(step == steps - 1)
    def _write():
        result = factors_ref[0] * sum_ref[...]
        if addend_ref is not None:
            result += factors_ref[1] * addend_ref[...].astype(jnp.float32)
        sum_ref[...] = result

        @pl.when(table_ref[0, tile] == table_ref[1, tile])
        def _mirror():
            # On the diagonal both triangles are in one tile, and the upper one decides.
            row = lax.broadcasted_iota(jnp.int32, result.shape, 0)
            column = lax.broadcasted_iota(jnp.int32, result.shape, 1)
            sum_ref[...] = jnp.where(row <= column, result, result.T)

        out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    @pl.when(step == steps)
    def _write_transpose():
        out_ref[...] = sum_ref[...].T.astype(out_ref.dtype)


def symmetric_product(
    x: Float[Array, "B m n"],
    y: Float[Array, "B m n"],
    addend: Float[Array, "B m m"] | None,
    factors: Float[Array, "2"],
    *,
    interpret: bool = False,
) -> Float[Array, "B m m"]:
    """The operation of `kernels.multiply_symmetric`; `interpret` runs it on any platform."""
    batch, rows, depth = x.shape
    size = _tile_size(rows)
    block = min(_DEPTH[x.dtype.name], pl.cdiv(depth, 128) * 128)
    steps = pl.cdiv(depth, block)
    table = jnp.asarray(triangle(pl.cdiv(rows, size)))

    def operand(which: int):
        def index(b, tile, step, table_ref, _):
            return b, table_ref[which, tile], jnp.minimum(step, steps - 1)

        return pl.BlockSpec((None, size, block), index)

    def upper(b, tile, step, table_ref, _):
        del step
        return b, table_ref[0, tile], table_ref[1, tile]

    def both(b, tile, step, table_ref, _):
        row, column = table_ref[0, tile], table_ref[1, tile]
        last = step == steps
        return b, jnp.where(last, column, row), jnp.where(last, row, column)

    addends = [] if addend is None else [addend]
    return pl.pallas_call(
        functools.partial(_kernel, depth=depth, steps=steps, block=block),
        # Of a product's type: inside shard_map that includes what varies between devices.
        out_shape=jax.eval_shape(lambda x, y: jnp.matmul(x, jnp.swapaxes(y, 1, 2)), x, y),
        grid_spec=PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, table.shape[1], steps + 1),
            in_specs=[
                operand(0),
                operand(1),
                *(pl.BlockSpec((None, size, size), upper) for _ in addends),
            ],
            out_specs=pl.BlockSpec((None, size, size), both),
            scratch_shapes=[VMEM((size, size), jnp.float32)],
        ),
        compiler_params=CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * table.shape[1] * size * size * depth,
            bytes_accessed=sum(array.nbytes for array in (x, y, *addends))
            + batch * rows * rows * x.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="symmetric_product",
    )(table, factors, x, y, *addends)
