"""What every case of attention shares: sizes, random weights, a linear layer, what a maximum is.

All in float64 NumPy, apart from the weights, which are float32 as a model keeps them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one model."""

    model: int = 10
    heads: int = 4
    kv_heads: int = 2
    head: int = 6
    rope: int = 2
    value: int = 5
    latent: int = 7


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of attention."""

    name: str
    params: Callable[[np.random.Generator, Sizes], dict[str, Any]]
    heads_of: Callable[[dict[str, Any], Array, Sizes], tuple[Array, Array]]
    blocks: Any = None
    own_keys: bool = True  # as many keys as queries
    key_heads: int | None = None  # where that is part of the case

    def sizes(self, **changes: int) -> Sizes:
        sizes = Sizes(**changes)
        kv_heads = sizes.heads if self.own_keys else sizes.kv_heads
        return dataclasses.replace(sizes, kv_heads=self.key_heads or kv_heads)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def wide(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def per_query(k: Array, heads: int) -> Array:
    """Repeats shared keys, one a query head."""
    return np.repeat(k, heads // k.shape[1], axis=1)


def linear(x: Array, module: dict[str, Any]) -> Array:
    """Applies `(inputs, *features)` and its bias; features come out flat."""
    kernel = wide(module["kernel"])
    y = x @ kernel.reshape(kernel.shape[0], -1)
    return y + wide(module["bias"]).reshape(-1) if "bias" in module else y


def maxima_of(q: Array, k: Array) -> Array:
    """The definition: the largest scaled product over all pairs of tokens, `(heads,)`."""
    return np.einsum("thd,shd->hts", q, k).max((1, 2)) / np.sqrt(q.shape[-1])


def heads_in(y: Array, heads: int) -> Array:
    """Returns `(tokens, features)` as `(tokens, heads, size)`."""
    return y.reshape(len(y), heads, -1)
