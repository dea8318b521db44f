"""Specs: what they accept, how they are normalised, what they refuse."""

import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._specs import is_spec, matrix_shapes, simplify_spec
from muonclip_jax.routing import MatrixSpec, Split, normalize_spec


def test_spec_accepts_pairs_and_is_hashable():
    spec = MatrixSpec((0, [1, 2]), [Split(1, [2, 2])])
    assert spec == MatrixSpec(MuonDimensionNumbers(0, (1, 2)), (Split(1, (2, 2)),))
    assert hash(spec) == hash(MatrixSpec(MuonDimensionNumbers(0, (1, 2)), (Split(1, (2, 2)),)))
    assert MatrixSpec((np.int64(0), 1)) == MatrixSpec()
    assert repr(spec.dims) == "MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))"


def test_default_is_optax_default():
    assert MatrixSpec().dims == MuonDimensionNumbers()


@pytest.mark.parametrize(
    ("dims", "shape", "expected"),
    [
        (MuonDimensionNumbers(), (3, 4), ((0,), (1,))),
        (MuonDimensionNumbers(-2, -1), (5, 3, 4), ((1,), (2,))),
        (MuonDimensionNumbers((0, 1), 2), (5, 3, 4), ((0, 1), (2,))),
        (MuonDimensionNumbers([2], [1, 0]), (5, 3, 4), ((2,), (1, 0))),
    ],
)
def test_normalize(dims, shape, expected):
    normalized = normalize_spec(dims, shape)
    assert normalized == MatrixSpec(expected)
    assert normalize_spec(normalized, shape) == normalized
    assert normalize_spec(simplify_spec(normalized), shape) == normalized


def test_normalize_split_axis():
    spec = normalize_spec(MatrixSpec((0, 1), (Split(-1, (4, 2, 2)),)), (3, 8))
    assert spec.splits == (Split(1, (4, 2, 2)),)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (MatrixSpec((0, 2)), (3, 4), "a/w: output axis 2 does not exist in shape"),
        (MatrixSpec((-3, 1)), (3, 4), "a/w: reduction axis -3 does not exist"),
        (MatrixSpec((0, -2)), (3, 4), "a/w: .*must all be different"),
        (MatrixSpec(((0, 0), 1)), (3, 4), "must all be different"),
        (MatrixSpec(((), 1)), (3, 4), "names no reduction axis"),
        (MatrixSpec((0, 1)), (4,), "does not exist in shape"),
        (MatrixSpec((1, 2), (Split(0, (2, 3)),)), (5, 3, 4), "Batch axes are separate"),
        (MatrixSpec((0, 1), (Split(5, (2, 3)),)), (3, 5), "neither a reduction nor an output"),
        (MatrixSpec((0, 1), (Split(1, (2, 3)),)), (3, 4), "covers 5 entries, and axis 1"),
        (MatrixSpec((0, 1), (Split(1, (2, 3)), Split(-1, (1, 4)))), (3, 5), "cut the same axis"),
    ],
)
def test_normalize_refuses(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        normalize_spec(spec, shape, "a/w")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MatrixSpec(0), TypeError, r"pair .*got 0.*MatrixSpec\(\(0, \(1, 2\)\)\)"),
        (lambda: MatrixSpec((0, 1, 2)), TypeError, "pair"),
        (lambda: MatrixSpec((0, 1.5)), TypeError, "must be an integer, got 1.5"),
        (lambda: MatrixSpec((True, 1)), TypeError, "must be an integer, got True"),
        (lambda: MatrixSpec((0, "12")), TypeError, "must be an integer"),
        (lambda: MatrixSpec((0, 1), ((1, 2),)), TypeError, "must be Splits"),
        (lambda: MatrixSpec((0, 1), (Split(1, (1,)), Split(1, (1,)))), ValueError, "different"),
        (lambda: Split(1, 4), TypeError, "must be a tuple of integers, got 4"),
        (lambda: Split(1, ()), ValueError, "must be positive"),
        (lambda: Split(1, (3, 0)), ValueError, "must be positive"),
        (lambda: Split(1, (1, 1), along=1), ValueError, "there is no view"),
        (lambda: Split(1, (1, 1), (4, 2), 2), ValueError, "no dimension of view"),
        (lambda: Split(1, (1, 1), (4, 3), 1), ValueError, "add up to 2.*has 3"),
    ],
)
def test_construction_refuses(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_split_parts():
    assert Split(1, (768, 256, 256)).part_lengths == (768, 256, 256)
    by_head = Split(1, (1, 1, 1), view=(12, 3, 64), along=1)
    assert by_head.length == 12 * 3 * 64
    assert by_head.part_lengths == (768, 768, 768)


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (MatrixSpec(), (3, 4), ((1, 3, 4),)),
        (MatrixSpec((1, 2)), (6, 3, 4), ((6, 3, 4),)),
        (MatrixSpec((0, (1, 2))), (8, 2, 4), ((1, 8, 8),)),
        (MatrixSpec((0, (2, 3))), (8, 6, 2, 4), ((6, 8, 8),)),
        (MatrixSpec((0, (1, 2)), Split(2, (3, 1))), (8, 2, 4), ((1, 8, 6), (1, 8, 2))),
        (MatrixSpec((1, 2), Split(2, (2, 2))), (6, 3, 4), ((12, 3, 2),)),
        (
            MatrixSpec((0, 1), (Split(0, (1, 2)), Split(1, (3, 1)))),
            (3, 4),
            ((1, 1, 3), (1, 1, 1), (1, 2, 3), (1, 2, 1)),
        ),
    ],
)
def test_matrix_shapes(spec, shape, expected):
    assert matrix_shapes(spec, shape) == expected
    assert sum(count * m * n for count, m, n in expected) == np.prod(shape)


def test_is_spec():
    assert is_spec(MatrixSpec())
    assert is_spec(MuonDimensionNumbers())
    assert not any(is_spec(x) for x in [None, (0, 1), "muon", {"w": MatrixSpec()}])
