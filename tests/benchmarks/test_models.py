"""The shapes of named models against their published sizes."""

import math

import jax
import jax.numpy as jnp
import pytest
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc
from benchmarks.models import MODELS, layers_of_256


@pytest.mark.parametrize(
    ("name", "published", "left_out"),
    [
        # Embedding and head are two leaves here and one there; norms and biases are left out.
        ("gpt2-small", 124.4e6 + 768 * 50257, 0.002),
        ("1.3b", 1.3158e9 + 2048 * 50257, 0.002),
    ],
)
def test_parameters_are_those_of_the_model(name, published, left_out):
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(MODELS[name].tree()))
    assert found == pytest.approx(published, rel=left_out)
    assert layers_of_256(48).matrices() == {(256, 256): 192, (256, 1024): 96}


@pytest.mark.parametrize("name", ["gpt2-small", "layers-of-256"])
def test_what_goes_to_muon_is_what_the_library_infers(name):
    model = MODELS[name]
    tree = model.tree(jnp.bfloat16)
    labels = mc.label_params(tree)
    numbers = model.dimension_numbers()
    expected = jax.tree.map(
        lambda spec: "adamw" if spec is None else "muon",
        numbers,
        is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
    )
    assert labels == expected
