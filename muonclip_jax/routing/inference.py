"""From the leaves of a tree to a decision for each: structure where it tells, names where not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from muonclip_jax._specs import MatrixSpec
from muonclip_jax.routing import words
from muonclip_jax.routing.layouts import (
    outputs_of,
    possible_layouts,
    to_spec,
    turned,
    with_layers,
    without,
)
from muonclip_jax.routing.leaves import Leaf
from muonclip_jax.routing.orientation import Evidence, biases_of, by_bias, gather, output_first
from muonclip_jax.routing.scan_axis import Axes, ScanAxis
from muonclip_jax.routing.stacks import direction, extra_axes, find_stacks
from muonclip_jax.routing.table import Row, look_up

_LARGEST_WINDOW = 16


@dataclass(frozen=True)
class Decision:
    """What a leaf is.

    Args:
        spec: Its matrices; None is AdamW.
        why: The reason.
        decays: Whether weight decay applies.
        readings: Where it is open what the leaf is: the layouts that fit its shape.
        flag: What a reader should check.
        stack: The axes of stacked layers.
    """

    spec: MatrixSpec | None
    why: str
    decays: bool = True
    readings: tuple[str, ...] = ()
    flag: str = ""
    stack: Axes = ()

    @property
    def unknown(self) -> bool:
        """Whether the leaf is open."""
        return bool(self.readings)


def infer(
    leaves: Sequence[Leaf], ruled: frozenset[str], scan_axis: ScanAxis
) -> dict[str, Decision]:
    """Decides for all leaves of a tree together.

    Args:
        leaves: All leaves that are visible.
        ruled: Paths that the user's rules decide: they are no evidence.
        scan_axis: Where stacked layers sit, as far as the user says.
    """
    free = [leaf for leaf in leaves if leaf.path not in ruled]
    widths = frozenset(table[1] for table in token_tables(free))
    biases = biases_of(free, {})
    plain = frozenset(
        leaf.path for leaf in free if _is_plain(leaf, biases.get(leaf.path, ("", None))[1])
    )
    stacks = find_stacks(free, scan_axis, plain, widths)
    evidence = gather(free, stacks.axes)
    decisions = {}
    for leaf in leaves:
        if leaf.path in stacks.open:
            decisions[leaf.path] = _open_stack(leaf, stacks.open[leaf.path])
        else:
            decisions[leaf.path] = _decide(leaf, stacks.axes.get(leaf.path, ()), evidence)
    return decisions


def _is_plain(leaf: Leaf, bias: tuple[int, ...] | None) -> bool:
    """Whether a leaf shows by itself that it is not stacked, whatever its name asks for."""
    if bias is None:
        return _is_window(leaf, leaf.shape)
    extra = extra_axes(leaf.name, leaf.shape)
    few = bool(extra) and min(extra) >= len(bias)
    return few or (len(bias) == 1 and _is_window(leaf, leaf.shape))


def token_tables(leaves: Sequence[Leaf]) -> list[tuple[int, int]]:
    """Rows and columns of the tables of token embeddings."""
    found = []
    for leaf in leaves:
        told = look_up(leaf.name, leaf.shape) if len(leaf.shape) == 2 else None
        if told is not None and told[0].why == "embedding table":
            names = (leaf.name.leaf, leaf.name.role, *leaf.name.scope[-1:])
            if not any(re.fullmatch(words.NOT_TOKENS, name) for name in names):
                found.append((leaf.shape[0], leaf.shape[1]))
    return found


def _open_stack(leaf: Leaf, options: Sequence[Axes]) -> Decision:
    readings = []
    for axes in options:
        told = look_up(leaf.name, without(leaf.shape, axes))
        if told is not None and told[1]:
            readings.append(with_layers(told[1], axes, len(leaf.shape)))
    return Decision(
        None,
        "stacked layers on an axis that the stack does not show",
        readings=tuple(dict.fromkeys((*readings, *possible_layouts(leaf.shape)))),
    )


def _decide(leaf: Leaf, axes: Axes, evidence: Evidence) -> Decision:
    rank = len(leaf.shape)
    if rank < 2:
        return Decision(None, "scalar" if rank == 0 else "vector", decays=False)
    if not leaf.trained:
        return Decision(None, "integers or bools: nothing to train", decays=False)
    if leaf.path in evidence.bias_paths:
        return Decision(None, "bias", decays=False)
    shape = without(leaf.shape, axes)
    named = _by_axis_names(leaf, axes, evidence)
    if named is not None:
        return named
    if len(shape) < 2:
        told = look_up(leaf.name, leaf.shape)
        if told is not None and not told[1]:
            return Decision(None, told[0].why, told[0].decays)
        return Decision(None, "vector", decays=False)
    told = look_up(leaf.name, shape)
    if told is not None and not told[1]:
        return Decision(None, told[0].why, told[0].decays)
    if told is not None and leaf.name.stacked and not axes and _may_be_adamw(leaf, shape):
        return Decision(
            None,
            "a gate that may be a stacked router or a stack of experts",
            readings=possible_layouts(leaf.shape),
        )
    window = (
        not axes and _is_plain(leaf, evidence.biases.get(leaf.path)) and _is_window(leaf, shape)
    )
    if window and (told is None or told[0].why == "matrix"):
        told = Row("convolution", "i*o"), "i" * (len(shape) - 1) + "o"
    if told is None:
        letters = _by_structure(leaf, shape, evidence)
        if letters is None:
            return Decision(
                None,
                f"no known name, rank {rank}",
                readings=tuple(
                    with_layers(letters, axes, rank) for letters in possible_layouts(shape)
                ),
            )
        told = Row("read from its shape"), letters
    row, letters = told
    if row.parts != 3:
        letters = _oriented(leaf, shape, letters, evidence)
    why = "stacked matrices" if axes and row.why == "matrix" else row.why
    return Decision(
        to_spec(with_layers(letters, axes, rank), leaf.shape, row.parts), why, stack=axes
    )


def _may_be_adamw(leaf: Leaf, shape: tuple[int, ...]) -> bool:
    """Whether AdamW would train the leaf if one of its axes held stacked layers."""
    if len(shape) < 3:
        return False
    told = look_up(leaf.name, shape[1:])
    return told is not None and not told[1]


def _is_window(leaf: Leaf, shape: tuple[int, ...]) -> bool:
    """Whether a leaf is a convolution by its shape: a small square window before the channels."""
    name = leaf.name
    if len(shape) not in (4, 5) or name.stacked or name.grouped or name.leaf not in ("kernel", "w"):
        return False
    told = look_up(name, shape)
    if told is not None and not told[1]:
        return False
    if told is not None and not re.match("conv|patch|matrix", told[0].why):
        return False
    if any(re.fullmatch(words.MOE, outer) for outer in (*name.scope, name.role)):
        return False
    window = shape[:-2]
    if window[0] == 2 and name.leaf == "w" and told is None:
        return False  # Gemma's (2, heads, inputs, head_dim)
    return len(set(window)) == 1 and window[0] <= min(_LARGEST_WINDOW, max(shape[-2:]))


def _by_structure(leaf: Leaf, shape: tuple[int, ...], evidence: Evidence) -> str | None:
    """The layout of a kernel whose name says nothing, if exactly one is possible."""
    rank = len(shape)
    bias = evidence.biases.get(leaf.path)
    if bias is not None:
        first = by_bias(shape, bias)
        if first is not None:
            outputs, inputs = "o" * len(bias), "i" * (rank - len(bias))
            return outputs + inputs if first else inputs + outputs
        if rank == 3 and bias == (shape[0], shape[2]):
            return "bio"
        return None
    if leaf.name.stacked:
        return None
    if rank in (4, 5) and leaf.name.leaf == "weight":
        window = shape[2:]
        if len(set(window)) == 1 and window[0] <= min(_LARGEST_WINDOW, max(shape[:2])):
            return "o" + "i" * (rank - 1)
    if rank != 3:
        return None
    heads = evidence.heads.get(leaf.modules[min(1, len(leaf.modules) - 1)], frozenset())
    reads, writes = (shape[0], shape[2]) in heads, (shape[2], shape[1]) in heads
    if reads != writes:
        return "ioo" if reads else "iio"
    width = evidence.widths.get(leaf.path)
    dense = re.fullmatch(words.word(words.DENSE), leaf.name.role)
    if dense and shape.count(width) == 1 and shape[0] == width:
        return "ioo"
    return None


def _oriented(leaf: Leaf, shape: tuple[int, ...], letters: str, evidence: Evidence) -> str:
    """A layout with the input on the side where the tree shows it, or the library has it."""
    plain = letters.replace("b", "")
    if not re.fullmatch("i+o+|o+i+", plain):
        return letters
    other = turned(letters)
    bias = evidence.biases.get(leaf.path)
    if bias is not None:
        outputs = outputs_of(letters, shape), outputs_of(other, shape)
        if (outputs[0] == bias) != (outputs[1] == bias):
            return letters if outputs[0] == bias else other
    last = leaf.name.leaf
    side, width = direction(leaf.name), evidence.widths.get(leaf.path)
    movable = output_first(last) or last == leaf.name.role
    if side and width is not None and len(shape) > 2 and movable:
        at = [a for a, n in enumerate(shape) if n == width and letters[a] != "b"]
        if len(at) == 1:
            rest = "o" if side == "i" else "i"
            return "".join(
                letter if letter == "b" else (side if axis == at[0] else rest)
                for axis, letter in enumerate(letters)
            )
    first = evidence.output_first.get(last, output_first(last))
    return other if plain.startswith("i") and first else letters


def _by_axis_names(leaf: Leaf, axes: Axes, evidence: Evidence) -> Decision | None:
    """What the framework's names of axes say, if they name the hidden state's axis."""
    if leaf.axes is None or not all(n or i in axes for i, n in enumerate(leaf.axes)):
        return None
    told = look_up(leaf.name, leaf.shape)
    if told is not None and not told[1]:
        return Decision(None, told[0].why, told[0].decays)
    kinds = [
        "b"
        if i in axes or re.fullmatch(words.BATCH_AXIS, name)
        else "w"
        if re.fullmatch(words.WIDTH_AXIS, name)
        else "x"
        for i, name in enumerate(leaf.axes)
    ]
    if any(re.fullmatch(words.TABLE_AXIS, name) for name in leaf.axes):
        return Decision(None, "a table by the name of an axis")
    if kinds.count("w") != 1 or "x" not in kinds:
        return None
    side = direction(leaf.name)
    if not side:
        first = kinds.index("w") < kinds.index("x")
        output_first = evidence.output_first.get(leaf.name.leaf, False)
        side = "i" if first != output_first else "o"
    other = "o" if side == "i" else "i"
    letters = "".join({"b": "b", "w": side, "x": other}[kind] for kind in kinds)
    return Decision(to_spec(letters, leaf.shape), "named axes", stack=axes)
