"""The moves that make matrices whole and bring them home.

To work on whole matrices the devices trade: everyone gives away blocks of matrices that others will
work on, and gets the missing blocks of its own. That is one `all_to_all` over the axes that shard
the matrix. Along axes that replicate the matrix nothing has to move: everyone takes its own share
of the stack, and results are gathered at the end. Where that would be much at once, or many places
of the stack are padding (fewer matrices than devices), results are cut into a piece for every
device first and traded, so that one parameter's matrices after another can be gathered, and no
padding.
"""

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax._devices import all_gather
from muonclip_jax.sharding.blocks import Axes, Block, Sizes

# Enough to fill a link. So much padding is worth a collective more; so much is gathered before the
# next leaf's results are, so that one parameter's can be used before the next one's arrive.
_GATHERED_BYTES = 64 * 2**20
# From here on one parameter is gathered after another: the compilers hold a gather twice, as sent
# and as received, and a sixteenth of what a current accelerator has is enough for that.
_GATHERED_AT_ONCE = 2**30


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
        x: `(slots * held groups, *block.shape)`, what this device's place along the axes that
            replicate the matrix has to give: entry `s * held groups + h` goes to place `h` along
            the positions that shard it.
        block: What a device holds of each.
        exchange: How the work is shared.
        sizes: Sizes of the mesh axes.

    Returns:
        `(slots, rows, columns)` or, where the exchange splits matrices, `(slots, rows, share)` with
        a share of the columns, in an order that `bring_home` knows.
    """
    held, _ = held_and_free(block, exchange.positions)
    ways = math.prod(sizes[axis] for axis in held)
    slots = x.shape[0] // ways
    x = x.reshape(slots, ways, *block.shape)
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


def bring_home(
    x: jax.Array, block: Block, exchange: Exchange, sizes: Sizes, owners: Sequence[Hashable | None]
) -> list[tuple[jax.Array, list[int]]]:
    """Brings results home.

    Args:
        x: What `make_whole` returned, worked on.
        block: As for `make_whole`, and what a device shall hold of each in the end.
        exchange: As for `make_whole`.
        sizes: Sizes of the mesh axes.
        owners: For place `s * groups + p` of the stack, what the matrix is a part of, or None
            where there is none.

    Returns:
        Pieces `(places, *block.shape)`, with the places of the stack that they are, in order.
        Together they have all places where there is a matrix.
    """
    held, free = held_and_free(block, exchange.positions)
    slots = x.shape[0]
    _, columns = _local_lengths(block, held, sizes)
    across, apart = _split_axes(block, exchange)
    if apart:
        x = all_gather(x, apart, 2)
    if across:
        x = lax.all_to_all(x, across, split_axis=1, concat_axis=2, tiled=True)
    x = x[:, :, :columns]
    placing = _placing(block, held)
    whole = (slots, *(sizes[axis] for axis in held), *block.shape)
    x = x.reshape([whole[axis] for axis in placing])
    x = x.transpose([placing.index(axis) for axis in range(len(placing))])
    ways = math.prod(sizes[axis] for axis in held)
    x = x.reshape(slots, ways, *block.shape)
    if held:
        x = lax.all_to_all(x, held, split_axis=1, concat_axis=1, tiled=True)
    if not free:
        return [(x.reshape(slots * ways, *block.shape), list(range(slots * ways)))]
    padding = sum(owner is None for owner in owners)
    size = math.prod(block.shape) * x.dtype.itemsize
    is_much = len(owners) * size > _GATHERED_AT_ONCE
    if is_much or (padding > len(owners) // 4 and padding * size >= _GATHERED_BYTES):
        return _by_owner(x, block, exchange, sizes, owners)
    x = all_gather(x, free, 1, tiled=False)
    return [(_in_order(x, free + held, exchange, sizes), list(range(len(owners))))]


def _by_owner(
    x: jax.Array, block: Block, exchange: Exchange, sizes: Sizes, owners: Sequence[Hashable | None]
) -> list[tuple[jax.Array, list[int]]]:
    """Gathers `(slots, places along held axes, *block.shape)` along the axes that replicate it.

    One owner's matrices after another, and no padding.
    """
    held, free = held_and_free(block, exchange.positions)
    devices = math.prod(sizes[axis] for axis in free)
    shape = block.shape
    cut = next((axis for axis, length in enumerate(shape) if length % devices == 0), None)
    if cut is None:
        # No dimension falls into equal pieces, but all entries in a row do, with some at the end.
        x = x.reshape(*x.shape[:2], -1)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % devices)))
    at = 2 + (cut or 0)
    # Everyone gets a piece of every matrix.
    x = lax.all_to_all(x[:, None], free, split_axis=1 + at, concat_axis=1, tiled=True)
    x = _in_order(x, free + held, exchange, sizes)
    pieces = []
    size = math.prod(shape) * x.dtype.itemsize
    for places in _chunks(owners, size):
        runs = [
            [place for _, place in run]
            for _, run in itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])
        ]
        piece = jnp.concatenate([x[run[0] : run[-1] + 1] for run in runs])
        piece = all_gather(piece, free, at - 1)
        if cut is None:
            piece = piece[:, : math.prod(shape)]
        pieces.append((piece.reshape(len(places), *shape), places))
    return pieces


def _in_order(x: jax.Array, axes: Axes, exchange: Exchange, sizes: Sizes) -> jax.Array:
    """From `(slots, places along some axes, those along others, ...)` to `(places, ...)`."""
    slots, rest = x.shape[0], x.shape[3:]
    x = x.reshape(slots, *(sizes[axis] for axis in axes), *rest)
    order = [1 + axes.index(axis) for axis in exchange.positions]
    x = x.transpose([0, *order, *range(1 + len(order), x.ndim)])
    return x.reshape(-1, *rest)


def _chunks(owners: Sequence[Hashable | None], size: int) -> Iterator[list[int]]:
    """Places with matrices, cut where the owner changes and there is enough for a collective."""
    chunk: list[int] = []
    for place, owner in enumerate(owners):
        if owner is None:
            continue
        if chunk and owner != owners[chunk[-1]] and len(chunk) * size >= _GATHERED_BYTES:
            yield chunk
            chunk = []
        chunk.append(place)
    if chunk:
        yield chunk


def by_free_and_held(block: Block, exchange: Exchange, sizes: Sizes) -> np.ndarray:
    """Numbers of the groups of devices as an array `(places along free axes, along held ones)`."""
    held, free = held_and_free(block, exchange.positions)
    lengths = [sizes[axis] for axis in exchange.positions]
    numbers = np.arange(math.prod(lengths)).reshape(lengths)
    numbers = numbers.transpose([exchange.positions.index(axis) for axis in free + held])
    return numbers.reshape(
        math.prod(sizes[axis] for axis in free), math.prod(sizes[axis] for axis in held)
    )


def held_and_free(block: Block, positions: Axes) -> tuple[Axes, Axes]:
    """The positions that shard a matrix, and those that replicate it."""
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
