"""Which attention block each recorded maximum belongs to, and what a clip scales in each block.

Maxima may be Flax's intermediates (nested dicts of tuples named `max_logits`), an NNX state of
boxed tuples, a tree of modules, or a flat dict by path such as "decoder/block_0/attention".
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence, Set
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from muonclip_jax._tree import (
    MAX_LOGITS,
    Shaped,
    Tree,
    array_leaves,
    containers,
    flatten_with_paths,
    is_masked,
    listed,
)
from muonclip_jax.attention.maxima import finite_max
from muonclip_jax.heads.clips import read_block
from muonclip_jax.heads.finding import (
    FoundBlock,
    Rule,
    Shape,
    find_blocks,
    kernel_name,
    strip_outer,
)
from muonclip_jax.heads.layouts import NORM_NAMES
from muonclip_jax.heads.plan import BlockPlan
from muonclip_jax.routing import MatrixRules, batch_axes

#: Module path -> the arrays that were recorded there.
Recorded: TypeAlias = dict[str, list[jax.Array]]

_MASKED = (
    " Parts of the tree are masked here: under optax.multi_transform or optax.masked QK-Clip "
    "gets only one group of parameters. Put it at the end of the outer chain, or call "
    "apply_qk_clip after optax.apply_updates, so that it gets queries and keys, kernels and "
    "biases. Where whole blocks are frozen, select the others with blocks= (muonclip: "
    "qk_clip_blocks=)."
)
_ADAPTERS = (
    " The tree holds low-rank adapters. The clip has to scale the kernels that they adapt as well: "
    "give it a tree that holds both."
)


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Returns the leaves of a tree in flatten order, by path without an outer "params" level."""
    return [(strip_outer(path), leaf) for path, leaf in array_leaves(tree)]


def find_in(
    tree: Tree, rules: tuple[Rule, ...] | None, *, whole: bool = True
) -> tuple[list[FoundBlock], Set[str]]:
    """Returns the attention blocks of a tree, and the modules whose kernels are masked or None.

    If the tree must be `whole`, it is an error if there is no block or parts of one are masked.
    """
    shapes = tuple((path, tuple(leaf.shape)) for path, leaf in named_leaves(tree))
    nodes = flatten_with_paths(tree, is_leaf=lambda x: x is None or is_masked(x))[0]
    masked = tuple(strip_outer(path) for path, node in nodes if is_masked(node))
    absent = {strip_outer(path) for path, node in nodes if node is None or is_masked(node)}
    there = {path for path, shape in shapes if len(shape) > 1}
    frozen = {x for path in absent for x in containers(path)}
    frozen -= {x for path in there for x in containers(path)}
    return (_find(shapes, masked, rules, whole) if shapes else []), frozen


@functools.lru_cache(maxsize=64)
def _find(
    shapes: tuple[tuple[str, Shape], ...],
    masked: tuple[str, ...],
    rules: tuple[Rule, ...] | None,
    whole: bool,
) -> list[FoundBlock]:
    leaves = {path: jax.ShapeDtypeStruct(shape, "f4") for path, shape in shapes}
    found = find_blocks(leaves, rules, strict=whole or not masked)
    stacks = _stacks(leaves) if any(len(shape) > 2 for _, shape in shapes) else {}
    for i, block in enumerate(found):
        name = kernel_name(block.leaves, block.layout.query.path)
        if name is not None and block.layout.query.parts == ("query",):
            found[i] = dataclasses.replace(block, stack=stacks.get(block.paths[name]))
    for block in found if masked and whole else ():
        names = (*block.layout.paths, *itertools.chain(*NORM_NAMES))
        parts = [f"{block.path}/{name}".removeprefix("/") for name in names]
        hidden = [path for path in masked if any(_inside(path, part) for part in parts)]
        if hidden and block.selected:
            raise ValueError(
                f"Attention block {block.path!r} is only partly visible: {listed(hidden)} "
                f"{'is' if len(hidden) == 1 else 'are'} hidden.{_MASKED}"
            )
    if whole and not any(block.selected for block in found):
        adapters = _ADAPTERS if any("lora_" in path.lower() for path in leaves) else ""
        raise ValueError(
            f"No attention block was found in parameters {listed(leaves)}. Expected a query "
            "and a key projection side by side, such as 'attention/query/kernel' and "
            "'attention/key/kernel'. If they have other names, give a layout: "
            "blocks=[(pattern, AttentionLayout(...))] (muonclip: qk_clip_blocks=). To train "
            "without the clip, leave it out (muonclip: qk_clip_threshold=None)."
            f"{adapters}{_MASKED if masked else ''}"
        )
    return found


def _stacks(leaves: dict[str, Any]) -> dict[str, Shape]:
    """Returns the stacked axes of every matrix by the default rules, if those suffice."""
    stacks = dict[str, Shape]()
    with contextlib.suppress(ValueError):
        for path, x, found in MatrixRules().decisions(leaves):
            if found.spec is not None:
                stacks[path] = batch_axes(found.spec, len(x.shape))
    return stacks


