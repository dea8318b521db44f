"""Attention by its definition, pair by pair in float64 NumPy."""

from typing import Any, NamedTuple

import numpy as np

# What hides a pair from softmax; finite, so that a query that sees nothing sees all keys alike.
_HIDDEN = -2.4e38


class DenseAttention(NamedTuple):
    """Output `(B, T, N, D)`, maxima `(N,)`, gradients of `sum(out * cotangent)` by q, k and v."""

    out: np.ndarray
    max_logits: np.ndarray
    gradients: tuple[np.ndarray, ...]


def dense_attention(
    query: Any,
    key: Any,
    value: Any = None,
    bias: Any = None,
    mask: Any = None,
    *,
    cotangent: Any = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
) -> DenseAttention:
    """Computes attention as `jax.nn` names its arguments; a value that is not given is the key."""
    value = key if value is None else value
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, queries, heads, head_dim = query.shape
    keys, key_heads = key.shape[1:3]
    group = heads // key_heads
    scale = head_dim**-0.5 if scale is None else scale
    all_keys, all_values = (np.repeat(x, group, axis=2) for x in (key, value))
    unbiased = logits = scale * np.einsum("btnh,bsnh->bnts", query, all_keys)

    t, s = np.arange(queries)[:, None], np.arange(keys)[None, :]
    allowed = np.ones(logits.shape, bool)
    allowed &= True if mask is None else np.asarray(mask, bool)
    allowed &= (s <= t) | (not is_causal)
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        allowed &= (t - left <= s) & (s <= t + right)
    live = np.ones((batch, queries), bool)
    if query_seq_lengths is not None:
        live = np.arange(queries) < np.asarray(query_seq_lengths)[:, None]
    allowed &= live[:, None, :, None]
    if key_value_seq_lengths is not None:
        allowed &= s < np.asarray(key_value_seq_lengths)[:, None, None, None]
    recorded = allowed
    if bias is not None:
        bias = np.broadcast_to(np.asarray(bias, np.float64), logits.shape)
        recorded = allowed & (bias > -1e9)
        logits = logits + bias
    max_logits = np.where(recorded, unbiased, -np.inf).max(axis=(0, 2, 3), initial=-np.inf)

    logits = np.where(allowed, logits, _HIDDEN)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnd->btnd", weights, all_values)
    cotangent = np.broadcast_to(cotangent, out.shape) * live[..., None, None]

    weights_bar = np.einsum("btnd,bsnd->bnts", cotangent, all_values)
    logits_bar = weights * (weights_bar - (weights * weights_bar).sum(-1, keepdims=True))
    logits_bar = scale * np.where(allowed, logits_bar, 0.0)
    query_bar = np.einsum("bnts,bsnh->btnh", logits_bar, all_keys)
    key_bar = np.einsum("bnts,btnh->bsnh", logits_bar, query)
    value_bar = np.einsum("bnts,btnd->bsnd", weights, cotangent)

    gradients = (
        query_bar,
        *(x.reshape(batch, keys, key_heads, group, -1).sum(3) for x in (key_bar, value_bar)),
    )
    return DenseAttention(out * live[..., None, None], max_logits, gradients)
