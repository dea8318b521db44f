"""scale_by_muon against float64 NumPy, and the properties that its docstring promises."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.helpers import TOLERANCE, normal_tree, polynomial_of_singular_values, update

KELLER_JORDAN = [(3.4445, -4.7750, 2.0315)] * 5


def first(tx: Any, gradients: Any) -> Any:
    return update(tx, gradients, tx.init(gradients), gradients)[0]


def oracle(grads: list[np.ndarray], beta: float, nesterov: bool, bias_correction: bool) -> Any:
    """The last direction of a run, in float64, orthogonalised by the scalar polynomial."""
    m = u = np.zeros_like(grads[0], dtype=np.float64)
    for t, g in enumerate(grads, start=1):
        g = g.astype(np.float64)
        m = beta * m + (1 - beta) * g
        m_hat, g_hat = m, g
        if bias_correction:
            m_hat = m / (1 - beta ** (t + 1 if nesterov else t))
            g_hat = g / (1 - beta**t)
        u = beta * m_hat + (1 - beta) * g_hat if nesterov else m_hat
    return polynomial_of_singular_values(u, KELLER_JORDAN, float(np.linalg.norm(u)))


@pytest.mark.parametrize(
    ("shape", "nesterov", "bias_correction"),
    [
        ((6, 6), True, True),
        ((6, 6), False, False),
        ((4, 12), True, False),
        ((12, 4), False, True),
    ],
)
def test_trajectory_is_the_definition(shape, nesterov: bool, bias_correction: bool):
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(shape).astype(np.float32) for _ in range(4)]
    options: dict[str, Any] = {"nesterov": nesterov, "bias_correction": bias_correction}
    tx = mc.scale_by_muon("keller_jordan", beta=0.9, ns_method="standard", **options)
    updates, state = {}, tx.init({"w": jnp.zeros(shape)})
    for g in grads:
        updates, state = update(tx, {"w": jnp.asarray(g)}, state)
    expected = oracle(grads, 0.9, **options)
    np.testing.assert_allclose(updates["w"], expected, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", float])
def test_the_momentum_is_an_average_in_the_dtype_asked_for(dtype) -> None:
    params = {"w": jnp.ones((4, 8), jnp.bfloat16)}
    state: Any = mc.scale_by_muon().init(params)
    assert state.mu["w"].dtype == jnp.bfloat16
    tx = mc.scale_by_muon(mu_dtype=dtype)
    updates, state = {}, tx.init(params)
    for _ in range(200):
        updates, state = update(tx, params, state, params)
    assert state._fields == ("count", "mu")
    assert int(state.count) == 200
    assert updates["w"].dtype == jnp.bfloat16
    assert state.mu["w"].dtype == jax.dtypes.canonicalize_dtype(dtype)
    of_complex: Any = mc.scale_by_muon(mu_dtype="complex64").init({"w": jnp.ones((4, 8), "c8")})
    assert of_complex.mu["w"].dtype == jnp.complex64
    # 1 - 0.95^200 = 1; a step of bfloat16 stops at half of its spacing over 1 - beta.
    np.testing.assert_allclose(np.asarray(state.mu["w"], np.float64), 1, atol=0.08)


@pytest.mark.parametrize(("max_bytes", "loops"), [(4 * 8 * 8, 0), (2**28, 1)])
def test_a_bound_on_stacks_counts_on_one_device_too(max_bytes: int, loops: int):
    # On a CPU a stack of several matrices is a loop over them; with one matrix each there is none.
    tx = mc.scale_by_muon(distribution=mc.Distribution(max_stack_bytes=max_bytes))
    grads = {name: jnp.ones((8, 8)) for name in "abc"}
    text = str(jax.make_jaxpr(tx.update)(grads, tx.init(grads)))
    assert len(re.findall(r"\b(?:while|scan)\[", text)) == loops


def test_a_set_brings_its_rescaling_to_the_drop_in_too():
    grads = normal_tree({"w": (8, 12)}, 5)
    for coeffs in ("minimax4", "turbo"):
        got = first(mc.muon(1.0, coeffs, beta=0.0, nesterov=False), grads)["w"]
        expected = -((12 / 8) ** 0.5) * mc.orthogonalize(grads["w"], ns_coeffs=coeffs)
        np.testing.assert_allclose(got, expected, atol=TOLERANCE["float32"])
