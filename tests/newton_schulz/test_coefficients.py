"""The named sets against their sources, and the step rule."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.matrices import minimax_rows
from muonclip_jax.newton_schulz.coefficients import (
    ALIASES,
    COEFFICIENT_SETS,
    find_sign_flip,
    resolve_coefficients,
    with_safety_factor,
)

KJ = (3.4445, -4.7750, 2.0315)
CONVERGE = (1.875, -1.25, 0.375)


def rows_of(ns_coeffs, ns_steps=None):
    return resolve_coefficients(ns_coeffs, ns_steps)[0]


def test_tables_are_the_minimax_polynomials_that_they_are_named_after() -> None:
    rows = {name: np.asarray(each.rows) for name, each in COEFFICIENT_SETS.items()}
    np.testing.assert_allclose(rows["minimax4"], minimax_rows(0.003, 4), rtol=1e-13)
    np.testing.assert_array_equal(rows["cans"], np.round(minimax_rows(1e-3, 5), 4))
    # The published seventh row carries the rounding of its own exchange.
    derived = np.asarray(minimax_rows(1e-3, 7, cushion=0.02407327424182761))
    np.testing.assert_allclose(rows["polar_express_1.00"][:6], derived[:6], rtol=1e-13)
    np.testing.assert_allclose(rows["polar_express_1.00"][6], derived[6], rtol=1e-10)
    for name, s in (("", 1.01), ("_1.00", 1.0), ("_1.02", 1.02), ("_1.05", 1.05)):
        found = rows[f"polar_express{name}"]
        expected = rows["polar_express_1.00"][:7] / (s, s**3, s**5)
        np.testing.assert_allclose(found[:7], expected, rtol=1e-14)
        assert tuple(found[7]) == CONVERGE


def test_rows_are_those_of_the_other_libraries() -> None:
    file = Path(__file__).parent.parent / "golden" / "newton_schulz_float64.json"
    golden = json.loads(file.read_text())["sets"]
    for name, coeffs, steps in (
        ("simple(KJ)x5", "keller_jordan", None),
        ("KJx10", "standard", 10),
        ("quintic(You)", "quintic", None),
        ("PE GNS(/1.05) 5", "polar_express_1.05", 5),
        ("CANS 5", "cans", None),
        ("deepseekv4 10", "deepseek_v4", None),
    ):
        np.testing.assert_allclose(rows_of(coeffs, steps), golden[name]["coeffs"], rtol=1e-13)
    assert all(rows_of(alias) == COEFFICIENT_SETS[name].rows for alias, name in ALIASES.items())


def test_no_set_changes_a_direction_after_any_step() -> None:
    for each in COEFFICIENT_SETS.values():
        assert all(find_sign_flip(each.rows[:steps]) is None for steps in range(1, 11))
    rows = ((2.0, -1.5, 0.5), CONVERGE, (3.0, -2.0, 0.0))
    assert with_safety_factor(rows, 2.0) == (*rows[:2], (1.5, -0.25, 0.0))
    assert find_sign_flip(rows) is None
    assert find_sign_flip(((4.0098, -7.0585, 2.4635),)) is not None


def test_step_rule() -> None:
    for coeffs, steps, expected in (
        ("keller_jordan", None, (KJ,) * 5),
        ("keller_jordan", 3, (KJ,) * 3),
        (KJ, None, (KJ,) * 5),
        (KJ, 7, (KJ,) * 7),
        ((KJ, (2, -1.5, 0.5)), None, (KJ, (2.0, -1.5, 0.5))),
        ("minimax4", 6, COEFFICIENT_SETS["minimax4"].rows + (CONVERGE,) * 2),
        ("polar_express", 10, COEFFICIENT_SETS["polar_express"].rows + (CONVERGE,) * 2),
        (np.asarray([[2.0, -1.5, 0.5]] * 2), np.int64(1), ((2.0, -1.5, 0.5),)),
        (jnp.asarray([2.0, -1.5, 0.5]), 2, ((2.0, -1.5, 0.5),) * 2),
    ):
        assert hash(rows_of(coeffs, steps)) == hash(expected)
        assert rows_of(coeffs, steps) == expected


def test_errors() -> None:
    for coeffs, steps, error, message in (
        ("muon2", None, ValueError, "'muon2' is not a coefficient set. Names are 'keller_jordan'"),
        ("you", 6, ValueError, "ns_steps=6 is more than the 5 rows of 'you'.*'minimax4'"),
        ([(2, -1.5, 0.5)] * 2, 3, ValueError, "ns_steps=3 is more than the 2 rows of the given"),
        ("you", 0, ValueError, "ns_steps must be None or an integer of at least 1, got 0"),
        ("you", 2.5, TypeError, "ns_steps must be None or an integer .* got 2.5"),
        ("you", True, TypeError, "got True"),
    ):
        with pytest.raises(error, match=message):
            resolve_coefficients(coeffs, steps)
    nan = float("nan")
    for wrong in (
        (1.0, 2.0),
        [],
        np.empty((0, 3)),
        [(1, 2, 3), (1, 2)],
        (1, nan, 0),
        (1, "b", 0),
        3.0,
    ):
        with pytest.raises(ValueError, match="expected a name, a triple"):
            resolve_coefficients(wrong)


def test_traced_coefficients_say_what_to_do() -> None:
    with pytest.raises(TypeError, match="static_args=\\('ns_steps',\\)"):
        jax.jit(lambda s: len(rows_of("you", s)))(3)
    with pytest.raises(TypeError, match="static_args=\\('ns_coeffs',\\)"):
        jax.jit(lambda a: len(rows_of((a, -1.5, 0.5))))(2.0)
