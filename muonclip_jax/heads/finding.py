"""Finds attention blocks in a tree of parameters, and selects them with `blocks=`.

A block is a module that has the projections of a layout directly below it. Its maxima are recorded
under its path, such as "decoder/block_0/attention", without an outer "params" level.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from muonclip_jax._tree import compile_pattern, nothing_matched
from muonclip_jax.heads.layouts import BUILTIN_LAYOUTS, AttentionLayout

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
Shape: TypeAlias = tuple[int, ...]
#: The leaves of one block: name inside the block, without wrappers -> shape.
Shapes: TypeAlias = Mapping[str, Shape]

#: A kernel's name under its projection -> candidates for its input axis. "" is the projection
#: itself. "weight" is `(outputs, inputs)` in PyTorch and Equinox; haliax has both orders.
KERNEL_NAMES: dict[str, tuple[int, ...]] = {"kernel": (0,), "w": (0,), "weight": (-1, 0), "": (0,)}
BIAS_NAMES = ("bias", "b")
#: Low-rank adapters: the kernel is W + A B, so B is multiplied with W, and A stays.
LORA_A, LORA_B = "lora_a", "lora_b"

_FIRST_NAMES = frozenset(layout.paths[0] for layout in BUILTIN_LAYOUTS)
_WRAPPED = re.compile(r"/array$|/0$|lora_|/base_|/wrapped/")
_REWRITES = (
    (r"/array$", ""),  # haliax.NamedArray by its field, or by its position:
    (r"((?:^|/)(?:kernel|weight|w|bias|b|scale))/0$", r"\1"),
    # What wraps a base layer: nnx.LoRA, PEFT, Levanter.
    (r"/(?:base_module|base_layer|wrapped)(?=/)", ""),
    # qwix: "kernel_lora_b" beside "kernel", "wq_lora_b" beside the array "wq".
    (r"/(?:kernel|weight|w)_(?=lora_[ab]$)", "/"),
    (r"_(?=lora_[ab]$)", "/"),
    # nnx.LoRALinear and Levanter: "lora/lora_a"; PEFT: "lora_A/default/weight".
    (r"(?:/lora)?/lora_[aA](?:/default)?(?:/(?:kernel|w)$)?", "/lora_a"),
    (r"(?:/lora)?/lora_[bB](?:/default)?(?:/(?:kernel|w)$)?", "/lora_b"),
)


@dataclasses.dataclass(frozen=True)
class FoundBlock:
    """A module that contains the projections of a layout."""

    path: str
    layout: AttentionLayout
    selected: bool  # whether `blocks=` selects it
    leaves: dict[str, Shape]  # by `plain_name` inside it
    paths: dict[str, str]  # their full paths
    stack: Shape | None = None  # axes on which queries alone are stacked, by the whole tree


def strip_outer(path: str) -> str:
    """Returns a parameter's path without an outer "params" level."""
    return path.removeprefix("params/")


def under(shapes: Shapes, path: str) -> dict[str, Shape]:
    """Returns the leaves of one submodule by their name in it; "" is the leaf at `path` itself."""
    found = {name[len(path) + 1 :]: x for name, x in shapes.items() if name.startswith(path + "/")}
    return {"": shapes[path]} | found if path in shapes else found


def kernel_name(shapes: Shapes, path: str) -> str | None:
    """Returns the name of a projection's kernel in the block, if it has one."""
    names = (f"{path}/{name}".removesuffix("/") for name in KERNEL_NAMES)
    return next((name for name in names if name in shapes), None)


def block_rules(blocks: Any, argument: str = "blocks") -> tuple[Rule, ...] | None:
    """Returns `blocks=` as validated rules; None selects every built-in block."""
    if blocks is None:
        return None
    pair = isinstance(blocks, tuple) and len(blocks) == 2 and isinstance(blocks[1], AttentionLayout)
    if pair or isinstance(blocks, str) or not isinstance(blocks, Iterable):
        blocks = (blocks,)
    rules: list[Rule] = []
    for entry in blocks:
        pattern, layout = ("", entry) if isinstance(entry, AttentionLayout) else (entry, None)
        if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], AttentionLayout):
            pattern, layout = entry
        if not isinstance(pattern, str):
            raise TypeError(
                f"{argument}= got {entry!r}. Expected a pattern such as 'encoder/.*attention$', an "
                "AttentionLayout, a pair (pattern, AttentionLayout), or a sequence of those."
            )
        compile_pattern(pattern)
        rules.append((pattern, layout))
    if not rules:
        raise ValueError(
            f"{argument}=() selects no attention block. Write {argument}=None for all of them, or "
            "leave QK-Clip out."
        )
    return tuple(rules)


def find_blocks(
    leaves: Mapping[str, Any], rules: tuple[Rule, ...] | None, *, strict: bool = True
) -> list[FoundBlock]:
    """Finds attention blocks among the leaves of a tree, selected by `block_rules` or not."""
    modules: dict[str, dict[str, str]] = {}
    for path in leaves:
        for at in (0, *(match.end() for match in re.finditer("[/.]", path))):
            name = path[at:].replace(".", "/")
            for pattern, replacement in _REWRITES if _WRAPPED.search(name) else ():
                name = re.sub(pattern, replacement, name)
            modules.setdefault(path[: max(at - 1, 0)], {})[name] = path
    found: list[FoundBlock] = []
    unused = dict.fromkeys(rules or ()) if strict else {}
    for path, inside in modules.items():
        if rules is None and _FIRST_NAMES.isdisjoint(name.split("/")[0] for name in inside):
            continue
        shapes = {name: tuple(getattr(leaves[at], "shape", ())) for name, at in inside.items()}
        # The paths at which there is a kernel, or an adapter of a kernel that is masked.
        made: set[str] = set()
        for name, shape in shapes.items():
            module, _, last = name.rpartition("/")
            made |= {name, module if last in KERNEL_NAMES else name} if len(shape) > 1 else set()
            made |= {name.partition("/lora_")[0]} if "/lora_" in name else set()
        builtin = next((b for b in BUILTIN_LAYOUTS if made.issuperset(b.paths)), None)
        layout, selected = builtin, rules is None
        for rule in rules or ():
            wanted = builtin if rule[1] is None else rule[1]
            there = wanted is not None and made.issuperset(wanted.paths)
            if there and re.search(rule[0], path) is not None:
                unused.pop(rule, None)
                layout, selected = wanted, True
                break
        if layout is not None:
            found.append(FoundBlock(path, layout, selected, shapes, inside))
    for pattern, wanted in unused:
        if wanted is None:
            raise nothing_matched("The pattern in blocks=", pattern, [b.path for b in found])
        wants = " and ".join(repr(name) for name in wanted.paths)
        what = f"The layout {wanted.name!r} in blocks=, which needs {wants} directly below a path "
        raise nothing_matched(f"{what}that matches", pattern, modules)
    return found
