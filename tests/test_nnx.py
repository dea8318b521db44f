"""Flax NNX models: what they compute stays, and their maxima arrive under their own paths."""

import functools
import gc
import inspect
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from muonclip_jax.nnx import capture_max_logits, dot_product_attention
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE

LENGTH, WIDTH, HEADS = 6, 16, 4


def _inputs(*shape: int, seed: int = 0) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(seed), shape)


def _attention(seed: int = 0, **keywords: Any) -> nnx.MultiHeadAttention:
    keywords = {"bias_init": nnx.initializers.normal(0.5), "decode": False} | keywords
    return nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(seed), **keywords)


class Block(nnx.Module):
    """Attention with a residual."""

    def __init__(self, rngs: nnx.Rngs, **keywords: Any):
        self.attention = nnx.MultiHeadAttention(
            HEADS,
            WIDTH,
            decode=False,
            bias_init=nnx.initializers.normal(0.5),
            rngs=rngs,
            **keywords,
        )

    def __call__(self, x, is_causal=False):
        return x + self.attention(x, is_causal=is_causal)


class Decoder(nnx.Module):
    """Two blocks, in a list or stacked, rematerialised or not."""

    def __init__(self, stacked: bool = False, remat: bool = False, **keywords: Any):
        self.stacked, self.remat = stacked, remat
        rngs = nnx.Rngs(0)
        if stacked:
            self.blocks: Any = nnx.vmap(lambda r: Block(r, **keywords))(rngs.split(2))
        else:
            self.blocks = nnx.List([Block(rngs, **keywords) for _ in range(2)])

    def __call__(self, x):
        def call(block, x):
            return block(x, is_causal=True)

        call = nnx.remat(call) if self.remat else call
        if not self.stacked:
            for block in self.blocks:
                x = call(block, x)
            return x

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def layers(x, block):
            return call(block, x)

        return layers(x, self.blocks)


def _dense_maxima(state: Any, x: Any, **keywords: Any) -> np.ndarray:
    """Returns the maxima that one attention's kernels give, in float64."""
    projected = {
        name: np.einsum("btd,dnh->btnh", np.float64(x), np.float64(state[name]["kernel"]))
        + np.float64(state[name]["bias"])
        for name in ("query", "key")
    }
    return dense_attention(projected["query"], projected["key"], **keywords).max_logits


def _pure(module: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def test_signature_holds_every_argument_that_flax_passes():
    theirs = inspect.signature(nnx.dot_product_attention).parameters
    ours = inspect.signature(dot_product_attention).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[n].default for n in theirs] == [theirs[n].default for n in theirs]


@pytest.mark.parametrize("key_heads", [None, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_fn_computes_what_flax_does_and_records(key_heads, is_causal):
    x = _inputs(2, LENGTH, WIDTH)
    expected = _attention(num_kv_heads=key_heads)(x, is_causal=is_causal)
    model: Any = _attention(num_kv_heads=key_heads, attention_fn=dot_product_attention)
    out, state = nnx.capture(model, nnx.Intermediate)(x, is_causal=is_causal)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE["float32"])
    (max_logits,) = state["max_logits"].get_value()
    np.testing.assert_allclose(
        max_logits, _dense_maxima(_pure(model), x, is_causal=is_causal), rtol=TOLERANCE["float32"]
    )


def test_outside_of_a_capture_nothing_is_recorded():
    model = _attention(attention_fn=dot_product_attention)
    before = nnx.graphdef(model)
    model(_inputs(2, LENGTH, WIDTH))
    assert nnx.graphdef(model) == before


@pytest.mark.parametrize("normalize_qk", [False, True])
def test_capture_with_masks_and_normalisation(normalize_qk):
    x = _inputs(2, LENGTH, WIDTH)
    mask = nnx.make_causal_mask(jnp.ones((2, LENGTH)))
    model = _attention(normalize_qk=normalize_qk)
    expected = model(x, mask=mask)
    out, max_logits = capture_max_logits(model)(x, mask=mask)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE["float32"])
    if not normalize_qk:
        np.testing.assert_allclose(
            max_logits["max_logits"],
            _dense_maxima(_pure(model), x, is_causal=True),
            rtol=TOLERANCE["float32"],
        )


