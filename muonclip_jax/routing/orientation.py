"""Which side of a kernel is its input: "kernel" and "w" have it first, "weight" has it last.

That is a habit of libraries (Flax and Haiku; Equinox, torch and haliax) and not of names, so what
the tree shows comes first: a bias has the shape of the output side, and what reads the hidden state
of a block has the block's width on its input side.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muonclip_jax.heads.names import GENERIC
from muonclip_jax.routing import words
from muonclip_jax.routing.layouts import without
from muonclip_jax.routing.leaves import Leaf
from muonclip_jax.routing.scan_axis import Axes
from muonclip_jax.routing.stacks import direction
from muonclip_jax.routing.table import look_up


def output_first(name: str) -> bool:
    """Whether libraries that call a kernel so have its output first.

    Example:
        >>> output_first("weight"), output_first("weight_ih"), output_first("weights")
        (True, True, False)
    """
    return re.fullmatch(r"weight(?:_.*)?", name) is not None


@dataclass(frozen=True)
class Evidence:
    """What a tree shows about its kernels.

    Args:
        biases: Path of a kernel -> shape of its bias without stacked layers.
        bias_paths: Paths of those biases.
        widths: Path of a kernel -> the width of the hidden state in its block.
        output_first: Last names -> whether kernels so called have the output first.
        heads: Module -> `(width, head_dim)` of kernels `(width, heads, head_dim)` in it that stand
            beside one of `(heads, head_dim, width)`.
    """

    biases: Mapping[str, tuple[int, ...]]
    bias_paths: frozenset[str]
    widths: Mapping[str, int]
    output_first: Mapping[str, bool]
    heads: Mapping[str, frozenset[tuple[int, int]]]


def gather(leaves: Sequence[Leaf], stacks: Mapping[str, Axes]) -> Evidence:
    """Reads a tree whose stacks are known.

    Args:
        leaves: All leaves.
        stacks: Path -> axes of stacked layers.
    """
    kernels = [
        (leaf, without(leaf.shape, stacks.get(leaf.path, ())))
        for leaf in leaves
        if len(leaf.shape) > 1
    ]
    kernels = [
        (leaf, shape)
        for leaf, shape in kernels
        if len(shape) > 1 and ((told := look_up(leaf.name, shape)) is None or told[1])
    ]
    found = biases_of(leaves, stacks)
    biases = {path: bias for path, (_, bias) in found.items()}
    block_widths = _widths(kernels)
    votes: Counter[tuple[str, bool]] = Counter()
    for leaf, shape in kernels:
        vote = by_bias(shape, biases.get(leaf.path))
        if vote is None:
            vote = _by_width(leaf, shape, block_widths.get(leaf.path))
        if vote is not None:
            votes[leaf.name.leaf, vote] += 1
    names = {leaf.name.leaf for leaf, _ in kernels}
    return Evidence(
        biases,
        frozenset(path for path, _ in found.values()),
        block_widths,
        {name: _elected(name, votes) for name in names},
        _heads(kernels),
    )


def by_bias(shape: tuple[int, ...], bias: tuple[int, ...] | None) -> bool | None:
    """Whether a bias shows that the output comes first; None where it shows nothing.

    Example:
        >>> by_bias((80, 48), (80,)), by_bias((48, 6, 10), (6, 10)), by_bias((8, 8), (8,))
        (True, False, None)
    """
    if bias is None or not 0 < len(bias) < len(shape):
        return None
    first, last = shape[: len(bias)] == bias, shape[-len(bias) :] == bias
    return None if first == last else first


def _elected(name: str, votes: Mapping[tuple[str, bool], int]) -> bool:
    habit = output_first(name)
    for_it, against = votes.get((name, habit), 0), votes.get((name, not habit), 0)
    return not habit if against > 1 and not for_it else habit


def biases_of(
    leaves: Sequence[Leaf], stacks: Mapping[str, Axes]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Paths and shapes of biases, without stacked layers, by the paths of their kernels."""
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    found = {}
    for leaf in leaves:
        if len(leaf.shape) < 2:
            continue
        owner, last = leaf.modules[0], leaf.name.leaf
        prefix = owner + "/" if owner else ""
        suffix = leaf.path[len(prefix) :].partition("/")[2]
        names = [f"{prefix}{name}" for name in ("bias", f"{last}_bias")]
        names += [f"{prefix}b"] if last in GENERIC else []
        if leaf.path.endswith("_w"):
            names.append(leaf.path[:-1] + "b")
        for path in [*names, *(f"{name}/{suffix}" for name in names if suffix)]:
            if path in shapes and path != leaf.path:
                axes = stacks.get(leaf.path, ())
                rank = len(leaf.shape)
                found[leaf.path] = path, _one_layer(shapes[path], axes, rank, leaf.shape)
                break
    return {path: bias for path, bias in found.items() if bias[1]}


def _one_layer(
    bias: tuple[int, ...], axes: Axes, rank: int, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """A bias without stacked layers, and without the window of a convolution."""
    for places in (axes, tuple(axis - rank + len(bias) for axis in axes)):
        if all(
            0 <= p < len(bias) and bias[p] == shape[a] for p, a in zip(places, axes, strict=True)
        ):
            bias = without(bias, places)
            break
    while len(bias) > 1 and bias[-1] == 1:
        bias = bias[:-1]
    return bias


def _widths(kernels: Sequence[tuple[Leaf, tuple[int, ...]]]) -> dict[str, int]:
    """The one length that all kernels of the smallest block around a kernel have."""
    common: dict[str, set[int]] = {}
    sides: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for leaf, shape in kernels:
        lengths = _outer_lengths(leaf, shape)
        for module in leaf.modules:
            common[module] = common[module] & lengths if module in common else set(lengths)
            sides.setdefault(module, set()).add(direction(leaf.name))
            counts[module] += 1
    found = {}
    for leaf, _ in kernels:
        for module in leaf.modules:
            if not common[module]:
                break
            if len(common[module]) == 1 and counts[module] > 2 and {"i", "o"} <= sides[module]:
                found[leaf.path] = next(iter(common[module]))
                break
    return found


def _outer_lengths(leaf: Leaf, shape: tuple[int, ...]) -> set[int]:
    """The lengths that may be the hidden state's: sizes of heads stand on inner axes."""
    told = look_up(leaf.name, shape)
    if told is not None and re.fullmatch("b*oio", told[1]):
        return {shape[told[1].index("i")]}
    return {shape[0], shape[-1]} if len(shape) == 2 or told is None else set(shape) - {1}


def _heads(
    kernels: Sequence[tuple[Leaf, tuple[int, ...]]],
) -> dict[str, frozenset[tuple[int, int]]]:
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for leaf, shape in kernels:
        if len(shape) == 3:
            shapes.setdefault(leaf.modules[min(1, len(leaf.modules) - 1)], set()).add(shape)
    return {
        module: frozenset(
            (width, size) for width, count, size in found if (count, size, width) in found
        )
        for module, found in shapes.items()
    }


def _by_width(leaf: Leaf, shape: tuple[int, ...], width: int | None) -> bool | None:
    side = direction(leaf.name)
    if width is None or not side or shape.count(width) != 1 or len(shape) != 2:
        return None
    if re.fullmatch(words.KEY_VALUE, leaf.name.role):
        return None  # in cross-attention they read another hidden state
    return (shape[-1] == width) == (side == "i")
