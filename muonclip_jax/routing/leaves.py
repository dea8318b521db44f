"""What is known of a leaf: its names, shape and axis names; and layouts, a letter for each axis.

Names are normalised: "MoeBlock_0" and "MoEBlock" are "moe_block". In a layout, "i" is an input axis
(summed over), "o" an output axis, and "b" a batch axis, with one matrix per entry. A query kernel
`(d_model, heads, head_dim)` is "ioo".
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._specs import MatrixSpec, Split
from muonclip_jax._tree import Tree, array_leaves
from muonclip_jax.heads.finding import Shape
from muonclip_jax.heads.layouts import spelling

Axes: TypeAlias = tuple[int, ...]
#: What a decision may depend on: path, shape, whether the dtype is inexact, and names of axes.
Key: TypeAlias = tuple[str, Shape, bool, tuple[str, ...] | None]
#: Last names that say nothing about the module; the name before them does.
GENERIC = ("kernel", "weight", "weights", "w")
# What haliax and Equinox add to a leaf's path: "weight/0" and "weight/array".
_WRAPPER = re.compile(rf"((?:^|[/.])(?:{'|'.join(GENERIC)}))/(?:\d+|array)$")
_SUFFIX = re.compile(r"(?!w_)(.*[^_])_(kernel|weights?|w)")  # "query_w" is "w" of "query"
# Names of a module list or of scanned layers. Followed by a number they are a list.
_CONTAINER = re.compile(r"(?:.*_)?(?:layers|blocks|stack|stacked|scan|scanned|repeats?|stages)")
# A name that, with a number, is one layer; class names ("MoeBlock_0") do not count.
_LAYER = re.compile(r"(?:[a-z0-9_]*_)?(?:res|encoder|decoder)?(?:layer|block|stage|unit|h)s?_?\d+")


class LeafName(NamedTuple):
    """The normalised names of one parameter."""

    leaf: str  # the last name
    role: str  # the most telling name: the last one that is neither generic nor a number
    scope: tuple[str, ...]  # the names before the role, outermost first
    stacked: bool  # below a container of layers without a layer number, as from `nn.scan`
    grouped: bool  # the same, perhaps with numbered modules ("layers/layer_0") scanned together


@dataclass(frozen=True)
class Decision:
    """The decision for one leaf."""

    spec: MatrixSpec | None  # its matrices; None is AdamW
    why: str
    decays: bool = True  # whether weight decay applies
    readings: tuple[str, ...] = ()  # where it is open what the leaf is: the layouts that fit
    flag: str = ""  # what a reader should check
    cure: MatrixSpec | None = None  # what a rule then gives


@dataclass(eq=False)
class Leaf:
    """A leaf, and what the tree shows of it, in the order in which it is found."""

    path: str
    shape: Shape
    trained: bool  # whether it holds floating-point or complex numbers
    axes: tuple[str, ...] | None  # the names that its framework gives its axes
    name: LeafName
    modules: tuple[str, ...]  # that contain it, the innermost first; "" is the whole tree
    ruled: Decision | None  # by a user's rule; the leaf is then no evidence for others
    scan_axis: Axes | None  # the axes of stacked layers that the user gives
    stack: Axes | None = None  # those axes, once known
    options: tuple[Axes, ...] | None = None  # those that fit, where it stays ambiguous
    bias: Shape | None = None  # the shape of its bias, in one layer
    biased: bool = False  # whether it has a bias, perhaps a masked one
    is_bias: bool = False  # whether it is such a bias
    width: int | None = None  # of the hidden state in its block
    output_first: bool = False  # whether kernels with this last name have the output axis first
    beside: set[Shape] = field(default_factory=set[Shape])  # kernels in its block
    decision: Decision = Decision(None, "")

    @property
    def layer(self) -> Shape:
        """The shape in one layer."""
        return without(self.shape, self.stack or ())


@lru_cache(maxsize=65536)
def read_path(path: str) -> tuple[LeafName, tuple[str, ...]]:
    """Reads the names and modules of a path such as "decoder/block_0/attention/query/kernel"."""
    path = _WRAPPER.sub(r"\1", path)
    outer = path.split("/")[:-1]
    modules = tuple("/".join(outer[:n]) for n in range(len(outer), -1, -1))
    parts: list[tuple[str, bool, bool]] = []  # name, whether it has a number, or is one layer
    for part in re.split(r"[/.]", path):
        if part.isdigit():
            parts[-1:] = [(name, True, True) for name, _, _ in parts[-1:]]
        elif part not in ("params", "~", ""):
            name = re.sub(r"_\d+$", "", spelling(part))
            parts.append((name, name != spelling(part), _LAYER.fullmatch(part) is not None))
    names = ["one_expert" if x[1] and x[0] in ("expert", "experts") else x[0] for x in parts]
    names = names or [""]
    lists = [i for i, x in enumerate(parts[:-1]) if _CONTAINER.fullmatch(x[0]) and not x[1]]
    stacked = bool(lists) and not any(one_layer for _, _, one_layer in parts[lists[0] :])
    if len(names) > 1 and (suffix := _SUFFIX.fullmatch(names[-1])):
        names[-1:] = suffix.groups()
    role = len(names) - (2 if names[-1] in GENERIC and len(names) > 1 else 1)
    return LeafName(names[-1], names[role], tuple(names[:role]), stacked, bool(lists)), modules


def read_tree(params: Tree) -> list[tuple[Key, Any]]:
    """Returns the leaves and their arrays; haliax, Linen's boxes and NNX give names of axes."""
    named: list[tuple[str, ...] | None] = []
    for node in jax.tree.leaves(params, is_leaf=lambda x: _axis_names(x) is not None):
        names = _axis_names(node)
        named += [names] * (1 if names is None else len(jax.tree.leaves(node)))
    leaves: list[tuple[Key, Any]] = []
    for (path, x), names in zip(array_leaves(params), named, strict=True):
        axes = names if names is not None and len(names) == len(x.shape) else None
        trained = bool(jnp.issubdtype(x.dtype, jnp.inexact))
        leaves.append(((path, tuple(x.shape), trained, axes), x))
    return leaves