def test_dropout_and_sown_weights_are_flax_to_the_bit():
    x = _inputs(2, LENGTH, WIDTH)
    keywords = {"dropout_rate": 0.5, "deterministic": False, "keep_rngs": False}
    expected = _attention(**keywords)(x, rngs=nnx.Rngs(7))
    out, max_logits = capture_max_logits(_attention(**keywords))(x, rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(
        max_logits["max_logits"],
        _dense_maxima(_pure(_attention()), x),
        rtol=TOLERANCE["float32"],
    )
    model = _attention(attention_fn=dot_product_attention)
    _, state = nnx.capture(model, nnx.Intermediate)(x, sow_weights=True)
    assert set(state) == {"attention_weights", "max_logits"}


@pytest.mark.parametrize(("stacked", "remat"), [(False, True), (True, False), (True, True)])
def test_capture_inside_of_a_jitted_gradient(stacked, remat):
    x = _inputs(2, LENGTH, WIDTH)
    model = Decoder(stacked, remat)
    plain = Decoder(stacked)

    @nnx.jit
    def step(model, x):
        def loss(model):
            out, max_logits = capture_max_logits(model)(x)
            return jnp.sum(out**2), max_logits

        return nnx.value_and_grad(loss, has_aux=True)(model)

    (value, max_logits), gradients = step(model, x)
    expected_value, expected = nnx.value_and_grad(lambda m: jnp.sum(m(x) ** 2))(plain)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2, rtol=1e-4), gradients, expected
    )
    maxima = max_logits["blocks"]
    if stacked:
        assert maxima["attention"]["max_logits"].shape == (2, HEADS)
    for i in range(2):
        state = _pure(model)["blocks"]
        attention = jax.tree.map(lambda p, i=i: p[i], state) if stacked else state[i]
        found = (
            maxima["attention"]["max_logits"][i]
            if stacked
            else (maxima[i]["attention"]["max_logits"])
        )
        expected = _dense_maxima(attention["attention"], x, is_causal=True)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        block = Block(nnx.Rngs(0))
        parameters = nnx.state(block, nnx.Param)
        nnx.replace_by_pure_dict(parameters, attention)
        nnx.update(block, parameters)
        x = block(x, is_causal=True)


def test_capture_around_jit():
    x = _inputs(2, LENGTH, WIDTH)
    model = Decoder()
    _, inside = nnx.jit(lambda m, x: capture_max_logits(m)(x))(model, x)
    _, around = capture_max_logits(nnx.jit(lambda m, x: m(x)))(model, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), inside, around)
    assert all(b.attention.attention_fn is nnx.dot_product_attention for b in model.blocks)


def _wrapped(query, key, value, **keywords):
    """An attention function of the user's own: twice Flax's."""
    return 2 * nnx.dot_product_attention(query, key, value, **keywords)


