"""Flax Linen and NNX models: what they compute stays, and their maxima arrive under their paths."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muonclip_jax import linen as mc_linen, nnx as mc_nnx
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE

LENGTH, WIDTH, HEADS = 6, 16, 4
X = 3 * jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
MASK = nn.make_causal_mask(jnp.ones((2, LENGTH)))
OURS: dict[str, Any] = {"linen": mc_linen, "nnx": mc_nnx}


def dense_maxima(attention: Any, x: jax.Array, mask: Any = None) -> np.ndarray:
    """Returns the maxima that one attention's kernels give, in float64."""
    query, key = (
        np.einsum("btd,dnh->btnh", np.float64(x), np.float64(attention[name]["kernel"]))
        + np.float64(attention[name]["bias"])
        for name in ("query", "key")
    )
    return dense_attention(query, key, mask=mask).max_logits


class Model(NamedTuple):
    """A module as both frameworks have it: jitted calls with and without a capture, and weights."""

    call: Callable[..., Any]
    captured: Callable[..., Any]
    weights: Any


def linen_model(module: nn.Module) -> Model:
    variables = module.init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, X)

    def run(apply: Any) -> Callable[..., Any]:
        return lambda x, **keywords: jax.jit(lambda v, x: apply(v, x, **keywords))(variables, x)

    captured = mc_linen.capture_max_logits(module.apply)
    return Model(run(module.apply), run(captured), variables["params"])


def nnx_model(module: Any) -> Model:
    def run(function: Any) -> Callable[..., Any]:
        def call(x: jax.Array, rngs: Any = None, **keywords: Any) -> Any:
            def jitted(module: Any, x: jax.Array) -> Any:
                given = keywords if rngs is None else {**keywords, "rngs": nnx.Rngs(**rngs)}
                return function(module)(x, **given)

            return nnx.jit(jitted)(module, x)

        return call

    weights = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return Model(run(lambda module: module), run(mc_nnx.capture_max_logits), weights)


def attention(framework: str, **keywords: Any) -> Model:
    bias_init = nn.initializers.normal(0.5)
    if framework == "linen":
        return linen_model(nn.MultiHeadDotProductAttention(HEADS, bias_init=bias_init, **keywords))
    keywords = {"decode": False, "rngs": nnx.Rngs(0), "bias_init": bias_init} | keywords
    return nnx_model(nnx.MultiHeadAttention(HEADS, WIDTH, **keywords))


def _twice(query, key, value, mask=None, dtype=None):
    """An attention function of the user's own: twice Flax's."""
    return 2 * nn.dot_product_attention(query, key, value, mask=mask, dtype=dtype)


def _twice_nnx(query, key, value, **keywords):
    return 2 * nnx.dot_product_attention(query, key, value, **keywords)


BOTH = ("linen", "nnx")
DROPOUT = {"dropout_rate": 0.5, "deterministic": False}
RNGS = {"rngs": {"dropout": jax.random.key(3)}}
CAUSAL = {"mask": None, "is_causal": True}
PRODUCTS = ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls")
#: Frameworks, settings of the module, and arguments of a call; "ours" is our attention function.
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "plain": (BOTH, {}, {}),
    "bfloat16": (BOTH, {"dtype": "bfloat16"}, {}),
    "float16 with dropout": (("linen",), {"dtype": "float16", **DROPOUT}, RNGS),
    "dropout with rngs of the call": (("nnx",), {"keep_rngs": False, **DROPOUT}, RNGS),
    "normalised": (BOTH, {"normalize_qk": True}, {}),
    "products of the user's own": (("linen",), dict.fromkeys(PRODUCTS, lambda: jnp.einsum), {}),
    "a function of the user's own": (("linen",), {"attention_fn": _twice}, {}),
    "the same in NNX": (("nnx",), {"attention_fn": _twice_nnx}, {}),
    "ours, bound": (BOTH, {"attention_fn": "bound"}, {}),
    "ours": (BOTH, {"attention_fn": "ours"}, {}),
    "ours, bfloat16": (BOTH, {"attention_fn": "ours", "dtype": "bfloat16"}, {}),
    "ours, shared keys": (("nnx",), {"attention_fn": "ours", "num_kv_heads": 2}, {}),
    "causal": (("nnx",), {}, CAUSAL),
    "ours, causal": (("nnx",), {"attention_fn": "ours"}, CAUSAL),
}


