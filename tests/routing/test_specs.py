"""Specs, and trees of them beside parameters: prefix, masked, None, one for all, a function."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

from muonclip_jax._specs import matrix_shapes, simplify_spec
from muonclip_jax.routing import (
    MatrixRules,
    MatrixSpec,
    Split,
    infer_dimension_numbers,
    normalize_spec,
    resolve_muon_specs,
    resolve_specs,
)


def test_a_spec_is_hashable_and_normalised_against_a_shape():
    spec, split = MatrixSpec((0, [1, 2]), [Split(1, [2, 2])]), Split(1, (2, 2))
    assert hash(spec) == hash(MatrixSpec(Dims(0, (1, 2)), (split,)))
    assert MatrixSpec((np.int64(0), 1)) == MatrixSpec()
    assert repr(spec.dims) == "MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))"
    for given, shape, expected in (
        (Dims(-2, -1), (5, 3, 4), MatrixSpec(((1,), (2,)))),
        (Dims([2], [1, 0]), (5, 3, 4), MatrixSpec(((2,), (1, 0)))),
        (MatrixSpec((0, 1), Split(-1, (6, 2))), (3, 8), MatrixSpec(((0,), (1,)), Split(1, (6, 2)))),
    ):
        assert normalize_spec(given, shape) == expected
        assert normalize_spec(simplify_spec(expected), shape) == expected


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (MatrixSpec((0, 2)), (3, 4), "a/w: axis 2 of .* does not exist in shape"),
        (MatrixSpec((0, -2)), (3, 4), "a/w: .*must be .* all different"),
        (MatrixSpec(((), 1)), (3, 4), r"axes \(\) .*must be at least one each"),
        (MatrixSpec((1, 2), (Split(0, (2, 3)),)), (5, 3, 4), "Batch axes are separate"),
        (MatrixSpec((0, 1), (Split(5, (2, 3)),)), (3, 5), "neither a reduction nor an output"),
        (MatrixSpec((0, 1), (Split(1, (2, 3)),)), (3, 4), "covers 5 entries, and axis 1"),
        (MatrixSpec((0, 1), (Split(1, (2, 3)), Split(-1, (1, 4)))), (3, 5), "have the same axis"),
    ],
)
def test_normalize_refuses(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        normalize_spec(spec, shape, "a/w")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MatrixSpec(0), TypeError, r"pair .*got 0.*MatrixSpec\(\(0, \(1, 2\)\)\)"),
        (lambda: MatrixSpec((0, 1.5)), TypeError, r"axes must be integers, got \(1.5,\)"),
        (lambda: MatrixSpec((True, 1)), TypeError, r"axes must be integers, got \(True,\)"),
        (lambda: MatrixSpec((0, 1), ((1, 2),)), TypeError, "must be Splits"),
        (lambda: MatrixSpec((0, 1), (Split(1, (1,)), Split(1, (1,)))), ValueError, "different"),
        (lambda: Split(1, 4), TypeError, "sizes must be integers, got 4"),
        (lambda: Split(1, (3, 0)), ValueError, r"must be positive.*sizes=\(3, 0\)"),
        (lambda: Split(1, (1, 1), along=1), ValueError, "of view=; .*along=1. Write"),
        (lambda: Split(1, (1, 1), (4, 2), 2), ValueError, r"view=\(4, 2\), along=2"),
        (lambda: Split(1, (1, 1), (4, 3), 1), ValueError, r"must .* add up .*view=\(4, 3\)"),
    ],
)
def test_construction_refuses(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (MatrixSpec((1, 2)), (6, 3, 4), ((6, 3, 4),)),
        (MatrixSpec((0, (1, 2)), Split(2, (3, 1))), (8, 2, 4), ((1, 8, 6), (1, 8, 2))),
        (MatrixSpec((0, 1), Split(1, (1, 1, 1), (4, 3, 2), 1)), (5, 24), ((3, 5, 8),)),
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


MASKED = optax.MaskedNode()
ONES = jnp.ones((2, 3))
TWO = {"w1": {"a": ONES, "b": ONES}, "w2": {"a": ONES, "b": ONES}}
ALL = ["w1/a", "w1/b", "w2/a", "w2/b"]
SOME = {"w1": None, "w2": {"a": Dims(), "b": None}}


class Layer(NamedTuple):
    a: Any
    b: Any


def muon_paths(params, specs=None, rules=None):
    return [path for path, _, spec in resolve_specs(params, specs, rules) if spec is not None]


@pytest.mark.parametrize(
    ("params", "specs", "muon"),
    [
        (TWO, SOME, ["w2/a"]),
        (TWO, {"w1": Dims(), "w2": None}, ["w1/a", "w1/b"]),
        (TWO, MatrixSpec(), ALL),
        (TWO, lambda params: {"w1": MatrixSpec(), "w2": None}, ["w1/a", "w1/b"]),
        (TWO, infer_dimension_numbers, ALL),
        # Containers need not agree, and None is no parameter.
        ({"w1": Layer(ONES, ONES)}, {"w1": {"a": MatrixSpec(), "b": None}}, ["w1/a"]),
        ({"w1": {"a": ONES, "b": ONES}}, {"w1": Layer(None, MatrixSpec())}, ["w1/b"]),
        ({"a": ONES, "static": None}, {"a": MatrixSpec(), "static": None}, ["a"]),
        (ONES, MatrixSpec(), [""]),
        ({}, MatrixSpec(), []),
        # Masked parameters leave entries unused, and masked entries belong to masked parameters.
        ({"w1": {"a": ONES, "b": MASKED}, "w2": MASKED}, SOME | {"w1": Dims()}, ["w1/a"]),
        ({"w1": MASKED, "w2": {"a": ONES, "b": MASKED}}, SOME, ["w2/a"]),
        ({"w1": ONES, "w2": MASKED}, {"w1": Dims(), "w2": MASKED}, ["w1"]),
    ],
)
def test_trees_of_specs(params, specs, muon):
    assert muon_paths(params, specs) == muon


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({"w1": MatrixSpec()}, ValueError, r"w2/a of shape \(2, 3\) has no entry.*'w1'"),
        ({"w1": None, "w2": {"a": MASKED, "b": MASKED}}, ValueError, "w2/a .*masked there"),
        ({"w1": None, "w2": None, "w3": None}, ValueError, "'w3' matches no path of the tree"),
        ({"w1": (0, 1), "w2": None}, TypeError, r"0 at 'w1/0'.*Write MatrixSpec\(\(0, 1\)\)"),
        ({"w1": MatrixSpec((0, 2)), "w2": None}, ValueError, "w1/a: axis 2"),
        (MatrixSpec((0, 1), Split(1, (1, 1))), ValueError, "w1/a: .*covers 2 entries"),
    ],
)
def test_trees_of_specs_that_are_refused(specs, error, message):
    with pytest.raises(error, match=message):
        resolve_specs(TWO, specs)


def test_under_muon_a_matrix_needs_no_spec_and_other_ranks_do():
    params = {"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 4))}
    assert muon_paths(params) == ["w"]
    assert muon_paths(params, rules=MatrixRules([("embed", Dims()), ("w", None)])) == ["embed"]
    assert [spec for _, _, spec in resolve_muon_specs(params)] == [MatrixSpec(((0,), (1,)))] * 2
    for leaf, message in (
        (jnp.ones(8), r"a/pos_embed of shape \(8,\) is a rank-1 leaf under Muon"),
        (jnp.ones((2, 9, 4)), r"a/pos_embed of shape \(2, 9, 4\) \(assigned to Muon(?s:.*)\^a/pos"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_muon_specs({"a": {"pos_embed": leaf}})
