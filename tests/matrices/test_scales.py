"""Shape factors against hand-computed values and other libraries' formulas."""

import math

import pytest

from muonclip_jax.matrices import SHAPE_RULE_ALIASES, SHAPE_RULES, shape_rule

# (fan_in, fan_out) = (4, 9), (9, 4), (16, 16)
EXPECTED = {
    "width_transfer": (1.5, 1.0, 1.0),
    "sqrt_max_fan": (3.0, 3.0, 4.0),
    "match_rms_adamw": (0.6, 0.6, 0.8),
    "rms_to_rms": (1.5, 2 / 3, 1.0),
    "sqrt_aspect": (1.5, 1.5, 1.0),
    "gad_cell": (1.2, 1.2, 1.6),
}


def test_every_rule_is_checked():
    assert set(EXPECTED) == set(SHAPE_RULES)


@pytest.mark.parametrize("name", EXPECTED)
def test_factors(name: str):
    rule = shape_rule(name)
    got = (rule(4, 9), rule(9, 4), rule(16, 16))
    assert all(math.isclose(x, y, rel_tol=1e-15) for x, y in zip(got, EXPECTED[name], strict=True))


@pytest.mark.parametrize("alias", SHAPE_RULE_ALIASES)
def test_aliases(alias: str):
    assert shape_rule(alias) is SHAPE_RULES[SHAPE_RULE_ALIASES[alias]][0]


def test_the_bare_name_spectral_is_refused_with_what_it_could_mean():
    with pytest.raises(ValueError, match="'spectral' means different factors") as error:
        shape_rule("spectral")
    assert all(name in str(error.value) for name in SHAPE_RULES)