@pytest.mark.parametrize(("ours", "flax"), [(mc_linen, nn), (mc_nnx, nnx)])
def test_dropout_and_products_of_the_users_own_are_those_of_flax(ours, flax):
    x, key = X.reshape(2, LENGTH, HEADS, -1), RNGS["rngs"]["dropout"]
    doubled = lambda *arguments: 2 * jnp.einsum(*arguments)  # noqa: E731
    own = {"attn_weights_value_einsum": doubled, "qk_attn_weights_einsum": doubled}
    for given in ({"dropout_rng": key, "dropout_rate": 0.5}, own if flax is nn else {}):
        out, expected = (each.dot_product_attention(x, x, x, **given) for each in (ours, flax))
        np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "framework"), [(name, each) for name, row in SETTINGS.items() for each in row[0]]
)
def test_a_capture_changes_no_bit_and_its_maxima_are_those_of_dense_float64(name, framework):
    _, settings, keywords = SETTINGS[name]
    dtype, ours = settings.get("dtype", "float32"), OURS[framework].dot_product_attention
    functions = {"ours": ours, "bound": functools.partial(ours, implementation="xla")}
    given = dict(settings)
    if isinstance(function := settings.get("attention_fn"), str):
        given["attention_fn"] = functions[function]
    model = attention(framework, **given)
    keywords = {"mask": MASK, **keywords}
    out, max_logits = model.captured(X, **keywords)
    np.testing.assert_array_equal(out, model.call(X, **keywords))
    if isinstance(function, str):
        del given["attention_fn"]
        expected = np.float32(attention(framework, **given).call(X, mask=MASK))
        atol = TOLERANCE[dtype] * np.abs(expected).max()  # Flax rounds the logits, we do not
        np.testing.assert_allclose(np.float32(out), expected, atol=atol)
        assert out.dtype == dtype
    assert max_logits["max_logits"].dtype == jnp.float32
    if "normalize_qk" not in settings:
        tolerance = TOLERANCE[dtype] * (1 if dtype == "float32" else 2)  # they are rounded to it
        expected = dense_maxima(model.weights, X, MASK)
        np.testing.assert_allclose(max_logits["max_logits"], expected, rtol=tolerance)


class LinenLayer(nn.Module):
    """Attention with a residual; as a step of nn.scan it returns a pair."""

    keywords: Any

    @nn.compact
    def __call__(self, x, _=None):
        bias_init = nn.initializers.normal(0.5)
        layer = nn.MultiHeadDotProductAttention(
            HEADS, name="attention", bias_init=bias_init, **self.keywords
        )
        return x + layer(x, mask=MASK), None


class LinenDecoder(nn.Module):
    stacked: bool
    remat: bool
    keywords: Any
    carried: tuple[str, ...] = ("params", "intermediates")

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(LinenLayer, prevent_cse=not self.stacked) if self.remat else LinenLayer
        if not self.stacked:
            for i in range(2):
                x = layer(self.keywords, name=f"block_{i}")(x)[0]
            return x
        axes: Any = dict.fromkeys(self.carried, 0)
        rngs: Any = {"params": True}
        stack = nn.scan(layer, variable_axes=axes, split_rngs=rngs, length=2)
        return stack(self.keywords, name="blocks")(x)[0]


class NnxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, keywords: Any):
        bias_init = nnx.initializers.normal(0.5)
        keywords = {"decode": False, "bias_init": bias_init, **keywords}
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs, **keywords)

    def __call__(self, x):
        return x + self.attention(x, mask=MASK)


