"""The maximum that one bad piece cannot hide: finite numbers first, then NaN, +inf, -inf.

A global batch is seen in pieces, and a piece may overflow. QK-Clip never acts on a maximum that is
not finite, so under a plain maximum one NaN would switch the clip off for all pieces.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

# Rank of what is not finite, above that of every finite number and of -inf.
_POSITIVE_INFINITY, _NOT_A_NUMBER = 1, 2


def separate(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Splits numbers into finite values (-inf elsewhere) and ranks of what was not finite.

    Both are reduced by a plain maximum, also across devices, and put together by `join`.
    """
    bad = jnp.where(jnp.isnan(x), _NOT_A_NUMBER, jnp.where(x > 0, _POSITIVE_INFINITY, 0))
    rank = jnp.where(jnp.isfinite(x), 0, bad)
    return jnp.where(rank == 0, x, -jnp.inf), rank.astype(x.dtype)


def join(values: Float[Array, "..."], rank: Float[Array, "..."]) -> Float[Array, "..."]:
    """Undoes `separate`: what was not finite comes back where nothing finite was found."""
    missing = ~jnp.isfinite(values)
    values = jnp.where(missing & (rank == _POSITIVE_INFINITY), jnp.inf, values)
    return jnp.where(missing & (rank == _NOT_A_NUMBER), jnp.nan, values)


def max_over(x: Float[Array, "..."], axes: Sequence[int]) -> Float[Array, "..."]:
    """Returns the finite-first maximum over axes.

    Example:
        >>> import jax.numpy as jnp
        >>> max_over(jnp.array([[1.0, jnp.nan], [jnp.nan, jnp.nan]]), (0,)).tolist()
        [1.0, nan]
    """
    return join(*(part.max(tuple(axes)) for part in separate(x)))


def maximum(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the finite-first maximum of two arrays, elementwise."""
    pairs = zip(separate(x), separate(y), strict=True)
    return join(*(jnp.maximum(a, b) for a, b in pairs))
