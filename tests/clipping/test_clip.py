"""Exact values of the clip, and the traps that other implementations fell into."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muonclip_jax.clipping import apply_qk_clip, qk_clip_info
from tests.clipping.models import attention, normal


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), tree)


def same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, bits(a), bits(b))


def test_alpha_splits_gamma_over_kernels_and_biases():
    params = {"attn": attention()}
    maxima = {"attn": jnp.asarray([150.0, 90.0, 40.0, 300.0])}
    new, info = apply_qk_clip(params, maxima, alpha=0.3)
    gamma = np.array([2 / 3, 1, 1, 1 / 3])
    for name, factor in (("query", gamma**0.3), ("key", gamma**0.7)):
        for leaf in ("kernel", "bias"):
            expected = np.asarray(params["attn"][name][leaf]) * factor[:, None]
            np.testing.assert_allclose(new["attn"][name][leaf], expected, rtol=1e-6)
            same_bits(new["attn"][name][leaf][..., 1:3, :], params["attn"][name][leaf][..., 1:3, :])
    same_bits({k: new["attn"][k] for k in ("value", "out")},
              {k: params["attn"][k] for k in ("value", "out")})  # fmt: skip
    np.testing.assert_allclose(info.gamma["attn"], gamma, rtol=1e-6)
    assert int(info.clipped_heads["attn"]) == 2


@pytest.mark.parametrize(
    ("shared_keys", "query", "key"),
    [
        ("query", [2 / 3, 1, 1, 1 / 3], 1.0),
        ("group", [3**-0.5] * 4, 3**-0.5),
        ("balanced", [2 / 3 * 3**0.5, 3**0.5, 3**0.5, 3**-0.5], 3**-0.5),
    ],
)
def test_shared_keys_by_each_rule(shared_keys, query, key):
    params = {"attn": attention(kv_heads=1)}
    maxima = {"attn": jnp.asarray([150.0, 90.0, 40.0, 300.0])}
    new, _ = apply_qk_clip(params, maxima, shared_keys=shared_keys)
    factor = {"query": np.array(query)[:, None], "key": key}
    for name, leaf in (("query", "kernel"), ("query", "bias"), ("key", "kernel"), ("key", "bias")):
        expected = np.asarray(params["attn"][name][leaf]) * factor[name]
        np.testing.assert_allclose(new["attn"][name][leaf], expected, rtol=1e-6)
    if shared_keys == "query":
        same_bits(new["attn"]["key"], params["attn"]["key"])


def test_stacked_layers_do_not_share_a_gamma():
    params = {"layers": {"attn": attention(stack=(3,), heads=2)}}
    maxima = {"layers/attn": jnp.asarray([[200.0, 1.0], [1.0, 400.0], [1.0, 1.0]])}
    new, info = apply_qk_clip(params, maxima)
    gamma = np.array([[0.5, 1], [1, 0.25], [1, 1]]) ** 0.5
    old = params["layers"]["attn"]["query"]
    got = new["layers"]["attn"]["query"]
    np.testing.assert_allclose(got["kernel"], old["kernel"] * gamma[:, None, :, None], rtol=1e-6)
    np.testing.assert_allclose(got["bias"], old["bias"] * gamma[:, :, None], rtol=1e-6)
    assert int(info.clipped_heads["layers/attn"]) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_keep_their_dtype_and_round_once(dtype):
    params = {"attn": attention(dtype=dtype)}
    new, _ = apply_qk_clip(params, {"attn": jnp.full(4, 300.0)})
    old = np.asarray(params["attn"]["key"]["kernel"]).astype(np.float64)
    expected = jnp.asarray(old / np.sqrt(3), dtype)
    assert new["attn"]["key"]["kernel"].dtype == dtype
    np.testing.assert_allclose(
        np.asarray(new["attn"]["key"]["kernel"], np.float32),
        np.asarray(expected, np.float32),
        rtol=float(jnp.finfo(dtype).eps),
    )


def test_odd_weights_keep_their_bits_too():
    params = {"attn": attention()}
    for bad in (-300.0, 0.0, np.nan, np.inf, -np.inf):
        same_bits(apply_qk_clip(params, {"attn": jnp.full(4, bad)})[0], params)
    odd = jnp.asarray([-0.0, 1e-42, np.inf, np.nan, -np.nan, np.finfo("f4").max] * 8)
    params = {"attn": attention(d=6, heads=1, bias=False)}
    params["attn"]["query"]["kernel"] = odd.reshape(6, 1, 8)
    same_bits(apply_qk_clip(params, {"attn": jnp.asarray([99.0])})[0], params)
    # The other heads' weights stay beside a head that is clipped.
    params = {"attn": attention(heads=2, bias=False)}
    params["attn"]["query"]["kernel"] = (
        params["attn"]["query"]["kernel"].at[:, 1].set(odd.reshape(6, 8))
    )
    new, _ = apply_qk_clip(params, {"attn": jnp.asarray([400.0, 9.0])})
    same_bits(new["attn"]["query"]["kernel"][:, 1], params["attn"]["query"]["kernel"][:, 1])


def test_published_latent_attention_numbers():
    """Rank 2, two heads, 4 of 6 query features without rotation, maxima 20 and 5, threshold 10."""
    params = {
        "decoder": {
            "self_attention": {
                "wq_a": {"kernel": normal(5, 2)},
                "wq_b": {"kernel": jnp.ones((2, 2, 6))},
                "wkv_a": {"kernel": normal(5, 2 + 2)},
                "wkv_b": {"kernel": jnp.ones((2, 2, 4 + 3))},
            }
        }
    }
    maxima = {"decoder": {"self_attention": {"max_logits": (jnp.asarray([20.0, 5.0]),)}}}
    new, info = apply_qk_clip(params, maxima, threshold=10.0)
    attn = new["decoder"]["self_attention"]
    q, kv = np.asarray(attn["wq_b"]["kernel"]), np.asarray(attn["wkv_b"]["kernel"])
    np.testing.assert_allclose(q[:, 0, :4], np.sqrt(0.5), rtol=1e-7)
    np.testing.assert_allclose(q[:, 0, 4:], 0.5, rtol=1e-7)
    np.testing.assert_allclose(kv[:, 0, :4], np.sqrt(0.5), rtol=1e-7)
    assert (kv[:, 0, 4:] == 1).all()
    assert (q[:, 1] == 1).all()
    assert (kv[:, 1] == 1).all()
    same_bits(
        [attn["wq_a"], attn["wkv_a"]],
        [params["decoder"]["self_attention"][name] for name in ("wq_a", "wkv_a")],
    )
    assert int(info.clipped_heads["decoder/self_attention"]) == 1


def test_a_model_that_is_the_attention():
    attn = attention()
    new, info = apply_qk_clip(attn, {"max_logits": (jnp.full(4, 400.0),)})
    np.testing.assert_allclose(new["key"]["bias"], attn["key"]["bias"] * 0.5, rtol=1e-6)
    assert list(info.gamma) == [""]


def test_several_maxima_from_inside_the_attention_are_maxed():
    params = {"self_attention": attention(heads=2)}
    ops = {
        "prefill": {"max_logits": jnp.asarray([400.0, 1.0])},
        "train": {"max_logits": jnp.asarray([1.0, 200.0])},
    }
    new, info = apply_qk_clip(params, {"self_attention": ops})
    assert info.max_logits["self_attention"].tolist() == [400.0, 200.0]
    old = params["self_attention"]["query"]["bias"]
    np.testing.assert_allclose(new["self_attention"]["query"]["bias"][0], old[0] / 2, rtol=1e-6)
    # Of blocks inside each other it is the nearest.
    inside = {"outer": attention(heads=2) | {"self_attention": attention(heads=2)}}
    maxima = {"outer": {"max_logits": jnp.ones(2), "self_attention": {"op": ops["train"]}}}
    _, info = apply_qk_clip(inside, maxima)
    assert info.max_logits["outer/self_attention"].tolist() == [1.0, 200.0]
    # What the block itself recorded comes before what its submodules did.
    _, info = apply_qk_clip(params, {"self_attention": ops | {"max_logits": jnp.ones(2)}})
    assert info.max_logits["self_attention"].tolist() == [1.0, 1.0]


def test_cross_attention_and_several_blocks():
    params = {"self_attn": attention(), "cross_attn": attention(heads=2)}
    maxima = {"self_attn": jnp.full(4, 1.0), "cross_attn": jnp.asarray([200.0, 1.0])}
    new, info = apply_qk_clip(params, maxima)
    same_bits(new["self_attn"], params["self_attn"])
    assert {k: int(v) for k, v in info.clipped_heads.items()} == {"self_attn": 0, "cross_attn": 1}


def test_one_trace_for_any_threshold_and_the_values_may_be_traced():
    params, maxima = {"attn": attention()}, {"attn": jnp.full(4, 400.0)}
    traces = []

    @jax.jit
    def step(params, maxima, threshold, alpha):
        traces.append(1)
        return apply_qk_clip(params, maxima, threshold=threshold, alpha=alpha)

    new, _ = step(params, maxima, 100.0, 0.5)
    step(params, maxima, jnp.inf, 1.0)
    assert len(traces) == 1
    eager, _ = apply_qk_clip(params, maxima)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, eager)


def _multi_steps(inner):
    multi = optax.MultiSteps(inner, 2)
    return multi, lambda state: multi.has_updated(state)


SKIPPING = {
    "gradients that are not finite": (
        lambda inner: (optax.apply_if_finite(inner, 3), lambda state: state.last_finite),
        [np.nan, 1.0],
    ),
    "micro-batches": (_multi_steps, [1.0, 1.0]),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_a_step_that_the_optimizer_skips_is_not_clipped(name):
    """The recipe of the documentation: an infinite threshold where nothing was updated."""
    make, factors = SKIPPING[name]
    tx, stepped = make(optax.sgd(0.1))
    params, maxima = {"attn": attention()}, {"attn": jnp.full(4, 400.0)}
    state, history, info = tx.init(params), [params], None

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        threshold = jnp.where(stepped(state), 100.0, jnp.inf)
        return *apply_qk_clip(params, maxima, threshold=threshold), state

    for factor in factors:
        grads = jax.tree.map(lambda x, factor=factor: factor * jnp.ones_like(x), params)
        params, info, state = step(params, state, grads)
        history.append(params)
    same_bits(history[0], history[1])
    expected, _ = apply_qk_clip(jax.tree.map(lambda x: x - 0.1, history[0]), maxima)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)
    assert info is not None
    assert int(info.total_clipped) == 4


def test_a_clip_compiles_once_when_it_is_not_jitted(caplog):
    params, maxima = {"attn": attention(hd=10)}, {"attn": jnp.full(4, 400.0)}
    apply_qk_clip(params, maxima)
    with jax.log_compiles():
        apply_qk_clip(params, maxima, threshold=7.0)
        assert not [record for record in caplog.records if "ompil" in record.getMessage()]
        apply_qk_clip({"attn": attention(hd=12)}, maxima)  # it would be seen
    assert [record for record in caplog.records if "ompil" in record.getMessage()]


def test_it_runs_in_scan_and_keeps_structure():
    params = {"attn": attention()}

    def body(params, maximum):
        return apply_qk_clip(params, {"attn": maximum})

    new, infos = jax.lax.scan(body, params, jnp.full((3, 4), 200.0))
    np.testing.assert_allclose(
        new["attn"]["key"]["bias"], params["attn"]["key"]["bias"] * 2**-1.5, rtol=1e-6
    )
    assert infos.clipped_heads["attn"].tolist() == [4, 4, 4]


def test_what_is_not_clipped_is_not_computed():
    """A branch a leaf, so that weights of other blocks are neither read nor written."""
    params = {"a": attention(), "b": attention()}
    maxima = {"a": jnp.full(4, 400.0), "b": jnp.full(4, 4.0)}
    text = str(jax.make_jaxpr(lambda p, m: apply_qk_clip(p, m)[0])(params, maxima))
    assert text.count(" cond[") == 2 * len(("query", "key")) * len(("kernel", "bias"))


def test_under_vmap_every_model_has_its_own_clip():
    models = [attention(), jax.tree.map(lambda x: 2 * x, attention())]
    maxima = jnp.asarray([[400.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *models)
    new, _ = jax.vmap(lambda p, m: apply_qk_clip({"attn": p}, {"attn": m}))(stacked, maxima)
    for i, model in enumerate(models):
        alone, _ = apply_qk_clip({"attn": model}, {"attn": maxima[i]})
        same_bits(jax.tree.map(lambda x, i=i: x[i], new), alone)


def test_info_alone_is_the_info_of_the_clip():
    params = {"attn": attention()}
    maxima = {"attn": jnp.asarray([1.0, 150.0, 90.0, 7.0])}
    _, info = apply_qk_clip({"params": params}, maxima)
    for tree in (params, jax.eval_shape(lambda: params)):
        jax.tree.map(np.testing.assert_array_equal, info, qk_clip_info(tree, maxima))


def test_an_empty_tree_stays_empty():
    new, info = apply_qk_clip({}, {})
    assert new == {}
    assert int(info.total_clipped) == 0
    assert float(info.largest) == -np.inf
