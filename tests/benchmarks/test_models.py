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
        ("qwen3-0.6b", 0.596e9, 0.001),
        ("resnet50", 25.557e6, 0.003),
        ("vit-b16", 86.57e6, 0.003),
    ],
)
def test_parameters_are_those_of_the_model(name, published, left_out):
    assert parameters(name) == pytest.approx(published, rel=left_out)


def test_experts_are_counted_one_by_one():
    # 58 layers of 256, and 60 of 384, three matrices each: 654e9 and 1015e9 entries.
    assert MODELS["deepseek-v3-experts"].matrices() == {(2048, 7168): 3 * 58 * 256}
    assert MODELS["kimi-k2-experts"].entries() == 3 * 60 * 384 * 2048 * 7168


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_matrices_are_those_of_the_tree(name, stacked):
    model = MODELS[name]
    tree, numbers = model.tree(stacked=stacked), model.dimension_numbers(stacked=stacked)

    def entries(spec, leaf):
        return 0 if spec is None else math.prod(leaf.shape)

    counted = jax.tree.map(
        entries, numbers, tree, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    )
    assert sum(jax.tree.leaves(counted)) == model.entries()


def test_layers_of_256():
    assert layers_of_256(48).matrices() == {(256, 256): 192, (256, 1024): 96}
    assert len(jax.tree.leaves(layers_of_256(48).tree())) == 288


@pytest.mark.parametrize("name", ["gpt2-small", "llama3-8b", "vit-b16", "resnet50"])
def test_what_goes_to_muon_is_what_the_library_infers(name):
    """Apart from the first convolution, which is the user's rule."""
    model = MODELS[name]
    tree = model.tree(jnp.bfloat16)
    first = [("stem/conv/kernel$", None)] if name == "resnet50" else []
    first += [("patches/kernel$", None)] if name == "vit-b16" else []
    labels = mc.label_params(tree, mc.MatrixRules(first))
    numbers = model.dimension_numbers()
    expected = jax.tree.map(
        lambda spec: "adamw" if spec is None else "muon",
        numbers,
        is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
    )
    assert labels == expected
