"""What trees show beside names: output heads, routers, orientation, names of axes, dtypes."""

import collections
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

from muonclip_jax import routing
from muonclip_jax.routing import MatrixRules, describe_labels, infer_dimension_numbers
from tests.routing.test_table import tree

LAYER = {"layers/0/up/kernel": (16, 64), "layers/0/down/kernel": (64, 16)}
TOKENS = LAYER | {"wte/embedding": (40, 16)}
POSITIONS = {"wpe/embedding": (40, 16)}
TYPES = {"type_embeddings/embedding": (2, 16)}
STACKED = {"layers/attn/w_q": (3, 8, 48, 4), "layers/attn/w_v": (3, 2, 48, 4)}
CHAIN = {f"mlp/layers/{i}/weight": x for i, x in enumerate([(32, 16), (32, 32), (40, 32)])}


def head(name):
    return {f"{name}/kernel": (16, 40)}


FC = head("fc")
TWO_HEADS = TOKENS | {"a/kernel": (16, 40), "b/kernel": (16, 40)}
MOE = {
    "layers/0/moe/switchboard/kernel": (16, 6),
    "layers/0/moe/experts/wi": (6, 16, 64),
    "layers/0/moe/experts/wo": (6, 64, 16),
}
BLOCK = {"wte/embedding": (64, 16), "mlp/a/kernel": (16, 64), "mlp/b/kernel": (64, 16)}
FLAT = {f"Dense_{i}/kernel": ((16, 64), (64, 16))[i % 2] for i in range(4)}
BASE = {"lora_q/base_module/kernel": (48, 60), "lora_q/lora_a": (48, 4)}


def routed(shapes, rules=None):
    found = (rules or MatrixRules()).decisions(tree(shapes))
    return {path: decision for path, _, decision in found}


def dims_of(found):
    return jax.tree.leaves(found, is_leaf=lambda x: x is None or isinstance(x, Dims))


@pytest.mark.parametrize(
    ("shapes", "adamw"),
    [
        # The token embedding tells the output head; position and type tables do not.
        *((TOKENS | head(x), {"wte/embedding", f"{x}/kernel"}) for x in ("fc", "output", "a/last")),
        (LAYER | POSITIONS | FC, {"wpe/embedding"}),
        (LAYER | TYPES | {"fc/kernel": (16, 2)}, {"type_embeddings/embedding"}),
        (TOKENS | POSITIONS | FC, {"wte/embedding", "wpe/embedding", "fc/kernel"}),
        # Hidden layers as large as the vocabulary are no heads; two candidates are not decided.
        (LAYER | {"wte/embedding": (64, 16)}, {"wte/embedding"}),
        (BLOCK, {"wte/embedding"}),
        (TWO_HEADS, {"wte/embedding"}),
        # What makes a number for each expert is the router.
        (MOE, {"layers/0/moe/switchboard/kernel"}),
        (BASE, {"lora_q/lora_a"}),
        # The output head tells the token table too, at any orientation; two may be none.
        (LAYER | {"t": (40, 16), "lm_head": (16, 40), "pos": (9, 16)}, {"t", "lm_head", "pos"}),
        (LAYER | {"t": (40, 16), "lm_head": (16, 40), "b": (40, 16)}, {"lm_head"}),
        (
            LAYER | {"E/weight": (40, 16), "lm_head/weight": (40, 16)},
            {"E/weight", "lm_head/weight"},
        ),
        (LAYER | {"a/kernel": (64, 16), "lm_head": (16, 64)}, {"lm_head"}),
    ],
)
def test_what_is_left_to_adamw(shapes, adamw):
    assert {path for path, decision in routed(shapes).items() if decision.spec is None} == adamw


