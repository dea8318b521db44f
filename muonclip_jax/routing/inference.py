"""Decides for each leaf of a tree, by structure if it is conclusive, otherwise by name.

Whether the input axes of a kernel are first differs between libraries ("kernel" and "w" have them
first, in Flax and Haiku; "weight" has them last, in Equinox, torch and haliax), so structure takes
precedence: a bias has the shape of the output axes, and kernels applied to the hidden state of a
block have the block's width as input axis.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from muonclip_jax._specs import MatrixSpec
from muonclip_jax.heads.finding import Shape
from muonclip_jax.routing.evidence import Evidence, biases_of, by_bias, gather, output_first
from muonclip_jax.routing.leaves import (
    Leaf,
    lengths,
    possible_layouts,
    to_spec,
    with_layers,
    without,
)
from muonclip_jax.routing.stacks import WIDTH_AXIS, Axes, ScanAxis, extra_axes, find_stacks
from muonclip_jax.routing.table import DENSE, EMBEDDING_TABLE, MOE, direction, fits, look_up, word

_LARGEST_WINDOW = 16
# Names of axes, as haliax, Flax and MaxText give them.
_BATCH_AXIS = r"(?:.*_)?(?:experts?|exp)(?:_.*)?|(?:num_)?qkv|(?:num_)?kv_stack"
_TABLE_AXIS = r"(?:.*_)?(?:vocab|positions?)(?:_.*)?"
_NOT_TOKENS = word(
    "pos|position|positions|positional|posemb|posembed|wpe|type|types|segment|segments|time|layer|"
    "relative|rel|codebook|codebooks"
)


@dataclass(frozen=True)
class Decision:
    """The decision for one leaf."""

    spec: MatrixSpec | None  # its matrices; None is AdamW
    why: str
    decays: bool = True  # whether weight decay applies
    readings: tuple[str, ...] = ()  # where it is open what the leaf is: the layouts that fit
    flag: str = ""  # what a reader should check
    stack: Axes = ()  # the axes of stacked layers


def infer(
    leaves: Sequence[Leaf], ruled: frozenset[str], scan_axis: ScanAxis
) -> dict[str, Decision]:
    """Decides for all leaves of a tree together.

    Args:
        leaves: All leaves that are not masked.
        ruled: Paths that the user's rules decide, which are not used as evidence.
        scan_axis: The user's axes of stacked layers.
    """
    free = [leaf for leaf in leaves if leaf.path not in ruled]
    widths = frozenset(columns for _, columns in token_tables(free))
    single = biases_of(free, {})
    plain = frozenset(x.path for x in free if _is_plain(x, single.get(x.path, ("", None))[1]))
    stacks = find_stacks(free, scan_axis, plain, widths)
    evidence = gather(free, stacks.axes)
    bias_paths = {path for path, _ in evidence.biases.values()}
    decisions: dict[str, Decision] = {}
    for leaf in leaves:
        if leaf.path in stacks.open:
            decisions[leaf.path] = _open_stack(leaf, stacks.open[leaf.path])
        elif len(leaf.shape) > 1 and leaf.trained and leaf.path in bias_paths:
            decisions[leaf.path] = Decision(None, "bias", decays=False)
        else:
            decisions[leaf.path] = _decide(leaf, stacks.axes.get(leaf.path, ()), evidence)
    return decisions


def token_tables(leaves: Iterable[Leaf]) -> list[Shape]:
    """Shapes of the token embedding tables, without position and type tables."""
    found: list[Shape] = []
    for leaf in leaves:
        told = look_up(leaf.name, leaf.shape) if len(leaf.shape) == 2 else None
        names = leaf.name.leaf, leaf.name.role, *leaf.name.scope[-1:]
        if told and told[0].why == EMBEDDING_TABLE and not fits(_NOT_TOKENS, *names):
            found.append(leaf.shape)
    return found


def _is_plain(leaf: Leaf, bias: Shape | None) -> bool:
    """Whether the shape of a leaf shows that it is not stacked."""
    if bias is None:
        return _is_window(leaf)
    extra = extra_axes(leaf.name, leaf.shape)
    return bool(extra and min(extra) >= len(bias)) or (len(bias) == 1 and _is_window(leaf))


def _is_window(leaf: Leaf) -> bool:
    """Whether a leaf is a convolution by its shape: a small square window before the channels."""
    name, shape = leaf.name, leaf.shape
    if len(shape) not in (4, 5) or name.grouped or name.leaf not in ("kernel", "w"):
        return False
    told = look_up(name, shape)
    if told is not None and not (told[1] and re.match("conv|patch|matrix", told[0].why)):
        return False
    if fits(MOE, *name.scope, name.role) or (shape[0] == 2 and name.leaf == "w" and told is None):
        return False  # experts; Gemma's (2, heads, inputs, head_dim)
    return _is_square(shape[:-2], shape[-2:])


def _is_square(window: Shape, channels: Shape) -> bool:
    return len(set(window)) == 1 and window[0] <= min(_LARGEST_WINDOW, max(channels))


def _open_stack(leaf: Leaf, options: Sequence[Axes]) -> Decision:
    readings: list[str] = []
    for axes in options:
        told = look_up(leaf.name, without(leaf.shape, axes))
        if told is not None and told[1]:
            readings.append(with_layers(told[1], axes, len(leaf.shape)))
    readings += possible_layouts(leaf.shape)
    why = "stacked layers on an axis that the stack does not show"
    return Decision(None, why, readings=tuple(dict.fromkeys(readings)))


def _decide(leaf: Leaf, axes: Axes, evidence: Evidence) -> Decision:
    name, rank, shape = leaf.name, len(leaf.shape), without(leaf.shape, axes)
    if rank < 2:
        return Decision(None, "scalar" if rank == 0 else "vector", decays=False)
    if not leaf.trained:
        return Decision(None, "integers or bools: nothing to train", decays=False)
    named = _by_axis_names(leaf, axes, evidence)
    if named is not None:
        return named
    told = look_up(name, shape if len(shape) > 1 else leaf.shape)
    if told is not None and not told[1]:
        return Decision(None, told[0].why, told[0].decays)
    if len(shape) < 2:
        return Decision(None, "vector", decays=False)
    if told is not None and name.stacked and not axes and len(shape) > 2:
        other = look_up(name, shape[1:])
        if other is not None and not other[1]:
            why = "a gate that may be a stacked router or a stack of experts"
            return Decision(None, why, readings=possible_layouts(shape))
    why, letters, parts = "", None, 1
    if told is not None:
        why, letters, parts = told[0].why, told[1], told[0].parts
    if (
        why in ("", "matrix")
        and not axes
        and _is_plain(leaf, evidence.bias(leaf))
        and _is_window(leaf)
    ):
        why, letters = "convolution", "i" * (rank - 1) + "o"
    elif letters is None:
        why, letters = "read from its shape", _by_structure(leaf, shape, evidence)
    if letters is None:
        readings = tuple(with_layers(x, axes, rank) for x in possible_layouts(shape))
        return Decision(None, f"no known name, rank {rank}", readings=readings)
    if parts != 3:
        letters = _oriented(leaf, shape, letters, evidence)
    why = "stacked matrices" if axes and why == "matrix" else why
    return Decision(to_spec(with_layers(letters, axes, rank), leaf.shape, parts), why, stack=axes)


def _by_structure(leaf: Leaf, shape: Shape, evidence: Evidence) -> str | None:
    """The layout of a kernel with unknown name, if exactly one is possible."""
    rank, bias = len(shape), evidence.bias(leaf)
    if bias is not None:
        first = by_bias(shape, bias)
        if first is not None:
            outputs, inputs = "o" * len(bias), "i" * (rank - len(bias))
            return outputs + inputs if first else inputs + outputs
        return "bio" if rank == 3 and bias == (shape[0], shape[2]) else None
    if leaf.name.stacked:
        return None
    if rank in (4, 5) and leaf.name.leaf == "weight" and _is_square(shape[2:], shape[:2]):
        return "o" + "i" * (rank - 1)
    if rank != 3:
        return None
    heads = evidence.heads.get(leaf.modules[:2][-1], ())
    reads, writes = (shape[0], shape[2]) in heads, (shape[2], shape[1]) in heads
    if reads != writes:
        return "ioo" if reads else "iio"
    width = evidence.widths.get(leaf.path)
    dense = fits(DENSE, leaf.name.role) and shape.count(width) == 1 and shape[0] == width
    return "ioo" if dense else None


def _oriented(leaf: Leaf, shape: Shape, letters: str, evidence: Evidence) -> str:
    """A layout with the input axes where the tree shows them, else where the library has them."""
    if not fits("i+o+|o+i+", letters.replace("b", "")):
        return letters
    rest = iter(letters.replace("b", "")[::-1])
    turned = "".join(letter if letter == "b" else next(rest) for letter in letters)
    bias, last = evidence.bias(leaf), leaf.name.leaf
    fitting = [x for x in (letters, turned) if lengths(x, shape, "o") == bias]
    if len(fitting) == 1:
        return fitting[0]
    side, width = direction(leaf.name), evidence.widths.get(leaf.path)
    if side and len(shape) > 2 and (output_first(last) or last == leaf.name.role):
        hidden = [a for a, n in enumerate(shape) if n == width and letters[a] != "b"]
        if len(hidden) == 1:
            rest = "o" if side == "i" else "i"
            kinds = (side if axis in hidden else rest for axis in range(len(shape)))
            return "".join("b" if x == "b" else y for x, y in zip(letters, kinds, strict=True))
    first = evidence.output_first.get(last, output_first(last))
    return turned if first and letters.replace("b", "").startswith("i") else letters


def _by_axis_names(leaf: Leaf, axes: Axes, evidence: Evidence) -> Decision | None:
    """The layout by the framework's axis names, if they include the hidden state's axis."""
    if leaf.axes is None or not all(n or i in axes for i, n in enumerate(leaf.axes)):
        return None
    told = look_up(leaf.name, leaf.shape)
    if told is not None and not told[1]:
        return Decision(None, told[0].why, told[0].decays)
    if fits(_TABLE_AXIS, *leaf.axes):
        return Decision(None, "a table by the name of an axis")
    kinds = [
        "b" if i in axes or fits(_BATCH_AXIS, name) else "w" if fits(WIDTH_AXIS, name) else "x"
        for i, name in enumerate(leaf.axes)
    ]
    if kinds.count("w") != 1 or "x" not in kinds:
        return None
    side = direction(leaf.name)
    if not side:
        first = kinds.index("w") < kinds.index("x")
        side = "i" if first != evidence.output_first.get(leaf.name.leaf, False) else "o"
    sides = {"b": "b", "w": side, "x": "o" if side == "i" else "i"}
    letters = "".join(sides[kind] for kind in kinds)
    return Decision(to_spec(letters, leaf.shape), "named axes", stack=axes)
