"""MatrixRules: order, locality, staticness, errors, and the two functions around them."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from muonclip_jax.routing import (
    MatrixRules,
    MatrixSpec,
    Split,
    infer_dimension_numbers,
    label_params,
)
from muonclip_jax.routing.rules import as_rules

DIMS = MuonDimensionNumbers


def _params():
    return {
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
    params = _params()
    labels = label_params(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert labels["layers_0"]["attention"] == {
        "query": {"kernel": "muon", "bias": "adamw"},
        "out": {"kernel": "muon", "bias": "adamw"},
    }
    assert labels["layers_0"]["mlp"] == ["muon", "muon"]
    assert labels["embed"] == {"embedding": "adamw"}
    dims = infer_dimension_numbers(params)
    assert dims["layers_0"]["attention"]["query"] == {"kernel": DIMS(0, (1, 2)), "bias": None}
    assert dims["layers_0"]["attention"]["out"]["kernel"] == DIMS((0, 1), 2)
    assert dims["layers_0"]["mlp"] == [DIMS(0, 1), DIMS(0, 1)]
    assert dims["lm_head"]["kernel"] is None


def test_user_rules_come_first_and_the_first_match_wins():
    rules = MatrixRules(
        [
            ("embedding$", MatrixSpec()),
            ("mlp/0$", None),
            ("mlp", DIMS(-1, -2)),
            ("query/kernel$", MatrixSpec((0, (1, 2)), Split(2, (3, 1)))),
        ]
    )
    dims = rules.dimension_numbers(_params())
    assert dims["embed"]["embedding"] == DIMS(0, 1)
    assert dims["layers_0"]["mlp"] == [None, DIMS(1, 0)]
    assert dims["layers_0"]["attention"]["query"]["kernel"] == MatrixSpec(
        (0, (1, 2)), Split(2, (3, 1))
    )
    assert rules.labels(_params())["layers_0"]["mlp"] == ["adamw", "muon"]


def test_equal_rules_are_equal_hashable_and_static():
    a = MatrixRules([["w$", DIMS(0, [1, 2])]], scan_axis=1)
    b = MatrixRules((("w$", DIMS(0, (1, 2))),), scan_axis=1)
    assert a == b
    assert hash(a) == hash(b)
    traces = []

    @functools.partial(jax.jit, static_argnames="rules")
    def count(params, rules):
        traces.append(1)
        labels = jax.tree.leaves(rules.labels(params))
        return jax.tree.map(lambda x: x * len(labels), params)

    count({"w": jnp.ones((2, 3, 4))}, rules=a)
    count({"w": jnp.ones((2, 3, 4))}, rules=b)
    assert len(traces) == 1


def test_partial_and_masked_trees_route_as_the_full_one():
    params = _params()
    rules = MatrixRules([("mlp/0$", None), ("embedding$", MatrixSpec())])
    full = {path: spec for path, _, spec in rules.decisions(params)}

    masked = jax.tree.map(lambda x: x if x.ndim > 1 else optax.MaskedNode(), params)
    assert all(full[path] == spec for path, _, spec in rules.decisions(masked))
    labels = rules.labels(masked)
    assert jax.tree.structure(labels) == jax.tree.structure(masked)
    assert labels["layers_0"]["norm"]["scale"] == optax.MaskedNode()

    partial = {"layers_0": {"mlp": params["layers_0"]["mlp"]}}
    assert all(full[path] == spec for path, _, spec in rules.decisions(partial))
    assert rules.dimension_numbers(partial) == {"layers_0": {"mlp": [None, DIMS(0, 1)]}}


def test_rule_that_matches_nothing_is_an_error_on_a_full_tree_only():
    rules = MatrixRules([("decoder/kernel$", None)])
    with pytest.raises(ValueError, match=r"'decoder/kernel\$' matches no path.*layers_0/mlp/0"):
        rules.labels({"layers_0": {"mlp": [jnp.ones((2, 2))]}})
    rules.dimension_numbers({"layers_0": {"mlp": [jnp.ones((2, 2))]}})
    rules.labels({"a": jnp.ones((2, 2)), "b": optax.MaskedNode()})


def test_map_params_calls_init_with_an_empty_tree():
    params = _params()
    rules = MatrixRules([("mlp/0$", None)])
    tx = optax.multi_transform({"muon": optax.trace(0.9), "adamw": optax.adam(0.1)}, rules.labels)
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


def test_works_as_multi_transform_labels():
    params = _params()
    tx = optax.multi_transform(
        {"muon": optax.scale(-1.0), "adamw": optax.set_to_zero()}, label_params
    )
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert float(updates["lm_head"]["kernel"].sum()) == 0
    assert float(updates["layers_0"]["mlp"][0].sum()) == -8 * 16


def test_optax_muon_takes_the_inferred_dimension_numbers():
    params = _params()
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=infer_dimension_numbers)
    updates = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p)[0], params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_shape_structs_tracers_and_empty_trees():
    shapes = jax.eval_shape(_params)
    assert label_params(shapes) == label_params(_params())
    seen = []
    jax.eval_shape(lambda p: seen.append(label_params(p)) or p, shapes)
    assert seen == [label_params(shapes)]
    assert label_params({}) == {}
    assert infer_dimension_numbers({"a": {}}) == {"a": {}}
    assert label_params(jnp.ones((2, 3))) == "muon"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([("(", None)],), ValueError, "no regular expression"),
        (([(1, None)],), TypeError, "must be a string"),
        (([("w", (0, 1))],), TypeError, r"'w' must give a MatrixSpec.*got \(0, 1\)"),
        (("w$",), TypeError, "list of .pattern, spec. pairs"),
        ((["w$"],), TypeError, "pair .pattern, spec."),
        (((), "0"), TypeError, "scan_axis must be an integer"),
    ],
)
def test_construction_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        MatrixRules(*arguments)


def test_rules_are_matrix_rules():
    with pytest.raises(TypeError, match="must be a MatrixRules"):
        as_rules([("w", None)])


def test_spec_that_does_not_fit_names_the_leaf():
    with pytest.raises(ValueError, match="layers_0/attention/query/bias: output axis 2"):
        MatrixRules([("query", MatrixSpec((0, (1, 2))))]).labels(_params())
