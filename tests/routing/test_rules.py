"""MatrixRules: order, locality, staticness, errors, and the functions around them."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

from muonclip_jax import routing
from muonclip_jax.routing import (
    MatrixRules,
    MatrixSpec,
    Split,
    as_rules,
    decay_mask,
    describe_labels,
    infer_dimension_numbers,
    label_params,
)

MASKED = optax.MaskedNode()
PARAMS = {
    "embed": {"embedding": jnp.ones((9, 8))},
    "layers_0": {
        "attention": {
            "query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))},
            "out": {"kernel": jnp.ones((2, 4, 8)), "bias": jnp.ones(8)},
        },
        "mlp": [jnp.ones((8, 16)), jnp.ones((16, 8))],
        "norm": {"scale": jnp.ones(8)},
    },
    "lm_head": {"kernel": jnp.ones((8, 9))},
}


def test_labels_and_dimension_numbers_have_the_tree_of_the_parameters():
    labels, dims = label_params(PARAMS), infer_dimension_numbers(PARAMS)
    half = {"kernel": "muon", "bias": "adamw"}
    assert labels == {
        "embed": {"embedding": "adamw"},
        "layers_0": {
            "attention": {"query": half, "out": half},
            "mlp": ["muon", "muon"],
            "norm": {"scale": "adamw"},
        },
        "lm_head": {"kernel": "adamw"},
    }
    assert dims["layers_0"]["attention"]["query"] == {"kernel": Dims(0, (1, 2)), "bias": None}
    assert dims["layers_0"]["attention"]["out"]["kernel"] == Dims((0, 1), 2)
    assert dims["layers_0"]["mlp"] == [Dims(0, 1), Dims(0, 1)]
    seen = []
    jax.eval_shape(lambda p: seen.append(label_params(p)) or p, PARAMS)
    assert seen == [label_params(jax.eval_shape(lambda: PARAMS))] == [labels]
    assert infer_dimension_numbers({"a": {}}) == {"a": {}}
    assert label_params(jnp.ones((2, 3))) == "muon"


def test_user_rules_come_first_and_the_first_match_wins():
    split = MatrixSpec((0, (1, 2)), Split(2, (3, 1)))
    pairs = {"embedding$": MatrixSpec(), "mlp/0$": None, "mlp": Dims(-1, -2), "query/ker": split}
    rules = MatrixRules(pairs)
    assert rules == MatrixRules(list(pairs.items()))
    dims = rules.dimension_numbers(PARAMS)
    assert dims["embed"]["embedding"] == Dims(0, 1)
    assert dims["layers_0"]["mlp"] == [None, Dims(1, 0)]
    assert dims["layers_0"]["attention"]["query"]["kernel"] == split
    assert rules.labels(PARAMS)["layers_0"]["mlp"] == ["adamw", "muon"]


def test_masked_and_partial_trees_keep_their_structure():
    rules = MatrixRules([("mlp/0$", None), ("embedding$", MatrixSpec())])
    masked = jax.tree.map(lambda x: x if x.ndim > 1 else MASKED, PARAMS)
    assert rules.labels(masked)["layers_0"]["norm"]["scale"] == MASKED
    partial = {"layers_0": {"mlp": PARAMS["layers_0"]["mlp"]}}
    assert rules.dimension_numbers(partial) == {"layers_0": {"mlp": [None, Dims(0, 1)]}}


def test_rule_that_matches_nothing_is_an_error_on_a_full_tree_only():
    rules = MatrixRules([("decoder/kernel$", None)])
    tree = {"layers_0": {"mlp": [jnp.ones((2, 2))]}}
    for ask in (rules.labels, functools.partial(describe_labels, rules=rules)):
        with pytest.raises(ValueError, match=r"'decoder/kernel\$' matches no path.*layers_0/mlp/0"):
            ask(tree)
    rules.dimension_numbers(tree)
    rules.labels({"a": jnp.ones((2, 2)), "b": MASKED})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([("(", None)],), ValueError, "not a regular expression"),
        (([(1, None)],), TypeError, "must be a string"),
        (([("w", (0, 1))],), TypeError, r"pairs .*with a MatrixSpec.*got \('w', \(0, 1\)\)"),
        *(((bad,), TypeError, r"list of pairs \(pattern, spec\)") for bad in ("w$", ["w$"], 1)),
        *(
            (((), bad), TypeError, "scan_axis must be an integer")
            for bad in ("0", True, 1.5, (), [("a",)], [("a", None)], [("a", "b")], [("a", 0), 1])
        ),
    ],
)
def test_construction_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        MatrixRules(*arguments)


def test_what_is_no_rules_or_does_not_fit_is_an_error():
    with pytest.raises(TypeError, match="must be a MatrixRules"):
        as_rules([("w", None)])
    with pytest.raises(ValueError, match="layers_0/attention/query/bias: axis 2"):
        MatrixRules([("query", MatrixSpec((0, (1, 2))))]).labels(PARAMS)


def test_a_rule_that_turns_a_matrix_and_the_axes_of_square_ones_are_shown():
    shapes = {"q_proj": (16, 16), "o_proj": (16, 16), "up": (64, 16), "down": (16, 64)}
    params = {f"blocks/{i}/{n}/weight": jnp.ones(s) for i in "01" for n, s in shapes.items()}
    rules = MatrixRules([("1/(up|q_proj)", MatrixSpec()), ("0/up", MatrixSpec((1, 0)))])
    text = describe_labels(params, rules)
    assert re.findall(r"(\S+).*<- check", text) == ["blocks/1/q_proj/weight", "blocks/1/up/weight"]
    assert re.findall(r"q_proj.* (\d->\d)", text) == ["1->0", "0->1"]
    cures = [eval(x, dict(vars(routing))) for x in re.findall("MatrixRules.*(?= says so)", text)]
    assert [x.rules[0][1] for x in cures] == [MatrixSpec((1, 0))] * 2


def test_the_table_and_the_decay_mask():
    params = {
        "layers": {
            "mlp": {"up_proj": {"kernel": jnp.ones((24, 4, 8))}},
            "attn": {"c_attn": {"kernel": jnp.ones((24, 4, 12))}},
            "norm": {"scale": jnp.ones((24, 4))},
        },
        "mla": {"wkv_b": jnp.ones((4, 2, 5))},
        "embed": jnp.ones((50, 4)),
        "stem": jnp.ones((7, 8, 9)),
    }
    spec = MatrixSpec((0, (1, 2)), Split(2, (3, 2)))
    rules = MatrixRules([("wkv_b$", spec), ("stem", None)])
    assert describe_labels(params, rules).splitlines() == [
        "path                       shape        label  matrices         why",
        "embed                      (50, 4)      adamw                   embedding table",
        "layers/attn/c_attn/kernel  (24, 4, 12)  muon   72 x (4, 4)      fused query, key, value",
        "layers/mlp/up_proj/kernel  (24, 4, 8)   muon   24 x (4, 8)      stacked matrices",
        "layers/norm/scale          (24, 4)      adamw                   gain or scale",
        "mla/wkv_b                  (4, 2, 5)    muon   (4, 6) + (4, 4)  rule 'wkv_b$'",
        "stem                       (7, 8, 9)    adamw                   rule 'stem'",
        "",
        "muon: 3 leaves, 1,960 numbers (71.0 %); adamw: 3 leaves, 800 numbers (29.0 %)",
    ]
    decays = dict.fromkeys(("embed", "stem"), True)
    layers = {"mlp": {"up_proj": {"kernel": True}}, "attn": {"c_attn": {"kernel": True}}}
    expected = {"layers": layers | {"norm": {"scale": False}}, "mla": {"wkv_b": True}, **decays}
    assert decay_mask(params, rules) == expected
    assert "muon: 0 leaves, 0 numbers (0.0 %)" in describe_labels({})
