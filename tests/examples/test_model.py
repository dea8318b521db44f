"""The model is causal, its positions are relative, and it records every head's largest logit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.model import GPT, ModelConfig, next_byte_loss

CONFIG = ModelConfig(layers=2, width=32, hidden=64)
MODEL = GPT(CONFIG)
apply = jax.jit(lambda params, tokens: MODEL.apply({"params": params}, tokens))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 12), jnp.uint8))["params"]


def test_a_later_byte_changes_no_earlier_logit(params):
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 256).astype(jnp.uint8)
    before, after = (apply(params, x) for x in (tokens, tokens.at[:, 7].set(tokens[:, 7] ^ 1)))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()


def test_recorded_maxima_are_those_of_the_definition(params):
    """Block 0 again in float64 NumPy, one pair of positions at a time."""
    tokens = np.asarray(jax.random.randint(jax.random.key(2), (1, 9), 0, 256))
    loss = jax.jit(next_byte_loss, static_argnums=0)
    _, recorded = loss(MODEL, params, jnp.asarray(tokens, jnp.uint8))
    assert set(recorded) == {"block_0", "block_1"}
    (maxima,) = recorded["block_0"]["attention"]["max_logits"]
    assert maxima.shape == (CONFIG.query_heads,)
    as64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    block = as64["block_0"]
    x = as64["embed"]["embedding"][tokens[0, :-1]]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * block["attention_norm"]["scale"]
    half = CONFIG.head_dim // 2

    def turned(vector: np.ndarray, time: int) -> np.ndarray:
        pairs = vector[:half] + 1j * vector[half:]
        pairs = pairs * np.exp(1j * time * 10_000.0 ** (-np.arange(half) / half))
        return np.concatenate([pairs.real, pairs.imag])

    for head in range(CONFIG.query_heads):
        shared = head * CONFIG.key_heads // CONFIG.query_heads
        query = x @ block["attention"]["query"]["kernel"][:, head]
        key = x @ block["attention"]["key"]["kernel"][:, shared]
        largest = max(
            turned(query[t], t) @ turned(key[s], s) / np.sqrt(CONFIG.head_dim)
            for t in range(len(x))
            for s in range(t + 1)
        )
        np.testing.assert_allclose(maxima[head], largest, rtol=2e-5)
