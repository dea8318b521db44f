"""Flax's boxes, frozen trees and scanned layers: record, clip, record again."""

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
THRESHOLD = 1.0
NORMAL = nn.initializers.normal(0.7)


class Layer(nn.Module):
    """One layer without a residual, so that layers differ."""

    box: Any = None

    @nn.compact
    def __call__(self, x, _=None):
        init = self.box(NORMAL, (None, None, None)) if self.box else NORMAL
        attention = nn.MultiHeadDotProductAttention(
            num_heads=3, kernel_init=init, bias_init=NORMAL, name="attn"
        )
        return nn.LayerNorm()(attention(x)), None


def recorded(model: nn.Module, params: Any) -> Any:
    return jax.jit(mc_linen.capture_max_logits(model.apply))({"params": params}, X)[1]


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_linen_with_the_whole_variables_and_boxes(box):
    model = Layer(box=box)
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    before = recorded(model, params)
    new, info = apply_qk_clip({"params": params}, before, threshold=THRESHOLD)
    kernel = new["params"]["attn"]["query"]["kernel"]
    assert type(kernel) is type(params["attn"]["query"]["kernel"])
    assert isinstance(kernel, nn.Partitioned)
    (then,), (now,) = jax.tree.leaves(before), jax.tree.leaves(recorded(model, new["params"]))
    np.testing.assert_allclose(now, np.minimum(then, THRESHOLD), rtol=1e-5)
    assert list(info.gamma) == ["attn"]
    frozen: Any = flax.core.FrozenDict(nn.meta.unbox(params))
    again, _ = apply_qk_clip(frozen, flax.core.FrozenDict(before), threshold=THRESHOLD)
    assert isinstance(again, flax.core.FrozenDict)
    np.testing.assert_array_equal(again["attn"]["query"]["kernel"], kernel.value)


@pytest.mark.parametrize("axis", [1, -1])
def test_linen_scan(axis):
    axes: Any = {"params": axis, "intermediates": 0}
    rngs: Any = {"params": True}
    scanned: Any = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs=rngs, length=4)
    model = scanned(name="layers")
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    before = recorded(model, params)
    new, info = apply_qk_clip(params, before, threshold=THRESHOLD)
    assert int(info.total_clipped) > 0
    # Later layers see other inputs once the first is clipped, so compare the first layer's heads.
    (then,), (now,) = jax.tree.leaves(before), jax.tree.leaves(recorded(model, new))
    np.testing.assert_allclose(now[0], np.minimum(then[0], THRESHOLD), rtol=1e-5)
    gamma = np.where(np.asarray(then) > THRESHOLD, THRESHOLD / np.asarray(then), 1.0)
    np.testing.assert_allclose(info.gamma["attn"], gamma, rtol=1e-6)
    ratio = np.asarray(new["attn"]["query"]["bias"] / params["attn"]["query"]["bias"])
    ratio = np.moveaxis(ratio, axis, 0)
    expected = np.broadcast_to(gamma[..., None] ** 0.5, ratio.shape)
    np.testing.assert_allclose(ratio, expected, rtol=1e-5)


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