def _axis_names(node: Any) -> tuple[str, ...] | None:
    if isinstance(node, jax.Array | dict | list | tuple):
        return None
    names: object = None
    if isinstance(getattr(node, "axes", None), tuple) and hasattr(node, "array"):
        names = tuple(getattr(axis, "name", None) for axis in node.axes)
    elif callable(getattr(node, "get_metadata", None)):
        metadata = node.get_metadata()
        found = map(metadata.get, ("sharding_names", "out_sharding", "sharding"))
        names = next(filter(None, found), None)
    elif callable(getattr(node, "unbox", None)):
        names = getattr(node, "names", None)
    if not isinstance(names, tuple | list) or not names:
        return None
    return tuple(spelling(name) if isinstance(name, str) else "" for name in names)


@lru_cache(maxsize=8192)
def to_spec(letters: str, shape: Shape = (), parts: int = 1) -> MatrixSpec:
    """The spec of a layout; the last output axis falls into equal parts where it can."""
    reduction, output = (tuple(a for a, x in enumerate(letters) if x == side) for side in "io")
    splits = ()
    if parts > 1 and shape[output[-1]] % parts == 0:
        splits = (Split(output[-1], (shape[output[-1]] // parts,) * parts),)
    return MatrixSpec(MuonDimensionNumbers(reduction, output), splits)


def without(shape: Shape, axes: Iterable[int]) -> Shape:
    """The shape of one layer: all but the axes of stacked layers."""
    return tuple(n for axis, n in enumerate(shape) if axis not in axes)


def with_layers(letters: str, axes: Axes, rank: int) -> str:
    """The layout of a stack, from that of one layer."""
    rest = iter(letters)
    return "".join("b" if axis in axes else next(rest) for axis in range(rank))


def lengths(letters: str, shape: Shape, side: str) -> tuple[int, ...]:
    """The lengths of the axes with a letter."""
    return tuple(n for n, letter in zip(shape, letters, strict=True) if letter == side)


def possible_layouts(shape: Shape) -> list[str]:
    """The possible layouts of a leaf with unknown name, the usual ones first."""
    rank = len(shape)
    batch, more = "b" * (rank - 3), rank - 1
    found = [batch + x for x in ("ioo", "iio", "bio")] + ["i" * more + "o", batch + "oii"]
    found += ["o" + "i" * more, "i" + "o" * more, batch + "oio", batch + "boi", batch + "ooi"]
    return list(dict.fromkeys([*found, "ib" + batch + "o", "io" + "b" + batch]))
