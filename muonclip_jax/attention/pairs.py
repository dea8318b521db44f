"""Which query attends to which key, and the arrays of an attention call in one form.

There is one batch axis, and query heads are grouped by key head as `(K, G)`. For causality and the
window, the keys of a range of queries follow from shapes; masks and biases are sliced per block, so
no array of size queries times keys is created.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._tree import ScalarLike

# A bias at or below this hides the pair. float32 spaces its numbers by 64 here: what the logit was,
# down to differences that matter to a softmax, can no longer be told.
_FORBIDDING_BIAS = -1e9


class Inputs(NamedTuple):
    """The arrays of one attention call. Axes of mask and bias may have length one."""

    query: jax.Array  # [B, T, K, G, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array | None  # [B, S, K, D]; None if only maxima are needed
    scale: ScalarLike
    mask: jax.Array | None = None  # [B, K, G, T, S]; False for masked pairs
    bias: jax.Array | None = None  # [B, K, G, T, S]; added to the logits
    query_seq_lengths: jax.Array | None = None  # [B]; queries from here on are padding
    key_value_seq_lengths: jax.Array | None = None  # [B]; keys from here on are padding


@dataclass(frozen=True)
class Geometry:
    """Static properties of a call."""

    is_causal: bool = False  # query t attends to keys up to and including t
    window: tuple[int, int] | None = None  # query t attends to keys from t - left to t + right
    platform: str = "cpu"

    def key_range(self, start: int, stop: int, keys: int) -> tuple[int, int]:
        """Returns the range of keys to which queries `start..stop` may attend.

        Example:
            >>> Geometry(is_causal=True, window=(3, 0)).key_range(8, 12, 64)
            (5, 12)
        """
        low, high = 0, min(keys, stop) if self.is_causal else keys
        if self.window is not None:
            low, high = max(low, start - self.window[0]), min(high, stop + self.window[1])
        return (low, high) if low < high else (0, 0)


class Block(NamedTuple):
    """A range of queries and one of keys; starts may be traced."""

    query_start: int | jax.Array
    queries: int
    key_start: int | jax.Array
    keys: int

    def cut(self, x: jax.Array) -> jax.Array:
        """Slices the last two axes of a mask or bias; axes of length one are kept."""
        if x.shape[-2] != 1:
            x = lax.dynamic_slice_in_dim(x, self.query_start, self.queries, axis=-2)
        if x.shape[-1] != 1:
            x = lax.dynamic_slice_in_dim(x, self.key_start, self.keys, axis=-1)
        return x


def allowed_pairs(inputs: Inputs, geometry: Geometry, block: Block) -> jax.Array | None:
    """Returns the unmasked pairs of a block, without the bias; None if all are.

    The result broadcasts to `[B, K, G, t, s]`.
    """
    queries = block.query_start + jnp.arange(block.queries)[:, None]
    keys = block.key_start + jnp.arange(block.keys)[None, :]
    conditions = []
    if geometry.is_causal:
        conditions.append(queries >= keys)
    if geometry.window is not None:
        left, right = geometry.window
        conditions += [queries <= keys + left, queries >= keys - right]
    if inputs.mask is not None:
        conditions.append(block.cut(inputs.mask))
    if (ends := inputs.query_seq_lengths) is not None:
        conditions.append(queries < ends[:, None, None, None, None])
    if (ends := inputs.key_value_seq_lengths) is not None:
        conditions.append(keys < ends[:, None, None, None, None])
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def bias_permits(bias: jax.Array) -> jax.Array:
    """Returns False where a bias is at most `finfo(bias.dtype).min / 2` or -1e9: it masks."""
    limit = _FORBIDDING_BIAS
    if jnp.issubdtype(bias.dtype, jnp.floating):
        limit = max(limit, float(jnp.finfo(bias.dtype).min) / 2)
    return ~(bias.astype(jnp.float32) <= limit)


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def permitted_max(logits: jax.Array, permitted: jax.Array | None, axes: Sequence[int]) -> jax.Array:
    """Returns the maximum over axes of the logits of permitted pairs, in float32; -inf without any.

    Compiled as a whole outside of `jit` too, where `jax_debug_infs` would refuse the -inf of a
    hidden pair.
    """
    logits = logits.astype(jnp.float32)
    if permitted is not None:
        logits = jnp.where(permitted, logits, -jnp.inf)
    return jnp.max(logits, axis=axes, initial=-jnp.inf)
