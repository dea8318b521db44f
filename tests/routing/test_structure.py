"""What trees show beside names: output heads, routers, orientation, names of axes, dtypes."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

from muonclip_jax.routing import MatrixRules, describe_labels, infer_dimension_numbers
from tests.routing.test_table import tree

LAYER = {"layers/0/up/kernel": (16, 64), "layers/0/down/kernel": (64, 16)}


def routed(shapes, rules=None):
    found = (rules or MatrixRules()).decisions(tree(shapes))
    return {path: decision for path, _, decision in found}


def sides(decision):
    """The axes that a kernel reads and those that it makes."""
    assert decision.spec is not None
    return tuple(decision.spec.dims)


def dims_of(found):
    return jax.tree.leaves(found, is_leaf=lambda x: x is None or isinstance(x, Dims))


def checks(shapes):
    lines = [x for x in describe_labels(tree(shapes)).splitlines() if x.startswith("check: ")]
    return {line.split()[1]: line for line in lines}


@pytest.mark.parametrize(
    "name", ["output", "proj_out", "decoder", "fc", "Dense_0", "readout_2x", "model/last"]
)
@pytest.mark.parametrize("rows", [1000, 8], ids=["", "bytes"])
def test_the_token_embedding_tells_the_output_head(name, rows):
    shapes = LAYER | {"tok/embedding": (rows, 16), f"{name}/kernel": (16, rows)}
    decision = routed(shapes)[f"{name}/kernel"]
    assert decision.spec is None
    assert "output head" in decision.why


def test_position_and_type_tables_tell_nothing():
    shapes = LAYER | {"wpe/embedding": (40, 16), "type_embeddings/embedding": (2, 16)}
    assert routed(shapes | {"fc/kernel": (16, 40)})["fc/kernel"].spec is not None
    both = shapes | {"wte/embedding": (40, 16), "fc/kernel": (16, 40)}
    assert routed(both)["fc/kernel"].spec is None


def test_hidden_layers_as_large_as_the_vocabulary_are_no_heads():
    shapes = LAYER | {"wte/embedding": (64, 16)}
    assert all(d.spec is not None for p, d in routed(shapes).items() if "layers" in p)
    block = {"wte/embedding": (64, 16), "mlp/a/kernel": (16, 64), "mlp/b/kernel": (64, 16)}
    assert routed(block)["mlp/a/kernel"].spec is not None


def test_two_candidates_are_flagged_and_not_decided():
    shapes = LAYER | {"wte/embedding": (40, 16), "a/kernel": (16, 40), "b/kernel": (16, 40)}
    assert routed(shapes)["a/kernel"].spec is not None
    assert set(checks(shapes)) == {"a/kernel", "b/kernel"}


@pytest.mark.parametrize(
    ("shapes", "flagged"),
    [
        ({"Dense_0/kernel": (784, 32), "Dense_1/kernel": (32, 10)}, {"Dense_1/kernel"}),
        (LAYER | {"fc/kernel": (16, 10)}, {"fc/kernel"}),
        (LAYER | {"fc/weight": (10, 16)}, {"fc/weight"}),
        # A tied embedding of NNX, listed under the first path of the shared parameter.
        (LAYER | {"decoder/weight": (100, 16)}, {"decoder/weight"}),
        (LAYER | {"decoder/kernel": (100, 16)}, {"decoder/kernel"}),
        (LAYER | {"lm_head/kernel": (16, 100)}, set()),
    ],
)
def test_without_embeddings_candidates_are_flagged(shapes, flagged):
    found = checks(shapes)
    assert set(found) == flagged
    for path, line in found.items():
        rule = line.split("; ")[1].split(" leaves")[0]
        rules = eval(rule, {"MatrixRules": MatrixRules})
        assert [p for p, d in routed(shapes, rules).items() if d.spec is None] == [path]


def test_what_makes_a_number_for_each_expert_is_the_router():
    shapes = {
        "layers/0/moe/switchboard/kernel": (16, 6),
        "layers/0/moe/experts/wi": (6, 16, 64),
        "layers/0/moe/experts/wo": (6, 64, 16),
    }
    found = routed(shapes)
    assert [path for path, decision in found.items() if decision.spec is None] == list(shapes)[:1]


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [
        # The bias has the output's length, whatever the leaf is called.
        ({"a/weight": (48, 80), "a/bias": (80,)}, Dims(0, 1)),
        ({"a/weight": (80, 48), "a/bias": (80,)}, Dims(1, 0)),
        ({"a/kernel": (80, 48), "a/bias": (80,)}, Dims(1, 0)),
        ({"a/kernel": (48, 6, 10), "a/bias": (6, 10)}, Dims(0, (1, 2))),
        ({"a/kernel": (6, 10, 48), "a/bias": (48,)}, Dims((0, 1), 2)),
        ({"a/kernel": (7, 10, 48), "a/bias": (7, 48)}, Dims(1, 2)),
        ({"a/weight": (24, 16, 3, 5), "a/bias": (24, 1, 1)}, Dims((1, 2, 3), 0)),
        ({"a/kernel": (3, 5, 16, 24), "a/bias": (24,)}, Dims((0, 1, 2), 3)),
        # Without one, libraries that say "weight" have the output first.
        ({"a/weight": (80, 48)}, Dims(1, 0)),
        ({"lstm/weight_ih": (80, 48)}, Dims(1, 0)),
        ({"a/weights": (48, 80)}, Dims(0, 1)),
        ({"a/kernel": (48, 80)}, Dims(0, 1)),
        # Small square windows, in front or behind.
        ({"down/kernel": (3, 3, 32, 64)}, Dims((0, 1, 2), 3)),
        ({"a/weight": (64, 32, 3, 3)}, Dims((1, 2, 3), 0)),
    ],
)
def test_orientation_of_one_kernel(shapes, dims):
    found = infer_dimension_numbers(tree(shapes))
    assert [x for x in dims_of(found) if x is not None] == [dims]


@pytest.mark.parametrize("leaf", ["weight", "kernel"])
@pytest.mark.parametrize("output_first", [True, False])
def test_siblings_tell_the_orientation(leaf, output_first):
    """Three readers of the hidden state and two writers agree on its width."""
    pairs = {"q_proj": (48, 60), "k_proj": (48, 20), "o_proj": (60, 48)}
    pairs |= {"gate_proj": (48, 80), "up_proj": (48, 80), "down_proj": (80, 48)}
    shapes = {
        f"layers/0/{name}/{leaf}": pair[::-1] if output_first else pair
        for name, pair in pairs.items()
    }
    for decision in routed(shapes).values():
        assert sides(decision) == (((1,), (0,)) if output_first else ((0,), (1,)))


def test_cross_attention_does_not_turn_a_tree():
    shapes = {
        "layers/0/attn/to_q/kernel": (32, 32),
        "layers/0/attn/to_k/kernel": (48, 32),
        "layers/0/attn/to_v/kernel": (48, 32),
        "layers/0/attn/to_out/kernel": (32, 32),
        "layers/0/ff/net/kernel": (128, 32),
    }
    assert all(sides(d) == ((0,), (1,)) for d in routed(shapes).values())


@dataclasses.dataclass(frozen=True)
class Axis:
    name: str
    size: int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class NamedArray:
    """As haliax has it: the array is the one child, the axes are static."""

    array: Any
    axes: tuple[Axis, ...]

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(children[0], axes)


def haliax(**axes):
    shape = tuple(axes.values())
    return NamedArray(
        jax.ShapeDtypeStruct(shape, jnp.float32), tuple(Axis(*pair) for pair in axes.items())
    )


@pytest.mark.parametrize(
    ("name", "array", "dims"),
    [
        ("q_proj", haliax(layer=5, kv_head=2, group=3, head_size=8, embed=48), Dims(4, (1, 2, 3))),
        ("o_proj", haliax(layer=5, embed=48, heads=6, head_size=8), Dims((2, 3), 1)),
        ("q_proj", haliax(embed=48, heads=6, layer=5, head_size=8), Dims(0, (1, 3))),
        ("up_proj", haliax(layer=48, mlp=48, embed=48), Dims(2, 1)),
        ("w1", haliax(experts=7, mlp=80, embed=48), Dims(2, 1)),
        ("any", haliax(layer=5, block=2, mlp=80, embed=48), Dims(3, 2)),
        ("any", haliax(vocab=200, embed=48), None),
    ],
)
def test_names_of_axes_come_before_names_of_modules(name, array, dims):
    found = infer_dimension_numbers({name: {"weight": array}})
    assert dims_of(found) == [dims]


def test_flax_names_of_axes_and_names_of_mesh_axes_that_say_nothing():
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "layers", "mlp"))
    box = init(jax.random.key(0), (8, 3, 5))
    assert dims_of(infer_dimension_numbers({"wi": {"kernel": box}})) == [Dims(0, 2)]
    box = nn.Partitioned(jnp.ones((8, 5)), names=("fsdp", None))
    assert dims_of(infer_dimension_numbers({"wi": {"kernel": box}})) == [Dims(0, 1)]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_integers_and_bools_are_not_orthogonalized(dtype):
    params = {"mlp": {"up": {"kernel": jnp.ones((4, 8), dtype)}}}
    assert MatrixRules().labels(params) == {"mlp": {"up": {"kernel": "adamw"}}}
    assert "integers or bools" in describe_labels(params)
    with pytest.raises(ValueError, match=r"mlp/up/kernel .*integers or bools"):
        MatrixRules([("up", Dims(0, 1))]).labels(params)


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("q/lora_a", (48, 4)),
        ("q/lora/lora_b", (4, 60)),
        ("attn/q_proj/w_lora_b", (4, 6, 10)),
        ("attn/o_proj/w_lora_a", (6, 10, 4)),
        ("mlp/up/kernel_lora_a", (48, 4)),
        ("base_model/model/layers/0/q_proj/lora_A/default/weight", (4, 48)),
        ("layers/q_proj/lora_B/default/weight", (3, 48, 4)),
    ],
)
def test_lora_factors_are_adamws_and_a_rule_gives_them_to_muon(path, shape):
    assert routed({path: shape})[path].spec is None
    rules = MatrixRules([("(?i)lora_?[ab]", Dims(0, 1))])
    assert routed({path: shape}, rules)[path].spec is not None
    base = {"lora_q/base_module/kernel": (48, 60), "lora_q/lora_a": (48, 4)}
    assert [decision.spec is None for decision in routed(base).values()] == [False, True]
