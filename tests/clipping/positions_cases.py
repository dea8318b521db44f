"""Attention whose queries and keys are not plain projections of one sequence."""

from typing import Any

import numpy as np

from tests.clipping.oracle import Array, Case, heads_in, linear, normal, per_query


def _params(rng, s) -> dict[str, Any]:
    return {
        name: {
            "kernel": normal(rng, s.model, heads, s.head),
            "bias": normal(rng, heads, s.head),
        }
        for name, heads in (("query", s.heads), ("key", s.kv_heads))
    }


def _rotated(y: Array, features: int) -> Array:
    """Rotates the first features of every head, in pairs, by the token's position."""
    half = features // 2
    angle = np.arange(len(y))[:, None, None] / 10.0 ** (np.arange(half) / half)
    a, b = y[..., :half], y[..., half:features]
    turned = (a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle))
    return np.concatenate([*turned, y[..., features:]], axis=-1)


def _rotary(share: float) -> dict[str, Any]:
    def heads_of(p, x, s):
        features = 2 * round(share * s.head / 2)
        q = _rotated(heads_in(linear(x, p["query"]), s.heads), features)
        k = _rotated(heads_in(linear(x, p["key"]), s.kv_heads), features)
        return q, per_query(k, s.heads)

    return {"params": _params, "heads_of": heads_of}


def _cross(p, x, s):
    """Keys of another sequence, of another length."""
    memory = 0.5 + x[::-1][:5]
    k = heads_in(linear(memory, p["key"]), s.kv_heads)
    return heads_in(linear(x, p["query"]), s.heads), per_query(k, s.heads)


POSITIONS = (
    Case("rotary", **_rotary(1.0)),
    Case("partial rotary", **_rotary(0.5), own_keys=False),
    Case("cross-attention", _params, _cross, own_keys=False),
)
