"""Factors by the shape of a matrix, under the names of what they do.

An orthogonal `(fan_in, fan_out)` matrix has RMS `sqrt(1 / max(fan_in, fan_out))` (Liu et al. 2025,
Lemma 1) and spectral norm 1. Every rule in use multiplies it by a function of the two fans. One
word, "spectral", is the name of three different functions in three libraries, so no rule here is
called that.
"""

import math
from collections.abc import Callable

#: name -> (the factor of an orthogonal (fan_in, fan_out) matrix, formula and who uses it)
SHAPE_RULES: dict[str, tuple[Callable[[int, int], float], str]] = {
    "width_transfer": (
        lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),
        "sqrt(max(1, fan_out / fan_in)): Keller Jordan; Optax's default; torch 'original'",
    ),
    "sqrt_max_fan": (
        lambda fan_in, fan_out: math.sqrt(max(fan_in, fan_out)),
        "sqrt(max(fan_in, fan_out)): unit RMS; Emerging-Optimizers and Megatron 'spectral'",
    ),
    "match_rms_adamw": (
        lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
        "0.2 sqrt(max(fan_in, fan_out)): Moonlight and Kimi K2; consistent_rms=0.2",
    ),
    "rms_to_rms": (
        lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),
        "sqrt(fan_out / fan_in): unit RMS-to-RMS operator norm; Scion; dion 'spectral_norm'",
    ),
    "sqrt_aspect": (
        lambda fan_in, fan_out: math.sqrt(max(fan_in, fan_out) / min(fan_in, fan_out)),
        "sqrt(max(fan_in, fan_out) / min(fan_in, fan_out))",
    ),
    "gad_cell": (
        lambda fan_in, fan_out: 0.4 * math.sqrt(max(fan_in, fan_out)),
        "0.4 sqrt(max(fan_in, fan_out)): GAD-cell/muon-clip; consistent_rms=0.4",
    ),
}

#: Names that other libraries use for the same functions.
SHAPE_RULE_ALIASES = {
    "original": "width_transfer",
    "shape_scaling": "width_transfer",
    "unit_rms_norm": "rms_to_rms",
}


def shape_rule(name: str) -> Callable[[int, int], float]:
    """Returns the factor `(fan_in, fan_out) -> float` of a rule.

    Raises:
        ValueError: If there is no rule of that name.

    Example:
        >>> shape_rule("width_transfer")(256, 1024)
        2.0
    """
    rule = SHAPE_RULES.get(SHAPE_RULE_ALIASES.get(name, name))
    if rule is None:
        listing = "; ".join(f"{key!r} is {text}" for key, (_, text) in SHAPE_RULES.items())
        hint = (
            " The bare name 'spectral' means different factors in different libraries."
            if name == "spectral"
            else ""
        )
        raise ValueError(
            f"Unknown shape rule {name!r}.{hint} Write one of: {listing}. "
            f"Aliases: {SHAPE_RULE_ALIASES}."
        )
    return rule[0]
