"""What couples the devices that share a matrix's columns: sums, maxima and one square.

`X = [X_1 ... X_k]` lies on `k` devices. Whatever Newton-Schulz needs to know of the whole matrix is
small: its norm, its largest entry, and `X X^H = sum_i X_i X_i^H`, an `m x m` matrix whatever the
number of columns. All devices then hold that matrix, and share its square by rows.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.polar.products import commuting, matmul


class Shares(NamedTuple):
    """How to compute with matrices of which this device has some columns, maybe all.

    Attributes:
        sum: Adds arrays of all devices, entry by entry.
        max: Their largest, entry by entry.
        square: From a Hermitian matrix that every device has to its product with itself.
    """

    sum: Callable[[jax.Array], jax.Array]
    max: Callable[[jax.Array], jax.Array]
    square: Callable[[jax.Array], jax.Array]


def _identity(x: jax.Array) -> jax.Array:
    return x


def _square(product: jax.Array) -> jax.Array:
    return commuting(product, product)


#: All columns on one device.
WHOLE = Shares(_identity, _identity, _square)


def shares_along(axes: tuple[str, ...]) -> Shares:
    """Returns how devices along mapped axes compute together, each with some columns."""
    return Shares(
        functools.partial(lax.psum, axis_name=axes),
        functools.partial(lax.pmax, axis_name=axes),
        functools.partial(_shared_square, axes=axes),
    )


def _shared_square(product: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`product @ product`, each device computing some rows; in the dtype of `product`."""
    m, rank = product.shape[-1], product.ndim
    ways = lax.axis_size(axes)
    rows = -(-m // ways)
    padded = jnp.pad(product, [(0, 0)] * (rank - 2) + [(0, rows * ways - m), (0, 0)])
    mine = lax.dynamic_slice_in_dim(padded, lax.axis_index(axes) * rows, rows, axis=rank - 2)
    # Rounded before it is sent: half the bytes.
    squared = matmul(mine, product).astype(product.dtype)
    gathered = lax.all_gather(squared, axes, axis=rank - 2, tiled=True, to="invarying")
    return lax.slice_in_dim(gathered, 0, m, axis=rank - 2)
