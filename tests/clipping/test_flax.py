"""Flax's own attention modules: record, clip, record again."""

import functools
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muonclip_jax.clipping import apply_qk_clip

X = jax.random.normal(jax.random.key(0), (2, 5, 12))
THRESHOLD = 1.0


def logits(query, key):
    """Dense maxima `(heads,)`, with keys repeated for the queries that share them."""
    key = jnp.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
    scores = jnp.einsum("...thd,...shd->...hts", query, key) / np.sqrt(query.shape[-1])
    return scores.max((0, -2, -1))


def recording(query, key, value, **kwargs):
    """Flax's attention that sows its maxima in the module that calls it."""
    module = nn.module._context.module_stack[-1]
    assert isinstance(module, nn.Module)
    module.sow("intermediates", "max_logits", logits(query, key))
    return nn.dot_product_attention(query, key, value)


NORMAL = nn.initializers.normal(0.7)


def attention(kernel_init: Any = NORMAL, **kwargs):
    return nn.MultiHeadDotProductAttention(
        num_heads=3,
        attention_fn=recording,
        kernel_init=kernel_init,
        bias_init=NORMAL,
        **kwargs,
    )


class Layer(nn.Module):
    """One layer without a residual, so that layers differ."""

    box: Any = None

    @nn.compact
    def __call__(self, x, _=None):
        init: Any = NORMAL
        if self.box is not None:
            init = self.box(init, (None, None, None))
        return nn.LayerNorm()(attention(init, name="attn")(x)), None


def init(model):
    return jax.jit(model.init)(jax.random.key(1), X)["params"]


@functools.partial(jax.jit, static_argnums=0)
def record(model, params):
    _, state = model.apply({"params": params}, X, mutable=["intermediates"])
    return state


def check(model, params, path, shape):
    before = record(model, params)
    new, info = apply_qk_clip(params, before, threshold=THRESHOLD)
    assert info.gamma[path].shape == shape
    assert int(info.total_clipped) > 0
    assert jax.tree.structure(new) == jax.tree.structure(params)
    return before, record(model, new), info


def first_layer(state, path):
    (maxima,) = jax.tree.leaves(state)
    return maxima


def test_linen_frozen():
    params: Any = flax.core.FrozenDict({"attn": init(attention())})
    maxima = {"attn": {"max_logits": (jnp.asarray([400.0, 1.0, 1.0]),)}}
    new, _ = apply_qk_clip(params, flax.core.FrozenDict({"intermediates": maxima}))
    old = params["attn"]["query"]["bias"]
    np.testing.assert_allclose(new["attn"]["query"]["bias"][0], old[0] / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        (nn.with_partitioning, nn.Partitioned),
        (nn.with_logical_partitioning, nn.LogicallyPartitioned),
    ],
)
def test_linen_with_the_whole_variables_and_boxes(box, kind):
    model = Layer(box=box)
    variables = {"params": init(model)}
    before = record(model, variables["params"])
    new, info = apply_qk_clip(variables, before, threshold=THRESHOLD)
    assert type(new["params"]["attn"]["query"]["kernel"]) is kind
    after = record(model, new["params"])
    expected = np.minimum(first_layer(before, ""), THRESHOLD)
    np.testing.assert_allclose(first_layer(after, ""), expected, rtol=1e-5)
    assert list(info.gamma) == ["attn"]


@pytest.mark.parametrize(("axis", "remat"), [(0, True), (1, False), (-1, False)])
def test_linen_scan(axis, remat):
    scanned = nn.scan(
        nn.remat(Layer) if remat else Layer,
        variable_axes={"params": axis, "intermediates": 0},
        split_rngs={"params": True},
        length=4,
    )
    model = scanned(name="layers")
    params = init(model)
    before, after, info = check(model, params, "attn", (4, 3))
    # Later layers see other inputs once the first is clipped, so compare the first layer's heads.
    (then,), (now,) = jax.tree.leaves(before), jax.tree.leaves(after)
    np.testing.assert_allclose(now[0], np.minimum(then[0], THRESHOLD), rtol=1e-5)
    gamma = np.where(np.asarray(then) > THRESHOLD, THRESHOLD / np.asarray(then), 1.0)
    np.testing.assert_allclose(info.gamma["attn"], gamma, rtol=1e-6)
    new, _ = apply_qk_clip(params, before, threshold=THRESHOLD)
    ratio = new["attn"]["query"]["bias"] / params["attn"]["query"]["bias"]
    ratio = np.moveaxis(np.asarray(ratio), axis, 0)
    np.testing.assert_allclose(
        ratio, np.broadcast_to(gamma[..., None] ** 0.5, ratio.shape), rtol=1e-5
    )


def nnx_model(**kwargs):
    return nnx.MultiHeadAttention(
        num_heads=6,
        in_features=12,
        qkv_features=24,
        decode=False,
        kernel_init=nnx.initializers.normal(0.7),
        bias_init=nnx.initializers.normal(0.7),
        rngs=nnx.Rngs(0),
        **kwargs,
    )


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_nnx(pure, kv_heads):
    model = nnx_model(num_kv_heads=kv_heads) if kv_heads != 6 else nnx_model()
    state = nnx.state(model, nnx.Param)
    params = nnx.to_pure_dict(state) if pure else state

    def maxima():
        return logits(model.query(X), model.key(X))

    before = maxima()
    recorded = nnx.State({"max_logits": nnx.Intermediate((before,))})
    new, info = apply_qk_clip(params, recorded, threshold=THRESHOLD)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    if pure:
        nnx.replace_by_pure_dict(state, new)
        new = state
    nnx.update(model, new)
    np.testing.assert_allclose(maxima(), np.minimum(before, THRESHOLD), rtol=1e-5)
    assert int(info.total_clipped) == int((before > THRESHOLD).sum()) > 0


def test_normalised_queries_and_keys_are_refused():
    linen = attention(normalize_qk=True)
    params = init(linen)
    model = nnx_model(normalize_qk=True)
    maxima = nnx.State({"max_logits": nnx.Intermediate((jnp.full(6, 400.0),))})
    for tree, recorded in (
        (params, record(linen, params)),
        (nnx.state(model, nnx.Param), maxima),
    ):
        with pytest.raises(ValueError, match=r"normalised \('query_ln' and 'key_ln'\)"):
            apply_qk_clip(tree, recorded)
