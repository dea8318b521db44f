"""Which axes of which leaf hold stacked layers, read from the leaves that are stacked together.

`nn.scan` and its relatives give every parameter of a layer one more axis, of one length, at one
place. So the kernels of a stack are those below one module that all have more axes than their names
ask for, and the axis is the one on which all of them have the same length. Only leaves of rank two
or more that Muon trains are asked, so that a tree without the others is read the same way.

Where several axes agree, what the layers do decides: a layer that is repeated reads what it writes.
Where that leaves several, or none agrees, the axes are open, and `MatrixRules(scan_axis=...)` says
which they are.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from muonclip_jax.heads.names import LeafName
from muonclip_jax.routing import words
from muonclip_jax.routing.layouts import without
from muonclip_jax.routing.leaves import Leaf
from muonclip_jax.routing.scan_axis import Axes, ScanAxis, allowed, given_axes
from muonclip_jax.routing.table import look_up

#: Path -> axes of the kernels of one stack.
Found = dict[str, Axes]


@lru_cache(maxsize=65536)
def extra_axes(name: LeafName, shape: tuple[int, ...]) -> frozenset[int] | None:
    """How many axes more than its name asks for a leaf may have; None if it is no evidence.

    Leaves that AdamW trains are none, and neither are those whose names say nothing.

    Example:
        >>> from muonclip_jax.heads.names import read_path
        >>> extra_axes(read_path("layers/mlp/up_proj/kernel"), (3, 8, 32))
        frozenset({1})
    """
    found = set()
    for extra in range(len(shape) - 1):
        for axes in itertools.combinations(range(len(shape)), extra):
            told = look_up(name, without(shape, axes))
            if told is None:
                continue
            row, letters = told
            if not letters:
                return None
            if row.weak:
                continue
            found.add(extra)
    return frozenset(found) or None


@dataclass
class Stacks:
    """The stacks of a tree, as they are found.

    Args:
        scan_axis: What the user says.
        widths: Widths of the model's token embeddings.
        axes: Path -> axes of stacked layers; () for a leaf of no stack.
        open: Path -> the axes that are possible, for leaves where that is open.
    """

    scan_axis: ScanAxis
    widths: frozenset[int]
    axes: dict[str, Axes] = field(default_factory=dict)
    open: dict[str, tuple[Axes, ...]] = field(default_factory=dict)

    def solve(self, module: str, leaves: Sequence[Leaf]) -> None:
        """Finds the axes of the leaves below a module together, or asks the modules in it."""
        extras = {leaf.path: extra_axes(leaf.name, leaf.shape) for leaf in leaves}
        kernels = [leaf for leaf in leaves if extras[leaf.path] is not None]
        known = bool(kernels)
        if known:
            common = frozenset.intersection(*[extras[leaf.path] or frozenset() for leaf in kernels])
        else:  # no name says how many axes a kernel has: a stack is what all leaves show alike
            kernels = [leaf for leaf in leaves if _may_be_kernel(leaf)]
            common = frozenset({1} if all(len(leaf.shape) > 2 for leaf in kernels) else ())
        if not kernels:
            return
        contained = all(self._contained(leaf) for leaf in kernels)
        for extra in sorted(common, key=lambda n: (n == 0, n) if contained else (False, n)):
            if extra == 0:
                if len(common) > 1 and not contained and not _repeats(kernels, {}):
                    continue
                self.axes |= {leaf.path: () for leaf in kernels}
                self.solve(module, [leaf for leaf in leaves if extras[leaf.path] is None])
                return
            found = self._narrowed(kernels, self._candidates(kernels, extra))
            if len(found) == 1 and (known or contained or _show(leaves, kernels, found[0])):
                self._assign(leaves, kernels[0], found[0])
                return
            if found and (known or contained):
                self.open |= {k.path: tuple(axes[k.path] for axes in found) for k in kernels}
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
        """Whether the path says that layers are stacked here."""
        given = given_axes(self.scan_axis, leaf.path)
        return leaf.name.stacked or (given not in (None, (0,)) and leaf.name.grouped)

    def _candidates(self, kernels: Sequence[Leaf], extra: int) -> list[Found]:
        """The axes on which all kernels have the same lengths; those that say the same once."""
        fewest = min(len(leaf.shape) for leaf in kernels)
        given = {given_axes(self.scan_axis, leaf.path) for leaf in kernels}
        if len(given) > 1:
            return []
        front = itertools.combinations(range(fewest), extra)
        choices = itertools.chain(front, itertools.combinations(range(-fewest, 0), extra))
        found: dict[object, Found] = {}
        for choice in allowed(given.pop(), list(choices), extra, fewest):
            axes = {k.path: tuple(sorted(a % len(k.shape) for a in choice)) for k in kernels}
            lengths = {tuple(leaf.shape[a] for a in axes[leaf.path]) for leaf in kernels}
            read = tuple(_read(leaf, axes[leaf.path]) for leaf in kernels)
            if len(lengths) == 1 and None not in read:
                found.setdefault(read, axes)
        return list(found.values())

    def _narrowed(self, kernels: Sequence[Leaf], found: list[Found]) -> list[Found]:
        """Those of several choices with which a layer reads what it writes."""

        def directed(axes: Found) -> bool:
            sides = {direction(leaf.name) for leaf in kernels}
            return {"i", "o"} <= sides and _repeats(kernels, axes)

        def closed(axes: Found) -> bool:
            read, written = zip(*[_sizes(leaf, axes[leaf.path]) for leaf in kernels], strict=True)
            return set(read) == set(written)

        def wide(axes: Found) -> bool:
            return all(map(reaches, kernels, axes.values()))

        def reaches(leaf: Leaf, axes: Axes) -> bool:
            sizes, side = _sizes(leaf, axes), direction(leaf.name)
            return bool(self.widths & ({sizes[side == "o"]} if side else set(sizes)))

        first = kernels[0]
        one_shape = all(leaf.shape == first.shape for leaf in kernels)
        for test in (directed, closed, wide):
            if len(found) > 1:
                kept = [axes for axes in found if test(axes)]
                # One shape is square by chance too: alone it only confirms the usual axis.
                if (
                    test is closed
                    and one_shape
                    and not (len(kept) == 1 and 0 in kept[0][first.path])
                ):
                    continue
                found = kept or found
        return found

    def _assign(self, leaves: Sequence[Leaf], first: Leaf, found: Found) -> None:
        """Gives the kernels their axes, and every other leaf beside them that has them too."""
        self.axes |= found
        place = found[first.path]
        for leaf in leaves:
            if leaf.path in found:
                continue
            # The same places from the front, or from the end; of nested stacks perhaps some.
            shift = len(leaf.shape) - len(first.shape)
            fitting = (
                tuple(axis + by for axis in some)
                for count in range(len(place), 0, -1)
                for by in (0, shift)
                for some in itertools.combinations(place, count)
                if all(
                    0 <= axis + by < len(leaf.shape) and leaf.shape[axis + by] == first.shape[axis]
                    for axis in some
                )
            )
            self.axes[leaf.path] = next(fitting, ())

    def adopt(self, leaves: Sequence[Leaf]) -> None:
        """Settles open leaves by those beside them.

        That is by a stack whose axes have the same lengths, or by a matrix of the transposed shape:
        one of the two leads to the hidden layer, the other back.
        """
        beside: dict[str, set[tuple[Axes, tuple[int, ...]]]] = {}
        for leaf in leaves if self.open else ():
            for module in leaf.modules if leaf.path in self.axes else ():
                beside.setdefault(module, set()).add((self.axes[leaf.path], leaf.shape))
        for leaf in leaves:
            for module in leaf.modules[1:] if leaf.path in self.open else ():
                near = beside.get(module, set())
                fitting = {
                    option
                    for option in self.open[leaf.path]
                    for axes, shape in near
                    if (axes == option and all(shape[a] == leaf.shape[a] for a in axes))
                    or without(shape, axes) == without(leaf.shape, option)[::-1]
                }
                if len(fitting) == 1:
                    self.axes[leaf.path] = fitting.pop()
                    del self.open[leaf.path]
                if fitting or any(axes for axes, _ in near):
                    break


def find_stacks(
    leaves: Sequence[Leaf], scan_axis: ScanAxis, plain: frozenset[str], widths: frozenset[int]
) -> Stacks:
    """Finds the axes of stacked layers of all leaves of rank two or more.

    Args:
        leaves: The leaves that nothing else decides.
        scan_axis: What the user says.
        plain: Paths of leaves that are known not to be stacked.
        widths: Widths of the model's token embeddings.
    """
    stacks = Stacks(scan_axis, widths)
    open_ = []
    for leaf in leaves:
        named = _named_axes(leaf)
        if named is not None or leaf.path in plain:
            stacks.axes[leaf.path] = named or ()
        elif len(leaf.shape) > 1:
            open_.append(leaf)
    stacks.solve("", open_)
    stacks.adopt(open_)
    return stacks


def _named_axes(leaf: Leaf) -> Axes | None:
    """The axes that the framework calls layers; None where its names leave that open."""
    if leaf.axes is None:
        return None
    stacked = tuple(i for i, name in enumerate(leaf.axes) if re.fullmatch(words.STACK_AXIS, name))
    told = all(leaf.axes) and any(re.fullmatch(words.WIDTH_AXIS, name) for name in leaf.axes)
    return stacked if stacked or told else None


def _may_be_kernel(leaf: Leaf) -> bool:
    told = look_up(leaf.name, leaf.shape)
    return told is None or bool(told[1])


def _show(leaves: Sequence[Leaf], kernels: Sequence[Leaf], found: Found) -> bool:
    """Whether kernels of several shapes and all vectors beside them have the axis of layers."""
    (axis,) = found[kernels[0].path]
    others = [leaf.shape for leaf in leaves if leaf.path not in found]
    length = kernels[0].shape[axis]
    several = len({leaf.shape for leaf in kernels}) > 1
    return several and bool(others) and all(length in shape for shape in others)


def _read(leaf: Leaf, axes: Axes) -> str | None:
    """The layout with "b" for the layers, or None where the name does not fit what is left."""
    told = look_up(leaf.name, without(leaf.shape, axes))
    if told is None and extra_axes(leaf.name, leaf.shape) is None:
        return f"{axes}"
    if told is None or not told[1]:
        return None
    letters = iter(told[1])
    return "".join("b" if axis in axes else next(letters) for axis in range(len(leaf.shape)))


def _sizes(leaf: Leaf, axes: Axes) -> tuple[int, int]:
    """How many features one layer's kernel reads and makes."""
    told = look_up(leaf.name, without(leaf.shape, axes))
    pairs = list(zip(without(leaf.shape, axes), told[1], strict=True)) if told and told[1] else []
    return (
        math.prod(n for n, letter in pairs if letter == "i"),
        math.prod(n for n, letter in pairs if letter == "o"),
    )


@lru_cache(maxsize=8192)
def direction(name: LeafName) -> str:
    """Whether a kernel reads the hidden state ("i"), writes it ("o"), or its name is silent."""
    if re.fullmatch(r".*_b(?:_proj)?", name.role):
        return ""
    if re.fullmatch(words.READS, name.role):
        return "i"
    return "o" if re.fullmatch(words.WRITES, name.role) else ""


def _repeats(kernels: Sequence[Leaf], axes: Found) -> bool:
    """Whether the kernels write something that they read, as far as their names tell."""
    sizes = {"i": set[int](), "o": set[int](), "": set[int]()}
    for leaf in kernels:
        side = direction(leaf.name)
        sizes[side].add(_sizes(leaf, axes.get(leaf.path, ()))[side == "o"])
    return not sizes["i"] or not sizes["o"] or bool(sizes["i"] & sizes["o"])
