"""The clip at the end of a chain."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muonclip_jax import QKClipState, apply_qk_clip, clip_until, qk_clip
from tests.helpers import assert_close, assert_equal, normal_tree

MAXIMA = {"attn": jnp.asarray([150.0, 90.0, 300.0])}
SHAPES = {
    "attn": {
        "query": {"kernel": (6, 3, 4), "bias": (3, 4)},
        "key": {"kernel": (6, 3, 4), "bias": (3, 4)},
        "out": {"kernel": (3, 4, 6)},
    },
    "dense": {"kernel": (6, 6)},
}
PARAMS, UPDATES = normal_tree(SHAPES, 0), normal_tree(SHAPES, 1)


def run(tx: Any, state: Any = None, params: Any = PARAMS) -> tuple[Any, Any]:
    """One update with the maxima of this file."""
    return tx.update(UPDATES, state or tx.init(params), params, max_logits=MAXIMA)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_leads_to_the_clipped_weights(dtype: str):
    """Of parameters in low precision too, whose updates are wide."""
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    updates, _ = run(qk_clip(), params=params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected, _ = apply_qk_clip(optax.apply_updates(wide, UPDATES), MAXIMA)
    assert_close(optax.apply_updates(wide, updates), expected, 3e-7)


@pytest.mark.parametrize(("dtype", "jit"), [("float32", True), ("bfloat16", False)])
def test_updates_of_other_heads_and_leaves_are_returned_bit_for_bit(dtype: str, jit: bool):
    params, updates = normal_tree(SHAPES, 0, dtype), normal_tree(SHAPES, 1, dtype)
    tx = qk_clip()
    step: Any = jax.jit(tx.update) if jit else tx.update
    new, _ = step(updates, tx.init(params), params, max_logits=MAXIMA)
    for name in ("query", "key"):
        for leaf in ("kernel", "bias"):
            old, got = updates["attn"][name][leaf], new["attn"][name][leaf]
            assert got.dtype == dtype
            np.testing.assert_array_equal(got[..., 1, :], old[..., 1, :])
            assert (got[..., 0, :] != old[..., 0, :]).mean() > 0.9
    for tree in (new, updates):
        del tree["attn"]["query"], tree["attn"]["key"]
    assert_equal(new, updates)


def test_what_is_not_clipped_is_not_computed():
    """A branch a leaf, so that updates of other blocks and their weights are not even read."""
    params, updates = ({"a": tree["attn"], "b": tree["attn"]} for tree in (PARAMS, UPDATES))
    maxima = {"a": MAXIMA["attn"], "b": jnp.ones(3)}
    tx: Any = qk_clip()
    step = jax.make_jaxpr(lambda u, p, m: tx.update(u, tx.init(p), p, max_logits=m)[0])
    text = str(step(updates, params, maxima))
    assert text.count(" cond[") == 2 * len(("query", "key")) * len(("kernel", "bias"))


def test_threshold_and_alpha_may_be_schedules():
    """And a threshold that is infinite or not positive clips nothing."""
    thresholds = jnp.asarray([100.0, 200.0, jnp.inf, 0.0, -1.0])
    alphas = jnp.asarray([0.5, 1.0, 0.0, 0.5, 0.5])
    tx = qk_clip(lambda count: thresholds[count], lambda count: alphas[count])
    state = tx.init(PARAMS)
    step: Any = jax.jit(tx.update)
    for threshold, alpha in zip(thresholds, alphas, strict=True):
        new, state = step(UPDATES, state, PARAMS, max_logits=MAXIMA)
        if 0 < threshold < jnp.inf:
            assert_close(new, run(qk_clip(threshold, alpha))[0], 3e-7)
        else:
            assert_equal(new, UPDATES)
    assert state == QKClipState(jnp.asarray(5))
    assert qk_clip(blocks="attn").init(jax.eval_shape(lambda: PARAMS)) == optax.EmptyState()
    assert_equal(run(qk_clip(threshold=1e6))[0], UPDATES)


def test_clipping_may_stop_after_a_step():
    tx = qk_clip(clip_until(1))
    first, state = run(tx)
    assert (first["attn"]["query"]["bias"] != UPDATES["attn"]["query"]["bias"]).any()
    assert_equal(run(tx, state)[0], UPDATES)
    schedule = clip_until(5, lambda count: 10.0 * (count + 1))
    assert [float(schedule(count)) for count in (0, 4, 5)] == [10.0, 50.0, np.inf]
