"""Finding attention blocks in a tree of parameters, and choosing among them with `blocks=`.

A block is a module that has the projections of a layout directly below it. It is called by its
path, the one under which its maxima are recorded: "decoder/block_0/attention". An outer "params"
level is no part of that.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from muonclip_jax._tree import compile_pattern, join, nothing_matched
from muonclip_jax.heads.builtin import BUILTIN_LAYOUTS
from muonclip_jax.heads.layouts import AttentionLayout
from muonclip_jax.heads.leaves import Shapes, has_adapter, kernel_name, plain_name

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

_FIRST_NAMES = frozenset(layout.paths[0] for layout in BUILTIN_LAYOUTS)


@dataclasses.dataclass(frozen=True)
class FoundBlock:
    """A module that holds the projections of a layout.

    Args:
        path: Its path.
        layout: The layout.
        selected: Whether `blocks=` asks for it to be clipped.
        leaves: Shapes of its leaves by `plain_name` inside it.
        paths: Their whole paths.
    """

    path: str
    layout: AttentionLayout
    selected: bool
    leaves: dict[str, tuple[int, ...]]
    paths: dict[str, str]


def strip_outer(path: str) -> str:
    """Returns a parameter's path without an outer "params" level."""
    return path.removeprefix("params/")


def block_rules(blocks: Any, argument: str = "blocks") -> tuple[Rule, ...] | None:
    """Returns `blocks=` as rules, validated; None where every built-in block is meant.

    Example:
        >>> block_rules("encoder")
        (('encoder', None),)
    """
    if blocks is None:
        return None
    pair = isinstance(blocks, tuple) and len(blocks) == 2 and isinstance(blocks[1], AttentionLayout)
    if pair or isinstance(blocks, str) or not isinstance(blocks, Iterable):
        blocks = (blocks,)
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
                raise TypeError(
                    f"{argument}= got {entry!r}. Expected a pattern such as "
                    "'encoder/.*attention$', an AttentionLayout, a pair (pattern, "
                    "AttentionLayout), or a sequence of those."
                )
        compile_pattern(rules[-1][0])
    if not rules:
        raise ValueError(
            f"{argument}=() selects no attention block. Write {argument}=None for all of them, or "
            "leave QK-Clip out."
        )
    return tuple(rules)


def _modules(paths: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns every module's leaves: module -> `plain_name` inside the module -> whole path."""
    modules: dict[str, dict[str, str]] = {}
    for path in paths:
        names = path.split("/")
        for depth in range(len(names)):
            modules.setdefault(join(names[:depth]), {})[plain_name(join(names[depth:]))] = path
    return modules


def _holds(layout: AttentionLayout | None, shapes: Shapes) -> bool:
    """Whether a module holds all projections of a layout: kernels, or adapters of hidden ones."""
    for path in () if layout is None else layout.paths:
        name = kernel_name(shapes, path)
        if len(shapes[name]) < 2 if name is not None else not has_adapter(shapes, path):
            return False
    return layout is not None


def find_blocks(
    leaves: Mapping[str, Any], rules: tuple[Rule, ...] | None, *, strict: bool = True
) -> list[FoundBlock]:
    """Finds attention blocks, in the order of their paths in the tree.

    Args:
        leaves: The parameters by their path, without an outer "params" level.
        rules: What `block_rules` returned. Built-in blocks that no rule asks for are returned too,
            not selected.
        strict: Whether a rule that matches nothing is an error; not so in part of a tree.

    Raises:
        ValueError: If a rule matches nothing, unless `strict` is False.
    """
    found: list[FoundBlock] = []
    unused = dict.fromkeys(rules or ()) if strict else {}
    candidates = _modules(leaves)
    for path, inside in candidates.items():
        if rules is None and _FIRST_NAMES.isdisjoint(name.split("/")[0] for name in inside):
            continue
        shapes = {name: tuple(getattr(leaves[at], "shape", ())) for name, at in inside.items()}
        builtin = next((b for b in BUILTIN_LAYOUTS if _holds(b, shapes)), None)
        layout, selected = builtin, rules is None
        for rule in rules or ():
            wanted = builtin if rule[1] is None else rule[1]
            if re.search(rule[0], path) is not None and _holds(wanted, shapes):
                unused.pop(rule, None)
                layout, selected = wanted, True
                break
        if layout is not None:
            found.append(FoundBlock(path, layout, selected, shapes, inside))
    for pattern, wanted in unused:
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
