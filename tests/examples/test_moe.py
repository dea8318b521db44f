"""The mixture of experts: routing and clip of its leaves, its model against NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.moe import Experts, LatentAttention, MoEConfig, Router, balanced

import muonclip_jax as mc

SIZES = {"layers": 2, "width": 16, "heads": 2, "query_latent": 12, "key_value_latent": 8}
SIZES |= {"plain": 4, "rotated": 2, "value": 6, "experts": 4, "expert_hidden": 8}
TINY = MoEConfig(**SIZES, dense_hidden=16)


def variables(module: Any, *arguments: Any) -> Any:
    return jax.jit(module.init)(jax.random.key(0), *arguments)["params"]


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 5, TINY.width))


def test_each_token_is_the_weighted_sum_of_its_best_experts(x):
    """Against a loop over tokens and the experts that a sort of the scores gives, in float64."""
    router, experts = Router(TINY), Experts(TINY)
    routing = variables(router, x) | {"bias": jnp.array([0.3, -0.2, 0.0, 0.1])}
    routed: Any = router.apply({"params": routing}, x, mutable=["intermediates"])
    weights, sown = routed
    params = variables(experts, x, weights)
    out: Any = experts.apply({"params": params}, x, weights)

    tokens = np.asarray(x, np.float64).reshape(-1, TINY.width)
    gate, up, down = (np.asarray(params[name], np.float64) for name in ("gate", "up", "down"))
    counts = np.zeros(TINY.experts)
    for token, found in zip(tokens, np.asarray(out).reshape(-1, TINY.width), strict=True):
        scores = 1 / (1 + np.exp(-token @ np.asarray(routing["kernel"], np.float64)))
        best = np.argsort(scores + np.asarray(routing["bias"], np.float64))[-TINY.chosen :]
        counts[best] += 1
        wanted = np.zeros(TINY.width)
        for expert in best:
            inner = token @ gate[expert]
            inner = inner / (1 + np.exp(-inner)) * (token @ up[expert])
            wanted += scores[expert] / scores[best].sum() * (inner @ down[expert])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    fair = len(tokens) * TINY.chosen / TINY.experts
    np.testing.assert_allclose(sown["intermediates"]["load"][0], counts / fair, rtol=1e-6)


def test_the_bias_moves_against_the_load_and_leaves_the_weights_alone():
    weights, bias, excess = jnp.ones(3), jnp.zeros(2), jnp.array([0.5, -0.5])
    out, pullback = jax.vjp(balanced, weights, bias, excess)
    np.testing.assert_array_equal(out, weights)
    cotangents = pullback(jnp.arange(3.0))
    np.testing.assert_array_equal(cotangents[0], jnp.arange(3.0))
    np.testing.assert_array_equal(cotangents[1], excess)


def test_the_clip_brings_latent_attention_to_its_threshold(x):
    attention = LatentAttention(TINY)
    params = {"attention": variables(attention, x)}

    @jax.jit
    def maxima(params: Any) -> Any:
        _, sown = attention.apply({"params": params["attention"]}, x, mutable=["intermediates"])
        return {"attention": sown["intermediates"]["max_logits"][0]}

    before = maxima(params)
    threshold = 0.5 * float(before["attention"].min())
    assert threshold > 0
    clipped, info = mc.apply_qk_clip(params, before, threshold=threshold)
    assert int(info.total_clipped) == TINY.heads
    np.testing.assert_allclose(maxima(clipped)["attention"], threshold, rtol=1e-5)
    # All heads share the rotated key and the latent: they stay as they are.
    np.testing.assert_array_equal(
        clipped["attention"]["wkv_a"]["kernel"], params["attention"]["wkv_a"]["kernel"]
    )
