"""Inference on what Flax modules really initialise: Linen, NNX, boxed and stacked."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._tree import flatten_with_paths
from muonclip_jax.routing import MatrixRules, infer_dimension_numbers, label_params

DIMS = MuonDimensionNumbers
X = jax.ShapeDtypeStruct((2, 4, 8), "float32")


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
        return nn.Dense(8)(x), None


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Attention,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return stack(name="layers")(x)[0]


class Zoo(nn.Module):
    """One of every layer whose kernels can be told."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.Embed(10, 8)(jnp.zeros((2, 4), int))
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x, x)
        x = nn.DenseGeneral((2, 4), name="query")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="out")(x)
        x = nn.Conv(6, (3,))(x)
        x = nn.ConvTranspose(6, (3,))(x)
        x = nn.ConvLocal(6, (3,))(x)
        x = jnp.asarray(nn.RNN(nn.LSTMCell(5))(x))
        x = nn.RNN(nn.GRUCell(5))(x)
        x = nn.BatchNorm(use_running_average=False)(jnp.asarray(x))
        x = nn.GroupNorm(5)(x)
        x = nn.WeightNorm(nn.Dense(6))(x)
        x = nn.SpectralNorm(nn.Dense(6))(x, update_stats=True)
        return nn.Dense(10, name="lm_head")(x)


def _init(module, *args):
    return jax.eval_shape(module.init, jax.random.key(0), *args)


def _muon(tree, rules=None):
    dims = infer_dimension_numbers(tree, rules)
    pairs, _ = flatten_with_paths(
        dims, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    )
    return {path: dim for path, dim in pairs if isinstance(dim, MuonDimensionNumbers)}


@pytest.fixture(scope="module")
def zoo():
    return _init(Zoo(), X)


@pytest.mark.parametrize("outer", [True, False])
def test_zoo(zoo, outer):
    tree = zoo if outer else zoo["params"]
    prefix = "params/" if outer else ""
    attention = "MultiHeadDotProductAttention_0"
    expected = {
        f"{attention}/query/kernel": DIMS(0, (1, 2)),
        f"{attention}/key/kernel": DIMS(0, (1, 2)),
        f"{attention}/value/kernel": DIMS(0, (1, 2)),
        f"{attention}/out/kernel": DIMS((0, 1), 2),
        "query/kernel": DIMS(0, (1, 2)),
        "out/kernel": DIMS((0, 1), 2),
        "Conv_0/kernel": DIMS((0, 1), 2),
        "ConvTranspose_0/kernel": DIMS((0, 1), 2),
        "ConvLocal_0/kernel": DIMS(1, 2),
        "Dense_0/kernel": DIMS(0, 1),
        "Dense_1/kernel": DIMS(0, 1),
        **{f"LSTMCell_0/{a}{b}/kernel": DIMS(0, 1) for a in "ih" for b in "figo"},
        **{f"GRUCell_0/{a}{b}/kernel": DIMS(0, 1) for a in "ih" for b in "nrz"},
    }
    assert _muon(tree) == {prefix + path: dims for path, dims in expected.items()}


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers(axis):
    params = _init(Scanned(axis), X)
    stack = (lambda i: i + 1) if axis == 0 else (lambda i: i + (i > 0))
    assert _muon(params, MatrixRules(scan_axis=axis)) == {
        "params/layers/attention/query/kernel": DIMS(stack(0), (stack(1), stack(2))),
        "params/layers/attention/key/kernel": DIMS(stack(0), (stack(1), stack(2))),
        "params/layers/attention/value/kernel": DIMS(stack(0), (stack(1), stack(2))),
        "params/layers/attention/out/kernel": DIMS((0 if axis else 1, 2), 3),
        "params/layers/Dense_0/kernel": DIMS(stack(0), 2),
    }


def test_scanned_and_single_layers_agree():
    """Without its axis of layers, a stacked leaf is read as the single one is."""
    single = _muon({"params": {"layers_0": _init(Attention(), X)["params"]}})
    stacked = _muon(_init(Scanned(0), X))
    assert {path.replace("layers_0", "layers"): _flat(d) for path, d in single.items()} == {
        path: [[i - 1 for i in axes] for axes in _flat(d)] for path, d in stacked.items()
    }


def _flat(dims):
    return [[axes] if isinstance(axes, int) else list(axes) for axes in dims]


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxed_leaves(box):
    init = box(nn.initializers.lecun_normal(), ("embed", "heads", "kv"))
    params = _init(nn.DenseGeneral((2, 4), kernel_init=init, name="query"), X)["params"]
    boxed = {"attention": {"query": params}}
    assert _muon(boxed) == {"attention/query/kernel": DIMS(0, (1, 2))}
    labels = label_params(boxed)
    assert jax.tree.structure(labels) == jax.tree.structure(boxed)
    assert labels["attention"]["query"]["kernel"].value == "muon"


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.conv = nnx.Conv(8, 6, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)])
        self.lora = nnx.LoRA(6, 2, 6, rngs=rngs)
        self.cell = nnx.LSTMCell(6, 6, rngs=rngs)
        self.head = nnx.Linear(6, 10, rngs=rngs)


NNX_EXPECTED = {
    "attention/query/kernel": DIMS(0, (1, 2)),
    "attention/key/kernel": DIMS(0, (1, 2)),
    "attention/value/kernel": DIMS(0, (1, 2)),
    "attention/out/kernel": DIMS((0, 1), 2),
    "conv/kernel": DIMS((0, 1), 2),
    "layers/0/kernel": DIMS(0, 1),
    **{f"cell/{a}{b}/kernel": DIMS(0, 1) for a in "ih" for b in ["f", "g", "i", "o"]},
}
NNX_EXPECTED["cell/if_/kernel"] = NNX_EXPECTED.pop("cell/if/kernel")


def test_nnx_states_boxed_and_pure():
    state = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    assert _muon(state) == NNX_EXPECTED
    pure = nnx.to_pure_dict(state)
    assert _muon(pure) == NNX_EXPECTED
    labels = label_params(state)
    assert jax.tree.structure(labels) == jax.tree.structure(state)


def test_nnx_model_with_all_its_variables():
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    assert _muon(nnx.state(model)) == NNX_EXPECTED


def test_nnx_vmapped_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def layers(rngs):
        return nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    state = nnx.state(nnx.eval_shape(lambda: layers(nnx.Rngs(0))), nnx.Param)
    assert _muon({"attention": nnx.to_pure_dict(state)}) == {
        "attention/query/kernel": DIMS(1, (2, 3)),
        "attention/key/kernel": DIMS(1, (2, 3)),
        "attention/value/kernel": DIMS(1, (2, 3)),
        "attention/out/kernel": DIMS((1, 2), 3),
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: Any
    bias: Any


def test_dataclasses_and_lists():
    model = [Layer(jnp.ones((3, 4)), jnp.ones(4)), (jnp.ones((4, 4)), jnp.ones(4))]
    assert jax.tree.leaves(label_params(model)) == ["muon", "adamw", "muon", "adamw"]
