"""Flax models: training steps with the clip in them on one device and on eight; boxes and dicts.

The clip's effect is looked at where nothing else moves: with a learning rate near zero a head over
the threshold is at it afterwards, and every other head is where it was.
"""

from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
import muonclip_jax.linen
import muonclip_jax.nnx

BATCH, LENGTH, WIDTH, HEADS = 8, 5, 16, 4
X = 3 * jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))


class Linen(nn.Module):
    """Two blocks, the second rematerialised."""

    @nn.compact
    def __call__(self, x):
        for i, module in enumerate(
            (nn.MultiHeadDotProductAttention, nn.remat(nn.MultiHeadDotProductAttention))
        ):
            x = x + module(HEADS, name=f"attention_{i}")(x)
        return nn.Dense(WIDTH, name="dense")(x)


class Nnx(nnx.Module):
    """Attention with shared keys and a dense layer."""

    def __init__(self, key_heads: int | None, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, num_kv_heads=key_heads, decode=False, rngs=rngs
        )
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.dense(x + self.attention(x))


PARAMS: Any = Linen().init(jax.random.key(1), X)["params"]
capture_nnx = muonclip_jax.nnx.capture_max_logits
NORMAL = nn.initializers.normal(0.7)


def linen_maxima(params: Any, x: jax.Array) -> Any:
    return muonclip_jax.linen.capture_max_logits(Linen().apply)({"params": params}, x)[1]


def same(maxima: Any, expected: Any) -> None:
    assert jax.tree.structure(maxima) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), maxima, expected)


@pytest.mark.parametrize("key_heads", [None, 2])
def test_a_step_of_the_optimizer_forwards_the_maxima_to_muonclip(key_heads):
    model = Nnx(key_heads, nnx.Rngs(0))
    before = capture_nnx(model)(X)[1]["attention"]["max_logits"]
    threshold = float(np.sort(before)[1:3].mean())
    tx = mc.muonclip(1e-9, weight_decay=0.0, qk_clip_threshold=threshold)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            out, max_logits = capture_nnx(model)(x)
            return jnp.mean(out**2), max_logits

        grads, max_logits = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, max_logits=max_logits)
        return max_logits["attention"]["max_logits"]

    same(step(model, optimizer, X), before)
    after = capture_nnx(model)(X)[1]["attention"]["max_logits"]
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)
    assert 0 < int(jnp.sum(before > threshold)) < HEADS


def test_under_jit_a_sharded_batch_has_the_maxima_of_the_whole():
    devices = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(devices):
        x = jax.device_put(X, NamedSharding(devices, P("batch")))
        placed = jax.device_put(PARAMS, NamedSharding(devices, P()))
        maxima = jax.jit(linen_maxima)(placed, x)
    same(maxima, linen_maxima(PARAMS, X))


def test_under_shard_map_one_collective_makes_them_the_maxima_of_the_whole():
    graph, state = nnx.split(Nnx(2, nnx.Rngs(0)))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def nnx_maxima(state, x):
        return capture_nnx(nnx.merge(graph, state))(x)[1]

    for function, weights in ((nnx_maxima, state), (linen_maxima, PARAMS)):
        mapped = jax.jit(
            jax.shard_map(
                lambda w, x, f=function: mc.reduce_max_logits(f(w, x), "batch"),
                mesh=mesh,
                in_specs=(P(), P("batch")),
                out_specs=P(),
            )
        )
        same(mapped(weights, X), function(weights, X))
    text = mapped.lower(PARAMS, X).compile().as_text() or ""
    assert text.count("all-reduce(") + text.count("all-reduce-start(") == 1
    # Without the reduction every device knows its own part only.
    own, whole = (linen_maxima(PARAMS, x)["attention_0"]["max_logits"] for x in (X[:1], X))
    assert np.abs(own - whole).max() > 0.1


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_linen_with_the_whole_variables_and_boxes(box):
    boxed = box(NORMAL, (None, None, None))
    model = nn.Sequential([nn.MultiHeadAttention(HEADS, kernel_init=boxed, bias_init=NORMAL)])
    capture = jax.jit(muonclip_jax.linen.capture_max_logits(model.apply))
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    before = capture({"params": params}, X)[1]
    new, info = mc.apply_qk_clip({"params": params}, before, threshold=1.0)
    kernel = new["params"]["layers_0"]["query"]["kernel"]
    assert type(kernel) is type(params["layers_0"]["query"]["kernel"])
    assert isinstance(kernel, nn.Partitioned)
    (then,), (now,) = jax.tree.leaves(before), jax.tree.leaves(capture(new, X)[1])
    np.testing.assert_allclose(now, np.minimum(then, 1.0), rtol=1e-5)
    assert int(info.total_clipped) > 0
    assert list(info.gamma) == ["layers_0"]
    frozen: Any = flax.core.FrozenDict(nn.meta.unbox(params))
    again, _ = mc.apply_qk_clip(frozen, flax.core.FrozenDict(before), threshold=1.0)
    assert isinstance(again, flax.core.FrozenDict)
    np.testing.assert_array_equal(again["layers_0"]["query"]["kernel"], kernel.value)


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="it came with Flax 0.12.6")
@pytest.mark.parametrize("how", ["apply_qk_clip", "qk_clip"])
def test_a_pure_dict_of_an_nnx_state_keeps_its_structure(how):
    """Its keys are integers where modules are in a list."""
    attention = [
        nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(i)) for i in range(2)
    ]
    model = nnx.Sequential(*attention)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _, maxima = capture_nnx(model)(X)
    threshold = float(np.median(np.stack(jax.tree.leaves(maxima))))
    new, info = mc.apply_qk_clip(params, maxima, threshold=threshold)
    if how == "qk_clip":
        zeros, tx = jax.tree.map(np.zeros_like, params), mc.qk_clip(threshold)
        updates, _ = tx.update(zeros, tx.init(params), params, max_logits=maxima)
        new = jax.tree.map(np.add, params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert list(info.gamma) == ["layers/0", "layers/1"]
    kernels = (tree["layers"][1]["query"]["kernel"] for tree in (new, params))
    ratio = np.divide(*map(np.asarray, kernels))
    gamma = np.broadcast_to(np.asarray(info.gamma["layers/1"])[:, None] ** 0.5, ratio.shape)
    np.testing.assert_allclose(ratio, gamma, rtol=1e-5)
