"""Flax Linen models: what they compute stays, and their maxima arrive under their own paths."""

import functools
import inspect
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors

from muonclip_jax.linen import TrainState, capture_max_logits, dot_product_attention
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE

LENGTH, WIDTH, HEADS = 6, 16, 4


def _inputs(*shape: int, seed: int = 0) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(seed), shape)


def _apply(model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    return model.apply(*arguments, **keywords)


def _causal(length: int = LENGTH) -> jax.Array:
    return nn.make_causal_mask(jnp.ones((1, length)))


class Block(nn.Module):
    """Attention with a residual; as a step of nn.scan it returns a pair."""

    scanned: bool = False
    keywords: Any = None

    @nn.compact
    def __call__(self, x, mask=None):
        attention = nn.MultiHeadDotProductAttention(
            HEADS, name="attention", bias_init=nn.initializers.normal(0.5), **(self.keywords or {})
        )
        x = x + attention(x, mask=mask)
        return (x, None) if self.scanned else x


class Decoder(nn.Module):
    """Two blocks, rematerialised or not."""

    remat: bool = False
    keywords: Any = None

    @nn.compact
    def __call__(self, x, mask=None):
        block = nn.remat(Block) if self.remat else Block
        for i in range(2):
            x = block(keywords=self.keywords, name=f"block_{i}")(x, mask)
        return x


class Scanned(nn.Module):
    """Three stacked blocks."""

    carried: tuple[str, ...] = ("params", "intermediates")
    remat: bool = False
    keywords: Any = None

    @nn.compact
    def __call__(self, x, mask=None):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        stack = nn.scan(
            block,
            variable_axes=dict.fromkeys(self.carried, 0),
            split_rngs={"params": True},
            in_axes=cast(Any, nn.broadcast),
            length=3,
        )
        return stack(scanned=True, keywords=self.keywords, name="blocks")(x, mask)[0]


def _dense_maxima(attention: Any, x: jax.Array, mask: Any = None) -> np.ndarray:
    """Returns the maxima that one attention's kernels give, in float64."""
    projected = {
        name: np.einsum("btd,dnh->btnh", np.float64(x), np.float64(attention[name]["kernel"]))
        + np.float64(attention[name]["bias"])
        for name in ("query", "key")
    }
    return dense_attention(projected["query"], projected["key"], mask=mask).max_logits


def _block_inputs(params: Any, x: jax.Array, mask: Any) -> list[jax.Array]:
    """Returns what each of Decoder's blocks is given."""
    inputs = [x]
    for i in range(2):
        inputs.append(_apply(Block(), {"params": params[f"block_{i}"]}, inputs[-1], mask))
    return inputs


def test_signature_holds_every_argument_that_flax_passes():
    theirs = inspect.signature(nn.dot_product_attention).parameters
    ours = inspect.signature(dot_product_attention).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[n].default for n in theirs] == [theirs[n].default for n in theirs]


@pytest.mark.parametrize(
    ("dtype", "masked", "normalize_qk"),
    [(jnp.float32, False, False), (jnp.float32, True, True), (jnp.bfloat16, True, False)],
)
def test_attention_fn_computes_what_flax_does(dtype, masked, normalize_qk):
    x, mask = _inputs(2, LENGTH, WIDTH), _causal() if masked else None

    def attention(**keywords):
        return nn.MultiHeadDotProductAttention(
            HEADS, dtype=dtype, normalize_qk=normalize_qk, **keywords
        )

    variables = attention().init(jax.random.key(1), x)
    expected = _apply(attention(), variables, x, mask=mask)
    ours = attention(attention_fn=dot_product_attention)
    assert list(ours.init(jax.random.key(1), x)) == ["params"]  # silent where nobody collects
    out, state = _apply(ours, variables, x, mask=mask, mutable=["intermediates"])
    # Flax rounds logits and softmax to bfloat16, ours are in float32.
    tolerance = 2e-6 if dtype == jnp.float32 else TOLERANCE["bfloat16"]
    scale = np.abs(np.float32(expected)).max()
    np.testing.assert_allclose(np.float32(out), np.float32(expected), atol=tolerance * scale)
    assert out.dtype == expected.dtype
    (max_logits,) = state["intermediates"]["max_logits"]
    assert max_logits.dtype == jnp.float32
    if not normalize_qk and dtype == jnp.float32:
        np.testing.assert_allclose(
            max_logits, _dense_maxima(variables["params"], x, mask), rtol=TOLERANCE["float32"]
        )


