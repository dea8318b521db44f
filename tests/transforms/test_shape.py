"""scale_by_shape against Optax's own, and its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib._muon as optax_muon
import pytest

import muonclip_jax as mc
from tests.helpers import update

PARAMS = {
    "wide": jnp.ones((4, 9)),
    "tall": jnp.ones((9, 4)),
    "heads": jnp.ones((3, 8, 2, 5)),
}
SPECS = {
    "wide": mc.MuonDimensionNumbers(0, 1),
    "tall": mc.MuonDimensionNumbers(0, 1),
    "heads": mc.MuonDimensionNumbers(1, (2, 3)),
}


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_is_optax_factor_by_factor(consistent_rms):
    ours = mc.scale_by_shape(SPECS, consistent_rms)
    theirs = optax_muon.scale_by_shape(SPECS, consistent_rms)
    got, _ = update(ours, PARAMS, ours.init(PARAMS))
    expected, _ = update(theirs, PARAMS, theirs.init(PARAMS))
    for name in PARAMS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6)


def test_orthogonal_update_gets_the_rms_asked_for():
    tx = mc.scale_by_shape(consistent_rms=0.2)
    q = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (12, 7)))[0]
    scaled = update(tx, {"w": q}, tx.init({"w": q}))[0]["w"]
    assert float(jnp.sqrt(jnp.mean(scaled**2))) == pytest.approx(0.2, rel=1e-5)


def test_parts_of_a_fused_kernel_have_their_own_factor():
    spec = mc.MatrixSpec((0, 1), (mc.Split(1, (16, 4)),))
    tx = mc.scale_by_shape({"w": spec})
    scaled = update(tx, {"w": jnp.ones((4, 20))}, tx.init({"w": jnp.ones((4, 20))}))[0]["w"]
    np.testing.assert_array_equal(scaled[:, :16], 2.0)
    np.testing.assert_array_equal(scaled[:, 16:], 1.0)


def test_rule_by_name_and_dtype():
    params = {"w": jnp.ones((4, 1), jnp.bfloat16)}
    tx = mc.scale_by_shape(rule="rms_to_rms")
    scaled = update(tx, params, tx.init(params))[0]["w"]
    assert scaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled.astype(jnp.float32), 0.5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="consistent_rms must be positive, got 0"):
        mc.scale_by_shape(consistent_rms=0.0)
    with pytest.raises(ValueError, match="takes consistent_rms or rule"):
        mc.scale_by_shape(consistent_rms=0.2, rule="rms_to_rms")
    with pytest.raises(ValueError, match=r"rule='keller' is not known.*consistent_rms=c"):
        mc.scale_by_shape(rule="keller")
