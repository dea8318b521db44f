"""Names and shapes of known models against what each leaf is."""

import re

import pytest
from optax import MaskedNode
from optax.contrib import MuonDimensionNumbers

from muonclip_jax.routing import MatrixRules, MatrixSpec, normalize_spec
from muonclip_jax.routing.inference import infer_leaf, suggested_rule
from muonclip_jax.routing.table import ROWS
from tests.routing.cases import CASES, UNKNOWN, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path}{case.shape}")
def test_leaf(case: Case):
    decision = infer_leaf(case.path, case.shape, case.scan_axis)
    assert not decision.unknown, decision.why
    if case.dims is None:
        assert decision.spec is None, decision.why
        return
    assert decision.spec is not None, decision.why
    expected = normalize_spec(MatrixSpec(case.dims), case.shape)
    assert decision.spec.dims == expected.dims, decision.why
    if case.parts is None:
        assert decision.spec.splits == ()
    else:
        [split] = decision.spec.splits
        assert split.sizes == case.parts
        assert (split.axis,) == expected.dims.output_axis


@pytest.mark.parametrize("outer", ["params/", "model/", ""])
@pytest.mark.parametrize("case", CASES[::7], ids=lambda case: f"{case.path}{case.shape}")
def test_outer_levels_change_nothing(outer, case: Case):
    path = outer + case.path.removeprefix("params/")
    assert infer_leaf(path.rstrip("/"), case.shape, case.scan_axis) == infer_leaf(
        case.path, case.shape, case.scan_axis
    )


@pytest.mark.parametrize(("path", "shape"), UNKNOWN)
def test_unknown_leaf_is_an_error_that_shows_a_rule_that_works(path, shape):
    tree = {path: _Shape(shape)}
    with pytest.raises(ValueError, match=re.escape(path)) as error:
        MatrixRules().labels(tree)
    assert str(shape) in str(error.value)
    rule = suggested_rule(path, len(shape))
    assert rule in str(error.value)
    rules = eval(rule, {"MatrixRules": MatrixRules, "MatrixSpec": MatrixSpec})
    assert rules.labels(tree) == {path: "muon"}


def test_error_reads_as_in_the_manual():
    with pytest.raises(ValueError, match="cannot be told by name") as error:
        MatrixRules().labels({"decoder": {"foo": {"w": _Shape((8, 2, 4))}}})
    assert 'MatrixRules([("decoder/foo/w$", MatrixSpec((0, (1, 2))))])' in str(error.value)


def test_error_names_every_kind_of_leaf_once():
    tree = {f"block_{i}": {"foo": _Shape((2, 3, 4))} for i in range(20)} | {
        "bar": _Shape((2, 3, 4))
    }
    with pytest.raises(ValueError, match="21 leaves") as error:
        MatrixRules().labels(tree)
    assert str(error.value).count("rules=MatrixRules") == 2
    assert r'r"block_\d+/foo$"' in str(error.value)


def test_rank_below_two_is_never_muon():
    for shape in [(), (7,)]:
        assert infer_leaf("Dense_0/kernel", shape).spec is None


def test_scan_axis_counts_from_the_end_too():
    decision = infer_leaf("layers/attention/query/kernel", (8, 2, 6, 4), -2)
    assert decision.spec == MatrixSpec(MuonDimensionNumbers((0,), (1, 3)))


def test_scan_axis_does_not_matter_without_stacked_layers():
    assert infer_leaf("Dense_0/kernel", (8, 4), 2) == infer_leaf("Dense_0/kernel", (8, 4))


@pytest.mark.parametrize("keep", range(5))
def test_routing_is_local(keep):
    """A part of a tree is routed as it is in the whole, masked or left out."""
    shapes = {case.path: case.shape for case in CASES if case.scan_axis == 0}
    whole = {path: _Shape(shape) for path, shape in shapes.items()}
    part = {path: leaf for i, (path, leaf) in enumerate(whole.items()) if i % 5 == keep}
    masked = {path: leaf if path in part else MaskedNode() for path, leaf in whole.items()}
    rules = MatrixRules([("c_fc", MatrixSpec((1, 0))), ("wpe", None)])
    labels, dims = rules.labels(whole), rules.dimension_numbers(whole)
    assert rules.dimension_numbers(part) == {path: dims[path] for path in part}
    assert rules.labels(masked) == {
        path: labels[path] if path in part else MaskedNode() for path in whole
    }


def test_every_row_of_the_table_is_used():
    """A row that decides none of the cases is dead or untested."""
    whys = {infer_leaf(case.path, case.shape, case.scan_axis).why for case in CASES}
    whys |= {infer_leaf(path, shape).why for path, shape in UNKNOWN}
    assert {row.why for row in ROWS} - whys == set()


class _Shape:
    """All that routing may look at."""

    def __init__(self, shape):
        self.shape = shape
        self.ndim = len(shape)
