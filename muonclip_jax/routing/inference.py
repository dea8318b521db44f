"""Decides for each leaf of a tree, by structure if it is conclusive, otherwise by name.

Whether the input axes of a kernel are first differs between libraries ("kernel" and "w" have them
first, in Flax and Haiku; "weight" has them last, in Equinox, torch and haliax), so structure takes
precedence: a bias has the shape of the output axes, and kernels applied to the hidden state of a
block have the block's width as input axis.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set

from muonclip_jax.heads.finding import Shape
from muonclip_jax.routing.leaves import (
    GENERIC,
    Decision,
    Leaf,
    lengths,
    possible_layouts,
    to_spec,
    with_layers,
    without,
)
from muonclip_jax.routing.stacks import (
    KEY_VALUE,
    WIDTH_AXIS,
    extra_axes,
    find_heads_first,
    find_stacks,
)
from muonclip_jax.routing.table import DENSE, EMBEDDING_TABLE, MOE, direction, fits, look_up, word

_PLAIN = r"(?:dense|linear|lin|fc|proj|projection)\d*"
_BATCH_AXIS = r"(?:.*_)?(?:experts?|exp)(?:_.*)?|(?:num_)?qkv|(?:num_)?kv_stack"
_TABLE_AXIS = r"(?:.*_)?(?:vocab|positions?)(?:_.*)?"
_NOT_TOKENS = word(
    "pos|position|positions|positional|posemb|posembed|wpe|type|types|segment|segments|time|layer|"
    "relative|rel|codebook|codebooks"
)
_OUTPUT_FIRST = r"weight(?:_.*)?"  # names of kernels in libraries that have the output axis first
_FLIP = str.maketrans("io", "oi")


def infer(leaves: Sequence[Leaf], hidden: Set[str]) -> None:
    """Finds the decision for every leaf of a tree, with masked leaves at the paths `hidden`."""
    free = [leaf for leaf in leaves if leaf.ruled is None]
    find_heads_first(leaves)
    _find_biases(leaves, hidden)
    for leaf in free:  # whose shape shows that they are not stacked
        extra = extra_axes(leaf.name, leaf.shape)
        if _is_window(leaf) or (leaf.bias and extra and min(extra) >= len(leaf.bias)):
            leaf.stack = ()
    find_stacks(free, frozenset(columns for _, columns in token_tables(free)))
    _find_biases(leaves, hidden)  # again, without stacked layers
    _find_widths(leaves)
    for leaf in leaves:
        leaf.decision = _decide(leaf)


def token_tables(leaves: Iterable[Leaf]) -> list[Shape]:
    """Shapes of the token embedding tables, without position and type tables."""
    return [
        leaf.shape
        for leaf in leaves
        if len(leaf.shape) == 2
        and not leaf.biased
        and look_up(leaf.name, leaf.shape).why == EMBEDDING_TABLE
        and not fits(_NOT_TOKENS, leaf.name.leaf, leaf.name.role, *leaf.name.scope[-1:])
    ]


def _find_biases(leaves: Sequence[Leaf], hidden: Set[str]) -> None:
    """Finds `bias` and `biased` of every kernel, and which leaves are biases."""
    by_path = {leaf.path: leaf for leaf in leaves}
    for leaf in leaves:
        leaf.bias, leaf.is_bias = None, False
    for leaf in leaves:
        if len(leaf.shape) < 2:
            continue
        prefix = leaf.modules[0] + "/" if leaf.modules[0] else ""
        last, slash, wrapper = leaf.path[len(prefix) :].partition("/")
        names = ["bias", f"{leaf.name.leaf}_bias", *(["b"] if leaf.name.leaf in GENERIC else [])]
        names += [last[:-1] + "b"] if last.endswith("_w") else []
        paths = [prefix + name + end for end in ("", slash + wrapper) for name in names]
        found = next((by_path[x] for x in paths if x in by_path and x != leaf.path), None)
        leaf.biased = found is not None or not hidden.isdisjoint(paths)
        if found is None:
            continue
        shape = found.layer
        if shape not in (leaf.layer[: len(shape)], leaf.layer[-len(shape) :]):
            shape = tuple(n for n in shape if n > 1)  # without axes to broadcast over
        if shape:
            leaf.bias, found.is_bias = shape, True


def _find_widths(leaves: Sequence[Leaf]) -> None:
    """Finds what kernels show together: `width`, `output_first` and `beside`."""
    free = [leaf for leaf in leaves if leaf.ruled is None and len(leaf.layer) > 1]
    kernels = [leaf for leaf in free if look_up(leaf.name, leaf.layer).layout != ""]
    common: dict[str, set[int]] = {}  # the lengths that all kernels below a module have
    sides: dict[str, list[str]] = {}
    grids: dict[str, set[Shape]] = {}
    for leaf in kernels:
        unknown = look_up(leaf.name, leaf.layer).layout is None
        outer = {leaf.layer[0], leaf.layer[-1]} if unknown else {*leaf.layer} - {1}
        for module in leaf.modules:
            common[module] = common.get(module, outer) & outer
            sides.setdefault(module, []).append(direction(leaf.name))
        leaf.beside = grids.setdefault(leaf.modules[:2][-1], set())
        leaf.beside.add(leaf.layer)
    votes: Counter[tuple[str, bool]] = Counter()
    for leaf in kernels:
        for module in leaf.modules:  # of the smallest block around it
            if len(common[module]) == 1 and len(sides[module]) > 2:
                leaf.width = next(iter(common[module])) if {"i", "o"} <= {*sides[module]} else None
            if not common[module] or leaf.width is not None:
                break
        shape, side, vote = leaf.layer, direction(leaf.name), _bias_is_first(leaf)
        told = side and len(shape) == 2 and not fits(KEY_VALUE, leaf.name.role)
        if vote is None and told and leaf.width is not None and shape.count(leaf.width) == 1:
            vote = (shape[-1] == leaf.width) == (side == "i")
        if vote is not None:
            votes[leaf.name.leaf, vote] += 1
    for leaf in leaves:
        last = leaf.name.leaf
        habit = fits(_OUTPUT_FIRST, last)
        leaf.output_first = habit != (votes[last, not habit] > 1 and not votes[last, habit])


def _bias_is_first(leaf: Leaf) -> bool | None:
    """Whether a bias shows that the output axis is first; None if it shows nothing."""
    shape, bias = leaf.layer, leaf.bias or ()
    if not 0 < len(bias) < len(shape) or _is_block_diagonal(leaf):
        return None
    first, last = shape[: len(bias)] == bias, shape[-len(bias) :] == bias
    return None if first == last else first


def _is_block_diagonal(leaf: Leaf) -> bool:
    """Whether the bias of a kernel shows that it is `(blocks, inputs, outputs)`."""
    shape, bias = leaf.layer, leaf.bias
    each = (*shape[:-2], *shape[-1:])
    unlike = bias not in (shape[:-1], shape[1:]) or shape[-2] == shape[-1]
    return len(shape) > 2 and (bias == (math.prod(each),) or (bias == each and unlike))


def _is_by_head(leaf: Leaf) -> bool:
    """Whether a kernel is `(heads, inputs, outputs)`, beside kernels of all heads' features."""
    heads, inputs, outputs = leaf.layer
    features = {n for other in leaf.beside if len(other) == 2 for n in other}
    return inputs == outputs and heads not in features and heads * inputs in features


