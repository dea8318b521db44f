"""The named sets and the step rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.newton_schulz import ALIASES, COEFFICIENT_SETS, plan_polar
from muonclip_jax.newton_schulz.coefficients import changes_direction, resolve_coefficients
from muonclip_jax.newton_schulz.generators import evaluate


def rows_of(ns_coeffs, ns_steps=None):
    return resolve_coefficients(ns_coeffs, ns_steps)[0]


def test_bands_on_the_scalar_map() -> None:
    # Lowest and highest value over [.01, 1], to the digits of the sources.
    bands = {
        "keller_jordan": (None, 0.682, 1.134),
        "you": (None, 0.978, 1.032),
        "polar_express_1.05": (5, 0.846, 1.124),
        "polar_express": (5, 0.870, 1.124),
        "cans": (None, 0.884, 1.120),
        "deepseek_v4": (None, 1.0000, 1.0005),
    }
    x = np.linspace(0.01, 1, 200_001)
    for name, (steps, low, high) in bands.items():
        out = evaluate(rows_of(name, steps), x)
        # The bands are rounded to three digits, the last one to four.
        tolerance = 6e-5 if name == "deepseek_v4" else 6e-4
        assert out.min() == pytest.approx(low, abs=tolerance), name
        assert out.max() == pytest.approx(high, abs=tolerance), name


def test_slopes_at_zero() -> None:
    slopes = {"keller_jordan": 485, "you": 493, "cans": 1049, "deepseek_v4": 79263}
    for name, slope in slopes.items():
        assert np.prod([row[0] for row in rows_of(name)]) == pytest.approx(slope, abs=0.5), name


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_no_set_turns_a_singular_value_negative(name: str) -> None:
    rows = COEFFICIENT_SETS[name].rows
    for steps in range(1, len(rows) + 1):
        assert changes_direction(rows[:steps]) is None


def test_step_rule() -> None:
    kj = (3.4445, -4.7750, 2.0315)
    assert rows_of("keller_jordan") == (kj,) * 5
    assert rows_of("keller_jordan", 3) == (kj,) * 3
    assert rows_of("keller_jordan", 10) == (kj,) * 10
    assert rows_of(kj) == (kj,) * 5
    assert rows_of(kj, 7) == (kj,) * 7
    assert rows_of((kj, (2, -1.5, 0.5))) == (kj, (2.0, -1.5, 0.5))
    assert rows_of((kj, (2, -1.5, 0.5)), 1) == (kj,)
    assert len(rows_of("polar_express")) == 8
    assert rows_of("polar_express", 10)[7:] == ((1.875, -1.25, 0.375),) * 3
    assert rows_of("you", 4) == COEFFICIENT_SETS["you"].rows[:4]


def test_aliases() -> None:
    for alias, name in ALIASES.items():
        assert rows_of(alias) == COEFFICIENT_SETS[name].rows
    assert rows_of("standard", 10) == rows_of("keller_jordan", 10)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, list])
def test_arrays_are_numbers_too(convert) -> None:
    rows = rows_of(convert([[2.0, -1.5, 0.5]] * 2), np.int64(2))
    assert rows == ((2.0, -1.5, 0.5),) * 2
    hash(plan_polar(convert([2.0, -1.5, 0.5])))


@pytest.mark.parametrize(
    ("coeffs", "steps", "error", "message"),
    [
        ("muon2", None, ValueError, "'muon2' is no coefficient set. Names are 'keller_jordan'"),
        ("you", 6, ValueError, "ns_steps=6 is more than the 5 rows of 'you'"),
        ([(2, -1.5, 0.5)] * 2, 3, ValueError, "ns_steps=3 is more than the 2 rows of the given"),
        ("you", 0, ValueError, "ns_steps must be None or at least 1, got 0"),
        ("you", 2.5, TypeError, "ns_steps must be None or an integer .* got 2.5"),
        ("you", True, TypeError, "got True"),
        ((1.0, 2.0), None, ValueError, r"ns_coeffs has shape \(2,\); expected a name, a triple"),
        ([], None, ValueError, "ns_coeffs has shape"),
        ([(1, 2, 3), (1, 2)], None, ValueError, "expected a name, a triple"),
        ((1.0, float("nan"), 0.0), None, ValueError, "NaN or infinity"),
        ((1.0, "b", 0.0), None, ValueError, "expected a name, a triple"),
        (3.0, None, TypeError, "ns_coeffs=3.0: expected a name"),
        (None, None, TypeError, "ns_coeffs=None: expected a name"),
    ],
)
def test_errors(coeffs, steps, error, message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_coefficients(coeffs, steps)


def test_traced_coefficients_say_what_to_do() -> None:
    with pytest.raises(TypeError, match="static_args=\\('ns_steps',\\)"):
        jax.jit(lambda s: len(rows_of("you", s)))(3)
    with pytest.raises(TypeError, match="static_args=\\('ns_coeffs',\\)"):
        jax.jit(lambda a: len(rows_of((a, -1.5, 0.5))))(2.0)
