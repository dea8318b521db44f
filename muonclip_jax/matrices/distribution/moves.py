"""The moves that make matrices whole and bring them home.

To work on whole matrices the devices trade: everyone gives away blocks of matrices that others will
work on, and gets the missing blocks of its own. That is one `all_to_all` over the axes that shard
the matrix. Along axes that replicate the matrix nothing has to move: everyone keeps its own share
of the stack, and results are gathered at the end.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.matrices.distribution.blocks import Axes, Block, Sizes


@dataclass(frozen=True)
class Exchange:
    """How devices share a stack: over `positions` by matrices, over `split` by columns.

    Attributes:
        positions: Axes along which devices work on different matrices.
        split: Axes along which devices work on different columns of the same matrices.
    """

    positions: Axes
    split: Axes

    def groups(self, sizes: Sizes) -> int:
        """How many groups of devices there are, each with matrices of its own."""
        return math.prod(sizes[axis] for axis in self.positions)

    def ways(self, sizes: Sizes) -> int:
        """Over how many devices each matrix is split."""
        return math.prod(sizes[axis] for axis in self.split)


def position(axes: Axes) -> jax.Array:
    """Returns the number of this device along `axes`, the first of them slowest."""
    number = jnp.zeros((), jnp.int32)
    for axis in axes:
        number = number * lax.axis_size(axis) + lax.axis_index(axis)
    return number


def make_whole(x: jax.Array, block: Block, exchange: Exchange, sizes: Sizes) -> jax.Array:
    """Brings blocks of many matrices to few matrices that are whole (or split by columns).

    Args:
        x: `(slots * groups, *block.shape)`; entry `s * groups + p` goes to group `p`.
        block: What a device holds of each.
        exchange: How the work is shared.
        sizes: Sizes of the mesh axes.

    Returns:
        `(slots, rows, columns)` or, where the exchange splits matrices, `(slots, rows, share)` with
        a share of the columns, in an order that `bring_home` knows.
    """
    held, free = _held_and_free(block, exchange.positions)
    slots = x.shape[0] // exchange.groups(sizes)
    lengths = [sizes[axis] for axis in exchange.positions]
    x = x.reshape(slots, *lengths, *block.shape)
    for number, axis in enumerate(exchange.positions):
        if axis in free:
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(axis), 1, axis=1 + number)
    x = x.reshape(slots, math.prod(sizes[axis] for axis in held), *block.shape)
    if held:
        x = lax.all_to_all(x, held, split_axis=1, concat_axis=1, tiled=True)
    x = x.reshape(slots, *(sizes[axis] for axis in held), *block.shape)
    x = x.transpose(_placing(block, held))
    rows, columns = _local_lengths(block, held, sizes)
    x = x.reshape(slots, rows, columns)
    across, apart = _split_axes(block, exchange)
    if across or apart:
        share = math.prod(sizes[axis] for axis in across + apart)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -columns % share)))
    if across:
        x = lax.all_to_all(x, across, split_axis=2, concat_axis=1, tiled=True)
    if apart:
        width = x.shape[2] // math.prod(sizes[axis] for axis in apart)
        x = lax.dynamic_slice_in_dim(x, position(apart) * width, width, axis=2)
    return x


def bring_home(x: jax.Array, block: Block, exchange: Exchange, sizes: Sizes) -> jax.Array:
    """Undoes `make_whole`, with the same arguments."""
    held, free = _held_and_free(block, exchange.positions)
    slots = x.shape[0]
    _, columns = _local_lengths(block, held, sizes)
    across, apart = _split_axes(block, exchange)
    if apart:
        x = lax.all_gather(x, apart, axis=2, tiled=True, to="invarying")
    if across:
        x = lax.all_to_all(x, across, split_axis=1, concat_axis=2, tiled=True)
    x = x[:, :, :columns]
    placing = _placing(block, held)
    whole = (slots, *(sizes[axis] for axis in held), *block.shape)
    x = x.reshape([whole[axis] for axis in placing])
    x = x.transpose([placing.index(axis) for axis in range(len(placing))])
    x = x.reshape(slots, math.prod(sizes[axis] for axis in held), *block.shape)
    if held:
        x = lax.all_to_all(x, held, split_axis=1, concat_axis=1, tiled=True)
    x = x.reshape(slots, *(sizes[axis] for axis in held), *block.shape)
    if free:
        x = lax.all_gather(x, free, axis=1, to="invarying")
        x = x.reshape(
            slots, *(sizes[axis] for axis in free), *(sizes[axis] for axis in held), *block.shape
        )
        order = [1 + (free + held).index(axis) for axis in exchange.positions]
        x = x.transpose([0, *order, *range(1 + len(order), x.ndim)])
    return x.reshape(slots * exchange.groups(sizes), *block.shape)


def _held_and_free(block: Block, positions: Axes) -> tuple[Axes, Axes]:
    held = tuple(axis for axis in positions if axis in block.axes)
    return held, tuple(axis for axis in positions if axis not in block.axes)


def _split_axes(block: Block, exchange: Exchange) -> tuple[Axes, Axes]:
    """Axes to split columns over: those that shard rows now, and those that replicate.

    Axes that shard columns already do what is wanted. The order of columns (and of rows) plays no
    part in `X X^H X`, as long as all devices of a group agree on it.
    """
    by_rows = {axis for _, axes in block.rows for axis in axes}
    across = tuple(axis for axis in exchange.split if axis in by_rows)
    return across, tuple(axis for axis in exchange.split if axis not in block.axes)


def _local_lengths(block: Block, held: Axes, sizes: Sizes) -> tuple[int, int]:
    rows, columns = (
        math.prod(
            length * math.prod(sizes[axis] for axis in axes if axis in held)
            for length, axes in dims
        )
        for dims in (block.rows, block.columns)
    )
    return rows, columns


def _placing(block: Block, held: Axes) -> list[int]:
    """Order of axes that puts every traded axis before the dimension that it shards."""
    order = [0]
    for number, (_, axes) in enumerate(block.dims):
        order += [1 + held.index(axis) for axis in axes if axis in held]
        order.append(1 + len(held) + number)
    return order
