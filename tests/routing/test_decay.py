"""decay_mask: norms, gains and biases do not decay, whatever axes stacking gave them."""

import jax
import jax.numpy as jnp

from muonclip_jax.routing import MatrixRules, decay_mask

SHAPES = {
    "layers": {
        "attention": {"query": {"kernel": (3, 8, 2, 4), "bias": (3, 2, 4)}},
        "norm": {"scale": (3, 8)},
    },
    "head": {"kernel": (8, 50), "bias": (50,)},
    "embed": {"embedding": (50, 8)},
    "stem": {"w": (7, 8, 9)},
}
PARAMS = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
)


def test_mask():
    rules = MatrixRules([("stem/w$", None)])
    assert decay_mask(PARAMS, rules) == {
        "layers": {
            "attention": {"query": {"kernel": True, "bias": False}},
            "norm": {"scale": False},
        },
        "head": {"kernel": True, "bias": False},
        "embed": {"embedding": True},
        "stem": {"w": True},
    }
