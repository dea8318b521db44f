"""Random attention weights in the layout of Flax's modules."""

import jax.numpy as jnp
import numpy as np


def normal(*shape, dtype=jnp.float32, seed=0):
    """Returns the same numbers for the same shape and seed, whatever ran before."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def attention(heads=4, kv_heads=None, d=6, hd=8, bias=True, stack=(), dtype=jnp.float32):
    def projection(count, seed):
        kernel = {"kernel": normal(*stack, d, count, hd, dtype=dtype, seed=seed)}
        shift = {"bias": normal(*stack, count, hd, dtype=dtype, seed=seed)}
        return kernel | shift if bias else kernel

    return {
        "query": projection(heads, 1),
        "key": projection(kv_heads or heads, 2),
        "value": projection(kv_heads or heads, 3),
        "out": {"kernel": normal(*stack, heads, hd, d, dtype=dtype)},
    }