HOOKS = {
    "dropout": {"dropout_rate": 0.5, "deterministic": False, "broadcast_dropout": False},
    "precision": {"precision": jax.lax.Precision.HIGHEST},
    "products of the user's own": {
        "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
        "attn_weights_value_einsum_cls": lambda: jnp.einsum,
    },
}


@pytest.mark.parametrize("name", HOOKS)
def test_with_hooks_it_is_flax_to_the_bit(name):
    x, mask = _inputs(2, LENGTH, WIDTH), _causal()
    rngs = {"dropout": jax.random.key(3)}
    model = nn.MultiHeadDotProductAttention(HEADS, **HOOKS[name])
    variables = model.init({"params": jax.random.key(1), **rngs}, x)
    expected = _apply(model, variables, x, mask=mask, rngs=rngs)
    out, max_logits = capture_max_logits(model.apply)(variables, x, mask=mask, rngs=rngs)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(
        max_logits["max_logits"],
        _dense_maxima(variables["params"], x, mask),
        rtol=TOLERANCE["float32"],
    )


def test_sown_attention_weights_are_sown_still():
    x = _inputs(2, LENGTH, WIDTH)
    model = nn.MultiHeadDotProductAttention(HEADS)
    variables = model.init(jax.random.key(1), x)
    keywords = {"sow_weights": True, "mutable": ["intermediates"]}
    _, expected = _apply(model, variables, x, **keywords)
    (_, state), max_logits = capture_max_logits(model.apply)(variables, x, **keywords)
    (weights,), (expected_weights,) = (
        s["intermediates"]["attention_weights"] for s in (state, expected)
    )
    np.testing.assert_array_equal(weights, expected_weights)
    assert max_logits["max_logits"].shape == (HEADS,)


@pytest.mark.parametrize("masked", [False, True])
def test_bias_and_batch_axes_of_the_function_itself(masked):
    query, key, value = (_inputs(2, 3, LENGTH, HEADS, 8, seed=i) for i in range(3))
    bias = _inputs(HEADS, LENGTH, LENGTH, seed=4)
    mask = _causal()[0] if masked else None
    expected = nn.dot_product_attention(query, key, value, bias, mask)
    out = dot_product_attention(query, key, value, bias, mask)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("remat", "attention_fn"), [(False, None), (True, dot_product_attention)])
def test_capture_needs_no_change_to_the_model(remat, attention_fn):
    keywords = {} if attention_fn is None else {"attention_fn": attention_fn}
    x, mask = _inputs(2, LENGTH, WIDTH), _causal()
    params = Decoder().init(jax.random.key(1), x)["params"]
    model = Decoder(remat=remat, keywords=keywords)

    @jax.jit
    def step(params):
        def loss(params):
            out, max_logits = capture_max_logits(model.apply)({"params": params}, x, mask)
            return jnp.sum(out**2), (out, max_logits)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (out, max_logits) = step(params)
    inputs = _block_inputs(params, x, mask)
    np.testing.assert_allclose(out, inputs[-1], atol=1e-5, rtol=1e-5)
    plain = jax.jit(jax.grad(lambda p: jnp.sum(_apply(Decoder(), {"params": p}, x, mask) ** 2)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2, rtol=1e-4),
        gradients,
        plain(params),
    )
    assert list(max_logits) == ["block_0", "block_1"]
    for i in range(2):
        np.testing.assert_allclose(
            max_logits[f"block_{i}"]["attention"]["max_logits"],
            _dense_maxima(params[f"block_{i}"]["attention"], inputs[i], mask),
            rtol=1e-4,  # what the second block is given was itself rounded
        )


