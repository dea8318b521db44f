"""Evidence about kernels in a tree: biases, widths of blocks, and head sizes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from muonclip_jax.heads.finding import Shape
from muonclip_jax.routing.leaves import GENERIC, Leaf, at, without
from muonclip_jax.routing.stacks import Axes
from muonclip_jax.routing.table import direction, fits, look_up

_KEY_VALUE = r"(?:.*_)?(?:k|v|kv|key|value|wk|wv|wkv)(?:_.*)?"


@dataclass(frozen=True)
class Evidence:
    """Evidence about the kernels of a tree, by path."""

    biases: Mapping[str, tuple[str, Shape]]  # path of the bias, and its shape in one layer
    #: The width of the hidden state in the kernel's block.
    widths: dict[str, int] = field(default_factory=dict[str, int])
    #: Last names -> whether kernels so called have the output first.
    output_first: dict[str, bool] = field(default_factory=dict[str, bool])
    #: Module -> `(width, head_dim)` of kernels `(width, heads, head_dim)` in it that stand beside
    #: one of `(heads, head_dim, width)`.
    heads: dict[str, set[tuple[int, int]]] = field(default_factory=dict[str, set[tuple[int, int]]])

    def bias(self, leaf: Leaf) -> Shape | None:
        """The shape of a kernel's bias."""
        return self.biases.get(leaf.path, ("", None))[1]


def biases_of(leaves: Sequence[Leaf], stacks: Mapping[str, Axes]) -> dict[str, tuple[str, Shape]]:
    """Paths and shapes of biases, without stacked layers, by the paths of their kernels."""
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    found: dict[str, tuple[str, Shape]] = {}
    for leaf in leaves:
        if len(leaf.shape) < 2:
            continue
        prefix = leaf.modules[0] + "/" if leaf.modules[0] else ""
        last, _, wrapper = leaf.path[len(prefix) :].partition("/")
        names = ["bias", f"{leaf.name.leaf}_bias", *(["b"] if leaf.name.leaf in GENERIC else [])]
        names += [last[:-1] + "b"] if last.endswith("_w") else []
        for end in ("", f"/{wrapper}") if wrapper else ("",):
            path = next((p for x in names if (p := prefix + x + end) in shapes), leaf.path)
            if path == leaf.path:
                continue
            axes, bias = stacks.get(leaf.path, ()), shapes[path]
            shift = len(bias) - len(leaf.shape)
            for places in (axes, tuple(axis + shift for axis in axes)):
                if at(bias, places) == at(leaf.shape, axes):
                    bias = without(bias, places)
                    break
            while len(bias) > 1 and bias[-1] == 1:  # a window's axes
                bias = bias[:-1]
            if bias:
                found[leaf.path] = path, bias
            break
    return found


def by_bias(shape: Shape, bias: Shape | None) -> bool | None:
    """Whether a bias shows that the output axis is first; None if it shows nothing."""
    if bias is None or not 0 < len(bias) < len(shape):
        return None
    first, last = shape[: len(bias)] == bias, shape[-len(bias) :] == bias
    return None if first == last else first


def gather(leaves: Sequence[Leaf], stacks: Mapping[str, Axes]) -> Evidence:
    """Reads a tree whose stacks are known."""
    evidence = Evidence(biases_of(leaves, stacks))
    kernels: list[tuple[Leaf, Shape]] = []
    for leaf in leaves:
        shape = without(leaf.shape, stacks.get(leaf.path, ()))
        if len(shape) > 1 and ((told := look_up(leaf.name, shape)) is None or told[1]):
            kernels.append((leaf, shape))
    _find_widths(kernels, evidence)
    votes: Counter[tuple[str, bool]] = Counter()
    grids: dict[str, set[Shape]] = {}
    for leaf, shape in kernels:
        vote = by_bias(shape, evidence.bias(leaf))
        width, side = evidence.widths.get(leaf.path), direction(leaf.name)
        # In cross-attention keys and values read another hidden state.
        told = side and len(shape) == 2 and not fits(_KEY_VALUE, leaf.name.role)
        if vote is None and told and width is not None and shape.count(width) == 1:
            vote = (shape[-1] == width) == (side == "i")
        if vote is not None:
            votes[leaf.name.leaf, vote] += 1
        if len(shape) == 3:
            grids.setdefault(leaf.modules[:2][-1], set()).add(shape)
    for name in {leaf.name.leaf for leaf, _ in kernels}:
        habit = output_first(name)
        turned = votes[name, not habit] > 1 and not votes[name, habit]
        evidence.output_first[name] = habit != turned
    for module, found in grids.items():
        evidence.heads[module] = {(w, size) for w, n, size in found if (n, size, w) in found}
    return evidence


def output_first(name: str) -> bool:
    """Whether libraries that use this name for a kernel have its output axis first."""
    return fits(r"weight(?:_.*)?", name)


def _find_widths(kernels: Sequence[tuple[Leaf, Shape]], evidence: Evidence) -> None:
    """Finds the one length that all kernels of the smallest block around a kernel have."""
    common: dict[str, set[int]] = {}
    sides: dict[str, list[str]] = {}
    for leaf, shape in kernels:
        told = look_up(leaf.name, shape)
        if told is not None and fits("b*oio", told[1]):  # sizes of heads stand on outer axes
            outer = {shape[told[1].index("i")]}
        else:
            merged = len(shape) == 2 or told is None
            outer = {shape[0], shape[-1]} if merged else set(shape) - {1}
        for module in leaf.modules:
            common[module] = common.get(module, outer) & outer
            sides.setdefault(module, []).append(direction(leaf.name))
    for leaf, _ in kernels:
        for module in leaf.modules:
            told = len(sides[module]) > 2 and {"i", "o"} <= set(sides[module])
            if len(common[module]) == 1 and told:
                (evidence.widths[leaf.path],) = common[module]
            if not common[module] or leaf.path in evidence.widths:
                break
