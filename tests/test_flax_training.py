"""Training steps of Flax models with the clip in them, on one device and on eight.

The clip's effect is looked at where nothing else moves: with a learning rate near zero a head over
the threshold is at it afterwards, and every other head is where it was.
"""

from typing import Any

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
