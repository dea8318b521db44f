"""The generators against the published digits and against what makes a polynomial optimal."""

import jax
import numpy as np
import pytest

from muonclip_jax.newton_schulz import (
    COEFFICIENT_SETS,
    cans_coefficients,
    optimal_odd_polynomial,
    orthogonalize,
    polar_express_coefficients,
    with_safety_factor,
)
from muonclip_jax.newton_schulz.generators import evaluate

# As printed in arXiv 2505.16932; its seventh row carries the rounding of its own exchange.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)


def test_polar_express_digits() -> None:
    rows = polar_express_coefficients(1e-3, 8, safety_factor=1.0)
    np.testing.assert_allclose(rows[:6], POLAR_EXPRESS[:6], rtol=1e-13)
    np.testing.assert_allclose(rows[6], POLAR_EXPRESS[6], rtol=1e-10)
    np.testing.assert_allclose(rows[7], POLAR_EXPRESS[7], rtol=1e-8)


@pytest.mark.parametrize("safety_factor", [1.01, 1.02, 1.05])
def test_safety_factor(safety_factor: float) -> None:
    s = safety_factor
    name = "polar_express" if s == 1.01 else f"polar_express_{s:.2f}"
    expected = [(a / s, b / s**3, c / s**5) for a, b, c in POLAR_EXPRESS[:7]]
    np.testing.assert_allclose(COEFFICIENT_SETS[name].rows[:7], expected, rtol=1e-14)
    assert COEFFICIENT_SETS[name].rows[7] == (1.875, -1.25, 0.375)
    generated = polar_express_coefficients(steps=5, safety_factor=s)
    np.testing.assert_allclose(generated, expected[:5], rtol=1e-13)


def test_cans_digits() -> None:
    np.testing.assert_array_equal(np.round(cans_coefficients(1e-3, 5), 4), CANS)


def test_minimax4_is_generated() -> None:
    rows = polar_express_coefficients(0.003, 4, safety_factor=1.0, cushion=0.0)
    np.testing.assert_allclose(COEFFICIENT_SETS["minimax4"].rows, rows, rtol=1e-13)
    np.testing.assert_allclose(rows, cans_coefficients(0.003, 4), rtol=1e-13)


@pytest.mark.parametrize("degree", [3, 5])
@pytest.mark.parametrize(("lower", "upper"), [(1e-3, 1.0), (0.02, 1.98), (0.5, 1.5), (0.9, 1.1)])
def test_optimal_polynomials_equioscillate(lower: float, upper: float, degree: int) -> None:
    # Chebyshev's criterion: degree // 2 + 2 alternating extremes of equal size.
    row = optimal_odd_polynomial(lower, upper, degree=degree)
    x = np.linspace(lower, upper, 400_001)
    error = evaluate((row,), x) - 1
    largest = np.abs(error).max()
    peaks = error[np.abs(error) > largest * (1 - 1e-6)]
    signs = np.sign(peaks)
    alternations = 1 + np.count_nonzero(signs[1:] != signs[:-1])
    assert alternations == degree // 2 + 2


def test_cubic_error_is_the_closed_form() -> None:
    a, b = 0.1, 1.2
    e = np.sqrt((a * a + a * b + b * b) / 3)
    expected = (2 * e**3 - a * a * b - b * b * a) / (2 * e**3 + a * a * b + b * b * a)
    row = optimal_odd_polynomial(a, b, degree=3)
    error = np.abs(evaluate((row,), np.linspace(a, b, 100_001)) - 1).max()
    np.testing.assert_allclose(error, expected, rtol=1e-8)


def test_composition_brings_the_lower_bound_near_one() -> None:
    for rows in (
        cans_coefficients(1e-2, 6),
        cans_coefficients(1e-2, 12, degree=3),
        polar_express_coefficients(1e-2, 6, safety_factor=1.0),
    ):
        out = evaluate(rows, np.linspace(1e-2, 1, 10_001))
        np.testing.assert_allclose(out, 1, atol=1e-2)


def test_generated_rows_go_into_orthogonalize() -> None:
    x = jax.random.normal(jax.random.key(0), (6, 10))
    y = orthogonalize(x, ns_coeffs=polar_express_coefficients(steps=8))
    np.testing.assert_allclose(y @ y.T, np.eye(6), atol=1e-4)


def test_contracting_rows_keep_out_of_the_safety_factor() -> None:
    assert with_safety_factor(((2.0, -1.5, 0.5),), 1.01) == ((2.0, -1.5, 0.5),)
    assert with_safety_factor(((1.875, -1.25, 0.375),), 1.01) == ((1.875, -1.25, 0.375),)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal_odd_polynomial(0.0, 1.0), r"0 < lower <= upper, got lower=0\.0"),
        (lambda: optimal_odd_polynomial(0.5, 0.4), r"upper=0\.4"),
        (lambda: optimal_odd_polynomial(0.5, 1.0, degree=7), "degree must be 3 or 5, got 7"),
        (lambda: polar_express_coefficients(0.0), r"lower_bound must lie in \(0, 1\], got 0\.0"),
        (lambda: polar_express_coefficients(steps=0), "steps must be .* at least 1, got 0"),
        (lambda: polar_express_coefficients(safety_factor=0.9), "safety_factor .* got 0.9"),
        (lambda: polar_express_coefficients(cushion=1.0), r"cushion must lie in \[0, 1\)"),
        (lambda: cans_coefficients(2.0), "lower_bound"),
        (lambda: cans_coefficients(degree=4), "degree must be 3 or 5, got 4"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
