"""The shapes of named models against their published sizes."""

import math

import jax
import jax.numpy as jnp
import pytest
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc
from benchmarks.models import MODELS, layers_of_256


def parameters(name: str) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(MODELS[name].tree()))


@pytest.mark.parametrize(
    ("name", "published", "left_out"),
    [
        # Embedding and head are two leaves here and one there; norms and biases are left out.
        ("gpt2-small", 124.4e6 + 768 * 50257, 0.002),
        ("gpt2-xl", 1557.6e6 + 1600 * 50257, 0.002),
        ("llama3-8b", 8.030e9, 0.001),
    ],
)
def test_parameters_are_those_of_the_model(name, published, left_out):
    assert parameters(name) == pytest.approx(published, rel=left_out)


def test_layers_of_256():
    assert layers_of_256(48).matrices() == {(256, 256): 192, (256, 1024): 96}
    assert len(jax.tree.leaves(layers_of_256(48).tree())) == 288


@pytest.mark.parametrize("name", ["gpt2-small", "llama3-8b"])
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
