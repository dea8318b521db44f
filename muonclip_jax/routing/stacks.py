"""Infers the axes of stacked layers from the leaves that are stacked together.

`nn.scan` adds an axis of equal length and position to every parameter of a layer. So a stack are
the kernels below one module that all have more axes than their names imply, and the same length on
one. Only leaves of rank two or more that Muon trains are used: a masked tree gives the same result.
Of several axes, those are used with which a layer's input width equals its output width.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from typing import TypeAlias

from muonclip_jax.heads.finding import Shape
from muonclip_jax.heads.layouts import OUT_NAMES
from muonclip_jax.routing.leaves import GENERIC, Axes, Leaf, LeafName, lengths, with_layers, without
from muonclip_jax.routing.table import ALL_QKV, direction, fits, look_up

#: The leaves of a stack, the kernels among them, and axes that the layers may be on.
Ambiguous: TypeAlias = tuple[Sequence[Leaf], Sequence[Leaf], list[Axes]]

_STACK_AXIS = r"(?:.*_)?(?:layers?|stages?|repeats?|blocks?|periods?|scan)"
KEY_VALUE = r"(?:.*_)?(?:k|v|kv|key|value|wk|wv|wkv)(?:_.*)?"
WIDTH_AXIS = r"(?:embed|emb|embedding|hidden|model|d_model|model_dim)(?:_(?!vocab).*)?"


def find_heads_first(leaves: Sequence[Leaf]) -> None:
    """Renames queries, keys and values `(heads, width, size)` beside outputs `(..., size, width)`.

    A stack of layers has these shapes too: `heads * size` is the width, or the path is one layer's.
    """
    block = lambda leaf: leaf.modules[: 1 + (leaf.name.leaf in GENERIC)][-1]  # noqa: E731
    outputs: defaultdict[str, set[Shape]] = defaultdict(set)
    for leaf in (leaf for leaf in leaves if leaf.name.role in OUT_NAMES):
        outputs[block(leaf)].add((len(leaf.shape), *leaf.shape[-3:]))
    for leaf in leaves:
        name, rank, (width, size) = leaf.name, len(leaf.shape), (0, 0, *leaf.shape)[-2:]
        if rank == 3 + name.grouped and fits(ALL_QKV, name.role) and size < width:
            one = name.grouped or re.search(r"\d/.+/", leaf.path)
            heads = {
                out[1] for out in outputs[block(leaf)] if (out[0], *out[2:]) == (rank, size, width)
            }
            if heads and (one or width // size in heads):
                role = "k_einsum" if fits(KEY_VALUE, name.role) else "q_einsum"
                leaf.name = name._replace(role=role)


def find_stacks(leaves: Sequence[Leaf], widths: frozenset[int]) -> None:
    """Finds `stack`, or `options`, of leaves of rank two or more, given widths of embeddings."""
    for leaf in leaves:
        layers = tuple(i for i, name in enumerate(leaf.axes or ()) if fits(_STACK_AXIS, name))
        if layers or (leaf.axes and all(leaf.axes) and fits(WIDTH_AXIS, *leaf.axes)):
            leaf.stack = layers
    unknown = [leaf for leaf in leaves if leaf.stack is None and len(leaf.shape) > 1]
    ambiguous = list(_solve("", unknown, widths))
    # The nearest enclosing stack decides, if exactly one option fits.
    stacked = [leaf for leaf in leaves if leaf.stack]
    for below, kernels, options in ambiguous:
        first, unnamed = kernels[0], not any(extra_axes(x.name, x.shape) for x in kernels)
        for module in first.modules[1:3]:
            beside = [x for x in stacked if module in x.modules[:3]]
            near = {(x.stack, *_lengths(x, x.stack or ())) for x in beside}
            fitting = [x for x in options if (a := _axes(first, x), *_lengths(first, a)) in near]
            if len(fitting) == 1:
                _assign(below, kernels, fitting[0])
                break
        for leaf in kernels:
            if leaf.stack is None and unnamed and len(below) == 1:
                leaf.stack = ()
            elif leaf.stack is None:
                leaf.options = tuple(_axes(leaf, choice) for choice in options)


def _solve(module: str, leaves: Sequence[Leaf], widths: frozenset[int]) -> Iterator[Ambiguous]:
    """Finds the axes of the leaves below a module together, or else of its submodules."""
    extras = {leaf: extra_axes(leaf.name, leaf.shape) for leaf in leaves}
    known = [leaf for leaf in leaves if extras[leaf]]
    kernels = known or [x for x in leaves if look_up(x.name, x.shape).layout != ""]
    if not kernels:
        return
    # Whether their paths indicate stacked layers.
    contained = {
        leaf.name.stacked or (leaf.name.grouped and leaf.scan_axis not in (None, (0,)))
        for leaf in kernels
    }
    inside, counts = contained == {True}, [extra for extra in extras.values() if extra]
    # If no name says how many axes a kernel has, a stack is what all leaves show alike.
    alike = frozenset({1} if min(len(leaf.shape) for leaf in kernels) > 2 else ())
    common = frozenset.intersection(*counts) if counts else alike
    beside = 0 not in common and any(0 in extra for extra in counts) and not (inside or module)
    if beside or len(contained) > 1:  # layers beside a stack
        common = frozenset[int]()
    for extra in sorted(common, key=lambda n: (n == 0, n) if inside else (False, n)):
        options = [()] if extra == 0 else _options(kernels, extra, inside or not known, widths)
        if extra == 0 and len(common) > 1 and not inside:
            read, written = _flow(kernels, ())
            if read and written and not read & written:
                continue
        if not (extra == 0 or known or inside) and not _all_show(leaves, options):
            continue
        if len(options) == 1:
            _assign(leaves if extra else known, kernels, options[0])
            yield from _solve(module, [x for x in leaves if x.stack is None], widths)
            return
        if options or _options(kernels, extra, True, widths):
            break  # fewer axes are possible, so more are a guess
    if len(leaves) == 1:
        extra = min((extras[leaves[0]] or frozenset()) - {0}, default=1)
        yield leaves, kernels, _options(kernels, extra, True, widths)
        return
    depth = module.count("/") + 2 if module else 1
    below: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        below.setdefault("/".join(leaf.path.split("/")[:depth]), []).append(leaf)
    for child, group in below.items():
        yield from _solve(child, group, widths)


def _options(
    kernels: Sequence[Leaf], extra: int, shown: bool, widths: frozenset[int]
) -> list[Axes]:
    """The axes that all kernels may be stacked on; of several, those that fit the widths."""
    given, *others = {leaf.scan_axis for leaf in kernels}
    found: dict[tuple[str | None, ...], Axes] = {}
    for choice in [] if others else _choices(given, extra, min(len(x.shape) for x in kernels)):
        layouts = tuple(_layout(leaf, choice) for leaf in kernels)
        if None not in layouts and len({tuple(_lengths(x, choice)) for x in kernels}) == 1:
            found.setdefault(layouts, choice)
    tests = {choice: _width_tests(kernels, choice, widths) for choice in found.values()}
    options = [choice for choice in tests if shown or given is not None or any(tests[choice])]
    for test in range(3):
        if len(options) > 1:
            options = [choice for choice in options if tests[choice][test]] or options
    return options


def _choices(given: Axes | None, extra: int, rank: int) -> list[Axes]:
    """Axes to try; where the user gives some, those alone, or more of them in nested stacks."""
    front = list(combinations(range(rank), extra))
    if given is None:
        return [*front, *combinations(range(-rank, 0), extra)]
    if any(not -rank <= axis < rank for axis in given[:extra]):
        return []
    if len(given) >= extra:
        return [given[:extra]]
    wanted = {axis % rank for axis in given}
    return front[:1] if given == (0,) else [axes for axes in front if wanted <= set(axes)]


def _width_tests(kernels: Sequence[Leaf], choice: Axes, widths: frozenset[int]) -> tuple[bool, ...]:
    """Whether the width that is read is written, all inputs are outputs, all have a known width."""
    read, written = _flow(kernels, choice)
    sizes = [_sizes(leaf, choice) for leaf in kernels]
    inputs, outputs = map(set, zip(*sizes, strict=True))
    # One shape is square by chance too: it only confirms layers in front of it.
    shape = kernels[0].shape
    front = 0 in _axes(kernels[0], choice) and shape.count(shape[0]) == 1
    closed = inputs == outputs and (front or len({leaf.shape for leaf in kernels}) > 1)
    sides = {"i": slice(1), "o": slice(1, 2), "": slice(2)}
    hidden = [size[sides[direction(x.name)]] for x, size in zip(kernels, sizes, strict=True)]
    return bool(read & written), closed, not any(map(widths.isdisjoint, hidden))


def _flow(kernels: Sequence[Leaf], choice: Axes) -> tuple[set[int], set[int]]:
    """The sizes of the hidden state that is read and written, as far as known by name."""
    read = {_sizes(leaf, choice)[0] for leaf in kernels if direction(leaf.name) == "i"}
    return read, {_sizes(leaf, choice)[1] for leaf in kernels if direction(leaf.name) == "o"}


def _sizes(leaf: Leaf, choice: Axes) -> tuple[int, int]:
    shape = without(leaf.shape, _axes(leaf, choice))
    letters = look_up(leaf.name, shape).layout or "b" * len(shape)
    return math.prod(lengths(letters, shape, "i")), math.prod(lengths(letters, shape, "o"))


def _layout(leaf: Leaf, choice: Axes) -> str | None:
    """The layout with "b" for the layers, or None if the name does not fit the other axes."""
    axes = _axes(leaf, choice)
    layout = look_up(leaf.name, without(leaf.shape, axes)).layout
    if layout is None and not extra_axes(leaf.name, leaf.shape):
        return f"{axes}"
    return with_layers(layout, axes, len(leaf.shape)) if layout else None


@lru_cache(maxsize=65536)
def extra_axes(name: LeafName, shape: Shape) -> frozenset[int] | None:
    """How many more axes than its name implies a leaf may have; None if AdamW trains it."""
    found: set[int] = set()
    for extra in range(len(shape) - 1):
        for axes in combinations(range(len(shape)), extra):
            entry = look_up(name, without(shape, axes))
            if entry.layout == "":
                return None
            if entry.sure:
                found.add(extra)
    return frozenset(found)


def _all_show(leaves: Sequence[Leaf], options: Sequence[Axes]) -> bool:
    """Whether kernels of several shapes and all vectors next to them have the one layer axis."""
    kernels = {x.shape for x in leaves if look_up(x.name, x.shape).layout != ""}
    vectors = {x.shape for x in leaves} - kernels
    if len(options) != 1 or len(kernels) < 2 or not vectors:
        return False
    length = next(iter(kernels))[options[0][0]]
    return all(length in shape for shape in vectors)


def _assign(leaves: Sequence[Leaf], kernels: Sequence[Leaf], choice: Axes) -> None:
    """Assigns the axes to the kernels, and to other leaves of the module that have them."""
    module = next(m for m in kernels[0].modules if all(m in leaf.modules for leaf in kernels))
    for leaf in kernels:
        leaf.stack = _axes(leaf, choice)
    for leaf in leaves:
        if leaf.stack is None and module in leaf.modules:
            same = _lengths(leaf, choice) == _lengths(kernels[0], choice)
            leaf.stack = _axes(leaf, choice) if same else ()


def _lengths(leaf: Leaf, axes: Axes) -> list[int]:
    rank = len(leaf.shape)
    return [leaf.shape[axis] for axis in axes if -rank <= axis < rank]


def _axes(leaf: Leaf, choice: Axes) -> Axes:
    """Axes of one leaf, counted from the front."""
    return tuple(sorted(axis % len(leaf.shape) for axis in choice))