def _is_window(leaf: Leaf) -> bool:
    """Whether a leaf is a convolution by its shape: a small square window before the channels."""
    name, shape, entry = leaf.name, leaf.shape, look_up(leaf.name, leaf.shape)
    if len(shape) not in (4, 5) or name.grouped or name.leaf not in ("kernel", "w"):
        return False
    if fits(MOE, *name.scope, name.role) or len(leaf.bias or (1,)) > 1:
        return False
    if entry.layout is None:  # but not Gemma's (2, heads, inputs, head_dim)
        named = shape[0] != 2 or name.leaf != "w"
    else:
        named = re.match("conv|patch|matrix", entry.why) is not None
    return named and _is_square(shape[:-2], shape[-2:])


def _is_square(window: Shape, channels: Shape) -> bool:
    return len(set(window)) == 1 and window[0] <= min(16, max(channels))


def _decide(leaf: Leaf) -> Decision:
    name, rank, shape, axes = leaf.name, len(leaf.shape), leaf.layer, leaf.stack or ()
    entry = look_up(name, shape if len(shape) > 1 else leaf.shape)
    if entry.why == EMBEDDING_TABLE and leaf.biased:  # tables have no bias
        entry = look_up(name._replace(role="dense", scope=()), shape)
    why, letters, readings = entry.why, entry.layout, list[str]()
    if rank < 2:
        return Decision(None, "scalar" if rank == 0 else "vector", decays=False)
    if not leaf.trained:
        return Decision(None, "integers or bools: nothing to train", decays=False)
    if leaf.options is not None and not _is_block_diagonal(leaf):
        found = [(look_up(name, without(leaf.shape, x)).layout, x) for x in leaf.options]
        readings = [with_layers(layout, x, rank) for layout, x in found if layout]
        readings += possible_layouts(leaf.shape)
        why = "stacked layers on an axis that the stack does not show"
    elif leaf.is_bias:
        return Decision(None, "bias", decays=False)
    elif letters == "":
        return Decision(None, why, entry.decays)
    elif sum(n > 1 for n in shape) < 2:
        return Decision(None, "vector", decays=name.leaf in GENERIC)
    elif leaf.axes and (named := _by_axis_names(leaf, leaf.axes)) is not None:
        return named
    elif name.stacked and letters and not axes and look_up(name, shape[1:]).layout == "":
        why = "a gate that may be a stacked router or a stack of experts"
        readings = possible_layouts(shape)
    elif why in ("", "matrix") and not axes and _is_window(leaf):
        why, letters = "convolution", "i" * (rank - 1) + "o"
    elif letters is None:
        why, letters = "read from its shape", _by_structure(leaf)
        if letters is None:
            why = f"no known name, rank {rank}"
            readings = [with_layers(x, axes, rank) for x in possible_layouts(shape)]
    if letters is None or readings:
        return Decision(None, why, readings=tuple(dict.fromkeys(readings)))
    if letters == "ioo" and _is_by_head(leaf):
        letters = "bio"
    if not _is_block_diagonal(leaf):
        letters = _oriented(leaf, letters)
    why = "stacked matrices" if axes and why == "matrix" else why
    inputs, outputs = (math.prod(lengths(letters, shape, side)) for side in "io")
    fused = (
        len(shape) == 2
        and outputs == 3 * inputs
        and not (entry.sure and not fits(_PLAIN, name.role))
    )
    # Beside an output projection, and no MLP.
    fused = fused and leaf.beside & {(inputs, inputs), shape[::-1]} == {(inputs, inputs)}
    letters = with_layers(letters, axes, rank)
    cure, spec = (to_spec(letters, leaf.shape, parts) for parts in (3, entry.parts))
    flag = "fused query, key and value, in this order" if fused else ""
    return Decision(spec, why, flag=flag, cure=cure if fused else None)


