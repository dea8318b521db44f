"""The mixture of experts: the clip of its latent attention."""

from typing import Any

import jax
import numpy as np
import pytest
from common.moe import LatentAttention, MoEConfig

import muonclip_jax as mc

SIZES = {"layers": 2, "width": 16, "heads": 2, "query_latent": 12, "key_value_latent": 8}
SIZES |= {"plain": 4, "rotated": 2, "value": 6, "experts": 4, "expert_hidden": 8}
TINY = MoEConfig(**SIZES, dense_hidden=16)


def variables(module: Any, *arguments: Any) -> Any:
    return jax.jit(module.init)(jax.random.key(0), *arguments)["params"]


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 5, TINY.width))


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
