"""What only Flax Linen has: collections, submodules of a call, the train state."""

from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors

import muonclip_jax as mc
from muonclip_jax.linen import TrainState, capture_max_logits, dot_product_attention
from tests.helpers import TOLERANCE
from tests.test_capture import HEADS, LENGTH, MASK, X, dense_maxima

RTOL = TOLERANCE["float32"]


def _attention(**keywords: Any) -> Any:
    bias_init = nn.initializers.normal(0.5)
    return nn.MultiHeadDotProductAttention(HEADS, bias_init=bias_init, **keywords)


def _captured(model: nn.Module, x: jax.Array = X, **keywords: Any) -> tuple[Any, Any, Any]:
    """Returns the variables, what the call returns, and the maxima."""
    variables = model.init(jax.random.key(1), x)
    return variables, *capture_max_logits(model.apply)(variables, x, **keywords)


def test_outside_of_a_capture_flax_is_as_it_was():
    model = _attention(attention_fn=dot_product_attention)
    variables, *_ = _captured(model)
    assert list(variables) == ["params"]  # silent where nobody collects
    _, state = model.apply(variables, X, mutable=["intermediates"])
    assert list(state["intermediates"]) == ["max_logits"]
    model = _attention()
    expected, state = model.apply(variables, X, mutable=["intermediates"], sow_weights=True)
    keywords: dict[str, Any] = {"sow_weights": True, "mutable": ["intermediates"]}
    _, (out, found), _ = _captured(model, **keywords)
    np.testing.assert_array_equal(out, expected)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(each["intermediates"]["attention_weights"] for each in (found, state)),
    )
    with pytest.raises(errors.ScopeParamShapeError):
        capture_max_logits(model.apply)(variables, X[..., :8])
    assert model.attention_fn is nn.dot_product_attention
    _, state = model.apply(variables, X, mutable=["intermediates"])
    assert "intermediates" not in state


def test_bias_and_batch_axes_of_the_function_itself():
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value = (3 * jax.random.normal(k, (2, 3, LENGTH, HEADS, 8)) for k in keys[:3])
    bias = 3 * jax.random.normal(keys[3], (HEADS, LENGTH, LENGTH))
    expected = nn.dot_product_attention(query, key, value, bias, MASK[0])
    out = dot_product_attention(query, key, value, bias, MASK[0])
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


def test_a_function_of_any_keywords_gets_no_mask_from_flax_and_none_is_recorded():
    """Flax passes only arguments that the signature names; the maxima are those of its logits."""

    def any_keywords(query, key, value, **keywords):
        assert not keywords
        return nn.dot_product_attention(query, key, value)

    variables, out, max_logits = _captured(_attention(attention_fn=any_keywords), mask=MASK)
    np.testing.assert_allclose(out, _attention().apply(variables, X), rtol=1e-5, atol=1e-5)
    expected = dense_maxima(variables["params"], X)
    np.testing.assert_allclose(max_logits["max_logits"], expected, rtol=RTOL)
    assert (expected > dense_maxima(variables["params"], X, MASK)).any()


def test_vmapped_modules_have_one_row_of_maxima_each():
    axes: Any = {"params": 0, "intermediates": 0}
    rngs: Any = {"params": True}
    module: Any = nn.vmap(nn.MultiHeadDotProductAttention, variable_axes=axes, split_rngs=rngs)
    x = jnp.stack([X, 2 * X, -X])
    variables, _, max_logits = _captured(module(HEADS), x)
    for i in range(3):
        member = jax.tree.map(lambda p, i=i: p[i], variables["params"])
        expected = dense_maxima(member, x[i])
        np.testing.assert_allclose(max_logits["max_logits"][i], expected, rtol=RTOL)


def test_collections_of_the_users_own_come_back_as_asked():
    """And a module that is called twice has the larger maxima."""

    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "other", x.sum())
            self.variable("batch_stats", "seen", lambda: jnp.zeros(())).value += 1
            attention = nn.MultiHeadDotProductAttention(HEADS, name="attn")
            attention(x)
            return attention(2 * x)

    apply = capture_max_logits(Noisy().apply)
    variables, (_, state), max_logits = _captured(Noisy(), mutable=["batch_stats"])
    assert (list(state), list(max_logits)) == (["batch_stats"], ["attn"])
    expected = dense_maxima(variables["params"]["attn"], 2 * X)
    np.testing.assert_allclose(max_logits["attn"]["max_logits"], expected, rtol=RTOL)
    (_, state), _ = apply(variables, X, mutable=["batch_stats", "intermediates"])
    assert set(state["intermediates"]) == {"other", "attn"}
    (_, state), _ = apply(variables, X, mutable=True)
    assert set(state) == {"params", "batch_stats", "intermediates"}
    # What an earlier call recorded is not this one's.
    larger = {"intermediates": {"attn": {"max_logits": (jnp.full(HEADS, 1e6),)}}}
    _, again = apply({**variables, **larger}, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(again["attn"]["max_logits"], max_logits["attn"]["max_logits"])


def test_a_module_without_compact_names_itself():
    class Plain(nn.Module):
        named: bool = True

        def setup(self):
            self.qkv = nn.DenseGeneral((3, HEADS, 4))

        def __call__(self, x):
            query, key, value = jnp.moveaxis(self.qkv(x), -3, 0)
            return dot_product_attention(query, key, value, record_in=self if self.named else None)

    variables, _, max_logits = _captured(Plain())
    assert max_logits["max_logits"].shape == (HEADS,)
    with pytest.raises(ValueError, match="record_in=self"):
        Plain(named=False).apply(variables, X)


def test_train_state_forwards_what_is_not_a_field():
    """To a transformation, through `MultiSteps`, and not to one that takes no extra arguments."""

    def update(updates, state, params=None, **extra):
        del state, params
        return updates, extra

    class Annotated(TrainState):
        note: Any = 0

    params, maxima = {"kernel": jnp.ones((2, 2))}, {"attention": {"max_logits": jnp.ones(4)}}
    empty = {"max_logits": jax.tree.map(jnp.zeros_like, maxima)}
    recorder = optax.GradientTransformationExtraArgs(lambda params: empty, update)
    state: Any = Annotated.create(apply_fn=None, params=params, tx=recorder)
    state = state.apply_gradients(grads=params, max_logits=maxima, note=7)
    assert state.opt_state == {"max_logits": maxima}
    assert (state.step, state.note) == (1, 7)
    assert state.tx is recorder
    np.testing.assert_array_equal(state.params["kernel"], 2 * params["kernel"])
    multi = optax.MultiSteps(recorder, 1)
    for tx in (multi, multi.gradient_transformation()):
        state = TrainState.create(apply_fn=None, params=params, tx=tx)
        state = state.apply_gradients(grads=params, max_logits=maxima)
        found = state.opt_state.inner_opt_state
        jax.tree.map(np.testing.assert_array_equal, found, {"max_logits": maxima})
        assert state.tx is tx
    for tx in (optax.sgd(0.1), optax.chain(optax.sgd(0.1), optax.identity())):
        state = TrainState.create(apply_fn=None, params=params, tx=tx)
        after = jax.jit(lambda s: s.apply_gradients(grads=params, max_logits=maxima))(state)
        assert after.step == 1
        assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_the_whole_variables_boxes_and_frozen_dicts_are_clipped(box):
    normal = nn.initializers.normal(0.7)
    boxed = box(normal, (None, None, None))
    model = nn.Sequential([nn.MultiHeadAttention(HEADS, kernel_init=boxed, bias_init=normal)])
    capture = jax.jit(capture_max_logits(model.apply))
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
