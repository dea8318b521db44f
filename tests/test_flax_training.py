"""Training steps of Flax models with the clip in them, on one device and on eight.

What the maxima must be is known from one device: a batch that is cut over devices has the maxima of
the whole. The clip's effect is looked at where nothing else moves: with a learning rate near zero a
head over the threshold is at it afterwards, and every other head is where it was.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
import muonclip_jax.linen
import muonclip_jax.nnx

BATCH, LENGTH, WIDTH, HEADS = 8, 5, 16, 4
STILL = 1e-9  # a learning rate at which nothing moves by more than a rounding
X = 3 * jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))


class Linen(nn.Module):
    """Two blocks, the second rematerialised."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            layer = (
                nn.remat(nn.MultiHeadDotProductAttention)
                if i
                else (nn.MultiHeadDotProductAttention)
            )
            x = x + layer(HEADS, name=f"attention_{i}")(x)
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


def linen_params() -> Any:
    return Linen().init(jax.random.key(1), X)["params"]


def linen_maxima(params: Any, x: jax.Array) -> Any:
    return muonclip_jax.linen.capture_max_logits(Linen().apply)({"params": params}, x)[1]


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def same(maxima: Any, expected: Any) -> None:
    assert jax.tree.structure(maxima) == jax.tree.structure(expected)
    np.testing.assert_allclose(flat(maxima), flat(expected), rtol=1e-6)


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("batch",), axis_types=(kind,))


@pytest.mark.parametrize("key_heads", [None, 2])
def test_nnx_optimizer_forwards_the_maxima_to_muonclip(key_heads):
    model = Nnx(key_heads, nnx.Rngs(0))
    before = muonclip_jax.nnx.capture_max_logits(model)(X)[1]["attention"]["max_logits"]
    threshold = float(np.sort(before)[1:3].mean())
    tx = mc.muonclip(STILL, weight_decay=0.0, qk_clip_threshold=threshold)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            out, max_logits = muonclip_jax.nnx.capture_max_logits(model)(x)
            return jnp.mean(out**2), max_logits

        (value, max_logits), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, max_logits=max_logits)
        return value, max_logits["attention"]["max_logits"]

    _, seen = step(model, optimizer, X)
    np.testing.assert_allclose(seen, before, rtol=1e-6)
    after = muonclip_jax.nnx.capture_max_logits(model)(X)[1]["attention"]["max_logits"]
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)
    assert 0 < (np.asarray(before) > threshold).sum() < HEADS


def test_linen_train_state_forwards_the_maxima_to_muonclip():
    params = linen_params()
    before = linen_maxima(params, X)
    first = np.asarray(before["attention_0"]["max_logits"])
    threshold = float(np.sort(first)[1:3].mean())
    tx = mc.muonclip(STILL, weight_decay=0.0, qk_clip_threshold=threshold)
    state: Any = muonclip_jax.linen.TrainState.create(apply_fn=Linen().apply, params=params, tx=tx)

    @jax.jit
    def step(state, x):
        def loss(params):
            apply = muonclip_jax.linen.capture_max_logits(state.apply_fn)
            out, max_logits = apply({"params": params}, x)
            return jnp.mean(out**2), max_logits

        grads, max_logits = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, max_logits=max_logits), max_logits

    state, seen = step(state, X)
    same(seen, before)
    # Only the first block sees the same inputs once the first is clipped.
    after = linen_maxima(state.params, X)["attention_0"]["max_logits"]
    np.testing.assert_allclose(after, np.minimum(first, threshold), rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_under_jit_a_sharded_batch_has_the_maxima_of_the_whole(kind):
    params, devices = linen_params(), mesh(kind)
    with jax.set_mesh(devices):
        x = jax.device_put(X, NamedSharding(devices, P("batch")))
        placed = jax.device_put(params, NamedSharding(devices, P()))
        maxima = jax.jit(linen_maxima)(placed, x)
    same(maxima, linen_maxima(params, X))


def test_under_pmap_every_device_clips_alike():
    params = linen_params()
    tx = mc.muonclip(0.02, qk_clip_threshold=1.0, axis_name="batch")

    @functools.partial(jax.pmap, axis_name="batch", in_axes=(None, None, 0))
    def step(params, state, x):
        def loss(params):
            apply = muonclip_jax.linen.capture_max_logits(Linen().apply)
            out, max_logits = apply({"params": params}, x)
            return jnp.mean(out**2), max_logits

        grads, max_logits = jax.grad(loss, has_aux=True)(params)
        grads = jax.lax.pmean(grads, "batch")
        max_logits = mc.reduce_max_logits(max_logits, "batch")
        updates, _ = tx.update(grads, state, params, max_logits=max_logits)
        return optax.apply_updates(params, updates), max_logits

    new, maxima = step(params, tx.init(params), X.reshape(8, 1, LENGTH, WIDTH))
    whole = linen_maxima(params, X)
    for device in range(8):
        same(jax.tree.map(lambda leaf, at=device: leaf[at], maxima), whole)
    jax.tree.map(
        lambda leaf: np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape)),
        new,
    )


def test_nnx_under_shard_map_and_vmap():
    model = Nnx(2, nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = linen_params()

    def maxima(state, x):
        return muonclip_jax.nnx.capture_max_logits(nnx.merge(graph, state))(x)[1]

    for function, weights in ((maxima, state), (linen_maxima, params)):
        mapped = jax.jit(
            jax.shard_map(
                lambda w, x, f=function: mc.reduce_max_logits(f(w, x), "batch"),
                mesh=mesh(AxisType.Auto),
                in_specs=(P(), P("batch")),
                out_specs=P(),
            )
        )
        same(mapped(weights, X), function(weights, X))
    # All blocks together; without the reduction every device knows its own part only.
    text = mapped.lower(params, X).compile().as_text() or ""
    assert text.count("all-reduce(") + text.count("all-reduce-start(") == 1
    assert np.abs(flat(linen_maxima(params, X[:1])) - flat(linen_maxima(params, X))).max() > 0.1

    # Models of an ensemble: a row of maxima each, stacked as their kernels are.
    @nnx.vmap(in_axes=0, out_axes=0)
    def models(key):
        return Nnx(2, nnx.Rngs(key))

    ensemble = models(jax.random.split(jax.random.key(0), 3))

    def call(ensemble, x):
        return nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(ensemble, x)

    _, rows = muonclip_jax.nnx.capture_max_logits(call)(ensemble, X)
    rows = rows["attention"]["max_logits"]
    assert rows.shape == (3, HEADS)
    params = nnx.state(ensemble, nnx.Param)
    _, info = mc.apply_qk_clip(params, {"attention": rows}, threshold=float(np.median(rows)))
    assert int(info.total_clipped) == 3 * HEADS // 2
