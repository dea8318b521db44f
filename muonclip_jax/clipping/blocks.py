"""Which blocks a clip will touch: parameters and maxima put side by side, errors both ways."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from muonclip_jax._tree import Tree, array_leaves, flatten_with_paths, is_masked, listed
from muonclip_jax.clipping.maxima import Recorded, read_maxima, trailing_shape
from muonclip_jax.heads.builtin import NORM_NAMES
from muonclip_jax.heads.clips import read_block
from muonclip_jax.heads.finding import FoundBlock, Rule, find_blocks, strip_outer
from muonclip_jax.heads.plan import BlockPlan

_NORMS = tuple(name for pair in NORM_NAMES for name in pair)
_MASKED = (
    " Parts of the tree are masked here: under optax.multi_transform or optax.masked QK-Clip "
    "sees only one group of parameters. Put it at the end of the outer chain, or call "
    "apply_qk_clip after optax.apply_updates, so that it sees queries and keys, kernels and "
    "biases. Where whole blocks are frozen, select the others with blocks= (muonclip: "
    "qk_clip_blocks=)."
)
_ADAPTERS = (
    " The tree holds low-rank adapters. The clip has to scale the kernels that they adapt as well: "
    "give it a tree that holds both."
)


@dataclasses.dataclass(frozen=True)
class NamedLeaves:
    """A tree of parameters as leaves by path."""

    paths: tuple[str, ...]  # in flatten order, without an outer "params" level
    leaves: tuple[Any, ...]  # in the same order
    treedef: Any
    masked: tuple[str, ...]  # what `optax.masked` or `optax.multi_transform` hid

    @property
    def by_path(self) -> dict[str, Any]:
        """Path -> leaf."""
        return dict(zip(self.paths, self.leaves, strict=True))

    def replaced(self, new: Mapping[str, Any]) -> Tree:
        """Returns the tree with some leaves exchanged."""
        pairs = zip(self.paths, self.leaves, strict=True)
        return jax.tree.unflatten(self.treedef, [new.get(path, leaf) for path, leaf in pairs])


def named_leaves(tree: Tree) -> NamedLeaves:
    """Returns the leaves of a tree by their path."""
    pairs, treedef = array_leaves(tree), jax.tree.structure(tree)
    everything, _ = flatten_with_paths(tree, is_leaf=is_masked)
    return NamedLeaves(
        paths=tuple(strip_outer(path) for path, _ in pairs),
        leaves=tuple(leaf for _, leaf in pairs),
        treedef=treedef,
        masked=tuple(strip_outer(path) for path, leaf in everything if is_masked(leaf)),
    )


def _inside(path: str, block: str) -> bool:
    return not block or path == block or path.startswith(block + "/")


def find_in(params: NamedLeaves, rules: tuple[Rule, ...] | None) -> list[FoundBlock]:
    """Finds the attention blocks of a tree.

    Raises:
        ValueError: If there is none, a rule matches nothing, or parts of one are masked.
    """
    found = find_blocks(params.by_path, rules)
    for block in found:
        prefix = block.path + "/" if block.path else ""
        hidden = [
            path
            for path in params.masked
            if any(_inside(path, prefix + name) for name in (*block.layout.paths, *_NORMS))
        ]
        if hidden and block.selected:
            raise ValueError(
                f"Attention block {block.path!r} is only partly visible: {listed(hidden)} "
                f"{'is' if len(hidden) == 1 else 'are'} hidden.{_MASKED}"
            )
    if not any(block.selected for block in found):
        adapters = any("lora_" in path.lower() for path in params.paths)
        raise ValueError(
            f"No attention block was found in parameters {listed(params.paths)}. Expected a query "
            "and a key projection side by side, such as 'attention/query/kernel' and "
            "'attention/key/kernel'. Where they have other names, say so: "
            "blocks=[(pattern, AttentionLayout(...))] (muonclip: qk_clip_blocks=). To train "
            "without the clip, leave it out (muonclip: qk_clip_threshold=None)."
            f"{_ADAPTERS if adapters else ''}"
            f"{_MASKED if params.masked else ''}"
        )
    return found


def match_maxima(
    found: Sequence[FoundBlock],
    max_logits: Tree,
    masked: Sequence[str],
    rules: tuple[Rule, ...] | None,
) -> Recorded:
    """Returns what was recorded for each selected block, by its path.

    A recording belongs to the block of its own path. One called `max_logits` may also come from a
    submodule: where there is no block of its path, it belongs to the nearest block around it. A
    block that is masked as a whole, frozen for example, is not among those that `rules` select.

    Raises:
        ValueError: If a recording has no block, or a selected block no recording.
    """
    recorded, sown = read_maxima(max_logits)
    paths = [block.path for block in found]
    matched = {path: list(recorded[path]) for path in paths if path in recorded}
    for module in [module for module in recorded if module not in paths]:
        owners = [path for path in paths if _inside(module, path)] if sown else []
        if rules is not None and any(_inside(path, module) for path in masked):
            continue
        if not owners:
            raise ValueError(
                f"A maximum was recorded for {module!r}, and no attention block has that path. "
                f"Blocks are: {listed(paths)}. Where its projections have other names, say so: "
                "blocks=[(pattern, AttentionLayout(...))]." + (_MASKED if masked else "")
            )
        owner = max(owners, key=len)
        if owner not in recorded:
            matched.setdefault(owner, []).extend(recorded[module])
    for block in found:
        if block.selected and block.path not in matched:
            raise ValueError(
                f"Attention block {block.path!r} ({block.layout.name}) has no maximum. Maxima are "
                f"there for: {listed(recorded)}. Record one for it, or select the blocks to "
                "clip with blocks=, as in blocks='decoder/.*attention$'."
            )
    return {block.path: matched[block.path] for block in found if block.selected}


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A leaf of which only the shape is known."""

    shape: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def _find(shapes: NamedLeaves, rules: tuple[Rule, ...] | None) -> list[FoundBlock]:
    return find_in(shapes, rules)


def plan_clip(
    params: NamedLeaves, max_logits: Tree, rules: tuple[Rule, ...] | None
) -> tuple[tuple[BlockPlan, ...], Recorded]:
    """Plans a clip: what is scaled in each block, and what was recorded for it.

    Only names and shapes are looked at; the same ones give the same plan without a second look.

    Raises:
        ValueError: If blocks, maxima and rules do not fit together.
    """
    if not params.paths:
        return (), {}
    shapes = tuple(_Shape(tuple(getattr(x, "shape", ()))) for x in params.leaves)
    found = _find(dataclasses.replace(params, leaves=shapes, treedef=None), rules)
    matched = match_maxima(found, max_logits, params.masked, rules)
    plans = [
        read_block(block, trailing_shape(matched[block.path])) for block in found if block.selected
    ]
    return tuple(plans), matched
