"""muonclip and MuonClipConfig: the assembly against its parts written out."""

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
from tests.helpers import assert_close, assert_equal

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


def stepped(tx: Any, params: Any = PARAMS, state: Any = None) -> Any:
    updates, state = tx.update(GRADS, tx.init(params) if state is None else state, params)
    return optax.apply_updates(params, updates), state


def test_without_the_clip_it_is_muon_and_adamw_written_out():
    """Kimi K2's settings: RMS 0.2, decay 0.1 on all but norms and biases, betas 0.9 and 0.95."""
    rate, adam_rate = 0.02, 0.005
    half = {"kernel": True, "bias": False}
    decays = {
        "attention": {"query": half, "key": half},
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
            "adamw": optax.adamw(adam_rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=decays),
        },
        mc.label_params,
    )
    tx = mc.muonclip(
        rate, adam_learning_rate=adam_rate, ns_coeffs="keller_jordan", qk_clip_threshold=None
    )
    (params, state), (expected, expected_state) = stepped(tx), stepped(written_out)
    for _ in range(2):
        params, state = stepped(tx, params, state)
        expected, expected_state = stepped(written_out, expected, expected_state)
    assert_close(params, expected, 1e-7)


def test_config_is_a_static_argument_with_the_arguments_of_muonclip():
    # Shardings hold devices, so they are no part of the value; `build` takes them.
    arguments = set(inspect.signature(mc.muonclip).parameters) - {"param_shardings"}
    assert {field.name for field in dataclasses.fields(mc.MuonClipConfig)} == arguments
    assert mc.MuonClipConfig(learning_rate=0.02).qk_clip_threshold == 100.0
    rows = [[1.5, -0.5, 0.0], [1.5, -0.5, 0.0]]
    config = mc.MuonClipConfig(learning_rate=0.02, qk_clip_threshold=None, ns_coeffs=rows)
    assert config.ns_coeffs == ((1.5, -0.5, 0.0), (1.5, -0.5, 0.0))
    assert config == dataclasses.replace(config)
    by_config = jax.jit(lambda config, params: stepped(config.build(), params)[0], static_argnums=0)
    plain = mc.muonclip(0.02, qk_clip_threshold=None, ns_coeffs=rows)
    assert_equal(by_config(config, PARAMS), jax.jit(lambda x: stepped(plain, x)[0])(PARAMS))


@pytest.mark.parametrize("make", [mc.muon, functools.partial(mc.muonclip, qk_clip_threshold=None)])
def test_rules_route(make: Any):
    params = {"a": {"kernel": jnp.eye(3, 4)}, "b": {"kernel": jnp.eye(3, 4)}}
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
    params: Any = {"kernel": jnp.asarray(weights, jnp.float32)}
    state, momentum = tx.init(params), np.zeros_like(weights)
    step = jax.jit(tx.update)
    for beta in betas:
        gradient = rng.standard_normal(weights.shape)
        updates, state = step({"kernel": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        momentum = beta * momentum + (1 - beta) * gradient
        u, _, vh = np.linalg.svd(beta * momentum + (1 - beta) * gradient, full_matrices=False)
        weights = weights - rate * (rms * np.sqrt(10) * u @ vh + decay * weights)
    np.testing.assert_allclose(params["kernel"], weights, rtol=0, atol=1e-6)
