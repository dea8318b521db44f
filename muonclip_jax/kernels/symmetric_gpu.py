"""The symmetric product on Hopper GPUs.

One program per multiprocessor processes tiles of the upper triangle. In each program, one warpgroup
copies rows of the operands into a ring buffer in shared memory, and two others multiply them with
`wgmma`, each half of a tile; the ring buffer is kept across tiles. The result is written in blocks
of 64 x 64: a block above the diagonal is written twice, directly and through a transposed view of
shared memory; one below is not written; one on the diagonal is mirrored first. The addend's blocks
are loaded during the products.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from muonclip_jax.kernels import triangle

DTYPES = ("bfloat16", "float16")
# Multiprocessors of an H100 and an H200.
_PROGRAMS = 132
# A tile is 128 x 128, of which each of two warpgroups computes 64 rows, in blocks of 64 x 64. A
# stage holds 64 columns of the operands, one swizzled row of 128 bytes.
_BLOCK, _GROUPS, _STAGES = 64, 2, 4
_TILE = _BLOCK * _GROUPS
# How `wgmma` leaves a result in registers, and its transpose.
_LAYOUT, _TRANSPOSED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
# Registers a thread: the copying warpgroup gives up what the others need.
_COPY_REGISTERS, _COMPUTE_REGISTERS = 40, 232


def _kernel(table, factors, x, y, *refs, tiles: int, work: int, programs: int) -> None:
    addend, out = (refs[0] if len(refs) == 2 else None), refs[-1]
    steps = x.shape[-1] // _BLOCK
    transforms = (plgpu.TilingTransform((8, _BLOCK)), plgpu.SwizzleTransform(2 * _BLOCK))
    blocks = range(_TILE // _BLOCK)

    def smem(*shape: int):
        return plgpu.SMEM(shape, x.dtype, transforms=transforms)

    @functools.partial(
        pl.run_scoped,
        x_smem=smem(_STAGES, _TILE, _BLOCK),
        y_smem=smem(_STAGES, _TILE, _BLOCK),
        upper=smem(_GROUPS, len(blocks), _BLOCK, _BLOCK),
        lower=smem(_GROUPS, _BLOCK, _BLOCK),
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        consumed=plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=_STAGES),
        fetched=plgpu.Barrier(num_arrivals=len(blocks), num_barriers=_GROUPS),
        collective_axes="warpgroup",
    )
    def _program(x_smem, y_smem, upper, lower, loaded, consumed, fetched):
        program, group = lax.axis_index("program"), lax.axis_index("warpgroup")
        count = lax.div(work - program + programs - 1, programs)

        def place(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """Returns the matrix, and the row and column of a tile in it."""
            item = program + number * programs
            tile = lax.rem(item, tiles)
            return lax.div(item, tiles), table[tile], table[tiles + tile]

        @pl.when(group == _GROUPS)
        def _copy():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def copy_tile(number, _):
                matrix, row, column = place(number)

                def copy_step(step, _):
                    position = number * steps + step
                    slot = lax.rem(position, _STAGES)

                    @pl.when(position >= _STAGES)
                    def _wait():
                        plgpu.barrier_wait(consumed.at[slot])

                    depth = pl.ds(step * _BLOCK, _BLOCK)
                    for source, index, ring in ((x, row, x_smem), (y, column, y_smem)):
                        rows = pl.ds(index * _TILE, _TILE)
                        plgpu.copy_gmem_to_smem(
                            source.at[matrix, rows, depth], ring.at[slot], loaded.at[slot]
                        )
                    return ()

                return lax.fori_loop(0, steps, copy_step, ())

            lax.fori_loop(0, count, copy_tile, ())
            for slot in range(_STAGES):

                @pl.when(count * steps > slot)
                def _drain(slot=slot):
                    plgpu.barrier_wait(consumed.at[slot])

        @pl.when(group < _GROUPS)
        def _compute():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

            def multiply(number, total):
                def multiply_step(step, _):
                    position = number * steps + step
                    slot = lax.rem(position, _STAGES)
                    plgpu.barrier_wait(loaded.at[slot])
                    mine = x_smem.at[slot, pl.ds(group * _BLOCK, _BLOCK)]
                    plgpu.wgmma(total, mine, y_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)

                    @pl.when(step > 0)
                    def _release():
                        plgpu.barrier_arrive(consumed.at[lax.rem(position - 1, _STAGES)])

                    return ()

                lax.fori_loop(0, steps, multiply_step, ())
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(consumed.at[lax.rem((number + 1) * steps - 1, _STAGES)])
                return total[...]

            def compute_tile(number, _):
                matrix, row, column = place(number)
                first, left = row * _GROUPS + group, column * len(blocks)

                def region(i: jax.Array, j: jax.Array):
                    return matrix, pl.ds(i * _BLOCK, _BLOCK), pl.ds(j * _BLOCK, _BLOCK)

                # The blocks of the tile before have left shared memory.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if addend is not None:
                    for j in blocks:
                        stage = upper.at[group, j]
                        source = addend.at[region(first, left + j)]
                        plgpu.copy_gmem_to_smem(source, stage, fetched.at[group])
                total = pl.run_scoped(
                    functools.partial(multiply, number),
                    plgpu.WGMMAAccumulatorRef((_BLOCK, _TILE), jnp.float32),
                )
                if addend is not None:
                    plgpu.barrier_wait(fetched.at[group])
                for j in blocks:
                    stage = upper.at[group, j]
                    result = factors[0] * total[:, j * _BLOCK : (j + 1) * _BLOCK]
                    if addend is not None:
                        result += factors[1] * stage[...].astype(jnp.float32)
                    _write(out, result, stage, lower.at[group], (first, left + j), region)
                return ()

            lax.fori_loop(0, count, compute_tile, ())
            plgpu.wait_smem_to_gmem(0)


def _write(out, result, stage, mirror, index, region) -> None:
    """Writes a block and its transpose, or nothing if the block is below the diagonal."""
    i, j = index
    result = result.astype(out.dtype)

    @pl.when(i <= j)
    def _on_or_above():
        # The block before has left the one stage for transposed blocks.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        stage[...] = result
        transposed = plgpu.layout_cast(result, _TRANSPOSED)
        mirror.transpose((1, 0))[...] = transposed

        @pl.when(i == j)
        def _mirror():
            # On the diagonal both triangles are in one block, and the upper one decides.
            plgpu.commit_smem()
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, (_BLOCK, _BLOCK), axis, layout=_LAYOUT)
                for axis in (0, 1)
            )
            stage[...] = jnp.where(row <= column, result, mirror[...])

        plgpu.commit_smem()

        @pl.when(i < j)
        def _above():
            plgpu.copy_smem_to_gmem(mirror, out.at[region(j, i)])

        plgpu.copy_smem_to_gmem(stage, out.at[region(i, j)])


def symmetric_product(
    x: Float[Array, "B m n"],
    y: Float[Array, "B m n"],
    addend: Float[Array, "B m m"] | None,
    factors: Float[Array, "2"],
    *,
    interpret: object = False,
) -> Float[Array, "B m m"]:
    """The operation of `kernels.multiply_symmetric`; `interpret` runs it on any platform."""
    batch, rows, _ = x.shape

    def padded(array: jax.Array, last: int) -> jax.Array:
        """Pads to whole tiles of rows, and to a multiple of `last` columns."""
        _, height, width = array.shape
        return jnp.pad(array, ((0, 0), (0, -height % _TILE), (0, -width % last)))

    operands = [padded(x, _BLOCK), padded(y, _BLOCK)]
    operands += [] if addend is None else [padded(addend, _TILE)]
    table = triangle(pl.cdiv(rows, _TILE))
    work = batch * table.shape[1]
    programs = min(_PROGRAMS, work)
    # Of a product's type: inside shard_map that includes what varies between devices.
    out_type = jax.eval_shape(lambda x, y: jnp.matmul(x, jnp.swapaxes(y, 1, 2)), *operands[:2])
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiles=table.shape[1], work=work, programs=programs),
        **{"out_type" if jax.__version_info__ >= (0, 10) else "out_shape": out_type},
        grid=(programs,),
        grid_names=("program",),
        num_threads=_GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="symmetric_product",
    )
    result = kernel(jnp.asarray(table.reshape(-1)), factors, *operands)
    return result[:, :rows, :rows]