class NnxDecoder(nnx.Module):
    def __init__(self, stacked: bool, remat: bool, keywords: Any):
        self.stacked, self.remat, rngs = stacked, remat, nnx.Rngs(0)
        if stacked:
            self.blocks: Any = nnx.vmap(lambda r: NnxLayer(r, keywords))(rngs.split(2))
        else:
            self.blocks = nnx.List([NnxLayer(rngs, keywords) for _ in range(2)])

    def __call__(self, x):
        def call(x, block):
            return block(x)

        call = nnx.remat(call) if self.remat else call
        if self.stacked:
            return nnx.scan(call, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return functools.reduce(call, self.blocks, x)


@pytest.mark.parametrize(
    ("framework", "stacked", "remat", "ours"),
    [
        ("linen", False, True, True),
        ("linen", True, True, False),
        ("nnx", False, True, False),
        ("nnx", True, False, True),
    ],
)
def test_every_layer_has_its_own_maxima_inside_of_a_gradient(framework, stacked, remat, ours):
    keywords = {"attention_fn": OURS[framework].dot_product_attention} if ours else {}
    if framework == "linen":
        model = LinenDecoder(stacked, remat, keywords)
        params = model.init(jax.random.key(1), X)["params"]
        plain = LinenDecoder(stacked, False, {})
        call = lambda p, x: plain.apply({"params": p}, x)  # noqa: E731
        captured = lambda p, x: mc_linen.capture_max_logits(model.apply)({"params": p}, x)  # noqa: E731
    else:
        graph, params = nnx.split(NnxDecoder(stacked, remat, keywords))
        plain_graph, _ = nnx.split(NnxDecoder(stacked, False, {}))
        call = lambda p, x: nnx.merge(plain_graph, p)(x)  # noqa: E731
        captured = lambda p, x: mc_nnx.capture_max_logits(nnx.merge(graph, p))(x)  # noqa: E731

    @jax.jit
    def step(params):
        def loss(params):
            out, max_logits = captured(params, X)
            return jnp.sum(out**2), max_logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, max_logits), gradients = step(params)
    expected = jax.jit(jax.value_and_grad(lambda p: jnp.sum(cast(Any, call(p, X)) ** 2)))(params)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2, rtol=1e-4), gradients, expected[1]
    )
    assert set(max_logits) <= {"blocks", "block_0", "block_1"}
    weights: Any = params if framework == "linen" else nnx.to_pure_dict(cast(Any, params))
    x: Any = X
    for i in range(2):
        layer, found = (
            jax.tree.map(lambda leaf, at=i: leaf[at], tree["blocks"])
            if stacked
            else tree[f"block_{i}"]
            if framework == "linen"
            else tree["blocks"][i]
            for tree in (weights, max_logits)
        )
        assert list(found) == ["attention"]
        # What the second layer is given was itself rounded.
        expected = dense_maxima(layer["attention"], x, MASK)
        np.testing.assert_allclose(found["attention"]["max_logits"], expected, rtol=1e-4)
        flax = nn.MultiHeadDotProductAttention(HEADS)
        x = x + cast(Any, flax.apply({"params": layer["attention"]}, x, mask=MASK))


@pytest.mark.parametrize("framework", BOTH)
def test_decoding_sees_only_what_is_in_the_cache(framework):
    x = X[:1]
    module = nn.MultiHeadDotProductAttention(HEADS, decode=True)
    variables = dict(module.init(jax.random.key(1), x))
    apply = jax.jit(lambda v, x: mc_linen.capture_max_logits(module.apply)(v, x, mutable=["cache"]))
    model = nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=nnx.Rngs(0))
    model.init_cache(x.shape)
    for t in range(3):
        if framework == "linen":
            weights = variables["params"]
            (_, state), max_logits = apply(variables, x[:, t : t + 1])
            assert list(state) == ["cache"]
            variables |= state
        else:
            weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            _, max_logits = mc_nnx.capture_max_logits(model)(x[:, t : t + 1])
        seen = (np.arange(LENGTH) <= t)[None, :] & (np.arange(LENGTH) == t)[:, None]
        expected = dense_maxima(weights, x, seen)
        np.testing.assert_allclose(max_logits["max_logits"], expected, rtol=1e-5)


def test_a_capture_that_caught_nothing_or_cannot_is_an_error():
    with pytest.raises(ValueError, match="No attention module recorded a maximum logit"):
        linen_model(nn.Dense(3)).captured(X)
    with pytest.raises(ValueError, match="No attention module recorded a maximum logit"):
        nnx_model(nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0))).captured(X)
    with pytest.raises(TypeError, match=r"whose first argument is the model; .* is int"):
        mc_nnx.capture_max_logits(lambda x: x)(3)
    with pytest.raises(ValueError, match=r"'blocks/attention' are lost.*'intermediates': 0"):
        linen_model(LinenDecoder(True, False, {}, carried=("params",))).captured(X)