def _wrapped(query, key, value, mask=None, dtype=None):
    """An attention function of the user's own: twice Flax's."""
    return 2 * nn.dot_product_attention(query, key, value, mask=mask, dtype=dtype)


@pytest.mark.parametrize(
    "attention_fn", [_wrapped, functools.partial(dot_product_attention, implementation="xla")]
)
def test_capture_works_with_other_attention_functions(attention_fn):
    x, mask = _inputs(2, LENGTH, WIDTH), _causal()
    model = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
    variables = model.init(jax.random.key(1), x)
    expected = _apply(model, variables, x, mask=mask)
    out, max_logits = capture_max_logits(model.apply)(variables, x, mask=mask)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(
        max_logits["max_logits"],
        _dense_maxima(variables["params"], x, mask),
        rtol=TOLERANCE["float32"],
    )


def test_a_function_of_any_keywords_gets_no_mask_from_flax_and_none_is_recorded():
    """Flax passes only arguments that the signature names; the maxima are those of its logits."""

    def any_keywords(query, key, value, **keywords):
        assert not keywords
        return nn.dot_product_attention(query, key, value)

    x, mask = _inputs(2, LENGTH, WIDTH), _causal()
    model = nn.MultiHeadDotProductAttention(HEADS, attention_fn=any_keywords)
    variables = model.init(jax.random.key(1), x)
    out, max_logits = capture_max_logits(model.apply)(variables, x, mask=mask)
    plain = nn.MultiHeadDotProductAttention(HEADS)
    np.testing.assert_allclose(out, _apply(plain, variables, x), rtol=1e-5, atol=1e-5)
    expected = _dense_maxima(variables["params"], x)
    np.testing.assert_allclose(max_logits["max_logits"], expected, rtol=TOLERANCE["float32"])
    assert (expected > _dense_maxima(variables["params"], x, mask)).any()


@pytest.mark.parametrize(("remat", "attention_fn"), [(True, None), (False, dot_product_attention)])
def test_scanned_layers_have_one_row_of_maxima_each(remat, attention_fn):
    keywords = {} if attention_fn is None else {"attention_fn": attention_fn}
    x = _inputs(2, LENGTH, WIDTH)
    model = Scanned(remat=remat, keywords=keywords)
    params = model.init(jax.random.key(1), x)["params"]

    def loss(params):
        out, max_logits = capture_max_logits(model.apply)({"params": params}, x)
        return jnp.sum(out), max_logits

    _, max_logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    maxima = max_logits["blocks"]["attention"]["max_logits"]
    assert maxima.shape == (3, HEADS)
    for layer in range(3):
        attention = jax.tree.map(lambda p, i=layer: p[i], params["blocks"])
        expected = _dense_maxima(attention["attention"], x)
        np.testing.assert_allclose(maxima[layer], expected, rtol=1e-4)
        x = _apply(Block(), {"params": attention}, x)


def test_vmapped_modules_have_one_row_of_maxima_each():
    ensemble = nn.vmap(
        nn.MultiHeadDotProductAttention,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=0,
    )(HEADS)
    x = _inputs(3, 2, LENGTH, WIDTH)
    variables = ensemble.init(jax.random.key(1), x)
    _, max_logits = capture_max_logits(ensemble.apply)(variables, x)
    for i in range(3):
        member = jax.tree.map(lambda p, i=i: p[i], variables["params"])
        np.testing.assert_allclose(
            max_logits["max_logits"][i], _dense_maxima(member, x[i]), rtol=TOLERANCE["float32"]
        )


