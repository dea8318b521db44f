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

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax._devices import all_gather
from muonclip_jax.sharding.blocks import Block
from muonclip_jax.sharding.mesh_shardings import Axes
from muonclip_jax.sharding.planning import Bucket, Exchange

# Padding of this size is worth another collective.
_PADDING_BYTES = 64 * 2**20
# Above this size one parameter is gathered after another: compilers hold a gather twice, as sent
# and as received, and a sixteenth of an accelerator's memory is enough for that.
_GATHERED_AT_ONCE = 2**30


def gather_matrices(x: jax.Array, block: Block, exchange: Exchange) -> jax.Array:
    """Gathers a few whole matrices, or columns of them, from blocks of many.

    From the blocks that this device sends (`members_sent`), `(slots * n, *block.shape)`, to
    `(slots, rows, columns)`; entry `s * n + h` goes to place `h` of the `n` along the matrix axes
    that shard the matrices. Split matrices have some of the columns, in an order that
    `scatter_results` undoes.
    """
    sharded, _, by_rows, replicated = _axes(block, exchange)
    x = x.reshape(-1, exchange.size(sharded), *block.shape)
    if sharded:
        x = lax.all_to_all(x, sharded, split_axis=1, concat_axis=1, tiled=True)
    shape, order = _interleaved(block, sharded, exchange)
    x = x.reshape(-1, *shape[1:]).transpose(order)
    x = x.reshape(len(x), *block.gathered_shape(sharded, exchange.sizes))
    padding = -x.shape[2] % exchange.size(by_rows + replicated)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)))
    if by_rows:
        x = lax.all_to_all(x, by_rows, split_axis=2, concat_axis=1, tiled=True)
    if replicated:
        width = x.shape[2] // exchange.size(replicated)
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(replicated) * width, width, axis=2)
    return x


def scatter_results(x: jax.Array, bucket: Bucket, exchange: Exchange) -> Sequence[jax.Array]:
    """Scatters results to the devices with their blocks; returns the blocks of each run.

    Undoes `gather_matrices`.
    """
    block, slots = bucket.block, len(x)
    sharded, unsharded, by_rows, replicated = _axes(block, exchange)
    if replicated:
        x = all_gather(x, replicated, 2)
    if by_rows:
        x = lax.all_to_all(x, by_rows, split_axis=1, concat_axis=2, tiled=True)
    x = x[:, :, : block.gathered_shape(sharded, exchange.sizes)[1]]
    shape, order = _interleaved(block, sharded, exchange)
    x = x.reshape(slots, *(shape[axis] for axis in order[1:])).transpose(np.argsort(order))
    x = x.reshape(slots, exchange.size(sharded), *block.shape)
    if sharded:
        x = lax.all_to_all(x, sharded, split_axis=1, concat_axis=1, tiled=True)
    lengths = [run.stop - run.start for run in bucket.runs]
    places = np.flatnonzero(bucket.real)

    def in_order(x: jax.Array) -> jax.Array:
        """The bucket's matrices, from `(slots, unsharded places, sharded places, ...)`."""
        axes = unsharded + sharded
        y = x.reshape(slots, *(exchange.sizes[axis] for axis in axes), *x.shape[3:])
        order = [0, *(1 + axes.index(axis) for axis in exchange.matrix_axes)]
        y = y.transpose(*order, *range(len(order), y.ndim)).reshape(-1, *x.shape[3:])
        return y[: len(places)] if bucket.real.ravel()[: len(places)].all() else y[places]

    matrix = math.prod(block.shape) * x.dtype.itemsize
    padding = bucket.real.size - len(places)
    if not unsharded:
        return lax.split(in_order(x[:, None]), lengths)
    if bucket.real.size * matrix <= _GATHERED_AT_ONCE and (
        4 * padding <= bucket.real.size or padding * matrix < _PADDING_BYTES
    ):
        return lax.split(in_order(all_gather(x, unsharded, 1, tiled=False)), lengths)
    # One parameter's results after another, and no padding: each device first gets a piece of every
    # matrix, along a dimension that the devices divide or else the longest one, padded.
    devices = exchange.size(unsharded)
    axis = max(range(x.ndim - 2), key=lambda i: (block.shape[i] % devices == 0, block.shape[i]))
    length = block.shape[axis]
    x = jnp.pad(x, [(0, -length % devices if i == 2 + axis else 0) for i in range(x.ndim)])
    x = lax.all_to_all(x[:, None], unsharded, split_axis=3 + axis, concat_axis=1, tiled=True)
    pieces = [all_gather(piece, unsharded, 1 + axis) for piece in lax.split(in_order(x), lengths)]
    return [lax.slice_in_dim(piece, 0, length, axis=1 + axis) for piece in pieces]


def members_sent(bucket: Bucket, exchange: Exchange) -> tuple[np.ndarray, Axes]:
    """The matrices that a device sends, by its place along the axes that replicate them; and those.

    `(places along those axes, slots * places along the sharding axes)`, arbitrary for padding.
    """
    sharded, unsharded, *_ = _axes(bucket.block, exchange)
    axes = exchange.matrix_axes
    member = np.maximum(np.cumsum(bucket.real) - 1, 0)
    member = member.reshape(-1, *(exchange.sizes[axis] for axis in axes))
    order = [[1 + axes.index(axis) for axis in some] for some in (unsharded, sharded)]
    member = member.transpose(*order[0], 0, *order[1])
    return member.reshape(exchange.size(unsharded), -1), unsharded


def _axes(block: Block, exchange: Exchange) -> tuple[Axes, Axes, Axes, Axes]:
    """Matrix axes that shard a matrix, or replicate it; column axes that shard rows, or replicate.

    Column axes that already shard columns need no exchange. `X X^H X` does not depend on the order
    of columns and rows, as long as it is the same on all devices of a group.
    """
    on_rows, on_columns = (
        {axis for _, axes in dims for axis in axes} for dims in (block.rows, block.columns)
    )
    sharding = on_rows | on_columns
    return (
        tuple(axis for axis in exchange.matrix_axes if axis in sharding),
        tuple(axis for axis in exchange.matrix_axes if axis not in sharding),
        tuple(axis for axis in exchange.column_axes if axis in on_rows),
        tuple(axis for axis in exchange.column_axes if axis not in sharding),
    )


def _interleaved(block: Block, sharded: Axes, exchange: Exchange) -> tuple[list[int], list[int]]:
    """The shape after the exchange, and the order that puts every axis before what it shards."""
    shape, order = [0, *(exchange.sizes[axis] for axis in sharded), *block.shape], [0]
    for number, (_, axes) in enumerate(block.rows + block.columns):
        order += [1 + sharded.index(axis) for axis in axes if axis in sharded]
        order.append(1 + len(sharded) + number)
    return shape, order
