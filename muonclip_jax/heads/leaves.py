"""The leaves of an attention block, named by what they are for its projections.

A kernel may sit at "q_proj/kernel", in a wrapper for an adapter ("q_proj/base_module/kernel"), or
in a `NamedArray` of haliax ("q_proj/weight/array"), and low-rank adapters have other names in every
library. All of that is read in one place, so that the rest knows one name for one thing.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

#: The leaves of one block: name inside the block, as `plain_name` gives it -> shape.
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

#: A kernel's name under its projection -> candidates for its input axis. "" is the projection
#: itself. "weight" is `(outputs, inputs)` in PyTorch and Equinox; haliax has both orders.
KERNEL_NAMES: Mapping[str, tuple[int, ...]] = {
    "kernel": (0,),
    "w": (0,),
    "weight": (-1, 0),
    "": (0,),
}
BIAS_NAMES = ("bias", "b")
#: Low-rank adapters: the kernel is W + A B, so B is multiplied with W, and A stays.
LORA_A, LORA_B = "lora_a", "lora_b"

_REWRITES: tuple[tuple[str, Any], ...] = (
    (r"/array$", ""),  # haliax.NamedArray by its field, or by its position:
    (r"((?:^|/)(?:kernel|weight|w|bias|b|scale))/0$", r"\1"),
    # What wraps a base layer: nnx.LoRA, PEFT, Levanter.
    (r"/(?:base_module|base_layer|wrapped)(?=/)", ""),
    # qwix: "kernel_lora_b" beside "kernel", "wq_lora_b" beside the array "wq".
    (r"/(?:kernel|weight|w)_(?=lora_[ab]$)", "/"),
    (r"_(?=lora_[ab]$)", "/"),
    # nnx.LoRALinear and Levanter: "lora/lora_a"; PEFT: "lora_A/default/weight".
    (
        r"(?:/lora)?/lora_([abAB])(?:/default)?(?:/(?:kernel|w)$)?",
        lambda match: f"/lora_{match[1].lower()}",
    ),
)
_REWRITTEN = re.compile(r"/array$|/0$|lora_|/base_|/wrapped/")


class MisfitError(Exception):
    """One way to read a block's shapes does not work out; the message says why."""


class RefusalError(MisfitError):
    """The block is understood, and it cannot be clipped; `leaf` is what the message begins with."""

    def __init__(self, why: str, leaf: str | None = None):
        super().__init__(why if leaf is None else f"{leaf!r} {why}")
        self.why, self.leaf = why, leaf

    def in_tree(self, paths: Mapping[str, str]) -> str:
        """Returns the message with the leaf's whole path in the tree."""
        return self.why if self.leaf is None else f"{paths[self.leaf]!r} {self.why}"


def plain_name(name: str) -> str:
    """Returns a leaf's name inside its block without wrappers, in one spelling for adapters.

    Example:
        >>> names = ("q_proj/base_module/kernel", "q_proj/weight/array", "q_proj/w_lora_b")
        >>> [plain_name(name) for name in (*names, "q_proj/lora_B/default/weight")]
        ['q_proj/kernel', 'q_proj/weight', 'q_proj/lora_b', 'q_proj/lora_b/weight']
    """
    for pattern, replacement in _REWRITES if _REWRITTEN.search(name) else ():
        name = re.sub(pattern, replacement, name)
    return name


def unstack(
    shape: tuple[int, ...], stack_axes: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape of one layer and the stacked axes counted from the front.

    Example:
        >>> unstack((12, 64, 4, 16), (0,), (12,))
        ((64, 4, 16), (0,))
    """
    rank = len(shape)
    axes = tuple(sorted(axis % rank for axis in stack_axes)) if rank else ()
    if len(set(axes)) < len(stack_axes) or any(not -rank <= axis < rank for axis in stack_axes):
        raise MisfitError(f"shape {shape} has no axes {stack_axes} to stack layers on")
    if tuple(shape[axis] for axis in axes) != sizes:
        raise MisfitError(f"shape {shape} is not stacked {sizes} on axes {axes}")
    return tuple(n for axis, n in enumerate(shape) if axis not in axes), axes


def under(shapes: Shapes, path: str) -> dict[str, tuple[int, ...]]:
    """Returns the leaves of one submodule by their name in it; "" is the leaf at `path` itself."""
    found = {name[len(path) + 1 :]: x for name, x in shapes.items() if name.startswith(path + "/")}
    return {"": shapes[path]} | found if path in shapes else found


def kernel_name(shapes: Shapes, path: str) -> str | None:
    """Returns the name of a projection's kernel in the block, if it has one."""
    names = (f"{path}/{name}".removesuffix("/") for name in KERNEL_NAMES)
    return next((name for name in names if name in shapes), None)


def has_adapter(shapes: Shapes, path: str) -> bool:
    """Whether a projection has a low-rank adapter, or a part of one."""
    return any(name.split("/")[0] in (LORA_A, LORA_B) for name in under(shapes, path))
