"""muonclip and MuonClipConfig: the assembly against its parts written out, and its checks."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

KERNEL = jax.random.normal(jax.random.key(0), (8, 2, 4))
PARAMS = {
    "attention": {
        "query": {"kernel": KERNEL, "bias": jnp.ones((2, 4))},
        "key": {"kernel": KERNEL[::-1], "bias": jnp.ones((2, 4))},
    },
    "embed": {"embedding": jax.random.normal(jax.random.key(1), (5, 8))},
    "norm": {"scale": jnp.ones(8)},
}
GRADS = jax.tree.map(jnp.sin, PARAMS)
MAX_LOGITS = {"attention": jnp.array([400.0, 30.0])}


def test_without_the_clip_it_is_muon_and_adamw_written_out():
    """Kimi K2's settings: RMS 0.2, decay 0.1 on all but norms and biases, betas 0.9 and 0.95."""
    rate = 0.02
    decays = {
        "attention": {
            "query": {"kernel": True, "bias": False},
            "key": {"kernel": True, "bias": False},
        },
        "embed": {"embedding": True},
        "norm": {"scale": False},
    }
    written_out = optax.multi_transform(
        {
            "muon": optax.chain(
                mc.scale_by_muon("keller_jordan"),
                mc.scale_by_shape(consistent_rms=0.2),
                optax.add_decayed_weights(0.1),
                optax.scale_by_learning_rate(rate),
            ),
            "adamw": optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=decays),
        },
        mc.label_params,
    )
    tx = mc.muonclip(rate, ns_coeffs="keller_jordan", qk_clip_threshold=None)
    state, expected_state = tx.init(PARAMS), written_out.init(PARAMS)
    params, expected = PARAMS, PARAMS
    for _ in range(3):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
        updates, expected_state = written_out.update(GRADS, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), params, expected)


def test_with_the_clip_it_is_the_same_then_the_pure_clip():
    plain = mc.muonclip(learning_rate=0.02, qk_clip_threshold=None)
    updates, _ = plain.update(GRADS, plain.init(PARAMS), PARAMS)
    expected, info = mc.apply_qk_clip(
        optax.apply_updates(PARAMS, updates), MAX_LOGITS, threshold=100.0
    )
    tx = mc.muonclip(learning_rate=0.02)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, max_logits=MAX_LOGITS)
    got = optax.apply_updates(PARAMS, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), got, expected)
    assert int(info.total_clipped) == 1


def test_clipping_without_maxima_says_so():
    tx = mc.muonclip(learning_rate=0.02)
    with pytest.raises(ValueError, match=r"max_logits=max_logits.*qk_clip_threshold=None"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_config_is_a_static_argument():
    config = mc.MuonClipConfig(learning_rate=0.02, qk_clip_threshold=None)
    assert config == mc.MuonClipConfig(learning_rate=0.02, qk_clip_threshold=None)

    @jax.jit
    def by_function(params):
        tx = mc.muonclip(learning_rate=0.02, qk_clip_threshold=None)
        return tx.update(GRADS, tx.init(params), params)[0]

    def by_config(config, params):
        tx = config.build()
        return tx.update(GRADS, tx.init(params), params)[0]

    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(by_config, static_argnums=0)(config, PARAMS),
        by_function(PARAMS),
    )


def test_traced_rate_decay_and_threshold_pass():
    @jax.jit
    def step(rate, decay, threshold):
        tx = mc.muonclip(rate, weight_decay=decay, qk_clip_threshold=threshold)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, max_logits=MAX_LOGITS)[0]

    fixed = mc.muonclip(0.02, weight_decay=0.05, qk_clip_threshold=50.0)
    expected, _ = fixed.update(GRADS, fixed.init(PARAMS), PARAMS, max_logits=MAX_LOGITS)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        step(0.02, 0.05, 50.0),
        expected,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"adam_learning_rate": -1.0}, "adam_learning_rate must be positive, got -1.0"),
        ({"qk_clip_threshold": 0.0}, "qk_clip_threshold must be positive"),
        ({"qk_clip_threshold": -5.0}, "qk_clip_threshold must be positive, got -5.0"),
        ({"qk_clip_blocks": ()}, r"qk_clip_blocks=\(\) selects no attention block"),
        ({"qk_clip_alpha": 1.5}, r"qk_clip_alpha must be in \[0, 1\], got 1.5"),
        ({"qk_clip_shared_keys": "quarry"}, "qk_clip_shared_keys must be one of 'query'"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"adam_b1": 1.0}, r"adam_b1 must be in \[0, 1\), got 1.0"),
        ({"adam_b2": -0.1}, r"adam_b2 must be in \[0, 1\), got -0.1"),
        ({"consistent_rms": -0.2}, "consistent_rms must be positive, got -0.2"),
        ({"ns_coeffs": "kj"}, "ns_coeffs='kj' is not a coefficient set"),
        ({"ns_method": "fast"}, "ns_method='fast' is not known"),
    ],
)
@pytest.mark.parametrize("build", [mc.muonclip, mc.MuonClipConfig])
def test_bad_settings_are_refused_at_construction(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**{"learning_rate": 0.02, **settings})


