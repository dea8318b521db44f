"""What a matrix tells about an optimizer, as numbers: from its Gram matrix, without an SVD.

Let `G = X X^H` for a wide `X` of `m` rows, with eigenvalues `sigma_i^2`. Two sums over them are
read off the entries of `G`:

    tr G = sum sigma_i^2,        ||G||_F^2 = sum sigma_i^4

and with them how many directions `X` really has: their ratio `(tr G)^2 / ||G||_F^2` is `k` where
`k` singular values are equal and the others are zero, and something in between elsewhere. It is `m`
for an orthogonal matrix and 1 for one of rank one. The distance of `X` from an orthogonal matrix is
the same number seen from the other side, for

    ||G / s^2 - I||_F / sqrt(m) = sqrt(m / rank - 1)        with s^2 = tr G / m

Only the largest singular value asks for an iteration.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from muonclip_jax.newton_schulz.products import gram, matmul

#: Steps of the power iteration. Whatever the spectrum, the relative error of the eigenvalue after
#: `k` steps from a random start is like `log(m) / k` in the mean (Kuczynski and Wozniakowski 1992,
#: SIAM J. Matrix Anal. Appl. 13), and that of its root half as large. A step costs two operations
#: an entry of `G`; making `G` costs `2 n`.
POWER_STEPS = 64


class UpdateFigures(NamedTuple):
    """Figures of a stack of update matrices, float32, `(count,)` each.

    Attributes:
        rms: Root of the mean square of the entries.
        spectral_norm: Largest singular value, from `POWER_STEPS` steps of the power iteration:
            never more than that, but for rounding.
        orthogonality_error: `||X X^H / s^2 - I||_F / sqrt(m)` with `s^2 = ||X||_F^2 / m`, the root
            of the mean of `(sigma_i^2 / s^2 - 1)^2`. It is 0 for any multiple of an orthogonal
            matrix, so that rate and scale play no part, `sqrt(m - 1)` for a matrix of rank one,
            and 1 for the zero matrix.
    """

    rms: Float[Array, " count"]
    spectral_norm: Float[Array, " count"]
    orthogonality_error: Float[Array, " count"]


def update_figures(x: Inexact[Array, "count m n"]) -> UpdateFigures:
    """Measures wide update matrices.

    Args:
        x: `(count, m, n)` with `m <= n`.

    Returns:
        The figures of each matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> figures = update_figures(3 * jnp.eye(2, 8)[None])
        >>> [float(figure[0]) for figure in figures]
        [1.0606601238250732, 3.0, 0.0]
    """
    size, y = _scaled(x)
    product = gram(y)
    mean = jnp.trace(jnp.real(product), axis1=-2, axis2=-1) / (x.shape[-2] * x.shape[-1])
    return UpdateFigures(
        rms=size * jnp.sqrt(mean),
        spectral_norm=size * jnp.sqrt(_largest_eigenvalue(product)),
        orthogonality_error=_distance_from_identity(product),
    )


def effective_rank(x: Inexact[Array, "count m n"]) -> Float[Array, " count"]:
    r"""Returns how many directions a matrix has, weighted by their energy.

    .. math:: \|X\|_F^4 / \|X X^H\|_F^2 = (\sum_i \sigma_i^2)^2 / \sum_i \sigma_i^4

    At least the stable rank `||X||_F^2 / ||X||_2^2` and at most the rank. Of the ranks in use it is
    the one that needs one product and no iteration, and in float32 it does not see the noise among
    small singular values, as an entropy of them does. 0 for the zero matrix.

    Args:
        x: `(count, m, n)` with `m <= n`.

    Returns:
        The rank of each matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> effective_rank(jnp.diag(jnp.asarray([5.0, 5.0, 0.0]))[None]).tolist()
        [2.0]

    References:
        Bartlett, Long, Lugosi and Tsigler 2020, Benign overfitting in linear regression,
        arXiv 1906.11300, Definition 3: `R_0` of the matrix `X X^H`.
    """
    _, y = _scaled(x)
    product = gram(y)
    trace = jnp.trace(jnp.real(product), axis1=-2, axis2=-1)
    squares = jnp.sum(jnp.abs(product) ** 2, axis=(-2, -1))
    return trace**2 / jnp.where(squares == 0, 1, squares)


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest entry of each matrix, and the matrix by it, in float32 or complex64.

    Squares and fourth powers then neither overflow nor vanish, whatever the rate.
    """
    y = x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)
    size = jnp.max(jnp.abs(y), axis=(-2, -1))
    return size, y / jnp.where(size == 0, 1, size)[:, None, None].astype(y.dtype)


def _distance_from_identity(product: jax.Array) -> jax.Array:
    rows = product.shape[-1]
    mean = jnp.trace(jnp.real(product), axis1=-2, axis2=-1)[:, None, None] / rows
    # Not by sqrt(m / rank - 1), in which all digits of a small distance cancel.
    identity = jnp.broadcast_to(jnp.eye(rows, dtype=product.dtype), product.shape)
    difference = product / jnp.where(mean == 0, 1, mean) - identity
    return jnp.sqrt(jnp.sum(jnp.abs(difference) ** 2, axis=(-2, -1)) / rows)


def _largest_eigenvalue(product: jax.Array) -> jax.Array:
    """The power iteration from one fixed start, on positive semi-definite matrices."""
    rows = product.shape[-1]
    # Random, so that no structure of a network is orthogonal to it.
    start = np.random.default_rng(0).standard_normal((rows, 1))

    def step(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = matmul(product, vectors)
        length = jnp.sqrt(jnp.sum(jnp.abs(moved) ** 2, axis=(-2, -1), keepdims=True))
        return moved / jnp.where(length == 0, 1, length).astype(moved.dtype), length

    # The first step is outside of the loop: inside `shard_map` its result varies over devices as
    # the matrices do, which a constant does not.
    first, length = step(jnp.asarray(start / np.linalg.norm(start), product.dtype))
    _, length = jax.lax.fori_loop(1, POWER_STEPS, lambda _, carry: step(carry[0]), (first, length))
    return length[:, 0, 0]
