"""The collectives before and after orthogonalisation, which gather matrices and scatter results.

Each device sends its blocks of matrices that other devices process, and receives the missing blocks
of its own matrices, in one all-to-all over the mesh axes that shard the matrix. Along axes that
replicate it nothing is sent before: each device selects its own matrices, and results are
all-gathered.

Example: four matrices on a mesh `fsdp` 2 x `tp` 2, one for each device; group `g = 2 i + j` is the
device `(i, j)`. Sharded `P("fsdp", "tp")`, device `(i, j)` holds block `(i, j)` of every matrix. It
sends that of matrix `g` to group `g`, and receives the blocks `(0, 0), (0, 1), (1, 0), (1, 1)` of
its own: an array `(2, 2, rows / 2, columns / 2)`, which becomes `(2, rows / 2, 2, columns / 2)` and
then `(rows, columns)`. Sharded `P("fsdp")`, it holds the rows `i` of every matrix, selects those of
matrices `j` and `2 + j`, and sends them along `fsdp` to the devices `(0, j)` and `(1, j)`. Results
are sent back the same way, and `(i, 0)` and `(i, 1)` all-gather theirs along `tp`.

If a matrix is split by columns, a second all-to-all exchanges rows for columns.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax._devices import all_gather
from muonclip_jax.sharding.blocks import Block, inverse_of
from muonclip_jax.sharding.mesh_shardings import Axes, Sizes
from muonclip_jax.sharding.plan import Bucket, Exchange

# Padding of this size is worth another collective.
_PADDING_BYTES = 64 * 2**20
# Above this size one parameter is gathered after another: compilers hold a gather twice, as sent
# and as received, and a sixteenth of an accelerator's memory is enough for that.
_GATHERED_AT_ONCE = 2**30


def gather_matrices(x: jax.Array, block: Block, exchange: Exchange, sizes: Sizes) -> jax.Array:
    """Gathers a few whole matrices, or columns of them, from blocks of many.

    From the blocks that this device sends (`members_sent`), `(slots * n, *block.shape)`, to
    `(slots, rows, columns)`; entry `s * n + h` goes to place `h` of the `n` along the matrix axes
    that shard the matrices. Split matrices have some of the columns, in an order that
    `scatter_results` undoes.
    """
    sharded, _ = _matrix_axes(block, exchange)
    x = x.reshape(-1, _size(sharded, sizes), *block.shape)
    if sharded:
        x = lax.all_to_all(x, sharded, split_axis=1, concat_axis=1, tiled=True)
    slots = len(x)
    x = x.reshape(slots, *(sizes[axis] for axis in sharded), *block.shape)
    x = x.transpose(_interleaved(block, sharded))
    x = x.reshape(slots, *block.gathered_shape(sharded, sizes))
    by_rows, replicated = _column_axes(block, exchange)
    padding = -x.shape[2] % _size(by_rows + replicated, sizes)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)))
    if by_rows:
        x = lax.all_to_all(x, by_rows, split_axis=2, concat_axis=1, tiled=True)
    if replicated:
        width = x.shape[2] // _size(replicated, sizes)
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(replicated) * width, width, axis=2)
    return x


def scatter_results(
    x: jax.Array, bucket: Bucket, exchange: Exchange, sizes: Sizes
) -> list[jax.Array]:
    """Scatters results to the devices with their blocks; returns the blocks of each run.

    Undoes `gather_matrices`.
    """
    block, slots = bucket.block, len(x)
    sharded, unsharded = _matrix_axes(block, exchange)
    by_rows, replicated = _column_axes(block, exchange)
    if replicated:
        x = all_gather(x, replicated, 2)
    if by_rows:
        x = lax.all_to_all(x, by_rows, split_axis=1, concat_axis=2, tiled=True)
    x = x[:, :, : block.gathered_shape(sharded, sizes)[1]]
    order = _interleaved(block, sharded)
    shape = (slots, *(sizes[axis] for axis in sharded), *block.shape)
    x = x.reshape([shape[axis] for axis in order]).transpose(inverse_of(order))
    x = x.reshape(slots, _size(sharded, sizes), *block.shape)
    if sharded:
        x = lax.all_to_all(x, sharded, split_axis=1, concat_axis=1, tiled=True)
    lengths = [run.stop - run.start for run in bucket.runs]
    if not unsharded:
        return _split(_at_places(x.reshape(-1, *block.shape), bucket), lengths)
    matrix = math.prod(block.shape) * x.dtype.itemsize
    places = slots * exchange.groups(sizes)
    padding = places - len(bucket.places)
    if places * matrix <= _GATHERED_AT_ONCE and (
        4 * padding <= places or padding * matrix < _PADDING_BYTES
    ):
        x = all_gather(x, unsharded, 1, tiled=False)
        x = _in_order(x, unsharded + sharded, exchange, sizes)
        return _split(_at_places(x, bucket), lengths)
    # One parameter's results after another, and no padding: each device first gets a piece of every
    # matrix, along a dimension that the devices divide or else the longest one, padded.
    devices = _size(unsharded, sizes)
    axis = max(range(x.ndim - 2), key=lambda i: (block.shape[i] % devices == 0, block.shape[i]))
    length = block.shape[axis]
    x = jnp.pad(x, [(0, -length % devices if i == 2 + axis else 0) for i in range(x.ndim)])
    x = lax.all_to_all(x[:, None], unsharded, split_axis=3 + axis, concat_axis=1, tiled=True)
    x = _at_places(_in_order(x, unsharded + sharded, exchange, sizes), bucket)
    pieces = [all_gather(piece, unsharded, 1 + axis) for piece in _split(x, lengths)]
    return [lax.slice_in_dim(piece, 0, length, axis=1 + axis) for piece in pieces]


def members_sent(bucket: Bucket, exchange: Exchange, sizes: Sizes) -> tuple[np.ndarray, Axes]:
    """The matrices of a bucket that a device sends, by place along the axes that replicate them.

    Returns indices of matrices `(places along those axes, slots * places along the sharding axes)`,
    arbitrary for padding; and those axes.
    """
    sharded, unsharded = _matrix_axes(bucket.block, exchange)
    axes = exchange.matrix_axes
    place = np.arange(bucket.slots * exchange.groups(sizes))
    member = np.searchsorted(bucket.places, place).clip(max=len(bucket.places) - 1)
    member = member.reshape(bucket.slots, *(sizes[axis] for axis in axes))
    order = [1 + axes.index(axis) for axis in unsharded], [1 + axes.index(axis) for axis in sharded]
    member = member.transpose([*order[0], 0, *order[1]])
    return member.reshape(_size(unsharded, sizes), -1), unsharded


def _at_places(x: jax.Array, bucket: Bucket) -> jax.Array:
    """The matrices of a bucket, without padding."""
    count = len(bucket.places)
    is_first = bucket.places == tuple(range(count))
    return lax.slice_in_dim(x, 0, count) if is_first else x[np.array(bucket.places)]


def _split(x: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
    bounds = itertools.accumulate(lengths, initial=0)
    return [lax.slice_in_dim(x, *pair) for pair in itertools.pairwise(bounds)]


def _in_order(x: jax.Array, axes: Axes, exchange: Exchange, sizes: Sizes) -> jax.Array:
    """From `(slots, places along some axes, those along others, ...)` to `(places, ...)`."""
    slots, rest = x.shape[0], x.shape[3:]
    x = x.reshape(slots, *(sizes[axis] for axis in axes), *rest)
    order = [1 + axes.index(axis) for axis in exchange.matrix_axes]
    x = x.transpose([0, *order, *range(1 + len(order), x.ndim)])
    return x.reshape(-1, *rest)


def _matrix_axes(block: Block, exchange: Exchange) -> tuple[Axes, Axes]:
    """The matrix axes that shard a matrix, and those that replicate it."""
    sharded = tuple(axis for axis in exchange.matrix_axes if axis in block.axes)
    return sharded, tuple(axis for axis in exchange.matrix_axes if axis not in block.axes)


def _column_axes(block: Block, exchange: Exchange) -> tuple[Axes, Axes]:
    """The column axes that shard rows now, and those that replicate the matrix.

    Axes that already shard columns need no exchange. `X X^H X` does not depend on the order of
    columns and rows, as long as it is the same on all devices of a group.
    """
    by_rows = {axis for _, axes in block.rows for axis in axes}
    return (
        tuple(axis for axis in exchange.column_axes if axis in by_rows),
        tuple(axis for axis in exchange.column_axes if axis not in block.axes),
    )


def _interleaved(block: Block, sharded: Axes) -> list[int]:
    """The order of axes that puts every exchanged axis before the dimension that it shards."""
    order = [0]
    for number, (_, axes) in enumerate(block.dims):
        order += [1 + sharded.index(axis) for axis in axes if axis in sharded]
        order.append(1 + len(sharded) + number)
    return order


def _size(axes: Axes, sizes: Sizes) -> int:
    return math.prod(sizes[axis] for axis in axes)