@pytest.mark.parametrize(
    ("shapes", "flagged"),
    [
        ({"Dense_0/kernel": (784, 32), "Dense_1/kernel": (32, 10)}, {"Dense_1/kernel"}),
        (LAYER | {"fc/kernel": (16, 10)}, {"fc/kernel"}),
        (LAYER | {"fc/weight": (10, 16)}, {"fc/weight"}),
        # A tied embedding of NNX, listed under the first path of the shared parameter.
        (LAYER | {"decoder/weight": (100, 16)}, {"decoder/weight"}),
        (LAYER | {"lm_head/kernel": (16, 100)}, set()),
        (TWO_HEADS, {"a/kernel", "b/kernel"}),
        # A leaf at the root that is as wide as the table; layers that have no modules.
        (LAYER | {"t": (40, 16), "lm_head": (16, 40), "x": (30, 16)}, {"x"}),
        (FLAT | {"Dense_4/kernel": (16, 10)}, {"Dense_4/kernel"}),
        # The last kernel of a chain, but not of a layer's; a table is not made of what it makes.
        (CHAIN | {"tok/weight": (40, 16)}, {"mlp/layers/2/weight"}),
        (CHAIN | {"E/weight": (40, 16)}, {"mlp/layers/2/weight", "E/weight"}),
        ({f"layers/{i}/{path}": shape for path, shape in CHAIN.items() for i in "01"}, set()),
    ],
)
def test_candidates_are_flagged_with_a_rule_that_works(shapes, flagged):
    lines = describe_labels(tree(shapes)).splitlines()
    found = {line.split()[1]: line for line in lines if line.startswith("check: ")}
    assert set(found) == flagged
    adamw = {path for path, decision in routed(shapes).items() if decision.spec is None}
    for path, line in found.items():
        rules = eval(line.split("; ")[1].split(" leaves")[0], {"MatrixRules": MatrixRules})
        assert path in rules.rules[0][0]
        # Of two candidates, the other one is then the head.
        left = {p for p, d in routed(shapes, rules).items() if d.spec is None}
        assert left == ({path} if "E/weight" in flagged else flagged) | adamw


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [
        # The bias has the output's length, whatever the leaf is called.
        ({"a/weight": (48, 80), "a/bias": (80,)}, Dims(0, 1)),
        ({"a/weight": (80, 48), "a/bias": (80,)}, Dims(1, 0)),
        ({"a/kernel": (48, 6, 10), "a/bias": (6, 10)}, Dims(0, (1, 2))),
        ({"a/kernel": (7, 10, 48), "a/bias": (7, 48)}, Dims(1, 2)),
        ({"a/weight": (24, 16, 3, 5), "a/bias": (24, 1, 1)}, Dims((1, 2, 3), 0)),
        ({"a/kernel": (3, 5, 16, 24), "a/bias": (24,)}, Dims((0, 1, 2), 3)),
        # Without one, libraries that say "weight" have the output first.
        ({"lstm/weight_ih": (80, 48)}, Dims(1, 0)),
        ({"a/kernel": (48, 80)}, Dims(0, 1)),
        # Two biases tell the habit of a library.
        (
            {"a/kernel": (80, 48), "a/bias": (80,), "b/kernel": (64, 32), "b/bias": (64,)}
            | {"c/kernel": (40, 24)},
            Dims(1, 0),
        ),
        # Small square windows, in front or behind.
        ({"down/kernel": (3, 3, 32, 64)}, Dims((0, 1, 2), 3)),
        ({"a/weight": (64, 32, 3, 3)}, Dims((1, 2, 3), 0)),
    ],
)
def test_orientation_of_one_kernel(shapes, dims):
    found = infer_dimension_numbers(tree(shapes))
    assert {x for x in dims_of(found) if x is not None} == {dims}


@pytest.mark.parametrize(
    ("query", "output", "dims"),
    [
        ({"0/attn/W_Q": (8, 48, 4)}, {"0/attn/W_O": (8, 4, 48)}, Dims(1, (0, 2))),
        ({"0/attn/W_K": (2, 48, 4)}, {"0/attn/W_O": (8, 4, 48)}, Dims(1, (0, 2))),
        ({"attn/w_q/kernel": (12, 48, 4)}, {"attn/w_o/kernel": (12, 4, 48)}, Dims(1, (0, 2))),
        ({"attn/w_q/kernel": (6, 48, 4)}, {"attn/w_o/kernel": (6, 4, 48)}, Dims(1, 2)),  # layers
        (STACKED, {"layers/attn/w_o": (3, 8, 4, 48)}, Dims(2, (1, 3))),
    ],
)
def test_heads_before_the_width_beside_an_output_projection(query, output, dims):
    found = dims_of(infer_dimension_numbers(tree(query | output)))
    assert found.count(dims) >= len(query)


Axis = collections.namedtuple("Axis", "name size")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclasses.dataclass
class NamedArray:
    """As haliax has it: the array is the one child, the axes are static."""

    array: Any
    axes: tuple[Axis, ...]


def haliax(**axes):
    array = jax.ShapeDtypeStruct(tuple(axes.values()), jnp.float32)
    return NamedArray(array, tuple(Axis(*pair) for pair in axes.items()))


def boxed(shape, *names):
    init = nn.with_logical_partitioning(nn.initializers.ones, names)
    return init(jax.random.key(0), shape)


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
        ("wi", boxed((8, 3, 5), "embed", "layers", "mlp"), Dims(0, 2)),
        # Names of mesh axes say nothing, nor do names without a width.
        ("up_proj", haliax(there=80, here=48), Dims(1, 0)),
        ("kernel", nn.Partitioned(jnp.ones((8, 5)), names=("fsdp", None)), Dims(0, 1)),
    ],
)
def test_names_of_axes_come_before_names_of_modules(name, array, dims):
    leaf = "weight" if isinstance(array, NamedArray) else "kernel"
    assert dims_of(infer_dimension_numbers({name: {leaf: array}})) == [dims]


def test_integers_are_not_orthogonalized():
    params = {"mlp": {"up": {"kernel": jnp.ones((4, 8), jnp.int32)}}}
    assert MatrixRules().labels(params) == {"mlp": {"up": {"kernel": "adamw"}}}
    assert "integers or bools" in describe_labels(params)
    with pytest.raises(ValueError, match=r"mlp/up/kernel .*integer or bool"):
        MatrixRules([("up", Dims(0, 1))]).labels(params)


def test_a_fused_kernel_of_no_known_name_is_flagged_with_the_rule_that_splits_it():
    shapes = {"layers/a/kernel": (2, 16, 48), "layers/b/kernel": (2, 16, 16)}
    shapes |= {"mlp/a/kernel": (16, 48), "mlp/b/kernel": (48, 16), "mlp/c/kernel": (16, 16)}
    [line] = [x for x in describe_labels(tree(shapes)).splitlines() if x.startswith("check:")]
    rules = eval(line.split("; ")[1].removesuffix(" says so"), dict(vars(routing)))
    [split] = infer_dimension_numbers(tree(shapes), rules)["layers"]["a"]["kernel"].splits
    assert (split.axis, split.sizes) == (2, (16, 16, 16))
