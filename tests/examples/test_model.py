"""The model is causal, its positions are relative, and it records every head's largest logit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.model import GPT, ModelConfig, next_byte_loss, rotate
from common.sample import sample

CONFIG = ModelConfig(layers=2, width=32, hidden=64)
loss = jax.jit(next_byte_loss, static_argnums=0)
apply = jax.jit(GPT.apply, static_argnums=0)


@pytest.fixture(scope="module")
def model_and_params():
    model = GPT(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12), jnp.uint8))["params"]


def test_a_later_byte_changes_no_earlier_logit(model_and_params):
    model, params = model_and_params
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 256).astype(jnp.uint8)
    changed = tokens.at[:, 7].set(tokens[:, 7] ^ 1)
    before = apply(model, {"params": params}, tokens)
    after = apply(model, {"params": params}, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()


def test_every_layer_records_one_maximum_a_query_head(model_and_params):
    model, params = model_and_params
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 256).astype(jnp.uint8)
    _, recorded = loss(model, params, tokens)
    assert set(recorded) == {f"block_{layer}" for layer in range(CONFIG.layers)}
    for block in recorded.values():
        (maxima,) = block["attention"]["max_logits"]
        assert maxima.shape == (CONFIG.query_heads,)
        assert bool(jnp.isfinite(maxima).all())


def test_recorded_maxima_are_those_of_the_definition(model_and_params):
    """Block 0 again in float64 NumPy, one pair of positions at a time."""
    model, params = model_and_params
    tokens = np.asarray(jax.random.randint(jax.random.key(2), (1, 9), 0, 256))
    _, recorded = loss(model, params, jnp.asarray(tokens, jnp.uint8))
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
        (maxima,) = recorded["block_0"]["attention"]["max_logits"]
        np.testing.assert_allclose(maxima[head], largest, rtol=2e-5)


def test_rotation_keeps_lengths_and_knows_distances_only():
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))
    turned = rotate(jnp.broadcast_to(x, (1, 10, 2, 8)))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1)[0],
        jnp.broadcast_to(jnp.linalg.norm(x, axis=-1)[0], (10, 2)),
        rtol=1e-6,
    )
    products = jnp.einsum("bthd,bshd->hts", turned, turned)
    np.testing.assert_allclose(products[:, 3, 1], products[:, 8, 6], rtol=1e-5)


def test_a_sample_is_the_same_for_the_same_seed(model_and_params):
    model, params = model_and_params

    def text(seed: int) -> str:
        return sample(model, params, prompt="def ", count=20, length=12, seed=seed)

    assert text(0) == text(0) != text(1)
    assert text(0).startswith("def ")


def test_a_cold_sample_is_the_most_likely_continuation(model_and_params):
    """Against a plain loop that scores the whole text so far, from a window that is not full."""
    model, params = model_and_params
    text = list(b"def ")
    for _ in range(8):
        window = jnp.asarray([text[-6:]], jnp.uint8)
        text.append(int(apply(model, {"params": params}, window)[0, -1].argmax()))
    cold = sample(model, params, prompt="def ", count=8, length=6, temperature=1e-6)
    assert cold == "def " + bytes(text[4:]).decode(errors="replace")
