"""The symmetric product on Hopper GPUs, through Mosaic GPU.

As many programs as the GPU has multiprocessors share the tiles of the upper triangle. In each, one
warpgroup copies rows of the operands into shared memory, a ring of stages ahead, and the others
multiply them with `wgmma`; the ring runs on from tile to tile. What a warpgroup has computed it
writes in blocks of 64 x 64, which are the triangle's true grain: a block above the diagonal goes
out twice, as it is and through a transposed view of shared memory; one below does not go out at
all; one on the diagonal is mirrored first. The addend's blocks are fetched while the products run.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from muonclip_jax.kernels.symmetric.tilings import BLOCK, Tiling
from muonclip_jax.kernels.symmetric.triangle import tiles_along

# Registers of the thread that copies; the others share what it leaves.
_COPY_REGISTERS = 40


def product_kernel(
    table,
    factors,
    x,
    y,
    *refs,
    tiling: Tiling,
    tiles: int,
    work: int,
    programs: int,
    symmetric: bool,
) -> None:
    """Computes tiles of `alpha x y^T + beta addend`, or of `alpha x y + beta addend`.

    Args:
        table: Rows, then columns, of the tiles, in the order of their turns.
        factors: `alpha` and `beta`.
        x: `(B, m, k)`.
        y: `(B, n, k)` where the result is symmetric, else `(B, k, n)`.
        *refs: The addend `(B, m, n)`, if there is one, and the result.
        tiling: How tiles fall to warpgroups.
        tiles: How many tiles a matrix has.
        work: How many tiles there are in all.
        programs: How many programs share them.
        symmetric: Whether blocks above the diagonal are written twice.
    """
    addend, out = (refs[0] if len(refs) == 2 else None), refs[-1]
    steps = tiles_along(x.shape[-1], BLOCK)
    transforms = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(2 * BLOCK))
    blocks = [(i, j) for i in range(tiling.rows) for j in range(tiling.columns)]
    block = (BLOCK, BLOCK)

    def smem(*shape: int):
        return plgpu.SMEM(shape, x.dtype, transforms=transforms)

    @functools.partial(
        pl.run_scoped,
        x_smem=smem(tiling.stages, tiling.height, BLOCK),
        y_smem=smem(
            tiling.stages, *((tiling.width, BLOCK) if symmetric else (BLOCK, tiling.width))
        ),
        upper=smem(tiling.warpgroups, len(blocks), *block),
        lower=smem(tiling.warpgroups, *block),
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
        consumed=plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=tiling.stages),
        fetched=plgpu.Barrier(num_arrivals=len(blocks), num_barriers=tiling.warpgroups),
        collective_axes="warpgroup",
    )
    def _program(x_smem, y_smem, upper, lower, loaded, consumed, fetched):
        program, group = lax.axis_index("program"), lax.axis_index("warpgroup")
        turns = lax.div(work - program + programs - 1, programs)

        def place(turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            item = program + turn * programs
            tile = lax.rem(item, tiles)
            return lax.div(item, tiles), table[tile], table[tiles + tile]

        @pl.when(group == tiling.warpgroups)
        def _copy():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def copy_tile(turn, _):
                matrix, row, column = place(turn)

                def copy_step(step, _):
                    place_in_ring = turn * steps + step
                    slot = lax.rem(place_in_ring, tiling.stages)

                    @pl.when(place_in_ring >= tiling.stages)
                    def _wait():
                        plgpu.barrier_wait(consumed.at[slot])

                    depth = pl.ds(step * BLOCK, BLOCK)
                    down = pl.ds(row * tiling.height, tiling.height)
                    across = pl.ds(column * tiling.width, tiling.width)
                    for source, ring in (
                        (x.at[matrix, down, depth], x_smem),
                        (
                            y.at[(matrix, *((across, depth) if symmetric else (depth, across)))],
                            y_smem,
                        ),
                    ):
                        plgpu.copy_gmem_to_smem(source, ring.at[slot], loaded.at[slot])
                    return ()

                return lax.fori_loop(0, steps, copy_step, ())

            lax.fori_loop(0, turns, copy_tile, ())
            for slot in range(tiling.stages):

                @pl.when(turns * steps > slot)
                def _drain(slot=slot):
                    plgpu.barrier_wait(consumed.at[slot])

        @pl.when(group < tiling.warpgroups)
        def _compute():
            plgpu.set_max_registers(_compute_registers(tiling), action="increase")
            alpha, beta = factors[0], factors[1]

            def compute_tile(turn, _):
                matrix, row, column = place(turn)
                first = row * (tiling.height // BLOCK) + group * tiling.rows
                left = column * tiling.columns

                def region(i: jax.Array, j: jax.Array):
                    return matrix, pl.ds(i * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK)

                # The last tile's blocks have left shared memory.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if addend is not None:
                    for index, (i, j) in enumerate(blocks):
                        plgpu.copy_gmem_to_smem(
                            addend.at[region(first + i, left + j)],
                            upper.at[group, index],
                            fetched.at[group],
                        )

                def multiply(total):
                    def multiply_step(step, _):
                        place_in_ring = turn * steps + step
                        slot = lax.rem(place_in_ring, tiling.stages)
                        plgpu.barrier_wait(loaded.at[slot])
                        height = tiling.rows * BLOCK
                        plgpu.wgmma(
                            total,
                            x_smem.at[slot, pl.ds(group * height, height)],
                            _transposed(y_smem.at[slot]) if symmetric else y_smem.at[slot],
                        )
                        plgpu.wgmma_wait(1)

                        @pl.when(step > 0)
                        def _release():
                            plgpu.barrier_arrive(
                                consumed.at[lax.rem(place_in_ring - 1, tiling.stages)]
                            )

                        return ()

                    lax.fori_loop(0, steps, multiply_step, ())
                    plgpu.wgmma_wait(0)
                    last = lax.rem((turn + 1) * steps - 1, tiling.stages)
                    plgpu.barrier_arrive(consumed.at[last])
                    return total[...]

                shape = (tiling.rows * BLOCK, tiling.columns * BLOCK)
                total = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
                if addend is not None:
                    plgpu.barrier_wait(fetched.at[group])
                for number, (i, j) in enumerate(blocks):
                    result = alpha * total[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                    stage = upper.at[group, number]
                    if addend is not None:
                        result += beta * stage[...].astype(jnp.float32)
                    result, index = result.astype(out.dtype), (first + i, left + j)
                    if symmetric:
                        _write_twice(out, result, stage, lower.at[group], index, region)
                    else:
                        stage[...] = result
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(stage, out.at[region(*index)])
                return ()

            lax.fori_loop(0, turns, compute_tile, ())
            plgpu.wait_smem_to_gmem(0)


def _write_twice(out, result, stage, mirror, index, region):
    """Writes a block and its transpose, or nothing where the block is below the diagonal."""
    i, j = index

    @pl.when(i <= j)
    def _on_or_above():
        # The block before this one has left the one stage for transposed blocks.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        stage[...] = result
        _store_transposed(mirror, result)

        @pl.when(i == j)
        def _mirror():
            # On the diagonal both triangles are in one block, and the upper one decides.
            plgpu.commit_smem()
            above = _positions(0) <= _positions(1)
            stage[...] = jnp.where(above, result, mirror[...])

        plgpu.commit_smem()

        @pl.when(i < j)
        def _above():
            plgpu.copy_smem_to_gmem(mirror, out.at[region(j, i)])

        plgpu.copy_smem_to_gmem(stage, out.at[region(i, j)])


def _transposed(ref):
    """Returns a transposed view of a matrix in shared memory."""
    return ref.transpose((1, 0))


def _store_transposed(ref, x: jax.Array) -> None:
    """Stores the transpose of a block."""
    _transposed(ref)[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def _positions(axis: int) -> jax.Array:
    """Returns where along an axis each entry of a block is."""
    layout = plgpu.Layout.WGMMA
    return plgpu.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis, layout=layout)


def _compute_registers(tiling: Tiling) -> int:
    """Returns what the copying warpgroup leaves to each other one, in steps of 8."""
    left = 65536 // 128 - _COPY_REGISTERS
    return min(left // tiling.warpgroups // 8 * 8, 232)
