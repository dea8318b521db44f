"""`muon(rules=...)`: a rule that matches nothing is refused, and one that matches routes."""

from typing import Any

import jax.numpy as jnp
import optax
import pytest

import muonclip_jax as mc
from tests.helpers import update

PARAMS = {"a": {"kernel": jnp.eye(3, 4)}, "b": {"kernel": jnp.eye(3, 4)}}


def test_a_rule_that_matches_nothing_is_an_error():
    tx = mc.muon(0.1, rules=mc.MatrixRules([("c/kernel$", None)]))
    with pytest.raises(ValueError, match="'c/kernel\\$' matches no path of the tree"):
        tx.init(PARAMS)


def test_a_rule_that_matches_routes():
    tx = mc.muon(0.1, rules=mc.MatrixRules([("b/kernel$", None)]))
    state: Any = tx.init(PARAMS)
    mu = state.inner_states["muon"].inner_state[0].mu
    assert isinstance(mu["b"]["kernel"], optax.MaskedNode)
    assert mu["a"]["kernel"].shape == (3, 4)
    update(tx, PARAMS, state, PARAMS)
