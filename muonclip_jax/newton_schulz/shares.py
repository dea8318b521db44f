"""What couples the devices that share a matrix's columns: sums, maxima and one product.

`X = [X_1 ... X_k]` lies on `k` devices. Whatever Newton-Schulz needs to know of the whole matrix is
small: its norm, its largest entry, and `X X^H = sum_i X_i X_i^H`, an `m x m` matrix whatever the
number of columns. All devices then hold that matrix, and share its square by rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._devices import all_gather
from muonclip_jax.newton_schulz.products import accumulator, gram, matmul_add, symmetric_product


class Shares(NamedTuple):
    """How to compute with matrices of which this device has some columns, maybe all.

    Attributes:
        sum: Adds arrays of all devices, entry by entry.
        max: Their largest, entry by entry.
        quadratic: `(R, b, c)` to `b R + c R R`, of a Hermitian matrix that every device has.
        implementation: Who computes the symmetric products: a name of `products.IMPLEMENTATIONS`.
        platform: What they run on; None is JAX's default.
    """

    sum: Callable[[jax.Array], jax.Array]
    max: Callable[[jax.Array], jax.Array]
    quadratic: Callable[[jax.Array, float, float], jax.Array]
    implementation: str
    platform: str | None = None

    def symmetric(
        self, x: jax.Array, y: jax.Array, addend: jax.Array | None = None, **factors: Any
    ) -> jax.Array:
        """Computes `symmetric_product` as all of these products are computed."""
        return symmetric_product(
            x,
            y,
            addend,
            implementation=self.implementation,
            platform=self.platform,
            **factors,
        )

    def gram(self, x: jax.Array, **options: Any) -> jax.Array:
        """Computes `x x^H` of the columns that are here; `sum` adds those of all devices."""
        return gram(x, implementation=self.implementation, platform=self.platform, **options)

    def polynomial(
        self, r: jax.Array, b: float, c: float, square: jax.Array | None = None
    ) -> jax.Array:
        """Computes `b R + c R R`, of what is there where `R R` is known or not wanted."""
        wide = accumulator(r.dtype)
        if c and square is None:
            return self.quadratic(r, b, c)
        result = b * r.astype(wide)
        if square is not None:
            result = result + c * square.astype(wide)
        return result.astype(r.dtype)


def _identity(x: jax.Array) -> jax.Array:
    return x


def whole_on(implementation: str, platform: str | None = None) -> Shares:
    """Returns how one device computes that has all columns."""

    def quadratic(r: jax.Array, b: float, c: float) -> jax.Array:
        addend = r if b else None
        return shares.symmetric(r, r, addend, alpha=c, beta=b)

    shares = Shares(_identity, _identity, quadratic, implementation, platform)
    return shares


#: All columns on one device, and XLA's products.
WHOLE = whole_on("xla")


def shares_along(
    axes: tuple[str, ...], implementation: str = "xla", platform: str | None = None
) -> Shares:
    """Returns how devices along mapped axes compute together, each with some columns."""
    return Shares(
        functools.partial(lax.psum, axis_name=axes),
        functools.partial(lax.pmax, axis_name=axes),
        functools.partial(_shared_quadratic, axes=axes),
        implementation,
        platform,
    )


def _shared_quadratic(r: jax.Array, b: float, c: float, axes: tuple[str, ...]) -> jax.Array:
    """`b r + c r r`, each device computing some rows; in the dtype of `r`."""
    m, rank = r.shape[-1], r.ndim
    ways = lax.axis_size(axes)
    rows = -(-m // ways)
    padded = jnp.pad(r, [(0, 0)] * (rank - 2) + [(0, rows * ways - m), (0, 0)])
    mine = lax.dynamic_slice_in_dim(padded, lax.axis_index(axes) * rows, rows, axis=rank - 2)
    # Rounded before it is sent: half the bytes.
    result = matmul_add(mine, r, mine if b else None, alpha=c, beta=b)
    gathered = all_gather(result, axes, rank - 2)
    return lax.slice_in_dim(gathered, 0, m, axis=rank - 2)
