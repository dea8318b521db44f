"""The printed table."""

import jax.numpy as jnp
import pytest

from muonclip_jax.routing import MatrixRules, MatrixSpec, Split, describe_labels


def test_table():
    params = {
        "layers": {
            "mlp": {"up_proj": {"kernel": jnp.ones((24, 4, 8))}},
            "attn": {"c_attn": {"kernel": jnp.ones((24, 4, 12))}},
        },
        "mla": {"wkv_b": jnp.ones((4, 2, 5))},
        "embed": jnp.ones((50, 4)),
        "norm": jnp.ones(4),
    }
    rules = MatrixRules([("wkv_b$", MatrixSpec((0, (1, 2)), Split(2, (3, 2))))])
    assert describe_labels(params, rules).splitlines() == [
        "path                       shape        label  matrices         why",
        "embed                      (50, 4)      adamw                   embedding table",
        "layers/attn/c_attn/kernel  (24, 4, 12)  muon   72 x (4, 4)      fused query, key, value",
        "layers/mlp/up_proj/kernel  (24, 4, 8)   muon   24 x (4, 8)      stacked matrices",
        "mla/wkv_b                  (4, 2, 5)    muon   (4, 6) + (4, 4)  rule 'wkv_b$'",
        "norm                       (4,)         adamw                   vector",
        "",
        "muon: 3 leaves, 1,960 numbers (90.6 %); adamw: 2 leaves, 204 numbers (9.4 %)",
    ]


def test_empty_tree():
    assert "muon: 0 leaves, 0 numbers (0.0 %)" in describe_labels({})


def test_fails_as_labels_do():
    with pytest.raises(ValueError, match="matches no path"):
        describe_labels({"w": jnp.ones((2, 2))}, MatrixRules([("v", None)]))
    with pytest.raises(ValueError, match="cannot be told by name"):
        describe_labels({"w": jnp.ones((2, 2, 2))})
