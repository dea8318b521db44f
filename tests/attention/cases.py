"""Attention calls that every implementation is asked for: masks, windows, lengths, heads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _mask(rng: np.random.Generator, shape: tuple[int, ...], share: float = 0.4) -> jax.Array:
    return jnp.asarray(rng.random(shape) < share)


def _empty(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    """A mask under which some queries see nothing, and one head of four sees nothing at all."""
    return _mask(rng, shape).at[:, :, 3].set(False).at[:, 1].set(False)


def _bias(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(30 * rng.standard_normal(shape), jnp.float32)


def _hiding(low: float) -> Callable[..., Any]:
    return lambda r, s: {"bias": jnp.where(_mask(r, s, 0.5), _bias(r, s), low)}


def _fixed(**keywords: Any) -> Callable[..., Any]:
    return lambda r, s: keywords


def _lengths(**lengths: tuple[int, int]) -> dict[str, Any]:
    return {f"{name}_seq_lengths": jnp.asarray(n, jnp.int32) for name, n in lengths.items()}


BOTH = _lengths(query=(60, 5), key_value=(50, 5))
#: Queries, keys, query heads, key heads, and further arguments of a generator and the pairs' shape.
CASES: dict[str, tuple[int, int, int, int, Callable[..., dict[str, Any]]]] = {
    "plain": (40, 40, 4, 4, _fixed()),
    "one key head": (40, 40, 4, 1, _fixed(scale=0.7)),
    "negative scale, cross": (40, 72, 4, 2, _fixed(scale=-0.2)),
    "causal": (72, 72, 4, 2, _fixed(is_causal=True)),
    "causal, more keys": (40, 72, 4, 2, _fixed(is_causal=True)),
    "causal, more queries": (72, 40, 4, 2, _fixed(is_causal=True)),
    "sided window": (72, 72, 4, 4, _fixed(local_window_size=(5, 1))),
    "causal window": (72, 72, 4, 2, _fixed(is_causal=True, local_window_size=(4, 2))),
    "many blocks of a window": (200, 150, 2, 1, _fixed(local_window_size=(40, 30))),
    "window past the keys": (72, 40, 4, 2, _fixed(local_window_size=3)),
    "mask": (40, 40, 4, 2, lambda r, s: {"mask": _mask(r, s)}),
    "mask of keys": (40, 40, 4, 2, lambda r, s: {"mask": _mask(r, (2, 1, 1, s[3]))}),
    "mask without batch": (40, 40, 4, 2, lambda r, s: {"mask": _mask(r, s[2:])}),
    "empty rows, causal": (72, 72, 4, 2, lambda r, s: {"mask": _empty(r, s), "is_causal": True}),
    "nothing at all": (40, 40, 4, 2, lambda r, s: {"mask": jnp.zeros(s, bool)}),
    "no keys": (40, 40, 4, 2, lambda r, s: _lengths(key_value=(0, 7))),
    "both lengths, causal": (72, 72, 4, 2, _fixed(**BOTH, is_causal=True)),
    "bias for all": (40, 40, 4, 2, lambda r, s: {"bias": _bias(r, (1, 1, 1, s[3]))}),
    "bias of finfo.min": (40, 40, 4, 2, _hiding(float(np.finfo(np.float32).min))),
    "bias of -inf": (40, 40, 4, 2, _hiding(-np.inf)),
    "bias of -1e9": (40, 40, 4, 2, _hiding(-1e9)),
    "bias, causal": (72, 72, 4, 2, lambda r, s: {"bias": _bias(r, s), "is_causal": True}),
}


def make(name: str, dtype: Any = "float32", value_dim: int = 8) -> Any:
    """Draws query, key, value and keywords, always the same ones."""
    queries, keys, heads, key_heads, keywords = CASES[name]
    rng = np.random.default_rng(0)
    arrays = (
        jnp.asarray(2 * rng.standard_normal((2, *shape)), dtype)
        for shape in ((queries, heads, 8), (keys, key_heads, 8), (keys, key_heads, value_dim))
    )
    return *arrays, keywords(rng, (2, heads, queries, keys))
