"""The error for leaves that nothing decides: every reading that fits, as a rule to paste."""

import re
from collections.abc import Mapping, Sequence

from muonclip_jax._specs import MatrixSpec, simplify_spec
from muonclip_jax.routing.inference import Decision
from muonclip_jax.routing.layouts import to_spec
from muonclip_jax.routing.leaves import Leaf

_LEAVES_SHOWN = 8


def unknown_leaves(leaves: Sequence[Leaf], decisions: Mapping[str, Decision]) -> ValueError:
    """Builds the error for the leaves that are open.

    Args:
        leaves: All leaves of the tree.
        decisions: The decision for each.
    """
    groups: dict[tuple[str, tuple[int, ...], tuple[str, ...]], list[Leaf]] = {}
    for leaf in leaves:
        decision = decisions[leaf.path]
        if decision.unknown:
            key = (_generalised(leaf.path), leaf.shape, decision.readings)
            groups.setdefault(key, []).append(leaf)
    count = sum(map(len, groups.values()))
    lines = []
    for (_, _, readings), group in list(groups.items())[:_LEAVES_SHOWN]:
        first = group[0]
        pattern = pattern_for(group, leaves)
        lines.append(f"  {first.path} of shape {first.shape} ({decisions[first.path].why}), one of")
        for letters in readings:
            lines.append(f"    rules={write_rule(pattern, letters)}  # {_meaning(letters, first)}")
        lines.append(f"    rules={write_rule(pattern, None)}  # AdamW trains it")
    stacked = any("stacked layers" in decisions[leaf.path].why for leaf in leaves)
    return ValueError(
        f"{count} {'leaf' if count == 1 else 'leaves'} of rank three or more cannot be told by "
        "name or structure, so it is open which axes form matrices. Say it by rules:\n"
        + "\n".join(lines)
        + (f"\n  and {len(groups) - _LEAVES_SHOWN} more" if len(groups) > _LEAVES_SHOWN else "")
        + "\nThe pair is (reduction axes, output axes), all others are batch axes."
        + (
            " Where layers are stacked on one axis, MatrixRules(scan_axis=0), or "
            "MatrixRules(scan_axis=[(pattern, axis)]), says which it is."
            if stacked
            else ""
        )
    )


def pattern_for(group: Sequence[Leaf], leaves: Sequence[Leaf]) -> str:
    r"""A pattern that matches the leaves of a group and no other leaf.

    Example:
        >>> a, b = Leaf("h/0/w", (2, 3, 4)), Leaf("h/1/w", (2, 3, 4))
        >>> pattern_for([a, b], [a, b, Leaf("h/0/b", (4,))])
        '^h/\\d+/w$'
    """
    pattern = f"^{_generalised(group[0].path)}$"
    matched = {leaf.path for leaf in leaves if re.search(pattern, leaf.path)}
    if matched == {leaf.path for leaf in group}:
        return pattern
    paths = [re.escape(leaf.path).replace(r"\-", "-") for leaf in group]
    return f"^({'|'.join(paths)})$" if len(paths) > 1 else f"^{paths[0]}$"


def write_rule(pattern: str, letters: str | None) -> str:
    """A rule to paste: a layout, or None for AdamW.

    Example:
        >>> write_rule("^decoder/foo/w$", "ioo")
        'MatrixRules([("^decoder/foo/w$", MatrixSpec((0, (1, 2))))])'
    """
    if letters is None:
        return f"MatrixRules([({_quoted(pattern)}, None)])"
    dims = simplify_spec(MatrixSpec(to_spec(letters, ()).dims))
    assert not isinstance(dims, MatrixSpec)
    return f"MatrixRules([({_quoted(pattern)}, MatrixSpec(({dims[0]}, {dims[1]})))])"


def _quoted(pattern: str) -> str:
    return ("r" if "\\" in pattern else "") + f'"{pattern}"'


def _generalised(path: str) -> str:
    return re.sub(r"(?<![A-Za-z\d])\d+", lambda _: r"\d+", re.escape(path).replace(r"\-", "-"))


def _meaning(letters: str, leaf: Leaf) -> str:
    """What a reading makes of the leaf: matrices from inputs to outputs."""

    def side(letter: str) -> str:
        lengths = [str(n) for n, of in zip(leaf.shape, letters, strict=True) if of == letter]
        return " x ".join(lengths)

    count = side("b")
    return f"{count + ' matrices ' if count else ''}{side('i')} -> {side('o')}"
