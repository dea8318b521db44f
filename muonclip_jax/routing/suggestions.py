"""The error for unknown leaves: every possible layout, as a rule to paste."""

import re
from collections.abc import Mapping, Sequence

from muonclip_jax._specs import MatrixSpec, simplify_spec
from muonclip_jax.routing.inference import Decision
from muonclip_jax.routing.leaves import Leaf, lengths, to_spec

_LEAVES_SHOWN = 8


def unknown_leaves(leaves: Sequence[Leaf], decided: Mapping[str, Decision]) -> ValueError:
    """Builds the error for the unknown leaves, given the decision for each path."""
    groups: dict[tuple[str, tuple[int, ...], tuple[str, ...]], list[Leaf]] = {}
    for leaf in leaves:
        if readings := decided[leaf.path].readings:
            groups.setdefault((_generalised(leaf.path), leaf.shape, readings), []).append(leaf)
    count = sum(map(len, groups.values()))
    lines: list[str] = []
    for (_, _, readings), group in list(groups.items())[:_LEAVES_SHOWN]:
        first, pattern = group[0], pattern_for(group, leaves)
        lines.append(f"  {first.path} of shape {first.shape} ({decided[first.path].why}), one of")
        for letters in readings:
            batch, inputs, outputs = (
                " x ".join(map(str, lengths(letters, first.shape, side))) for side in "bio"
            )
            meaning = f"{batch + ' matrices ' if batch else ''}{inputs} -> {outputs}"
            lines.append(f"    rules={write_rule(pattern, letters)}  # {meaning}")
        lines.append(f"    rules={write_rule(pattern, None)}  # AdamW trains it")
    if len(groups) > _LEAVES_SHOWN:
        lines.append(f"  and {len(groups) - _LEAVES_SHOWN} more")
    lines.append("The pair is (reduction axes, output axes), all others are batch axes.")
    if any("stacked layers" in decided[leaf.path].why for leaf in leaves):
        lines[-1] += (
            " If layers are stacked on one axis, write MatrixRules(scan_axis=0) or "
            "MatrixRules(scan_axis=[(pattern, axis)])."
        )
    return ValueError(
        f"{count} {'leaf' if count == 1 else 'leaves'} of rank three or more cannot be identified "
        "by name or structure, so their matrix axes are unknown. Write rules:\n" + "\n".join(lines)
    )


def pattern_for(group: Sequence[Leaf], leaves: Sequence[Leaf]) -> str:
    r"""A pattern that matches the leaves of a group and no other leaf.

    Example:
        >>> a, b = Leaf("h/0/w", (2, 3, 4)), Leaf("h/1/w", (2, 3, 4))
        >>> pattern_for([a, b], [a, b, Leaf("h/0/b", (4,))])
        '^h/\\d+/w$'
    """
    pattern = f"^{_generalised(group[0].path)}$"
    if {leaf.path for leaf in leaves if re.search(pattern, leaf.path)} == {x.path for x in group}:
        return pattern
    paths = [_escaped(leaf.path) for leaf in group]
    return f"^({'|'.join(paths)})$" if len(paths) > 1 else f"^{paths[0]}$"


def write_rule(pattern: str, letters: str | None) -> str:
    """A rule to paste: a layout, or None for AdamW.

    Example:
        >>> write_rule("^decoder/foo/w$", "ioo")
        'MatrixRules([("^decoder/foo/w$", MatrixSpec((0, (1, 2))))])'
    """
    spec = None
    if letters is not None:
        reduction, output = MatrixSpec(simplify_spec(to_spec(letters, ()))).dims
        spec = f"MatrixSpec(({reduction}, {output}))"
    raw = "r" if "\\" in pattern else ""
    return f'MatrixRules([({raw}"{pattern}", {spec})])'


def _escaped(path: str) -> str:
    return re.escape(path).replace(r"\-", "-")


def _generalised(path: str) -> str:
    return re.sub(r"(?<![A-Za-z\d])\d+", lambda _: r"\d+", _escaped(path))
