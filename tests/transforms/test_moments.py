"""Dtypes of the stored momentum: each one works or is refused, with what to write instead."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.helpers import update

OPTIMIZERS: dict[str, Any] = {
    "scale_by_muon": mc.scale_by_muon,
    "muon": lambda **arguments: mc.muon(1e-3, **arguments),
    "muonclip": lambda **arguments: mc.muonclip(1e-3, qk_clip_threshold=None, **arguments),
}
REAL = {"w": jnp.ones((4, 8))}
COMPLEX = {"w": jnp.ones((4, 8), jnp.complex64)}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "dtype", ["int8", "int32", "uint8", bool, jnp.float8_e4m3fn, "float8_e5m2", "int4"]
)
def test_a_dtype_in_which_no_average_moves_is_refused(name: str, dtype) -> None:
    with pytest.raises(ValueError, match=r"mu_dtype=.* cannot hold a moving average\. Pass one of"):
        OPTIMIZERS[name](mu_dtype=dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_no_dtype_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"mu_dtype='bf16' is no dtype\. Pass one of 'float32'"):
        OPTIMIZERS[name](mu_dtype="bf16")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("scale_by_muon", {"beta": 0.999}),
        ("muon", {"beta": 0.999}),
        ("muonclip", {"beta": 0.998}),
        ("muon", {"adam_b1": 0.999}),
        ("muonclip", {"adam_b1": 0.9999}),
    ],
)
def test_a_decay_that_bfloat16_rounds_to_one_is_refused(name: str, arguments) -> None:
    (argument, decay), *_ = arguments.items()
    with pytest.raises(ValueError, match=rf"with {argument}={decay}: .* a smaller {argument}"):
        OPTIMIZERS[name](mu_dtype="bfloat16", **arguments)
    OPTIMIZERS[name](mu_dtype="float32", **arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", jnp.bfloat16, float])
def test_the_others_hold_the_average(dtype) -> None:
    tx = mc.scale_by_muon(mu_dtype=dtype)
    state: Any = tx.init(REAL)
    for _ in range(200):
        _, state = update(tx, REAL, state, REAL)
    # 1 - 0.95^200 = 1; a step of bfloat16 stops at half of its spacing over 1 - beta.
    mu = np.asarray(state.mu["w"], np.float64)
    assert state.mu["w"].dtype == jax.dtypes.canonicalize_dtype(dtype)
    np.testing.assert_allclose(mu, 1, atol=0.08)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("leaf", ["w", "bias"])
@pytest.mark.parametrize(
    ("dtype", "mu_dtype", "message"),
    [
        ("float32", "complex64", "dtype float32, and mu_dtype='complex64' is complex"),
        ("complex64", "float32", "dtype complex64, and mu_dtype='float32' is real"),
        ("float32", "float64", "mu_dtype='float64' needs 64-bit types"),
    ],
)
def test_init_refuses_by_path(name: str, leaf: str, dtype: str, mu_dtype: str, message) -> None:
    if name == "scale_by_muon" and leaf == "bias":
        pytest.skip("it sees matrices alone")
    shapes = {"w": (4, 8), "bias": (8,)}
    params = {"layer": {leaf: jnp.ones(shapes[leaf], dtype)}}
    with pytest.raises(ValueError, match=message) as refused:
        OPTIMIZERS[name](mu_dtype=mu_dtype).init(params)
    assert mu_dtype == "float64" or f"layer/{leaf}" in str(refused.value)


@pytest.mark.parametrize("dtype", ["int32", "bool", "float8_e4m3fn"])
def test_init_refuses_leaves_that_are_no_numbers_to_train(dtype: str) -> None:
    with pytest.raises(TypeError, match=f"layer/w has dtype {dtype}; an optimizer's moments need"):
        mc.scale_by_muon().init({"layer": {"w": jnp.ones((4, 8), dtype)}})


@pytest.mark.parametrize("mu_dtype", [None, "complex64"])
def test_complex_momentum_for_complex_parameters(mu_dtype) -> None:
    tx = mc.scale_by_muon(mu_dtype=mu_dtype)
    _, state = update(tx, COMPLEX, tx.init(COMPLEX), COMPLEX)
    assert state.mu["w"].dtype == jnp.complex64


@pytest.mark.parametrize(
    ("arguments", "params", "message"),
    [
        ({"ns_dtype": "float16"}, COMPLEX, "w: ns_dtype='float16' is not possible for input"),
        ({"ns_dtype": "float64"}, REAL, "w: ns_dtype='float64' needs 64-bit types"),
    ],
)
def test_init_refuses_what_newton_schulz_cannot_compute_in(arguments, params, message) -> None:
    with pytest.raises(ValueError, match=message):
        mc.scale_by_muon(**arguments).init(params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ns_dtype": "int8"}, "ns_dtype='int8' is not known"),
        ({"ns_dtype": jnp.float8_e5m2}, "ns_dtype='float8_e5m2' is not known"),
        ({"ns_method": "svd", "ns_dtype": "float16"}, 'not possible for ns_method="svd"'),
        (
            {"ns_method": "gram", "ns_dtype": jnp.bfloat16},
            r'ns_method="gram" is unstable .* in bfloat16: .*Pass ns_dtype=.*\'float32\'',
        ),
    ],
)
@pytest.mark.parametrize("name", [*OPTIMIZERS, "orthogonalize"])
def test_construction_refuses_what_newton_schulz_cannot_compute_in(
    name: str, arguments, message: str
) -> None:
    functions = {"orthogonalize": lambda **given: mc.orthogonalize(REAL["w"], **given)}
    with pytest.raises(ValueError, match=message):
        (functions | OPTIMIZERS)[name](**arguments)
