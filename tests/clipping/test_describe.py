"""The printed table, the telemetry, and copies of the weights."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muonclip_jax.clipping import QKClipInfo, apply_qk_clip, describe_attention
from muonclip_jax.clipping.gamma import SHARED_KEYS, role_factors


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PARAMS = {
    "a": {
        "query": {"kernel": leaf(6, 4, 8), "bias": leaf(4, 8)},
        "key": {"kernel": leaf(6, 2, 8)},
        "out": {"kernel": leaf(4, 8, 6)},
    },
    "b": {
        "wq_b": {"kernel": leaf(3, 5, 2, 6)},
        "wkv_a": {"kernel": leaf(3, 9, 6)},
        "wkv_b": {"kernel": leaf(3, 4, 2, 7)},
        "out": {"kernel": leaf(3, 2, 3, 9)},
    },
}
B = """\
b: latent (low-rank query), 2 heads of 4, stacked (3,)
  b/wq_b/kernel (3, 5, 2, 6): query (4 a head) by gamma^alpha, query (2 a head) by gamma
  b/wkv_b/kernel (3, 4, 2, 7): key (4 a head) by gamma^(1-alpha), value (3 a head) untouched"""
A = """\
a: separate q and k, 4 query heads on 2 key heads of 8
  a/query/bias (4, 8): query by {query}
  a/query/kernel (6, 4, 8): query by {query}"""


def test_the_table_without_maxima():
    assert describe_attention(PARAMS) == f"{A.format(query='gamma')}\n{B}"


def test_the_table_by_rule():
    text = describe_attention(PARAMS, shared_keys="balanced", blocks="a")
    key = "  a/key/kernel (6, 2, 8): key by eta^(1-alpha)"
    unselected = "b: latent (low-rank query), not selected by blocks="
    assert text == f"{A.format(query='gamma/eta^(1-alpha)')}\n{key}\n{unselected}"


@pytest.mark.parametrize("rule", SHARED_KEYS)
def test_the_words_name_what_each_rule_scales(rule):
    factors = role_factors(jnp.asarray([0.25, 1.0, 1.0, 0.5]), 0.5, rule, 2)
    text = describe_attention({"a": PARAMS["a"]}, shared_keys=rule)
    named = {line.split("/")[1] for line in text.splitlines()[1:]}
    assert named == set(factors) - {"query_alone"}


def test_merged_kernels_need_the_maxima():
    params = {"attn": {"q_proj": {"kernel": leaf(6, 32)}, "k_proj": {"kernel": leaf(6, 16)}}}
    assert describe_attention(params) == "attn: separate q and k, heads as many as the maxima say"
    text = describe_attention(params, {"attn": leaf(4)})
    assert text.startswith("attn: separate q and k, 4 query heads on 2 key heads of 8\n")


OPEN = {
    "four layers of merged heads, or heads of 64": {"q": (4, 64, 64), "k": (4, 64, 64)},
    "with the layers' output": {"q": (4, 64, 64), "k": (4, 64, 64), "o": (4, 64, 64)},
    "heads on an axis, without an output": {"q": (6, 2, 4), "k": (6, 2, 4)},
    "an axis of four in every place": {"q": (4, 4, 4), "k": (4, 4, 4), "o": (4, 4, 4)},
}


@pytest.mark.parametrize("name", OPEN)
def test_shapes_that_leave_the_heads_open_are_not_guessed(name):
    params = {"attn": {role: {"kernel": leaf(*shape)} for role, shape in OPEN[name].items()}}
    assert describe_attention(params) == "attn: separate q and k, heads as many as the maxima say"


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"q": (64, 8, 16), "k": (64, 2, 16), "o": (8, 16, 64)}, "8 query heads on 2 key heads of"),
        ({"q": (3, 64, 4, 16), "k": (3, 64, 4, 16), "o": (3, 4, 16, 64)}, "4 heads of 16, stacked"),
        ({"q": (64, 3, 4, 16), "k": (64, 3, 4, 16), "o": (4, 3, 16, 64)}, "4 heads of 16, stacked"),
        ({"q": (64, 3, 4, 16), "k": (64, 3, 1, 16), "o": (4, 3, 16, 64)}, "4 query heads on 1 key"),
    ],
)
def test_shapes_that_allow_one_reading_are_read(shapes, expected):
    params = {"attn": {role: {"kernel": leaf(*shape)} for role, shape in shapes.items()}}
    assert f"attn: separate q and k, {expected}" in describe_attention(params)


def test_a_block_that_cannot_be_clipped_says_why():
    params = {"attn": PARAMS["a"] | {"query_ln": {"scale": leaf(8)}, "key_ln": {"scale": leaf(8)}}}
    text = describe_attention(params, {"attn": leaf(4)})
    assert text.startswith("attn: separate q and k, cannot be clipped: ")
    assert "'query_ln' and 'key_ln'" in text


@pytest.mark.parametrize(
    "block",
    [
        PARAMS["a"] | {name: {"scale": leaf(8)} for name in ("query_ln", "key_ln")},  # Flax
        # Qwen 3 of Hugging Face, of tunix, Gemma 3, MaxText; merged kernels do not show heads.
        {"q_proj": {"kernel": leaf(6, 32)}, "k_proj": {"kernel": leaf(6, 16)}}
        | {name: {"scale": leaf(8)} for name in ("q_norm", "k_norm")},
        {"q_proj": {"w": leaf(6, 4, 8)}, "k_proj": {"w": leaf(6, 2, 8)}}
        | {name: {"w": leaf(8)} for name in ("q_norm", "k_norm")},
        {"q_einsum": {"w": leaf(4, 6, 8)}, "kv_einsum": {"w": leaf(2, 1, 6, 8)}}
        | {name: {"scale": leaf(8)} for name in ("_query_norm", "_key_norm")},
        {"query": {"kernel": leaf(6, 3, 4, 8)}, "key": {"kernel": leaf(6, 3, 2, 8)}}
        | {name: {"scale": leaf(8, 3)} for name in ("query_norm", "key_norm")},
    ],
)
def test_gains_that_heads_share_show_without_maxima(block):
    text = describe_attention({"attn": block})
    assert re.match(r"attn: [a-z, ]+, cannot be clipped: its queries and keys are normalised", text)


def test_gains_of_every_head_show_without_maxima():
    block = PARAMS["a"] | {"query_norm": {"scale": leaf(32)}, "key_norm": {"scale": leaf(16)}}
    title, line = describe_attention({"attn": block}).splitlines()
    assert title.endswith("on 2 key heads of 8, normalised: gains of 'query_norm' and 'key_norm'")
    assert line == "  attn/query_norm/scale (32,): query by gamma"


def test_no_attention_is_an_error():
    with pytest.raises(ValueError, match="No attention block was found"):
        describe_attention({"dense": {"kernel": leaf(3, 3)}})


def info_of(threshold=100.0):
    params = {name: {"query": jnp.ones((6, 2, 4)), "key": jnp.ones((6, 2, 4))} for name in "ab"}
    maxima = {"a": jnp.asarray([400.0, 9.0]), "b": jnp.asarray([50.0, 200.0])}
    return apply_qk_clip(params, maxima, threshold=threshold)[1]


def test_flat_scalars():
    scalars = {name: float(x) for name, x in info_of().scalars("clip").items()}
    assert scalars == {
        "clip/max_logit": 400.0,
        "clip/min_gamma": 0.25,
        "clip/clipped_heads": 2.0,
        "clip/clipped_fraction": 0.5,
        "clip/a/max_logit": 400.0,
        "clip/a/min_gamma": 0.25,
        "clip/a/clipped_heads": 1.0,
        "clip/b/max_logit": 200.0,
        "clip/b/min_gamma": 0.5,
        "clip/b/clipped_heads": 1.0,
    }
    assert len(info_of().scalars(blocks=False)) == 4
    not_clipped = info_of(1e9)
    assert jax.tree.structure(info_of()) == jax.tree.structure(not_clipped)
    assert (int(not_clipped.total_clipped), not_clipped.total_heads) == (0, 4)
    empty = QKClipInfo(max_logits={}, gamma={}, clipped_heads={}).scalars()
    assert float(empty["qk_clip/clipped_fraction"]) == 0.0
    assert float(empty["qk_clip/max_logit"]) == -np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_head_that_is_not_finite_hides_no_other(bad):
    maxima = {"a": jnp.asarray([bad, 9.0]), "b": jnp.asarray([bad, bad])}
    gamma = jax.tree.map(jnp.ones_like, maxima)
    none = jnp.zeros((), jnp.int32)
    info = QKClipInfo(max_logits=maxima, gamma=gamma, clipped_heads={"a": none, "b": none})
    assert float(info.largest) == 9.0
    scalars = info.scalars()
    assert float(scalars["qk_clip/a/max_logit"]) == 9.0
    np.testing.assert_array_equal(scalars["qk_clip/b/max_logit"], bad)


def test_scalars_stay_on_the_device():
    """Inside `jit` they are tracers: nothing asks for their values."""

    @jax.jit
    def scalars(info: QKClipInfo):
        return info.scalars()

    info = info_of()
    with jax.transfer_guard("disallow"):
        out = scalars(info)
    assert float(out["qk_clip/max_logit"]) == 400.0


# Copies of the weights


def test_lookahead_in_training_stays_at_the_threshold():
    """Where slow weights are not clipped, the next synchronisation brings the old ones back."""
    x, query, key = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate(((5, 6), (6, 2, 4), (6, 2, 4)))
    )
    threshold = 2.0

    def maxima_of(params):
        q, k = (jnp.einsum("td,dhk->thk", x, params["attn"][name]) for name in ("query", "key"))
        return {"attn": jnp.einsum("thk,shk->hts", q, k).max((1, 2)) / 2}

    tx = optax.lookahead(optax.sgd(0.0), sync_period=2, slow_step_size=0.5)
    params: Any = optax.LookaheadParams.init_synced({"attn": {"query": query, "key": key}})
    start = tx.init(params)

    @jax.jit
    def step(params, state, clip_slow):
        maxima = maxima_of(params.fast)
        grads = jax.tree.map(jnp.ones_like, params.fast)
        updates, state = tx.update(grads, state, params)
        moved: Any = optax.apply_updates(params, updates)
        fast, slow = (apply_qk_clip(copy, maxima, threshold=threshold)[0] for copy in moved)
        slow = jax.tree.map(lambda a, b: jnp.where(clip_slow, a, b), slow, moved.slow)
        return moved._replace(fast=fast, slow=slow), state

    assert (maxima_of(params.fast)["attn"] > threshold).all()
    clipped, state, unclipped, other = params, start, params, start
    for _ in range(2):
        clipped, state = step(clipped, state, True)
        np.testing.assert_allclose(maxima_of(clipped.fast)["attn"], threshold, rtol=1e-5)
        unclipped, other = step(unclipped, other, False)
    # What the test is about: the blend with slow weights that kept their size.
    assert (maxima_of(unclipped.slow)["attn"] > 1.5 * threshold).all()
