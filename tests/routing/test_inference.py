"""Names and shapes of known models against what each leaf is."""

import re

import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from muonclip_jax.routing import MatrixRules, MatrixSpec, normalize_spec
from muonclip_jax.routing.inference import infer
from muonclip_jax.routing.leaves import Leaf
from muonclip_jax.routing.table import ROWS
from tests.routing.cases import CASES, UNKNOWN, Case


def infer_leaf(path, shape, scan_axis=0):
    return infer([Leaf(path, shape)], frozenset(), MatrixRules(scan_axis=scan_axis).scan_axis)[path]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path}{case.shape}")
def test_leaf(case: Case):
    decision = infer_leaf(case.path, case.shape, case.scan_axis)
    assert not decision.readings, decision.why
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


@pytest.mark.parametrize("scan_axis", [None, 0])
@pytest.mark.parametrize(("path", "shape"), UNKNOWN)
def test_unknown_leaf_is_an_error_that_shows_a_rule_that_works(path, shape, scan_axis):
    tree = {path: _Shape(shape)}
    with pytest.raises(ValueError, match=re.escape(path)) as error:
        MatrixRules(scan_axis=scan_axis).labels(tree)
    assert str(shape) in str(error.value)
    found = set()
    for rule in re.findall(r"MatrixRules\(\[.*?\)\]\)", str(error.value)):
        rules = eval(rule, {"MatrixRules": MatrixRules, "MatrixSpec": MatrixSpec})
        found |= set(rules.labels(tree).values())
    assert found == {"muon", "adamw"}


def test_error_lists_every_reading():
    with pytest.raises(ValueError, match="cannot be told by name or structure") as error:
        MatrixRules().labels({"decoder": {"foo": {"w": _Shape((8, 2, 4))}}})
    for dims in ("(0, (1, 2))", "((0, 1), 2)", "(1, 2)", "((1, 2), 0)", "(1, (0, 2))"):
        assert f'MatrixRules([("^decoder/foo/w$", MatrixSpec({dims}))])' in str(error.value)


def test_error_names_every_kind_of_leaf_once():
    tree = {f"block_{i}": {"foo": _Shape((2, 3, 4))} for i in range(20)} | {
        "bar": _Shape((2, 3, 4))
    }
    with pytest.raises(ValueError, match="21 leaves") as error:
        MatrixRules().labels(tree)
    assert str(error.value).count("MatrixSpec((0, (1, 2)))") == 2
    assert r'r"^block_\d+/foo$"' in str(error.value)


def test_a_printed_pattern_selects_no_leaf_of_another_shape():
    tree = {"block_0": {"foo": _Shape((2, 3, 4))}, "block_1": {"foo": _Shape((3, 4))}}
    with pytest.raises(ValueError, match="block_0/foo") as error:
        MatrixRules().labels(tree)
    assert '("^block_0/foo$", MatrixSpec((0, (1, 2))))' in str(error.value)


def test_rank_below_two_is_never_muon():
    for shape in [(), (7,)]:
        assert infer_leaf("Dense_0/kernel", shape).spec is None


def test_scan_axis_counts_from_the_end_too():
    decision = infer_leaf("layers/attention/query/kernel", (8, 2, 6, 4), -2)
    assert decision.spec == MatrixSpec(MuonDimensionNumbers((0,), (1, 3)))


def test_scan_axis_does_not_matter_without_stacked_layers():
    assert infer_leaf("Dense_0/kernel", (8, 4), 2) == infer_leaf("Dense_0/kernel", (8, 4))


def test_every_row_of_the_table_is_used():
    """A row that decides none of the cases is dead or untested."""
    whys = {infer_leaf(case.path, case.shape, case.scan_axis).why for case in CASES}
    assert {row.why for row in ROWS} - whys == set()


class _Shape:
    """All that routing may look at."""

    def __init__(self, shape):
        self.shape = shape
        self.ndim = len(shape)
        self.dtype = np.dtype("float32")
