"""Exact values of the clip, and the traps that other implementations fell into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.clipping import apply_qk_clip, qk_clip_info
from muonclip_jax.clipping.gamma import SHARED_KEYS, clip_gamma, role_factors
from tests.clipping.cases import attention

MAXIMA = {"attn": jnp.asarray([150.0, 90.0, 40.0, 300.0])}
FOUR_TIMES = {"attn": jnp.full(4, 400.0)}


def same_bits(a, b):
    def bits(x):
        return np.asarray(x).view(f"u{x.dtype.itemsize}")

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


GAMMA = np.array([2 / 3, 1, 1, 1 / 3])


@pytest.mark.parametrize(
    ("kv_heads", "alpha", "rule", "query", "key"),
    [
        (4, 0.3, "query", GAMMA**0.3, GAMMA**0.7),
        (1, 0.5, "query", GAMMA, 1.0),
        (1, 0.5, "group", 3**-0.5, 3**-0.5),
        (1, 0.5, "balanced", GAMMA * 3**0.5, 3**-0.5),
    ],
)
def test_gamma_is_split_over_kernels_and_biases(kv_heads, alpha, rule, query, key):
    params = {"attn": attention(kv_heads=kv_heads)}
    new, info = apply_qk_clip(params, MAXIMA, alpha=alpha, shared_keys=rule)
    old = params["attn"]
    for name, gamma in (("query", query), ("key", key)):
        factor = np.broadcast_to(gamma, 4 if name == "query" else kv_heads)[:, None]
        expected = jax.tree.map(lambda x, factor=factor: np.asarray(x) * factor, old[name])
        assert_close(new["attn"][name], expected)
    same_bits([new["attn"][n] for n in ("value", "out")], [old[n] for n in ("value", "out")])
    np.testing.assert_allclose(info.gamma["attn"], GAMMA, rtol=1e-6)
    assert int(info.clipped_heads["attn"]) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_keep_their_dtype_and_round_once(dtype):
    params = {"attn": attention(dtype=dtype)}
    new = apply_qk_clip(params, {"attn": jnp.full(4, 300.0)})[0]["attn"]["key"]["kernel"]
    expected = jnp.asarray(np.float32(params["attn"]["key"]["kernel"]) / np.sqrt(3), dtype)
    assert new.dtype == dtype
    # Rounded factors or products would differ in many a last bit.
    assert np.mean(np.float32(new) != np.float32(expected)) < 0.02


def test_odd_weights_keep_their_bits_too():
    params = {"attn": attention()}
    for bad in (-300.0, 0.0, np.nan, np.inf, -np.inf):
        same_bits(apply_qk_clip(params, {"attn": jnp.full(4, bad)})[0], params)
    # Beside a head that is clipped, and alone.
    odd = jnp.asarray([-0.0, 1e-42, np.inf, np.nan, -np.nan, np.finfo("f4").max] * 8)
    params = {"attn": attention(heads=2, bias=False)}
    kernel = params["attn"]["query"]["kernel"].at[:, 1].set(odd.reshape(6, 8))
    params["attn"]["query"]["kernel"] = kernel
    new, _ = apply_qk_clip(params, {"attn": jnp.asarray([400.0, 9.0])})
    same_bits(new["attn"]["query"]["kernel"][:, 1], kernel[:, 1])
    same_bits(apply_qk_clip(params, {"attn": jnp.asarray([99.0, 9.0])})[0], params)


def test_published_latent_attention_numbers():
    """Rank 2, two heads, 4 of 6 query features without rotation, maxima 20 and 5, threshold 10."""
    shapes = {"wq_a": (5, 2), "wkv_a": (5, 4), "wq_b": (2, 2, 6), "wkv_b": (2, 2, 7)}
    block = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    maxima = {"decoder": {"self_attention": {"max_logits": (jnp.asarray([20.0, 5.0]),)}}}
    new, info = apply_qk_clip({"decoder": {"self_attention": block}}, maxima, threshold=10.0)
    expected = jax.tree.map(np.ones_like, block)
    expected["wq_b"]["kernel"][:, 0] = [*[np.sqrt(0.5)] * 4, 0.5, 0.5]
    expected["wkv_b"]["kernel"][:, 0, :4] = np.sqrt(0.5)
    assert_close(new["decoder"]["self_attention"], expected)
    assert int(info.clipped_heads["decoder/self_attention"]) == 1


def test_blocks_are_clipped_by_their_own_maxima():
    """A block at the root, one beside another, recordings from inside, blocks inside each other."""
    block, one, other = attention(heads=2), jnp.asarray([400.0, 1.0]), jnp.asarray([1.0, 200.0])
    new, info = apply_qk_clip(block, {"max_logits": (jnp.full(2, 400.0),)})
    np.testing.assert_allclose(new["key"]["bias"], block["key"]["bias"] * 0.5, rtol=1e-6)
    assert list(info.gamma) == [""]
    params = {"self_attn": attention(), "cross_attn": block}
    new, info = apply_qk_clip(params, {"self_attn": jnp.ones(4), "cross_attn": other})
    same_bits(new["self_attn"], params["self_attn"])
    assert {k: int(v) for k, v in info.clipped_heads.items()} == {"self_attn": 0, "cross_attn": 1}
    # The maximum of what is recorded inside of a block; what the block recorded comes before it.
    ops = {"prefill": {"max_logits": one}, "train": {"max_logits": other}}
    own, inside = ops | {"max_logits": jnp.ones(2)}, {"outer": block | {"attn": block}}
    for tree, maxima, path, expected in (
        ({"attn": block}, {"attn": ops}, "attn", [400.0, 200.0]),
        ({"attn": block}, {"attn": own}, "attn", [1.0, 1.0]),
        (inside, {"outer": own | {"attn": {"op": ops["train"]}}}, "outer/attn", [1.0, 200.0]),
    ):
        info = apply_qk_clip(tree, maxima)[1]
        assert info.max_logits[path].tolist() == expected


def test_it_compiles_once_for_any_threshold_also_where_it_is_not_jitted(caplog):
    params = {"attn": attention(hd=10)}
    apply_qk_clip(params, FOUR_TIMES)
    with jax.log_compiles():
        apply_qk_clip(params, FOUR_TIMES, threshold=7.0, alpha=1.0)
        assert not [record for record in caplog.records if "ompil" in record.getMessage()]
        apply_qk_clip({"attn": attention(hd=12)}, FOUR_TIMES)  # it would be seen
    assert [record for record in caplog.records if "ompil" in record.getMessage()]


def test_under_vmap_every_model_has_its_own_clip():
    params = {"attn": attention()}
    models = [params, jax.tree.map(lambda x: 2 * x, params)]
    maxima = {"attn": jnp.asarray([[400.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])}
    new, _ = jax.vmap(apply_qk_clip)(jax.tree.map(lambda *xs: jnp.stack(xs), *models), maxima)
    for i, model in enumerate(models):
        alone, _ = apply_qk_clip(model, {"attn": maxima["attn"][i]})
        same_bits(jax.tree.map(lambda x, i=i: x[i], new), alone)


def test_info_alone_is_the_info_of_the_clip_and_an_empty_tree_stays_empty():
    params = {"attn": attention()}
    _, info = apply_qk_clip({"params": params}, MAXIMA)
    for tree in (params, jax.eval_shape(lambda: params)):
        jax.tree.map(np.testing.assert_array_equal, info, qk_clip_info(tree, MAXIMA))
    new, info = apply_qk_clip({}, {})
    assert (new, int(info.total_clipped), float(info.largest)) == ({}, 0, -np.inf)


def test_gamma_in_every_dtype():
    assert clip_gamma(jnp.asarray([100.0, 99.0]), 100.0).tolist() == [1.0, 1.0]
    assert clip_gamma(jnp.asarray([1e30]), jnp.inf).tolist() == [1.0]
    assert jax.jit(clip_gamma)(jnp.asarray([20.0]), 10.0).tolist() == [0.5]
    for dtype in ("bfloat16", "float16", "float32"):
        gamma = clip_gamma(jnp.asarray([48.0], dtype), 16.0)
        assert gamma.dtype == jnp.float32
        np.testing.assert_allclose(gamma, [1 / 3], rtol=1e-7)
    with jax.enable_x64(True):  # as wide as the maxima
        maxima = np.array([150.0, 90.0, 1234.5])
        for alpha in (0.0, 0.3, 1.0):
            factors = role_factors(clip_gamma(jnp.asarray(maxima), 100.0), alpha, "query", 3)
            expected = np.minimum(1.0, 100.0 / maxima)
            np.testing.assert_allclose(factors["query"], expected**alpha, rtol=1e-15)
            np.testing.assert_allclose(factors["key"], expected ** (1 - alpha), rtol=1e-15)
        assert clip_gamma(jnp.asarray(maxima, jnp.bfloat16), 100.0).dtype == jnp.float32


@pytest.mark.parametrize("bad", [-5.0, 0.0, -0.0, np.nan, np.inf, -np.inf, np.finfo("f4").min])
def test_a_maximum_or_a_traced_threshold_that_is_no_positive_number_changes_nothing(bad):
    """An infinite threshold is what a loop passes on a step that its optimizer skipped."""
    gamma = clip_gamma(jnp.asarray([bad, 50.0]), 10.0)
    assert gamma.tolist() == pytest.approx([1.0, 0.2])
    for shared_keys in SHARED_KEYS:
        for kv_heads in (1, 2):
            factors = role_factors(gamma[jnp.asarray([0, 0])], 0.5, shared_keys, kv_heads)
            assert all((factor == 1.0).all() for factor in factors.values())
    params, maxima = {"attn": attention()}, {"attn": jnp.asarray([50.0, 0.0, -0.5, 1e30])}
    clip = jax.jit(lambda threshold: apply_qk_clip(params, maxima, threshold=threshold))
    new, info = clip(bad)
    jax.tree.map(np.testing.assert_array_equal, new, params)
    assert int(info.total_clipped) == 0