def _inside(path: str, block: str) -> bool:
    return not block or f"{path}/".startswith(block + "/")


def read_maxima(max_logits: Tree) -> tuple[Recorded, bool]:
    """Returns the recorded maxima of each module, and whether they are named `max_logits`.

    If any leaf is named `max_logits`, only such leaves are used. Otherwise every leaf must be an
    array at the path of its attention block, "" if the model itself is the attention block.
    """
    named = [(path.split("/"), leaf) for path, leaf in flatten_with_paths(max_logits)[0]]
    sown = any(MAX_LOGITS in names for names, _ in named)
    if not sown and len(named) == 1 and named[0][1] is max_logits:
        named = []
    found: Recorded = {}
    for names, leaf in named:
        while names and names[0] in ("params", "intermediates"):
            names = names[1:]
        if sown and MAX_LOGITS in names:
            names = names[: len(names) - 1 - names[::-1].index(MAX_LOGITS)]
        elif sown:
            continue
        found.setdefault("/".join(names), []).append(leaf)
    if not found:
        raise ValueError(
            f"max_logits contains no maxima. Expected leaves named {MAX_LOGITS!r}, as in what Flax "
            "returns as intermediates, or an array of (heads,) at each attention block, as in "
            f"{{'decoder/block_0/attention': array}}; got {max_logits!r:.80}. Record them with "
            "muonclip_jax.dot_product_attention, or capture them with muonclip_jax.linen or "
            "muonclip_jax.nnx."
        )
    for module, recorded in found.items():
        if not all(isinstance(x, Shaped) for x in recorded):
            raise ValueError(
                f"The maxima of {module!r} are {recorded}; expected arrays of (heads,). Write "
                "jnp.asarray(...)."
            )
    return found, sown


def match_maxima(
    found: Sequence[FoundBlock],
    max_logits: Tree,
    frozen: Set[str],
    rules: tuple[Rule, ...] | None,
) -> tuple[Recorded, dict[str, list[Shape]]]:
    """Returns the recordings of each selected block, by path, and their shapes, short ones first.

    A recording belongs to the block with the same path. One named `max_logits` may also come from a
    submodule: if no block has its path, it belongs to the nearest enclosing block. A block that is
    masked as a whole, for example frozen, is not selected.
    """
    recorded, sown = read_maxima(max_logits)
    paths = [block.path for block in found]
    matched = {path: list(recorded[path]) for path in paths if path in recorded}
    for module in [module for module in recorded if module not in paths]:
        owners = [path for path in paths if _inside(module, path)] if sown else []
        if rules is not None and module in frozen:
            continue
        if not owners:
            keys = ", ".join(f"{path!r}: (heads,)" for path in paths[:2])
            cure = f"Blocks are: {listed(paths)}. Write max_logits={{{keys}, ...}}. Where its "
            cure += "projections have other names, write blocks=[(pattern, AttentionLayout(...))]."
            if module in frozen:
                cure = "Its kernels are None or masked. If it is frozen, select the others with "
                cure += "blocks= (muonclip: qk_clip_blocks=), else put the clip last in the chain."
            raise ValueError(
                f"A maximum was recorded for {module!r}, where no attention block is. {cure}"
            )
        if (owner := max(owners, key=len)) not in recorded:
            matched.setdefault(owner, []).extend(recorded[module])
    selected = [block for block in found if block.selected]
    for block in selected:
        if block.path not in matched:
            raise ValueError(
                f"Attention block {block.path!r} ({block.layout.name}) has no maximum. Maxima were "
                f"recorded for: {listed(recorded)}. Record one for it, or select the blocks to "
                "clip with blocks=, as in blocks='decoder/.*attention$'."
            )
    matched = {block.path: matched[block.path] for block in selected}
    shapes = {path: {tuple(x.shape) for x in xs} for path, xs in matched.items()}
    return matched, {path: sorted(each, key=len) for path, each in shapes.items()}


def merge_recordings(arrays: Sequence[jax.Array], shape: Shape) -> jax.Array:
    """Returns the maximum over recordings and over the axes before `shape`, in float32 or wider."""
    reduced: list[jax.Array] = []
    for x in arrays:
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        reduced.append(finite_max(wide, range(len(x.shape) - len(shape))))
    return reduced[0] if len(reduced) == 1 else finite_max(jnp.stack(reduced), (0,))


def plan_clip(
    params: Tree, max_logits: Tree, rules: tuple[Rule, ...] | None
) -> tuple[tuple[BlockPlan, ...], Recorded]:
    """Returns what a clip scales in each block, and the recordings of each block."""
    found, frozen = find_in(params, rules)
    if not found:  # the tree is empty
        return (), {}
    matched, shapes = match_maxima(found, max_logits, frozen, rules)
    plans = (read_block(block, *shapes[block.path]) for block in found if block.selected)
    return tuple(plans), matched
