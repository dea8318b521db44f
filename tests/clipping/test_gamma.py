"""Gamma and its split over queries and keys, against the published table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.clipping import apply_qk_clip
from muonclip_jax.clipping.gamma import (
    SHARED_KEYS,
    check_clip_settings,
    clip_gamma,
    role_factors,
)
from tests.clipping.models import attention

# One group of four query heads on one key head, threshold 100 (Megatron's rule, "query only" and
# the compensated rule of the table in the documentation).
MAXIMA = np.array([150.0, 90.0, 40.0, 300.0])
AFTERWARDS = {
    "group": [50.0, 30.0, 13.3333333, 100.0],
    "query": [100.0, 90.0, 40.0, 100.0],
    "balanced": [100.0, 90.0, 40.0, 100.0],
}


@pytest.mark.parametrize("shared_keys", SHARED_KEYS)
@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_table_of_rules_for_shared_keys(shared_keys, alpha):
    gamma = clip_gamma(jnp.asarray(MAXIMA), 100.0)
    factors = role_factors(gamma, alpha, shared_keys, 1)
    after = MAXIMA * factors["query"] * factors.get("key", jnp.ones(1))
    np.testing.assert_allclose(after, AFTERWARDS[shared_keys], rtol=1e-6)
    if (shared_keys, alpha) == ("balanced", 0.5):  # raised by at most the published factor
        assert float(factors["query"].max()) == pytest.approx(np.sqrt(3.0), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_own_keys_divide_gamma_by_alpha(alpha):
    gamma = np.array([2 / 3, 1.0, 0.01])
    factors = role_factors(jnp.asarray(gamma, jnp.float32), alpha, "query", 3)
    np.testing.assert_allclose(factors["query"], gamma**alpha, rtol=1e-6)
    np.testing.assert_allclose(factors["key"], gamma ** (1 - alpha), rtol=1e-6)
    assert factors["query"][1] == factors["key"][1] == 1.0


@pytest.mark.parametrize("bad", [-5.0, 0.0, -0.0, np.nan, np.inf, -np.inf, np.finfo("f4").min])
@pytest.mark.parametrize("shared_keys", SHARED_KEYS)
def test_a_maximum_that_is_no_positive_number_changes_nothing(bad, shared_keys):
    gamma = clip_gamma(jnp.asarray([bad, 50.0]), 10.0)
    assert gamma.tolist() == pytest.approx([1.0, 0.2])
    for kv_heads in (1, 2):
        factors = role_factors(gamma[jnp.asarray([0, 0])], 0.5, shared_keys, kv_heads)
        assert all((factor == 1.0).all() for factor in factors.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gamma_is_float32(dtype):
    gamma = clip_gamma(jnp.asarray([48.0], dtype), 16.0)
    assert gamma.dtype == jnp.float32
    np.testing.assert_allclose(gamma, [1 / 3], rtol=1e-7)


def test_the_threshold_itself_and_an_infinite_one():
    assert clip_gamma(jnp.asarray([100.0]), 100.0).tolist() == [1.0]
    assert clip_gamma(jnp.asarray([1e30]), jnp.inf).tolist() == [1.0]


@pytest.mark.parametrize("threshold", [0.0, -0.0, -1.0, np.nan, -np.inf])
def test_a_traced_threshold_that_is_not_positive_changes_nothing(threshold):
    maxima = jnp.asarray([50.0, 0.0, -0.5, 1e30])
    assert jax.jit(clip_gamma)(maxima, threshold).tolist() == [1.0] * 4
    attn = attention()
    new, info = jax.jit(lambda p, t: apply_qk_clip(p, {"attn": maxima}, threshold=t))(
        {"attn": attn}, threshold
    )
    jax.tree.map(np.testing.assert_array_equal, new["attn"], attn)
    assert int(info.total_clipped) == 0


def test_traced_settings_pass():
    out = jax.jit(clip_gamma)(jnp.asarray([20.0]), 10.0)
    assert out.tolist() == [0.5]
    check_clip_settings(jnp.asarray(-1.0), jnp.asarray(7.0), "query")
    check_clip_settings(lambda count: 100.0, lambda count: 0.5, "query", schedules=True)


BAD: dict[str, tuple[Any, Any, Any, str]] = {
    "zero": (0, 0.5, "query", r"threshold must be positive, got .* largest pre-softmax"),
    "negative": (np.float32(-2), 0.5, "query", "threshold must be positive"),
    "NaN": (np.nan, 0.5, "query", "threshold must be positive"),
    "alpha below": (100.0, -0.1, "query", r"alpha must lie in \[0, 1\], got"),
    "alpha above": (100.0, 2, "query", r"alpha must lie in \[0, 1\], got"),
    "alpha NaN": (100.0, np.nan, "query", r"alpha must lie in \[0, 1\], got"),
    "rule": (100.0, 0.5, "megatron", "'query', 'group', 'balanced', got 'megatron'"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_out_of_range_are_refused(name):
    *settings, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        check_clip_settings(*settings)


def test_factors_are_as_wide_as_the_maxima():
    with jax.enable_x64(True):
        maxima = np.array([150.0, 90.0, 1234.5])
        factors = role_factors(clip_gamma(jnp.asarray(maxima), 100.0), 0.25, "query", 3)
        expected = np.minimum(1.0, 100.0 / maxima) ** 0.25
        np.testing.assert_allclose(factors["query"], expected, rtol=1e-15)
        assert clip_gamma(jnp.asarray(maxima, jnp.bfloat16), 100.0).dtype == jnp.float32
