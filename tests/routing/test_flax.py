"""Inference on what Flax modules really initialise: Linen, NNX, boxed and not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers as Dims

from muonclip_jax._tree import flatten_with_paths
from muonclip_jax.routing import infer_dimension_numbers, label_params

X = jax.ShapeDtypeStruct((2, 4, 8), "float32")
ATTENTION = dict.fromkeys(("query", "key", "value"), Dims(0, (1, 2))) | {"out": Dims((0, 1), 2)}


class Zoo(nn.Module):
    """One of every layer whose kernels can be told."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.Embed(10, 8)(jnp.zeros((2, 4), int))
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x, x)
        x = nn.DenseGeneral((2, 4), name="query")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="out")(x)
        x = nn.ConvLocal(6, (3,))(nn.ConvTranspose(6, (3,))(nn.Conv(6, (3,))(x)))
        x = nn.RNN(nn.GRUCell(5))(jnp.asarray(nn.RNN(nn.LSTMCell(5))(x)))
        x = nn.BatchNorm(use_running_average=False)(jnp.asarray(x))
        x = nn.WeightNorm(nn.Dense(6))(nn.GroupNorm(5)(x))
        x = nn.SpectralNorm(nn.Dense(6))(x, update_stats=True)
        return nn.Dense(10, name="lm_head")(x)


def init(module):
    return jax.eval_shape(module.init, jax.random.key(0), X)


def muon(tree):
    """Path of each kernel that Muon trains, without "/kernel" -> its axes."""
    dims = infer_dimension_numbers(tree)
    pairs, _ = flatten_with_paths(dims, is_leaf=lambda x: x is None or isinstance(x, Dims))
    return {path.removesuffix("/kernel"): dim for path, dim in pairs if isinstance(dim, Dims)}


def test_linen_zoo_with_and_without_the_outer_level():
    tree = init(Zoo())
    expected = {f"MultiHeadDotProductAttention_0/{name}": dims for name, dims in ATTENTION.items()}
    expected |= {"query": Dims(0, (1, 2)), "out": Dims((0, 1), 2), "ConvLocal_0": Dims(1, 2)}
    expected |= {"Conv_0": Dims((0, 1), 2), "ConvTranspose_0": Dims((0, 1), 2)}
    cells = [f"LSTMCell_0/{a}{b}" for a in "ih" for b in "figo"]
    cells += [f"GRUCell_0/{a}{b}" for a in "ih" for b in "nrz"]
    expected |= dict.fromkeys(["Dense_0", "Dense_1", *cells], Dims(0, 1))
    assert muon(tree["params"]) == expected
    assert muon(tree) == {f"params/{path}": dims for path, dims in expected.items()}


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxed_leaves(box):
    kernel_init = box(nn.initializers.lecun_normal(), ("embed", "heads", "kv"))
    params = init(nn.DenseGeneral((2, 4), kernel_init=kernel_init, name="query"))["params"]
    boxed = {"attention": {"query": params}}
    assert muon(boxed) == {"attention/query": Dims(0, (1, 2))}
    labels = label_params(boxed)
    assert jax.tree.structure(labels) == jax.tree.structure(boxed)
    assert labels["attention"]["query"]["kernel"].value == "muon"


class Model(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)])
        self.lora = nnx.LoRA(6, 2, 6, rngs=rngs)
        self.head = nnx.Linear(6, 10, rngs=rngs)


def test_nnx_states_boxed_and_pure_with_all_their_variables():
    expected = {f"attention/{name}": dims for name, dims in ATTENTION.items()}
    expected["layers/0"] = Dims(0, 1)
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    for tree in (state, nnx.to_pure_dict(state), nnx.state(model)):
        assert muon(tree) == expected
    assert jax.tree.structure(label_params(state)) == jax.tree.structure(state)
