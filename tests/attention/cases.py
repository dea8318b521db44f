"""Attention calls that every implementation is asked for: masks, windows, lengths, heads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Keywords = Callable[[np.random.Generator, tuple[int, ...]], dict[str, Any]]


class Call(NamedTuple):
    """What one call is given."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    keywords: dict[str, Any]


class Case(NamedTuple):
    """A call's sizes, and its further arguments made from a generator and the full pair shape."""

    queries: int
    keys: int
    heads: int
    key_heads: int
    keywords: Keywords

    def make(self, dtype: Any = jnp.float32, value_dim: int = 8) -> Call:
        """Draws the arrays, always the same ones."""
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> jax.Array:
            return jnp.asarray(2 * rng.standard_normal(shape), dtype)

        return Call(
            draw(2, self.queries, self.heads, 8),
            draw(2, self.keys, self.key_heads, 8),
            draw(2, self.keys, self.key_heads, value_dim),
            self.keywords(rng, (2, self.heads, self.queries, self.keys)),
        )


def _mask(rng: np.random.Generator, shape: tuple[int, ...], share: float = 0.4) -> jax.Array:
    return jnp.asarray(rng.random(shape) < share)


def _empty(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    """A mask under which some queries see nothing, and one head of four sees nothing at all."""
    return _mask(rng, shape).at[:, :, 3].set(False).at[:, 1].set(False)


def _bias(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(30 * rng.standard_normal(shape), jnp.float32)


def _hiding(low: float) -> Keywords:
    return lambda r, s: {"bias": jnp.where(_mask(r, s, 0.5), _bias(r, s), low)}


def _lengths(**lengths: tuple[int, int]) -> dict[str, Any]:
    return {f"{name}_seq_lengths": jnp.asarray(n, jnp.int32) for name, n in lengths.items()}


CASES: dict[str, Case] = {
    "plain": Case(40, 40, 4, 4, lambda r, s: {}),
    "one key head": Case(40, 40, 4, 1, lambda r, s: {"scale": 0.7}),
    "negative scale, cross": Case(40, 72, 4, 2, lambda r, s: {"scale": -0.2}),
    "causal": Case(72, 72, 4, 2, lambda r, s: {"is_causal": True}),
    "causal, more keys": Case(40, 72, 4, 2, lambda r, s: {"is_causal": True}),
    "causal, more queries": Case(72, 40, 4, 2, lambda r, s: {"is_causal": True}),
    "sided window": Case(72, 72, 4, 4, lambda r, s: {"local_window_size": (5, 1)}),
    "causal window": Case(
        72, 72, 4, 2, lambda r, s: {"is_causal": True, "local_window_size": (4, 0)}
    ),
    "many blocks of a window": Case(200, 150, 2, 1, lambda r, s: {"local_window_size": (40, 30)}),
    "window past the keys": Case(72, 40, 4, 2, lambda r, s: {"local_window_size": 3}),
    "mask": Case(40, 40, 4, 2, lambda r, s: {"mask": _mask(r, s)}),
    "mask of keys": Case(40, 40, 4, 2, lambda r, s: {"mask": _mask(r, (2, 1, 1, s[3]))}),
    "mask without batch": Case(40, 40, 4, 2, lambda r, s: {"mask": _mask(r, s[2:])}),
    "empty rows, causal": Case(
        72, 72, 4, 2, lambda r, s: {"mask": _empty(r, s), "is_causal": True}
    ),
    "nothing at all": Case(40, 40, 4, 2, lambda r, s: {"mask": jnp.zeros(s, bool)}),
    "no keys": Case(40, 40, 4, 2, lambda r, s: _lengths(key_value=(0, 7))),
    "both lengths, causal": Case(
        *(72, 72, 4, 2),
        lambda r, s: _lengths(query=(60, 5), key_value=(50, 5)) | {"is_causal": True},
    ),
    "bias for all": Case(40, 40, 4, 2, lambda r, s: {"bias": _bias(r, (1, 1, 1, s[3]))}),
    "bias of finfo.min": Case(40, 40, 4, 2, _hiding(float(np.finfo(np.float32).min))),
    "bias of -inf": Case(40, 40, 4, 2, _hiding(-np.inf)),
    "bias of -1e9": Case(40, 40, 4, 2, _hiding(-1e9)),
    "bias, causal": Case(72, 72, 4, 2, lambda r, s: {"bias": _bias(r, s), "is_causal": True}),
}
