"""Attention calls that every implementation is asked for: masks, windows, lengths, heads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest


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
    keywords: Callable[[np.random.Generator, tuple[int, ...]], dict[str, Any]]

    def make(self, dtype: Any = jnp.float32, value_dim: int = 8) -> Call:
        """Draws the arrays, always the same ones."""
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> jax.Array:
            return jnp.asarray(2 * rng.standard_normal(shape), dtype)

        pairs = (2, self.heads, self.queries, self.keys)
        return Call(
            draw(2, self.queries, self.heads, 8),
            draw(2, self.keys, self.key_heads, 8),
            draw(2, self.keys, self.key_heads, value_dim),
            self.keywords(rng, pairs),
        )


def _mask(rng: np.random.Generator, shape: tuple[int, ...], share: float = 0.4) -> jax.Array:
    return jnp.asarray(rng.random(shape) < share)


def _with_empty_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    """A mask under which some queries see nothing, and one head of four sees nothing at all."""
    return _mask(rng, shape).at[:, :, 3].set(False).at[:, 1].set(False)


def _bias(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(30 * rng.standard_normal(shape), jnp.float32)


def _forbidding(rng: np.random.Generator, shape: tuple[int, ...], low: float) -> jax.Array:
    return jnp.where(_mask(rng, shape, 0.5), _bias(rng, shape), low)


def _lengths(*lengths: int) -> jax.Array:
    return jnp.asarray(lengths, jnp.int32)


MIN = float(np.finfo(np.float32).min)

CASES: dict[str, Case] = {
    "plain": Case(40, 40, 4, 4, lambda r, s: {}),
    "grouped": Case(40, 40, 4, 2, lambda r, s: {}),
    "one key head": Case(40, 40, 4, 1, lambda r, s: {"scale": 0.7}),
    "negative scale": Case(40, 40, 4, 4, lambda r, s: {"scale": -0.2}),
    "cross": Case(40, 72, 4, 2, lambda r, s: {}),
    "causal": Case(72, 72, 4, 2, lambda r, s: {"is_causal": True}),
    "causal, more keys": Case(40, 72, 4, 2, lambda r, s: {"is_causal": True}),
    "causal, more queries": Case(72, 40, 4, 2, lambda r, s: {"is_causal": True}),
    "window": Case(72, 72, 4, 2, lambda r, s: {"local_window_size": 3}),
    "sided window": Case(72, 72, 4, 4, lambda r, s: {"local_window_size": (5, 1)}),
    "causal window": Case(
        72, 72, 4, 2, lambda r, s: {"is_causal": True, "local_window_size": (4, 0)}
    ),
    "window past the keys": Case(72, 40, 4, 2, lambda r, s: {"local_window_size": (4, 2)}),
    "mask": Case(40, 40, 4, 2, lambda r, s: {"mask": _mask(r, s)}),
    "mask for all heads": Case(40, 40, 4, 2, lambda r, s: {"mask": _mask(r, (1, 1, *s[2:]))}),
    "mask of keys": Case(40, 40, 4, 2, lambda r, s: {"mask": _mask(r, (2, 1, 1, s[3]))}),
    "mask without batch": Case(40, 40, 4, 2, lambda r, s: {"mask": _mask(r, s[2:])}),
    "empty rows": Case(72, 72, 4, 4, lambda r, s: {"mask": _with_empty_rows(r, s)}),
    "empty rows, causal": Case(
        72, 72, 4, 2, lambda r, s: {"mask": _with_empty_rows(r, s), "is_causal": True}
    ),
    "nothing at all": Case(40, 40, 4, 2, lambda r, s: {"mask": jnp.zeros(s, bool)}),
    "key lengths": Case(40, 40, 4, 2, lambda r, s: {"key_value_seq_lengths": _lengths(7, 40)}),
    "no keys": Case(40, 40, 4, 2, lambda r, s: {"key_value_seq_lengths": _lengths(0, 0)}),
    "query lengths": Case(40, 40, 4, 2, lambda r, s: {"query_seq_lengths": _lengths(40, 9)}),
    "both lengths, causal": Case(
        72,
        72,
        4,
        2,
        lambda r, s: {
            "query_seq_lengths": _lengths(60, 5),
            "key_value_seq_lengths": _lengths(50, 5),
            "is_causal": True,
        },
    ),
    "bias that adds": Case(40, 40, 4, 2, lambda r, s: {"bias": _bias(r, s)}),
    "bias for all": Case(40, 40, 4, 2, lambda r, s: {"bias": _bias(r, (1, 1, 1, s[3]))}),
    "bias of finfo.min": Case(40, 40, 4, 2, lambda r, s: {"bias": _forbidding(r, s, MIN)}),
    "bias of -inf": Case(40, 40, 4, 2, lambda r, s: {"bias": _forbidding(r, s, -np.inf)}),
    "bias of -1e9": Case(40, 40, 4, 2, lambda r, s: {"bias": _forbidding(r, s, -1e9)}),
    "bias, causal": Case(72, 72, 4, 2, lambda r, s: {"bias": _bias(r, s), "is_causal": True}),
}

#: How the XLA implementation is made to cut the sequence: not at all, or into many blocks.
BLOCKS = {"one block": 1 << 30, "many blocks": 1}

#: The cases that stand for the others where a run is long; the rest is marked slow there.
QUICK = (
    "grouped",
    "causal",
    "causal window",
    "window past the keys",
    "empty rows, causal",
    "both lengths, causal",
    "bias of -inf",
    "bias, causal",
)


def quick_first() -> list[Any]:
    """Returns the cases as test parameters."""
    return [
        pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,)) for name in CASES
    ]