def test_a_module_called_twice_has_the_larger_maxima():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(HEADS, name="attention")
            attention(x)
            return attention(2 * x)

    x = _inputs(2, LENGTH, WIDTH)
    variables = Shared().init(jax.random.key(1), x)
    variables = jax.tree.map(lambda p: p, variables)
    _, max_logits = capture_max_logits(Shared().apply)(variables, x)
    np.testing.assert_allclose(
        max_logits["attention"]["max_logits"],
        _dense_maxima(variables["params"]["attention"], 2 * x),
        rtol=TOLERANCE["float32"],
    )


def test_decoding_sees_only_what_is_in_the_cache():
    x = _inputs(1, LENGTH, WIDTH)
    model = nn.MultiHeadDotProductAttention(HEADS, decode=True)
    variables = model.init(jax.random.key(1), x)
    params, cache = variables["params"], variables["cache"]
    apply = jax.jit(
        lambda v, x: capture_max_logits(model.apply)(v, x, mutable=["cache"])  # one token
    )
    for t in range(3):
        (_, state), max_logits = apply({"params": params, "cache": cache}, x[:, t : t + 1])
        assert list(state) == ["cache"]
        cache = state["cache"]
        seen = np.zeros((1, LENGTH), bool)
        seen[0, : t + 1] = True
        rows = np.zeros((LENGTH, 1), bool)
        rows[t] = True
        np.testing.assert_allclose(
            max_logits["max_logits"], _dense_maxima(params, x, rows & seen), rtol=1e-5
        )


