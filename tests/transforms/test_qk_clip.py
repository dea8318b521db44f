"""The clip at the end of a chain."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muonclip_jax.clipping import apply_qk_clip
from muonclip_jax.heads.layouts import separate
from muonclip_jax.transforms._qk_clip import QKClipState, clip_until, qk_clip

MAXIMA = {"attn": jnp.asarray([150.0, 90.0, 300.0])}


def params_like(seed, dtype=jnp.float32) -> Any:
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    shapes = {
        "attn": {
            "query": {"kernel": (6, 3, 4), "bias": (3, 4)},
            "key": {"kernel": (6, 3, 4), "bias": (3, 4)},
            "out": {"kernel": (3, 4, 6)},
        },
        "dense": {"kernel": (6, 6)},
    }
    return jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS, UPDATES = params_like(0), params_like(1)


def run(tx: Any, state: Any, updates=UPDATES, params=PARAMS, **extra: Any) -> tuple[Any, Any]:
    """One update with the maxima of this file, typed loosely as Optax's trees are."""
    return tx.update(updates, state, params, max_logits=MAXIMA, **extra)


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def test_it_leads_to_the_clipped_weights():
    tx = qk_clip()
    updates, _ = run(tx, tx.init(PARAMS))
    got = optax.apply_updates(PARAMS, updates)
    expected, _ = apply_qk_clip(optax.apply_updates(PARAMS, UPDATES), MAXIMA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-7), got, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [False, True])
def test_updates_of_other_heads_and_leaves_are_returned_bit_for_bit(dtype, jit):
    params, updates = params_like(0, dtype), params_like(1, dtype)
    tx = qk_clip()
    step: Any = jax.jit(tx.update) if jit else tx.update
    new, _ = step(updates, tx.init(params), params, max_logits=MAXIMA)
    for name in ("query", "key"):
        for leaf in ("kernel", "bias"):
            old, got = updates["attn"][name][leaf], new["attn"][name][leaf]
            assert got.dtype == dtype
            np.testing.assert_array_equal(bits(got[..., 1, :]), bits(old[..., 1, :]))
            assert (bits(got[..., 0, :]) != bits(old[..., 0, :])).mean() > 0.9
    same = ("out",)
    for name in same:
        np.testing.assert_array_equal(
            bits(new["attn"][name]["kernel"]), bits(updates["attn"][name]["kernel"])
        )
    np.testing.assert_array_equal(bits(new["dense"]["kernel"]), bits(updates["dense"]["kernel"]))


def test_without_a_head_over_the_threshold_it_is_the_identity():
    tx = qk_clip(threshold=1e6)
    new, _ = run(tx, tx.init(PARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), new, UPDATES)


def test_what_is_not_clipped_is_not_computed():
    """A branch a leaf, so that updates of other blocks and their weights are not even read."""
    params, updates = ({"a": tree["attn"], "b": tree["attn"]} for tree in (PARAMS, UPDATES))
    maxima = {"a": MAXIMA["attn"], "b": jnp.ones(3)}
    tx: Any = qk_clip()
    step = jax.make_jaxpr(lambda u, p, m: tx.update(u, tx.init(p), p, max_logits=m)[0])
    text = str(step(updates, params, maxima))
    assert text.count(" cond[") == 2 * len(("query", "key")) * len(("kernel", "bias"))


def test_low_precision_parameters_with_wide_updates():
    params = params_like(0, jnp.bfloat16)
    tx = qk_clip()
    new, _ = run(tx, tx.init(params), params=params)
    assert new["attn"]["query"]["kernel"].dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected, _ = apply_qk_clip(optax.apply_updates(wide, UPDATES), MAXIMA)
    got = optax.apply_updates(wide, new)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-7), got, expected)


def test_threshold_and_alpha_may_be_schedules():
    thresholds = jnp.asarray([100.0, 200.0, jnp.inf])
    alphas = jnp.asarray([0.5, 1.0, 0.0])
    tx = qk_clip(lambda count: thresholds[count], lambda count: alphas[count])
    state = tx.init(PARAMS)
    structure = jax.tree.structure(state)
    step: Any = jax.jit(tx.update)
    for threshold, alpha in zip(thresholds, alphas, strict=True):
        new, state = step(UPDATES, state, PARAMS, max_logits=MAXIMA)
        fixed = qk_clip(threshold, alpha)
        expected, _ = run(fixed, fixed.init(PARAMS))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-7), new, expected)
        assert jax.tree.structure(state) == structure
    assert isinstance(state, QKClipState)
    assert int(state.count) == 3


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_schedule_that_is_not_positive_clips_nothing(bad):
    tx = qk_clip(lambda count: jnp.where(count < 1, bad, 100.0))
    first, state = run(tx, tx.init(PARAMS))
    second, _ = run(tx, state)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), first, UPDATES)
    assert (second["attn"]["query"]["bias"][0] != UPDATES["attn"]["query"]["bias"][0]).all()


def test_clipping_may_stop_after_a_step():
    tx = qk_clip(clip_until(1))
    state = tx.init(PARAMS)
    first, state = run(tx, state)
    second, state = run(tx, state)
    assert (first["attn"]["query"]["bias"] != UPDATES["attn"]["query"]["bias"]).any()
    jax.tree.map(np.testing.assert_array_equal, second, UPDATES)


def test_stopping_takes_a_schedule_and_checks_a_number():
    schedule = clip_until(5, lambda count: 10.0 * (count + 1))
    assert [float(schedule(count)) for count in (0, 4, 5)] == [10.0, 50.0, np.inf]
    with pytest.raises(ValueError, match="threshold must be positive"):
        clip_until(5, -1.0)


def test_inside_multi_transform_it_refuses_and_says_where_it_belongs():
    tx = optax.multi_transform(
        {"a": qk_clip(), "b": optax.sgd(0.2)},
        lambda params: jax.tree.map(lambda x: "a" if x.ndim > 2 else "b", params),
    )
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"partly visible.*multi_transform.*outer chain"):
        run(tx, state)


def test_init_takes_shapes_and_checks_what_was_asked_for():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert qk_clip(blocks="attn").init(shapes) == optax.EmptyState()
    with pytest.raises(ValueError, match="'decoder' matches no path"):
        qk_clip(blocks="decoder").init(shapes)
    with pytest.raises(ValueError, match="needs 'ask' and 'answer'"):
        qk_clip(blocks=separate("ask", "answer")).init(shapes)


def test_missing_maxima_say_what_to_pass():
    tx = qk_clip()
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params, max_logits="):
        tx.update(UPDATES, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(UPDATES, tx.init(PARAMS), max_logits=MAXIMA)


def test_updates_without_a_leaf_that_must_change():
    tx = qk_clip()
    updates = {"attn": UPDATES["attn"] | {"query": None}, "dense": UPDATES["dense"]}
    with pytest.raises(ValueError, match=r"'attn/query/.*have no entry for it"):
        tx.update(updates, tx.init(PARAMS), PARAMS, max_logits=MAXIMA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"shared_keys": "all"}, "shared_keys must be one of"),
        ({"blocks": ()}, "selects no attention block"),
    ],
)
def test_settings_are_checked_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        qk_clip(**arguments)