def _by_axis_names(leaf: Leaf, names: Sequence[str]) -> Decision | None:
    """The layout by the framework's axis names, if they include the hidden state's axis."""
    axes = leaf.stack or ()
    if not all(name or i in axes for i, name in enumerate(names)):
        return None
    if fits(_TABLE_AXIS, *names):
        return Decision(None, "a table by the name of an axis")
    # "i" is the hidden state's axis, and "o" the others.
    letters = "".join(
        "b" if i in axes or fits(_BATCH_AXIS, name) else "i" if fits(WIDTH_AXIS, name) else "o"
        for i, name in enumerate(names)
    )
    if letters.count("i") != 1 or "o" not in letters:
        return None
    first = "o" if leaf.output_first else "i"
    side = direction(leaf.name) or ("i" if letters.replace("b", "")[0] == first else "o")
    return Decision(to_spec(letters if side == "i" else letters.translate(_FLIP)), "named axes")


def _by_structure(leaf: Leaf) -> str | None:
    """The layout of a kernel with unknown name, up to orientation, if exactly one is possible."""
    shape, bias, rank = leaf.layer, leaf.bias, len(leaf.layer)
    if bias is not None:
        if _is_block_diagonal(leaf):
            return "b" * (rank - 2) + "io"
        first = _bias_is_first(leaf)
        if first is None or (first and len(bias) > 1 and not leaf.output_first):
            return None  # both may be stacked on the first axis
        return "i" * (rank - len(bias)) + "o" * len(bias)
    if leaf.name.stacked:
        return None
    if rank in (4, 5) and leaf.name.leaf == "weight" and _is_square(shape[2:], shape[:2]):
        return "o" + "i" * (rank - 1)
    if rank != 3:
        return None
    # (width, heads, head_dim) beside (heads, head_dim, width).
    grids = [other for other in leaf.beside if len(other) == 3]
    heads = {(w, size) for w, n, size in grids if (n, size, w) in grids}
    reads, writes = (shape[0], shape[2]) in heads, (shape[2], shape[1]) in heads
    if reads != writes:
        return "ioo" if reads else "iio"
    dense = fits(DENSE, leaf.name.role) and shape.count(leaf.width) == 1 and shape[0] == leaf.width
    return "ioo" if dense else None


def _oriented(leaf: Leaf, letters: str) -> str:
    """A layout with the input axes where the tree shows them, else where the library has them."""
    shape, sides, last = leaf.layer, letters.replace("b", ""), leaf.name.leaf
    if not re.fullmatch("i+o+|o+i+", sides):
        return letters
    batch = tuple(axis for axis, letter in enumerate(letters) if letter == "b")
    turned = with_layers(sides[::-1], batch, len(letters))
    fitting = [x for x in (letters, turned) if lengths(x, shape, "o") == leaf.bias]
    if len(fitting) == 1:
        return fitting[0]
    side = direction(leaf.name)
    if side and len(shape) > 2 and (fits(_OUTPUT_FIRST, last) or last == leaf.name.role):
        hidden = [axis for axis, n in enumerate(shape) if n == leaf.width and axis not in batch]
        if len(hidden) == 1:
            read = "".join(x if x == "b" else "io"[i not in hidden] for i, x in enumerate(letters))
            return read if side == "i" else read.translate(_FLIP)
    return turned if leaf.output_first and sides.startswith("i") else letters
