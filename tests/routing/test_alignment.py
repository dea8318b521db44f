"""Spec trees beside parameter trees: full, prefix, masked, None, one for all, a function."""

from typing import Any, NamedTuple

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
    resolve_muon_specs,
    resolve_specs,
)

DIM = MuonDimensionNumbers((1,), (2,))
TWO = {
    "w1": {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))},
    "w2": {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))},
}


def _given(params, specs, rules=None):
    return {path: spec is not None for path, _, spec in resolve_specs(params, specs, rules)}


@pytest.mark.parametrize(
    ("params", "specs", "muon"),
    [
        # The combinations that Optax's own Muon accepts.
        ({"w1": jnp.ones((1, 2, 3)), "w2": jnp.ones((2, 3, 4))}, {"w1": DIM, "w2": DIM}, "11"),
        ({"w1": jnp.ones((1, 2, 3)), "w2": jnp.ones((2, 3, 4))}, {"w1": None, "w2": DIM}, "01"),
        (TWO, {"w1": None, "w2": {"a": MuonDimensionNumbers(), "b": None}}, "0010"),
        (TWO, {"w1": MuonDimensionNumbers(), "w2": None}, "1100"),
        (TWO, MuonDimensionNumbers(), "1111"),
        (TWO, MatrixSpec(), "1111"),
        (TWO, lambda params: jax.tree.map(lambda _: MatrixSpec(), params), "1111"),
        (TWO, lambda params: {"w1": MatrixSpec(), "w2": None}, "1100"),
        (TWO, lambda params: None, "1111"),
        (TWO, infer_dimension_numbers, "1111"),
    ],
)
def test_combinations(params, specs, muon):
    assert list(_given(params, specs).values()) == [bit == "1" for bit in muon]


def test_optax_agrees_on_prefix_trees():
    """The masks of `optax.contrib.muon` are the oracle."""
    specs = {"w1": None, "w2": {"a": MuonDimensionNumbers(), "b": None}}
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=specs)
    state = optax.tree.get(tx.init(TWO), "mu", filtering=lambda path, _: "muon" in str(path))
    masked = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    expected = [not isinstance(x, optax.MaskedNode) for x in masked]
    assert list(_given(TWO, specs).values()) == expected


def test_order_is_that_of_the_parameters_and_leaves_come_along():
    params = {"b": jnp.ones((2, 3)), "a": [jnp.ones((3, 4)), jnp.ones(5)]}
    resolved = resolve_specs(params, {"a": [MatrixSpec((1, 0)), None], "b": MatrixSpec()})
    assert [path for path, _, _ in resolved] == ["a/0", "a/1", "b"]
    for (_, leaf, _), expected in zip(resolved, jax.tree.leaves(params), strict=True):
        assert leaf is expected
    assert resolved[0][2] == MatrixSpec(((1,), (0,)))


def test_containers_need_not_agree():
    class Layer(NamedTuple):
        a: Any
        b: Any

    params = {"w1": Layer(jnp.ones((2, 3)), jnp.ones((2, 3)))}
    assert _given(params, {"w1": {"a": MatrixSpec(), "b": None}}) == {"w1/a": True, "w1/b": False}
    assert _given(params, {"w1": Layer(None, MatrixSpec())}) == {"w1/a": False, "w1/b": True}


def test_masked_parameters_leave_entries_unused():
    specs = {"w1": MuonDimensionNumbers(), "w2": {"a": MuonDimensionNumbers(), "b": None}}
    masked = {
        "w1": {"a": TWO["w1"]["a"], "b": optax.MaskedNode()},
        "w2": {"a": optax.MaskedNode(), "b": optax.MaskedNode()},
    }
    assert _given(masked, specs) == {"w1/a": True}
    assert _given({"w1": TWO["w1"], "w2": optax.MaskedNode()}, specs) == {
        "w1/a": True,
        "w1/b": True,
    }
    assert _given(
        {"w1": optax.MaskedNode(), "w2": {"a": optax.MaskedNode(), "b": TWO["w1"]["a"]}}, specs
    )