@pytest.mark.parametrize(
    "attention_fn", [_wrapped, functools.partial(dot_product_attention, implementation="xla")]
)
def test_capture_works_with_other_attention_functions(attention_fn):
    x = _inputs(2, LENGTH, WIDTH)
    model = _attention(attention_fn=attention_fn)
    expected = model(x, is_causal=True)
    out, max_logits = capture_max_logits(model)(x, is_causal=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(
        max_logits["max_logits"],
        _dense_maxima(_pure(model), x, is_causal=True),
        rtol=TOLERANCE["float32"],
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_capture_changes_no_bit_of_the_output(dtype):
    x = _inputs(2, LENGTH, WIDTH)
    model = _attention(dtype=dtype)
    expected = nnx.jit(lambda m, x: m(x, is_causal=True))(model, x)
    out, _ = nnx.jit(lambda m, x: capture_max_logits(m)(x, is_causal=True))(model, x)
    np.testing.assert_array_equal(out, expected)


def _slow(query, key, value, **keywords):
    """An attention function that other threads have time to get in the way of."""
    time.sleep(0.02)
    return nnx.dot_product_attention(query, key, value, **keywords)


def test_captures_of_one_model_in_threads_have_their_own_maxima():
    """Beside them a thread that captures nothing and whose logits are larger."""
    model = _attention(attention_fn=_slow)
    inputs = [_inputs(1, LENGTH, WIDTH, seed=seed) for seed in range(3)]
    expected = [capture_max_logits(model)(x)[1]["max_logits"] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        plain = pool.submit(lambda: [model(100 * inputs[0]) for _ in range(6)])
        found = list(pool.map(lambda x: capture_max_logits(model)(x)[1]["max_logits"], inputs * 2))
        plain.result()
    jax.tree.map(np.testing.assert_array_equal, found, expected * 2)
    assert model.attention_fn is _slow


def test_a_capture_keeps_no_function_alive():
    def attention_fn(query, key, value, **keywords):
        return nnx.dot_product_attention(query, key, value, **keywords)

    model = _attention(attention_fn=attention_fn)
    capture_max_logits(model)(_inputs(1, LENGTH, WIDTH))
    alive = weakref.ref(attention_fn)
    del model, attention_fn
    gc.collect()
    assert alive() is None


def test_the_same_function_is_traced_once_by_jit():
    """`jit` compares the attention functions of the modules, which capture exchanges."""
    traces = 0

    def attention_fn(query, key, value, **keywords):
        nonlocal traces
        traces += 1
        return nnx.dot_product_attention(query, key, value, **keywords)

    model = _attention(attention_fn=attention_fn)
    captured = capture_max_logits(nnx.jit(lambda m, x: m(x)))
    for seed in range(3):
        captured(model, _inputs(1, LENGTH, WIDTH, seed=seed))
    assert traces == 1


def test_decoding_sees_only_what_is_in_the_cache():
    x = _inputs(1, LENGTH, WIDTH)
    model = _attention(decode=True)
    model.init_cache((1, LENGTH, WIDTH))
    for t in range(3):
        _, max_logits = capture_max_logits(model)(x[:, t : t + 1])
        seen = (np.arange(LENGTH) <= t)[None, :] & (np.arange(LENGTH) == t)[:, None]
        np.testing.assert_allclose(
            max_logits["max_logits"], _dense_maxima(_pure(model), x, mask=seen), rtol=1e-5
        )


def test_methods_and_functions_can_be_captured():
    x = _inputs(2, LENGTH, WIDTH)
    model = Decoder()
    _, expected = capture_max_logits(model)(x)
    _, method = capture_max_logits(model.__call__)(x)
    _, function = capture_max_logits(lambda model, x: model(x))(model, x)
    for found in (method, function):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_capture_that_caught_nothing_is_an_error():
    model = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="The capture caught no logit"):
        capture_max_logits(model)(_inputs(2, WIDTH))
    with pytest.raises(TypeError, match=r"whose first argument is the model; .* is int"):
        capture_max_logits(lambda x: x)(3)


def _recorder() -> optax.GradientTransformationExtraArgs:
    """A transformation that keeps the maxima of its last update."""

    def init(params):
        del params
        return {"max_logits": {"blocks": {"attention": {"max_logits": jnp.zeros((2, HEADS))}}}}

    def update(updates, state, params=None, **extra):
        del state, params
        return jax.tree.map(lambda u: -0.01 * u, updates), {"max_logits": extra["max_logits"]}

    return optax.GradientTransformationExtraArgs(init, update)


def test_optimizer_gets_the_maxima_from_end_to_end():
    x = _inputs(2, LENGTH, WIDTH)
    model = Decoder(stacked=True)
    optimizer = nnx.Optimizer(model, _recorder(), wrt=nnx.Param)
    _, expected = capture_max_logits(model)(x)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            out, max_logits = capture_max_logits(model)(x)
            return jnp.mean(out**2), max_logits

        (value, max_logits), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradients, max_logits=max_logits)
        return value

    first = step(model, optimizer, x)
    recorded = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]["max_logits"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), recorded, expected)
    assert step(model, optimizer, x) < first
