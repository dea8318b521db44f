"""The measures of quality on results that are known."""

import math

import numpy as np
import pytest

from benchmarks.matrices import Reference, diverges, over_all, spectra


def test_known_singular_values():
    x = np.random.default_rng(0).normal(size=(2, 6, 9))
    left, _, right = np.linalg.svd(x, full_matrices=False)
    for quality in Reference(x).quality(left @ right):  # the polar factor itself is perfect
        assert quality["largest"] == pytest.approx(1)
        assert quality["rms"] == pytest.approx(0, abs=1e-7)
        assert quality["cosine"] == pytest.approx(1)
    x = np.diag([3.0, 2.0, 1.0])[None]
    quality = Reference(x).quality(np.diag([1.2, 0.9, 0.5])[None])[0]
    assert quality["largest"] == pytest.approx(1.2)
    assert quality["rms"] == pytest.approx(math.sqrt((0.04 + 0.01 + 0.25) / 3))
    assert quality["cosine"] == pytest.approx(2.6 / math.sqrt(3 * (1.44 + 0.81 + 0.25)))
    x = np.diag([1.0, 0.0])[None]  # a direction that the matrix does not have is not asked for
    quality = Reference(x).quality(np.diag([1.0, 0.0])[None])[0]
    assert quality["rms"] == pytest.approx(0, abs=1e-7)


def test_what_is_not_finite_or_too_large_diverges():
    reference = Reference(np.eye(2)[None])
    for bad in (np.full((1, 2, 2), np.nan), 1.7 * np.eye(2)[None]):
        assert diverges(reference.quality(bad)[0])
    good = reference.quality(1.2 * np.eye(2)[None])
    assert not diverges(good[0])
    assert diverges(over_all(good + reference.quality(np.full((1, 2, 2), np.inf))))


def test_spectra_have_the_condition_of_their_name():
    found = spectra(12, 20)
    for power in (3, 4, 5, 6):
        assert np.linalg.cond(found[f"cond 1e{power}"]) == pytest.approx(10.0**power)
    assert np.linalg.matrix_rank(found["rank one"]) == 1
