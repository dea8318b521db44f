"""Infers the axes of stacked layers from the leaves that are stacked together.

`nn.scan` and similar transformations add one axis of equal length and position to every parameter
of a layer. So the kernels of a stack are those below one module that all have more axes than their
names imply, and the layer axis is the one on which they all have the same length. Only leaves of
rank two or more that Muon trains are used, so a masked tree without the others gives the same
result.

If several axes qualify, those are used for which a layer's input width equals its output width. If
several remain, or none qualifies, the axes are ambiguous, and `MatrixRules(scan_axis=...)` is
needed.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from muonclip_jax.heads.finding import Shape
from muonclip_jax.routing.leaves import Leaf, LeafName, at, lengths, with_layers, without
from muonclip_jax.routing.table import direction, fits, look_up

#: Axes of stacked layers.
Axes: TypeAlias = tuple[int, ...]
#: `scan_axis=` as pairs of a pattern and axes; None reads them from the stacks.
ScanAxis: TypeAlias = tuple[tuple[str, Axes], ...] | None

_Group: TypeAlias = tuple[Sequence[Leaf], Sequence[Leaf], Sequence[Axes]]
_STACK_AXIS = r"(?:.*_)?(?:layers?|stages?|repeats?|blocks?|periods?|scan)"
WIDTH_AXIS = r"(?:embed|emb|embedding|hidden|model|d_model|model_dim)(?:_(?!vocab).*)?"


@lru_cache(maxsize=65536)
def extra_axes(name: LeafName, shape: Shape) -> frozenset[int] | None:
    """Possible numbers of axes in addition to those its name implies; None if it is no evidence.

    Leaves trained by AdamW are no evidence, nor are those with unknown names.

    Example:
        >>> from muonclip_jax.routing.leaves import read_path
        >>> extra_axes(read_path("layers/mlp/up_proj/kernel"), (3, 8, 32))
        frozenset({1})
    """
    found: set[int] = set()
    for extra in range(len(shape) - 1):
        for axes in itertools.combinations(range(len(shape)), extra):
            told = look_up(name, without(shape, axes))
            if told is not None and not told[1]:
                return None
            if told is not None and not told[0].weak:
                found.add(extra)
    return frozenset(found) or None


@dataclass
class Stacks:
    """The stacks of a tree, as they are found, by the paths of the leaves."""

    scan_axis: ScanAxis  # what the user says
    widths: frozenset[int]  # of the model's token embeddings
    axes: dict[str, Axes] = field(default_factory=dict[str, Axes])  # () for a leaf of no stack
    open: dict[str, tuple[Axes, ...]] = field(default_factory=dict[str, tuple[Axes, ...]])
    #: Leaves, the kernels among them, and options: what is settled at last.
    groups: list[_Group] = field(default_factory=list[_Group])

    def solve(self, module: str, leaves: Sequence[Leaf]) -> None:
        """Finds the axes of the leaves below a module together, or else of its submodules."""
        extras = {leaf: extra_axes(leaf.name, leaf.shape) for leaf in leaves}
        known = {leaf: extra for leaf, extra in extras.items() if extra is not None}
        kernels = list(known) or [leaf for leaf in leaves if _may_be_kernel(leaf)]
        if not kernels:
            return
        contained = {self._contained(leaf) for leaf in kernels}
        if known:
            common = frozenset.intersection(*known.values())
        else:  # no name says how many axes a kernel has: a stack is what all leaves show alike
            common = frozenset({1} if all(len(leaf.shape) > 2 for leaf in kernels) else ())
        inside = contained == {True}
        plain = any(0 in extra for extra in known.values()) and 0 not in common
        if len(contained) > 1 or (plain and not inside and not module):
            common = frozenset[int]()  # layers beside a stack
        for extra in sorted(common, key=lambda n: (n == 0, n) if inside else (False, n)):
            if extra == 0:
                if len(common) > 1 and not inside and not _repeats(kernels, ()):
                    continue
                self.axes |= {leaf.path: () for leaf in kernels}
                self.solve(module, [leaf for leaf in leaves if leaf not in known])
                return
            found = self._narrowed(kernels, self._candidates(kernels, extra), inside or not known)
            if len(found) == 1 and (known or inside or _show(leaves, kernels, found[0])):
                self._assign(leaves, kernels, found[0])
                return
            if found and (known or inside):
                self.groups.append((leaves, kernels, found))
                return
        if len(leaves) == 1:
            (self.open if known else self.axes)[leaves[0].path] = ()
            return
        depth = module.count("/") + 2 if module else 1
        below: dict[str, list[Leaf]] = {}
        for leaf in leaves:
            below.setdefault("/".join(leaf.path.split("/")[:depth]), []).append(leaf)
        for child, group in below.items():
            self.solve(child, group)

    def _contained(self, leaf: Leaf) -> bool:
        """Whether the path indicates stacked layers."""
        given = self._given(leaf)
        return leaf.name.stacked or (leaf.name.grouped and given not in (None, (0,)))

    def _given(self, leaf: Leaf) -> Axes | None:
        """The axes that the user gives for a leaf."""
        pairs = self.scan_axis or ()
        return next((axes for pattern, axes in pairs if re.search(pattern, leaf.path)), None)

    def _candidates(self, kernels: Sequence[Leaf], extra: int) -> list[Axes]:
        """The axes on which all kernels have the same lengths, without equivalent ones."""
        fewest = min(len(leaf.shape) for leaf in kernels)
        given = {self._given(leaf) for leaf in kernels}
        if len(given) > 1:
            return []
        front = itertools.combinations(range(fewest), extra)
        choices = [*front, *itertools.combinations(range(-fewest, 0), extra)]
        found: dict[tuple[str | None, ...], Axes] = {}
        for choice in _allowed(given.pop(), choices, extra, fewest):
            lengths = {tuple(leaf.shape[a] for a in _axes(leaf, choice)) for leaf in kernels}
            read = tuple(_read(leaf, _axes(leaf, choice)) for leaf in kernels)
            if len(lengths) == 1 and None not in read:
                found.setdefault(read, choice)
        return list(found.values())

    def _narrowed(self, kernels: Sequence[Leaf], found: list[Axes], shown: bool) -> list[Axes]:
        """The choices for which a layer's output width is an input width.

        If no path indicates a stack, lengths may be equal by chance, so a single choice is tested
        too.
        """
        first = kernels[0].shape
        one_shape = all(leaf.shape == first for leaf in kernels)

        def directed(choice: Axes) -> bool:
            return {"i", "o"} <= {direction(x.name) for x in kernels} and _repeats(kernels, choice)

        def closed(choice: Axes) -> bool:
            # One shape is square by chance too: it only confirms layers in front of it.
            read, written = zip(
                *[_sizes(leaf, _axes(leaf, choice)) for leaf in kernels], strict=True
            )
            front = 0 in _axes(kernels[0], choice) and first.count(first[0]) == 1
            return set(read) == set(written) and (front or not one_shape)

        def wide(choice: Axes) -> bool:
            return all(self.widths & _hidden(leaf, _axes(leaf, choice)) for leaf in kernels)

        tests = (directed, closed, wide)
        if not shown and self._given(kernels[0]) is None:
            found = [choice for choice in found if any(test(choice) for test in tests)]
        for test in tests:
            if len(found) > 1:
                found = [choice for choice in found if test(choice)] or found
        return found

    def _assign(self, leaves: Sequence[Leaf], kernels: Sequence[Leaf], choice: Axes) -> None:
        """Assigns the axes to the kernels, and to other leaves of the module that have them."""
        self.axes |= {leaf.path: _axes(leaf, choice) for leaf in kernels}
        first = kernels[0]
        for leaf in leaves:
            if leaf.path not in self.axes:
                fitting = (
                    _axes(leaf, some)
                    for count in range(len(choice), 0, -1)  # of nested stacks perhaps some
                    for some in itertools.combinations(choice, count)
                    if _lengths(leaf, some) == _lengths(first, some)
                )
                self.axes[leaf.path] = next(fitting, ())

    def adopt(self) -> None:
        """Resolves ambiguous kernels by the nearest enclosing stack, if exactly one option fits."""
        for leaves, kernels, options in self.groups:
            first = kernels[0]
            for module in first.modules[1:]:
                near = {axes for path, axes in self.axes.items() if axes and _in(path, module)}
                fitting = [x for x in options if _axes(first, x) in near]
                if len(fitting) == 1:
                    self._assign(leaves, kernels, fitting[0])
                if near:
                    break
            self.open |= {
                leaf.path: tuple(_axes(leaf, choice) for choice in options)
                for leaf in kernels
                if leaf.path not in self.axes
            }


def find_stacks(
    leaves: Sequence[Leaf], scan_axis: ScanAxis, plain: frozenset[str], widths: frozenset[int]
) -> Stacks:
    """Finds the axes of stacked layers of all leaves of rank two or more.

    Args:
        leaves: The leaves that no rule decides.
        scan_axis: The user's choice.
        plain: Paths of leaves that are known not to be stacked.
        widths: Widths of the model's token embeddings.
    """
    stacks = Stacks(scan_axis, widths)
    rest: list[Leaf] = []
    for leaf in leaves:
        named = [i for i, name in enumerate(leaf.axes or ()) if fits(_STACK_AXIS, name)]
        told = leaf.axes and all(leaf.axes) and any(fits(WIDTH_AXIS, x) for x in leaf.axes)
        if named or told or leaf.path in plain:
            stacks.axes[leaf.path] = tuple(named)
        elif len(leaf.shape) > 1:
            rest.append(leaf)
    stacks.solve("", rest)
    stacks.adopt()
    return stacks


def _axes(leaf: Leaf, choice: Axes) -> Axes:
    """Axes of one leaf, counted from the front."""
    return tuple(sorted(axis % len(leaf.shape) for axis in choice))


def _lengths(leaf: Leaf, choice: Axes) -> tuple[int | None, ...]:
    rank = len(leaf.shape)
    return at(leaf.shape, (axis + rank if axis < 0 else axis for axis in choice))


def _in(path: str, module: str) -> bool:
    return not module or path.startswith(module + "/")


def _allowed(given: Axes | None, choices: list[Axes], extra: int, rank: int) -> list[Axes]:
    """The choices that the user allows: the given axes, or more of them in nested stacks."""
    if given is None:
        return choices
    if any(not -rank <= axis < rank for axis in given[:extra]):
        return []
    if len(given) >= extra:
        return [given[:extra]]
    if given == (0,):
        return [tuple(range(extra))]
    wanted = {axis % rank for axis in given}
    return [axes for axes in choices if axes[0] >= 0 and wanted <= set(axes)]


def _may_be_kernel(leaf: Leaf) -> bool:
    told = look_up(leaf.name, leaf.shape)
    return told is None or bool(told[1])


def _show(leaves: Sequence[Leaf], kernels: Sequence[Leaf], choice: Axes) -> bool:
    """Whether kernels of several shapes and all vectors next to them have the layer axis."""
    length = kernels[0].shape[choice[0]]
    others = [leaf.shape for leaf in leaves if leaf not in kernels]
    several = len({leaf.shape for leaf in kernels}) > 1
    return several and bool(others) and all(length in shape for shape in others)


def _read(leaf: Leaf, axes: Axes) -> str | None:
    """The layout with "b" for the layers, or None if the name does not fit the other axes."""
    told = look_up(leaf.name, without(leaf.shape, axes))
    if told is None and extra_axes(leaf.name, leaf.shape) is None:
        return f"{axes}"
    if told is None or not told[1]:
        return None
    return with_layers(told[1], axes, len(leaf.shape))


def _sizes(leaf: Leaf, axes: Axes) -> tuple[int, int]:
    """Input and output features of one layer's kernel."""
    shape = without(leaf.shape, axes)
    told = look_up(leaf.name, shape)
    letters = told[1] if told and told[1] else "b" * len(shape)
    return math.prod(lengths(letters, shape, "i")), math.prod(lengths(letters, shape, "o"))


def _hidden(leaf: Leaf, axes: Axes) -> set[int]:
    """The sizes that may be the hidden state's."""
    sizes, side = _sizes(leaf, axes), direction(leaf.name)
    return {sizes[side == "o"]} if side else set(sizes)


def _repeats(kernels: Sequence[Leaf], choice: Axes) -> bool:
    """Whether an output size of the kernels is also an input size, as far as known by name."""
    sides = {side: [x for x in kernels if direction(x.name) == side] for side in "io"}
    read, written = (
        set[int]().union(*(_hidden(leaf, _axes(leaf, choice)) for leaf in sides[side]))
        for side in "io"
    )
    return not read or not written or bool(read & written)
