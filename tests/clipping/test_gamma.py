"""Gamma and its split over queries and keys: values, dtypes, and what changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.clipping import apply_qk_clip
from muonclip_jax.clipping.gamma import SHARED_KEYS, check_clip_settings, clip_gamma, role_factors
from tests.clipping.cases import attention


def test_values_and_dtypes():
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


@pytest.mark.parametrize(
    ("threshold", "alpha", "rule", "message"),
    [
        *((bad, 0.5, "query", "threshold must be positive, got .* maximum pre-softmax")
          for bad in (0, np.float32(-2), np.nan)),
        *((100.0, bad, "query", r"alpha must be in \[0, 1\], got") for bad in (-0.1, 2, np.nan)),
        (100.0, 0.5, "megatron", "'query', 'group', 'balanced', got 'megatron'"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_and_traced_ones_pass(threshold, alpha, rule, message):
    with pytest.raises(ValueError, match=message):
        check_clip_settings(threshold, alpha, rule)
    check_clip_settings(jnp.asarray(-1.0), jnp.asarray(7.0), "query")
    check_clip_settings(lambda count: 100.0, lambda count: 0.5, "query", schedules=True)