def test_collections_of_the_users_own_come_back_as_asked():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "other", x.sum())
            self.variable("batch_stats", "seen", lambda: jnp.zeros(())).value += 1
            return nn.MultiHeadDotProductAttention(HEADS)(x)

    x = _inputs(2, LENGTH, WIDTH)
    variables = Noisy().init(jax.random.key(1), x)
    apply = capture_max_logits(Noisy().apply)
    path = "MultiHeadDotProductAttention_0"
    (_, state), max_logits = apply(variables, x, mutable=["batch_stats"])
    assert list(state) == ["batch_stats"]
    assert list(max_logits) == [path]
    (_, state), _ = apply(variables, x, mutable=["batch_stats", "intermediates"])
    assert set(state["intermediates"]) == {"other", path}
    (_, state), _ = apply(variables, x, mutable=True)
    assert set(state) == {"params", "batch_stats", "intermediates"}
    # What an earlier call recorded is not this one's.
    larger = {"intermediates": {path: {"max_logits": (jnp.full(HEADS, 1e6),)}}}
    _, again = apply({**variables, **larger}, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(again[path]["max_logits"], max_logits[path]["max_logits"])


def test_a_module_without_compact_names_itself():
    class Plain(nn.Module):
        named: bool = True

        def setup(self):
            self.qkv = nn.DenseGeneral((3, HEADS, 4))

        def __call__(self, x):
            query, key, value = jnp.moveaxis(self.qkv(x), -3, 0)
            return dot_product_attention(query, key, value, record_in=self if self.named else None)

    x = _inputs(2, LENGTH, WIDTH)
    variables = Plain().init(jax.random.key(1), x)
    _, max_logits = capture_max_logits(Plain().apply)(variables, x)
    assert max_logits["max_logits"].shape == (HEADS,)
    with pytest.raises(ValueError, match="record_in=self"):
        _apply(Plain(named=False), variables, x)


def test_a_capture_that_caught_nothing_or_cannot_is_an_error():
    x = _inputs(2, WIDTH)
    model = nn.Dense(3)
    variables = model.init(jax.random.key(1), x)
    with pytest.raises(ValueError, match="The capture caught no logit"):
        capture_max_logits(model.apply)(variables, x)
    scanned, x = Scanned(carried=("params",)), _inputs(2, LENGTH, WIDTH)
    variables = scanned.init(jax.random.key(1), x)
    with pytest.raises(ValueError, match=r"'blocks/attention' cannot leave .*'intermediates': 0"):
        capture_max_logits(scanned.apply)(variables, x)


@pytest.mark.parametrize(
    ("dtype", "dropout"), [(jnp.float32, 0.5), (jnp.bfloat16, 0.0), (jnp.float16, 0.5)]
)
def test_a_capture_changes_no_bit_of_the_output(dtype, dropout):
    x = _inputs(2, LENGTH, WIDTH)
    mask = nn.make_causal_mask(x[..., 0])
    model = nn.MultiHeadDotProductAttention(HEADS, dtype=dtype, dropout_rate=dropout)
    variables = model.init(jax.random.key(1), x, deterministic=True)
    keywords = {"mask": mask, "deterministic": False, "rngs": {"dropout": jax.random.key(2)}}
    expected = jax.jit(lambda v, x: model.apply(v, x, **keywords))(variables, x)
    out, found = jax.jit(lambda v, x: capture_max_logits(model.apply)(v, x, **keywords))(
        variables, x
    )
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(
        found["max_logits"],
        _dense_maxima(variables["params"], x, mask),
        rtol=2 * TOLERANCE[jnp.dtype(dtype).name],  # The logits are rounded to this dtype.
    )


def test_after_a_capture_flax_is_as_it_was():
    x = _inputs(2, LENGTH, WIDTH)
    model = nn.MultiHeadDotProductAttention(HEADS)
    variables = model.init(jax.random.key(1), x)
    capture_max_logits(model.apply)(variables, x)
    with pytest.raises(errors.ScopeParamShapeError):
        capture_max_logits(model.apply)(variables, x[..., :8])
    assert model.attention_fn is nn.dot_product_attention
    _, state = _apply(model, variables, x, mutable=["intermediates"])
    assert "intermediates" not in state


def _recorder() -> optax.GradientTransformationExtraArgs:
    """A transformation that keeps the extra arguments of its last update."""

    def update(updates, state, params=None, **extra):
        del state, params
        return updates, extra

    return optax.GradientTransformationExtraArgs(lambda params: {}, update)


def test_train_state_forwards_what_is_not_a_field():
    class Annotated(TrainState):
        note: Any = 0

    params = {"kernel": jnp.ones((2, 2))}
    state: Any = Annotated.create(apply_fn=None, params=params, tx=_recorder())
    tx = state.tx
    maxima = {"attention": {"max_logits": jnp.ones(4)}}
    state = state.apply_gradients(grads=params, max_logits=maxima, note=7)
    assert state.opt_state == {"max_logits": maxima}
    assert (state.step, state.note) == (1, 7)
    assert state.tx is tx
    np.testing.assert_array_equal(state.params["kernel"], 2 * params["kernel"])


def test_train_state_forwards_through_multi_steps():
    multi = optax.MultiSteps(_recorder(), 1)
    params, maxima = {"kernel": jnp.ones((2, 2))}, {"attention": {"max_logits": jnp.ones(4)}}
    given: Any
    for given in (multi, multi.gradient_transformation()):
        state: Any = TrainState.create(apply_fn=None, params=params, tx=given)
        inner = {"max_logits": jax.tree.map(jnp.zeros_like, maxima)}
        state = state.replace(opt_state=state.opt_state._replace(inner_opt_state=inner))
        state = state.apply_gradients(grads=params, max_logits=maxima)
        found = state.opt_state.inner_opt_state
        jax.tree.map(np.testing.assert_array_equal, found, {"max_logits": maxima})
        assert state.tx is given


def test_train_state_works_in_a_jitted_step_with_any_optimizer():
    x, mask = _inputs(2, LENGTH, WIDTH), _causal()
    model = Decoder()
    params = model.init(jax.random.key(1), x)["params"]

    @jax.jit
    def step(state, x):
        def loss(params):
            out, max_logits = capture_max_logits(state.apply_fn)({"params": params}, x, mask)
            return jnp.mean(out**2), max_logits

        gradients, max_logits = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients, max_logits=max_logits)

    for tx in (optax.sgd(0.1), optax.chain(optax.sgd(0.1), optax.identity())):
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        after = step(state, x)
        assert after.step == 1
        assert jax.tree.structure(after) == jax.tree.structure(state)
