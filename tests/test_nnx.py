"""What only Flax NNX has: captures of methods, functions and jitted calls, threads, `Optimizer`."""

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc
from muonclip_jax.nnx import capture_max_logits, dot_product_attention
from tests.test_capture import HEADS, WIDTH, NnxDecoder, X


def _attention(**keywords: Any) -> Any:
    return nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0), **keywords)


def _slow(query, key, value, **keywords):
    """An attention function that other threads have time to get in the way of."""
    time.sleep(0.02)
    return nnx.dot_product_attention(query, key, value, **keywords)


def test_outside_of_a_capture_nothing_is_recorded():
    model = _attention(attention_fn=dot_product_attention)
    before = nnx.graphdef(model)
    model(X)
    assert nnx.graphdef(model) == before
    _, state = nnx.capture(model, nnx.Intermediate)(X, sow_weights=True)
    assert set(state) == {"attention_weights", "max_logits"}


def test_methods_functions_and_jitted_calls_can_be_captured():
    model = NnxDecoder(False, False, {})
    _, expected = capture_max_logits(model)(X)
    for function, *arguments in (
        (model.__call__, X),
        (lambda model, x: model(x), model, X),
        (nnx.jit(lambda model, x: model(x)), model, X),
    ):
        _, found = capture_max_logits(function)(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    assert all(block.attention.attention_fn is nnx.dot_product_attention for block in model.blocks)


def test_captures_of_one_model_in_threads_have_their_own_maxima():
    """Beside them a thread that captures nothing and whose logits are larger."""
    model = _attention(attention_fn=_slow)
    inputs = [X, 2 * X[::-1], X[:, :3]]
    expected = [capture_max_logits(model)(x)[1]["max_logits"] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        plain = pool.submit(lambda: [model(100 * X) for _ in range(6)])
        found = list(pool.map(lambda x: capture_max_logits(model)(x)[1]["max_logits"], inputs * 2))
        plain.result()
    jax.tree.map(np.testing.assert_array_equal, found, expected * 2)
    assert model.attention_fn is _slow


def test_a_capture_traces_a_jitted_function_once_and_keeps_nothing_alive():
    """`jit` compares the attention functions of the modules, which capture exchanges."""
    traces = 0

    def attention_fn(query, key, value, **keywords):
        nonlocal traces
        traces += 1
        return nnx.dot_product_attention(query, key, value, **keywords)

    model = _attention(attention_fn=attention_fn)
    captured = capture_max_logits(nnx.jit(lambda m, x: m(x)))
    for factor in range(3):
        captured(model, factor * X)
    assert traces == 1
    model = _attention(attention_fn=lambda *given, **keywords: _slow(*given, **keywords))
    alive = weakref.ref(model.attention_fn)
    capture_max_logits(model)(X)
    del model
    gc.collect()
    assert alive() is None


def test_a_flax_without_captures_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(nnx, "capture", raising=False)
    with pytest.raises(NotImplementedError, match=r"nnx\.capture of Flax 0\.12\.6 or later"):
        capture_max_logits(_attention())(X)


@pytest.mark.parametrize("key_heads", [None, 2])
def test_a_step_of_the_optimizer_forwards_the_maxima_to_muonclip(key_heads):
    """With a learning rate near zero a head over the threshold is at it, others stay."""
    model = _attention(num_kv_heads=key_heads)
    before = capture_max_logits(model)(X)[1]["max_logits"]
    threshold = float(np.sort(before)[1:3].mean())
    tx = mc.muonclip(1e-9, weight_decay=0.0, qk_clip_threshold=threshold)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            out, max_logits = capture_max_logits(model)(x)
            return jnp.mean(out**2), max_logits

        grads, max_logits = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, max_logits=max_logits)

    step(model, optimizer, X)
    after = capture_max_logits(model)(X)[1]["max_logits"]
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)
    assert 0 < int(jnp.sum(before > threshold)) < HEADS


def test_a_pure_dict_of_an_nnx_state_keeps_its_structure():
    """Its keys are integers where modules are in a list."""
    model = nnx.Sequential(_attention(), _attention())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _, maxima = capture_max_logits(model)(X)
    threshold = float(np.median(np.stack(jax.tree.leaves(maxima))))
    new, info = mc.apply_qk_clip(params, maxima, threshold=threshold)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert list(info.gamma) == ["layers/0", "layers/1"]
    kernels = (tree["layers"][1]["query"]["kernel"] for tree in (new, params))
    ratio = np.divide(*map(np.asarray, kernels))
    gamma = np.broadcast_to(np.asarray(info.gamma["layers/1"])[:, None] ** 0.5, ratio.shape)
    np.testing.assert_allclose(ratio, gamma, rtol=1e-5)
