"""The pairs of pattern and spec that `MatrixRules` is given, checked."""

from collections.abc import Iterable
from typing import Any

from muonclip_jax._specs import MatrixSpec, SpecLike, is_spec
from muonclip_jax._tree import compile_pattern


def rule_pairs(rules: Any) -> Iterable[Any]:
    """Returns the rules one by one, from a dict too.

    Raises:
        TypeError: If they are no collection.

    Example:
        >>> rule_pairs({"w$": None})
        (('w$', None),)
    """
    if isinstance(rules, dict):
        return tuple(rules.items())
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise TypeError(
            f"rules must be a list of (pattern, spec) pairs, got {rules!r}. Write, for example, "
            'MatrixRules([("foo/w$", MatrixSpec((0, 1)))]).'
        )
    return tuple(rules)


def check_rule(rule: Any) -> tuple[str, SpecLike | None]:
    """Returns a rule in a form that can be hashed.

    Raises:
        TypeError: If it is no pair of a pattern and a spec or None.
        ValueError: If the pattern is no regular expression.

    Example:
        >>> from optax.contrib import MuonDimensionNumbers
        >>> check_rule(["w$", MuonDimensionNumbers(0, [1, 2])])
        ('w$', MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2)))
    """
    if not isinstance(rule, tuple | list) or len(rule) != 2:
        raise TypeError(
            f"A rule must be a pair (pattern, spec), got {rule!r}. Write, for example, "
            '("foo/w$", MatrixSpec((0, 1))), or ("foo/w$", None) for AdamW.'
        )
    pattern, spec = rule
    if not isinstance(pattern, str):
        raise TypeError(
            f"A rule's pattern must be a string such as 'query/kernel$', got {pattern!r}."
        )
    compile_pattern(pattern)
    if spec is not None and not is_spec(spec):
        raise TypeError(
            f"The rule for {pattern!r} must give a MatrixSpec, MuonDimensionNumbers or None, got "
            f"{spec!r}. Write, for example, MatrixSpec((0, 1))."
        )
    # Optax allows lists of axes, which cannot be hashed.
    return pattern, spec if spec is None or isinstance(spec, MatrixSpec) else MatrixSpec(spec).dims