def test_config_takes_lists_and_refuses_arrays():
    rows = [[1.5, -0.5, 0.0], [1.5, -0.5, 0.0]]
    assert mc.MuonClipConfig(learning_rate=0.02, ns_coeffs=rows).ns_coeffs == (
        (1.5, -0.5, 0.0),
        (1.5, -0.5, 0.0),
    )
    with pytest.raises(TypeError, match="hashable Python values"):
        mc.MuonClipConfig(learning_rate=0.02, qk_clip_blocks=jnp.ones(3))


def test_the_config_has_the_arguments_of_muonclip():
    # Shardings hold devices, so they are no part of the value; `build` takes them.
    arguments = set(inspect.signature(mc.muonclip).parameters) - {"param_shardings"}
    assert {field.name for field in dataclasses.fields(mc.MuonClipConfig)} == arguments
    assert mc.MuonClipConfig(learning_rate=0.02).qk_clip_threshold == 100.0


@pytest.mark.parametrize("make", [mc.muon, functools.partial(mc.muonclip, qk_clip_threshold=None)])
def test_rules_route_and_one_that_matches_nothing_is_an_error(make: Any):
    params = {"a": {"kernel": jnp.eye(3, 4)}, "b": {"kernel": jnp.eye(3, 4)}}
    with pytest.raises(ValueError, match=r"'c/kernel\$' matches no path of the tree"):
        make(0.1, rules=mc.MatrixRules([("c/kernel$", None)])).init(params)
    state = make(0.1, rules=mc.MatrixRules([("b/kernel$", None)])).init(params)
    mu = state.inner_states["muon"].inner_state[0].mu
    assert isinstance(mu["b"]["kernel"], optax.MaskedNode)
    assert mu["a"]["kernel"].shape == (3, 4)


def test_beta_may_be_a_schedule_of_the_number_of_updates():
    """Against the recursion in float64 NumPy."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((6, 10))
    betas, rate, decay, rms = [0.5, 0.9, 0.7], 0.05, 0.1, 0.2
    tx = mc.muonclip(
        rate,
        qk_clip_threshold=None,
        weight_decay=decay,
        beta=lambda count: jnp.asarray(betas)[count],
        ns_method="svd",
    )
    params: Any = {"mlp": {"kernel": jnp.asarray(weights, jnp.float32)}}
    state, momentum = tx.init(params), np.zeros_like(weights)
    step = jax.jit(tx.update)
    for beta in betas:
        gradient = rng.standard_normal(weights.shape)
        updates, state = step(
            {"mlp": {"kernel": jnp.asarray(gradient, jnp.float32)}}, state, params
        )
        params = optax.apply_updates(params, updates)
        momentum = beta * momentum + (1 - beta) * gradient
        u, _, vh = np.linalg.svd(beta * momentum + (1 - beta) * gradient, full_matrices=False)
        weights = weights - rate * (rms * np.sqrt(10) * u @ vh + decay * weights)
    np.testing.assert_allclose(params["mlp"]["kernel"], weights, rtol=0, atol=1e-6)


#: Every numeric argument, off its default.
NUMERIC: dict[str, Any] = {
    "learning_rate": 0.01,
    "qk_clip_threshold": 90.0,
    "qk_clip_alpha": 0.4,
    "weight_decay": 0.05,
    "beta": 0.9,
    "consistent_rms": 0.3,
    "eps": 1e-7,
    "adam_learning_rate": 0.004,
    "adam_b1": 0.8,
    "adam_b2": 0.9,
    "adam_eps": 1e-6,
    "adam_weight_decay": 0.02,
}


def test_every_numeric_argument_may_be_injected():
    """As numbers and as schedules; and each value counts."""
    plain = mc.muonclip(**NUMERIC)
    numbers = optax.inject_hyperparams(mc.muonclip)(**NUMERIC)
    schedules = optax.inject_hyperparams(mc.muonclip)(
        **{name: functools.partial(lambda x, count: x, x) for name, x in NUMERIC.items()}
    )
    expected, _ = jax.jit(plain.update)(GRADS, plain.init(PARAMS), PARAMS, max_logits=MAX_LOGITS)
    for tx in (numbers, schedules):
        state: Any = tx.init(PARAMS)
        assert set(NUMERIC) <= set(state.hyperparams)
        updates, _ = jax.jit(tx.update)(GRADS, state, PARAMS, max_logits=MAX_LOGITS)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), updates, expected
        )
