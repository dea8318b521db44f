"""What every case of attention shares: random weights, a linear layer, the definition of a maximum.

All in float64 NumPy, apart from the weights, which are float32 as a model keeps them.
"""

from typing import Any

import numpy as np

Array = np.ndarray


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