def test_masked_specs_for_masked_parameters():
    masked = {"w1": TWO["w1"], "w2": {"a": optax.MaskedNode(), "b": optax.MaskedNode()}}
    specs = {"w1": MatrixSpec(), "w2": {"a": optax.MaskedNode(), "b": optax.MaskedNode()}}
    assert _given(masked, specs) == {"w1/a": True, "w1/b": True}
    assert _given(masked, infer_dimension_numbers) == {"w1/a": True, "w1/b": True}
    with pytest.raises(ValueError, match=r"w2/a of shape \(2, 3\) has no entry.*masked there"):
        resolve_specs(TWO, specs)


def test_none_parameters_and_none_entries():
    params = {"a": jnp.ones((2, 3)), "static": None}
    assert _given(params, {"a": MatrixSpec(), "static": None}) == {"a": True}


def test_single_array():
    assert resolve_specs(jnp.ones((2, 3)), MatrixSpec())[0][0] == ""
    assert resolve_muon_specs(jnp.ones((2, 3)))[0][2] == MatrixSpec(((0,), (1,)))
    assert resolve_specs({}, {}) == []


def test_rules_decide_where_nothing_is_given():
    params = {"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 4))}
    assert _given(params, None) == {"embed": False, "w": True}
    rules = MatrixRules([("embed", MatrixSpec()), ("w", None)])
    assert _given(params, None, rules) == {"embed": True, "w": False}


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({"w1": MatrixSpec()}, ValueError, r"w2/a of shape \(2, 3\) has no entry.*'w1'"),
        ({"w1": None, "w2": None, "w3": None}, ValueError, "'w3' matches no path of the tree"),
        ({"w1": (0, 1), "w2": None}, TypeError, r"0 at 'w1/0'.*Write MatrixSpec\(\(0, 1\)\)"),
        ({"w1": "muon", "w2": None}, TypeError, "'muon' at 'w1'"),
        ({"w1": MatrixSpec((0, 2)), "w2": None}, ValueError, "w1/a: output axis 2"),
        (MatrixSpec((0, 1), Split(1, (1, 1))), ValueError, "w1/a: .*covers 2 entries"),
    ],
)
def test_refuses(specs, error, message):
    with pytest.raises(error, match=message):
        resolve_specs(TWO, specs)


def test_under_muon_a_matrix_needs_no_spec():
    resolved = resolve_muon_specs({"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 4))})
    assert [spec for _, _, spec in resolved] == [MatrixSpec(((0,), (1,)))] * 2


def test_under_muon_a_vector_is_an_error():
    with pytest.raises(ValueError, match=r"norm/scale of shape \(8,\) is a rank-1 leaf under Muon"):
        resolve_muon_specs({"norm": {"scale": jnp.ones(8)}})
    with pytest.raises(ValueError, match="rank-0 leaf under Muon"):
        resolve_muon_specs({"temperature": jnp.ones(())})


def test_under_muon_more_axes_need_a_spec():
    with pytest.raises(ValueError, match=r"embed/embedding of shape \(2, 9, 4\) reached Muon") as e:
        resolve_muon_specs({"embed": {"embedding": jnp.ones((2, 9, 4))}})
    assert 'MatrixRules([("^embed/embedding$", MatrixSpec((0, (1, 2))))])' in str(e.value)
    resolve_muon_specs(
        {"embed": {"embedding": jnp.ones((2, 9, 4))}},
        rules=MatrixRules([("embed/embedding$", MatrixSpec((0, (1, 2))))]),
    )


def test_inside_multi_transform_every_branch_sees_its_leaves():
    params = {"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 4)), "norm": jnp.ones(4)}
    seen = []

    def look(updates, state, params=None):
        seen.append([path for path, _, _ in resolve_muon_specs(updates)])
        return updates, state

    tx = optax.multi_transform(
        {
            "muon": optax.GradientTransformation(lambda params: optax.EmptyState(), look),
            "adamw": optax.identity(),
        },
        lambda p: MatrixRules().labels(p),
    )
    tx.update(params, tx.init(params), params)
    assert seen == [["w"]]
