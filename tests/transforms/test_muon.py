"""scale_by_muon against float64 NumPy, and the properties that its docstring promises."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.helpers import TOLERANCE, polynomial_of_singular_values, update

KELLER_JORDAN = [(3.4445, -4.7750, 2.0315)] * 5


def _oracle(grads: list[np.ndarray], beta: float, nesterov: bool, bias_correction: bool):
    """The last direction of a run, in float64, orthogonalised by the scalar polynomial."""
    m = np.zeros_like(grads[0], dtype=np.float64)
    u = m
    for t, g in enumerate(grads, start=1):
        g = g.astype(np.float64)
        m = beta * m + (1 - beta) * g
        m_hat, g_hat = m, g
        if bias_correction:
            m_hat = m / (1 - beta ** (t + 1 if nesterov else t))
            g_hat = g / (1 - beta**t)
        u = beta * m_hat + (1 - beta) * g_hat if nesterov else m_hat
    return polynomial_of_singular_values(u, KELLER_JORDAN, float(np.linalg.norm(u))), u


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)])
def test_trajectory_is_the_definition(shape, nesterov: bool, bias_correction: bool):
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(shape).astype(np.float32) for _ in range(4)]
    tx = mc.scale_by_muon(
        "keller_jordan",
        beta=0.9,
        nesterov=nesterov,
        bias_correction=bias_correction,
        ns_method="standard",
    )
    state = tx.init({"w": jnp.zeros(shape)})
    updates = {}
    for g in grads:
        updates, state = update(tx, {"w": jnp.asarray(g)}, state)
    expected, _ = _oracle(grads, 0.9, nesterov, bias_correction)
    np.testing.assert_allclose(updates["w"], expected, atol=TOLERANCE["float32"])


def test_adaptive_multiplies_by_the_dual_norm():
    g = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    tx = mc.scale_by_muon("keller_jordan", adaptive=True, nesterov=False, bias_correction=True)
    updates, _ = update(tx, {"w": jnp.asarray(g)}, tx.init({"w": jnp.zeros((5, 8))}))
    polar, u = _oracle([g], 0.95, False, True)
    np.testing.assert_allclose(updates["w"], np.sum(u * polar) * polar, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exponent", [-18, -12, -6, 0, 6, 12, 18])
def test_update_does_not_depend_on_the_size_of_the_gradient(exponent: int):
    g = np.random.default_rng(2).standard_normal((8, 12))
    tx = mc.scale_by_muon()

    def direction(scale: float) -> jax.Array:
        grads = {"w": jnp.asarray(g * scale, jnp.float32)}
        return update(tx, grads, tx.init(grads))[0]["w"]

    np.testing.assert_allclose(direction(10.0**exponent), direction(1.0), atol=2e-5)


def test_leaves_that_share_a_stack_are_as_if_alone():
    """One tree with tall, wide, stacked and split leaves: each as orthogonalised by itself."""
    rng = np.random.default_rng(3)
    shapes = {"wide": (4, 8), "tall": (8, 4), "layers": (3, 4, 8), "fused": (4, 16)}
    specs = {
        "wide": mc.MuonDimensionNumbers(0, 1),
        "tall": mc.MuonDimensionNumbers(0, 1),
        "layers": mc.MuonDimensionNumbers(1, 2),
        "fused": mc.MatrixSpec((0, 1), (mc.Split(1, (8, 4, 4)),)),
    }
    grads = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }
    # A set whose Gram form does not amplify the rounding of the momentum.
    tx = mc.scale_by_muon("keller_jordan", weight_dimension_numbers=specs)
    got, _ = update(tx, grads, tx.init(grads))

    def alone(x: jax.Array) -> jax.Array:
        return mc.orthogonalize(x, ns_coeffs="keller_jordan", eps=1e-8)

    fused = grads["fused"]
    expected = {
        "wide": alone(grads["wide"]),
        "tall": alone(grads["tall"]),
        "layers": jnp.stack([alone(x) for x in grads["layers"]]),
        "fused": jnp.concatenate(
            [alone(fused[:, :8]), alone(fused[:, 8:12]), alone(fused[:, 12:])], axis=1
        ),
    }
    for name in shapes:
        np.testing.assert_allclose(got[name], expected[name], atol=TOLERANCE["float32"])


def test_state_is_count_and_momentum_in_the_dtype_asked_for():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    state: Any = mc.scale_by_muon().init(params)
    assert state.mu["w"].dtype == jnp.bfloat16
    tx = mc.scale_by_muon(mu_dtype=jnp.float32)
    updates, state = update(tx, params, tx.init(params))
    assert state._fields == ("count", "mu")
    assert state.mu["w"].dtype == jnp.float32
    assert updates["w"].dtype == jnp.bfloat16
    assert int(state.count) == 1


def test_a_vector_is_refused_with_its_path():
    with pytest.raises(ValueError, match="block/bias"):
        mc.scale_by_muon().init({"block": {"bias": jnp.ones(4)}})


@pytest.mark.parametrize(("max_bytes", "loops"), [(4 * 8 * 8, 0), (2**28, 1)])
def test_a_bound_on_stacks_counts_on_one_device_too(max_bytes: int, loops: int):
    # On a CPU a stack of several matrices is a loop over them; with one matrix each there is none.
    tx = mc.scale_by_muon(distribution=mc.Distribution(max_stack_bytes=max_bytes))
    grads = {name: jnp.ones((8, 8)) for name in "abc"}
    text = str(jax.make_jaxpr(tx.update)(grads, tx.init(grads)))
    assert len(re.findall(r"\b(?:while|scan)\[", text)) == loops


def test_a_set_brings_its_rescaling_to_the_drop_in_too():
    grads = {"w": jnp.asarray(np.random.default_rng(5).standard_normal((8, 12)), jnp.float32)}
    for coeffs in ("minimax4", "turbo"):
        tx = mc.muon(1.0, coeffs, beta=0.0, nesterov=False)
        got = update(tx, grads, tx.init(grads), grads)[0]["w"]
        scale = (12 / 8) ** 0.5
        expected = -scale * mc.orthogonalize(grads["w"], ns_coeffs=coeffs)
        np.testing.assert_allclose(got, expected, atol=TOLERANCE["float32"])
