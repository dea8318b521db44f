"""Finding attention blocks in a tree of parameters, and choosing among them with `blocks=`.

A block is a module that has the projections of a layout directly below it. It is called by its
path, the one under which its maxima are recorded: "decoder/block_0/attention". An outer "params"
level is no part of that.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from muonclip_jax._paths import compile_pattern, join, nothing_matched
from muonclip_jax.heads.builtin import BUILTIN_LAYOUTS, KERNEL_NAMES
from muonclip_jax.heads.layouts import AttentionLayout
from muonclip_jax.heads.leaves import Leaves, kernel_of

#: What `blocks=` accepts: a pattern that selects found blocks, a layout, a pair of both, several.
Blocks: TypeAlias = (
    str
    | AttentionLayout
    | tuple[str, AttentionLayout]
    | Sequence[str | AttentionLayout | tuple[str, AttentionLayout]]
    | None
)
#: One rule of `blocks=`: where to look, and the layout there (None: the built-in ones).
Rule: TypeAlias = tuple[str, AttentionLayout | None]


@dataclasses.dataclass(frozen=True)
class FoundBlock:
    """A module that holds the projections of a layout.

    Args:
        path: Its path.
        layout: The layout.
        selected: Whether `blocks=` asks for it to be clipped.
        leaves: Its leaves by their path inside it.
    """

    path: str
    layout: AttentionLayout
    selected: bool
    leaves: Leaves


def strip_outer(path: str) -> str:
    """Returns a parameter's path without an outer "params" level.

    Example:
        >>> strip_outer("params/attention/query/kernel")
        'attention/query/kernel'
    """
    return path.removeprefix("params/")


def block_rules(blocks: Any, argument: str = "blocks") -> tuple[Rule, ...] | None:
    """Returns `blocks=` as rules, validated; None where every built-in block is meant.

    Args:
        blocks: What the user wrote.
        argument: As which argument, for the messages.

    Example:
        >>> block_rules("encoder")
        (('encoder', None),)

    Raises:
        TypeError: If an entry is no pattern, layout, or pair of them.
        ValueError: If a pattern is no regular expression or there is no entry.
    """
    if blocks is None:
        return None
    if isinstance(blocks, str | AttentionLayout) or _is_pair(blocks):
        blocks = (blocks,)
    if not isinstance(blocks, Iterable):
        raise TypeError(_what_blocks_are(blocks, argument))
    rules: list[Rule] = []
    for entry in blocks:
        match entry:
            case str():
                rules.append((entry, None))
            case AttentionLayout():
                rules.append(("", entry))
            case (str() as pattern, AttentionLayout() as layout):
                rules.append((pattern, layout))
            case _:
                raise TypeError(_what_blocks_are(entry, argument))
        compile_pattern(rules[-1][0])
    if not rules:
        raise ValueError(
            f"{argument}=() selects no attention block. Write {argument}=None for all of them, or "
            "leave QK-Clip out."
        )
    return tuple(rules)


def _is_pair(blocks: Any) -> bool:
    return isinstance(blocks, tuple) and len(blocks) == 2 and isinstance(blocks[1], AttentionLayout)


def _what_blocks_are(given: Any, argument: str) -> str:
    return (
        f"{argument}= got {given!r}. Expected a pattern such as 'encoder/.*attention$', an "
        "AttentionLayout, a pair (pattern, AttentionLayout), or a sequence of those."
    )


def _modules(paths: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns every module's leaves: module -> path inside the module -> whole path."""
    modules: dict[str, dict[str, str]] = {}
    for path in paths:
        names = path.split("/")
        for depth in range(len(names)):
            modules.setdefault(join(names[:depth]), {})[join(names[depth:])] = path
    return modules


def _holds(layout: AttentionLayout, inside: dict[str, str], leaves: Leaves) -> bool:
    """Whether a module holds all projections of a layout, with kernels of rank two or more."""
    for path in layout.paths:
        if path not in inside and not any(f"{path}/{n}" in inside for n in KERNEL_NAMES if n):
            return False
        found = kernel_of({name: leaves[whole] for name, whole in inside.items()}, path)
        if found is None or len(getattr(found[1], "shape", ())) < 2:
            return False
    return True


def find_blocks(
    leaves: Leaves, rules: tuple[Rule, ...] | None, *, strict: bool = True
) -> list[FoundBlock]:
    """Finds attention blocks.

    Args:
        leaves: The parameters by their path, without an outer "params" level.
        rules: What `block_rules` returned.
        strict: Whether a rule that matches nothing is an error; not so in part of a tree.

    Returns:
        The blocks in order of their paths in the tree. Where rules are given, the built-in ones
        that no rule asks for are there too, not selected.

    Raises:
        ValueError: If a rule matches nothing, unless `strict` is False.
    """
    found: list[FoundBlock] = []
    used: set[int] = set()
    candidates = _modules(leaves)
    for path, inside in candidates.items():
        builtin = next((b for b in BUILTIN_LAYOUTS if _holds(b, inside, leaves)), None)
        layout, selected = builtin, rules is None
        for number, (pattern, wanted) in enumerate(rules or ()):
            if re.search(pattern, path) is None:
                continue
            here = builtin if wanted is None else wanted
            if here is not None and (wanted is None or _holds(wanted, inside, leaves)):
                used.add(number)
                layout, selected = here, True
                break
        if layout is not None:
            block = {name: leaves[whole] for name, whole in inside.items()}
            found.append(FoundBlock(path, layout, selected, block))
    for number, (pattern, wanted) in enumerate(rules or ()):
        if number in used or not strict:
            continue
        if wanted is None:
            raise nothing_matched("The pattern in blocks=", pattern, [b.path for b in found])
        wants = " and ".join(repr(name) for name in wanted.paths)
        raise nothing_matched(
            f"The layout {wanted.name!r} in blocks=, which needs {wants} directly below a path "
            "that matches",
            pattern,
            candidates,
        )
    return found
