"""Flax's boxes, frozen trees and pure dicts: record, clip, record again."""

from typing import Any

import flax.core
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from muonclip_jax import linen as mc_linen, nnx as mc_nnx, qk_clip
from muonclip_jax.clipping import apply_qk_clip

X = jax.random.normal(jax.random.key(0), (2, 5, 12))
NORMAL = nn.initializers.normal(0.7)


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_linen_with_the_whole_variables_and_boxes(box):
    boxed = box(NORMAL, (None, None, None))
    model = nn.Sequential([nn.MultiHeadAttention(3, kernel_init=boxed, bias_init=NORMAL)])
    capture = jax.jit(mc_linen.capture_max_logits(model.apply))
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    before = capture({"params": params}, X)[1]
    new, info = apply_qk_clip({"params": params}, before, threshold=1.0)
    kernel = new["params"]["layers_0"]["query"]["kernel"]
    assert type(kernel) is type(params["layers_0"]["query"]["kernel"])
    assert isinstance(kernel, nn.Partitioned)
    (then,), (now,) = jax.tree.leaves(before), jax.tree.leaves(capture(new, X)[1])
    np.testing.assert_allclose(now, np.minimum(then, 1.0), rtol=1e-5)
    assert int(info.total_clipped) > 0
    assert list(info.gamma) == ["layers_0"]
    frozen: Any = flax.core.FrozenDict(nn.meta.unbox(params))
    again, _ = apply_qk_clip(frozen, flax.core.FrozenDict(before), threshold=1.0)
    assert isinstance(again, flax.core.FrozenDict)
    np.testing.assert_array_equal(again["layers_0"]["query"]["kernel"], kernel.value)


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="it came with Flax 0.12.6")
@pytest.mark.parametrize("how", ["apply_qk_clip", "qk_clip"])
def test_a_pure_dict_of_an_nnx_state_keeps_its_structure(how):
    """Its keys are integers where modules are in a list."""
    attention = [nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(i)) for i in range(2)]
    model = nnx.Sequential(*attention)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _, maxima = mc_nnx.capture_max_logits(model)(X)
    threshold = float(np.median(np.stack(jax.tree.leaves(maxima))))
    new, info = apply_qk_clip(params, maxima, threshold=threshold)
    if how == "qk_clip":
        zeros, tx = jax.tree.map(np.zeros_like, params), qk_clip(threshold)
        updates, _ = tx.update(zeros, tx.init(params), params, max_logits=maxima)
        new = jax.tree.map(np.add, params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert list(info.gamma) == ["layers/0", "layers/1"]
    kernels = (tree["layers"][1]["query"]["kernel"] for tree in (new, params))
    ratio = np.divide(*map(np.asarray, kernels))
    gamma = np.broadcast_to(np.asarray(info.gamma["layers/1"])[:, None] ** 0.5, ratio.shape)
    np.testing.assert_allclose(ratio, gamma, rtol=1e-5)
