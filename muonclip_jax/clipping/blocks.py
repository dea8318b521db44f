"""Which blocks a clip will touch: parameters and maxima put side by side, errors both ways."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from muonclip_jax._paths import array_leaves, flatten_with_paths
from muonclip_jax._typing import Tree
from muonclip_jax.clipping.maxima import Recorded, read_maxima, trailing_shape
from muonclip_jax.heads.builtin import NORM_NAMES
from muonclip_jax.heads.finding import FoundBlock, Rule, find_blocks, strip_outer
from muonclip_jax.heads.leaves import Shape
from muonclip_jax.heads.plan import BlockPlan
from muonclip_jax.heads.reading import read_block


@dataclasses.dataclass(frozen=True)
class NamedLeaves:
    """A tree of parameters as leaves by path.

    Args:
        paths: Path of every leaf in flatten order, without an outer "params" level.
        leaves: The leaves in the same order.
        treedef: What puts them together again.
        masked: Paths that `optax.masked` or `optax.multi_transform` hid.
    """

    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    treedef: Any
    masked: tuple[str, ...]

    @property
    def by_path(self) -> dict[str, Any]:
        """Path -> leaf."""
        return dict(zip(self.paths, self.leaves, strict=True))

    def replaced(self, new: Mapping[str, Any]) -> Tree:
        """Returns the tree with some leaves exchanged."""
        pairs = zip(self.paths, self.leaves, strict=True)
        return jax.tree.unflatten(self.treedef, [new.get(path, leaf) for path, leaf in pairs])


_NORMS = tuple(name for pair in NORM_NAMES for name in pair)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def named_leaves(tree: Tree) -> NamedLeaves:
    """Returns the leaves of a tree by their path."""
    pairs, treedef = array_leaves(tree), jax.tree.structure(tree)
    everything, _ = flatten_with_paths(tree, is_leaf=_is_masked)
    return NamedLeaves(
        paths=tuple(strip_outer(path) for path, _ in pairs),
        leaves=tuple(leaf for _, leaf in pairs),
        treedef=treedef,
        masked=tuple(strip_outer(path) for path, leaf in everything if _is_masked(leaf)),
    )


def _inside(path: str, block: str) -> bool:
    return not block or path == block or path.startswith(block + "/")


def _listed(paths: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return (", ".join(repr(path) for path in paths[:limit]) or "none") + more


_MASKED = (
    " Parts of the tree are masked here: under optax.multi_transform or optax.masked QK-Clip "
    "sees only one group of parameters. Put it at the end of the outer chain, or call "
    "apply_qk_clip after optax.apply_updates, so that it sees queries and keys, kernels and "
    "biases. Where whole blocks are frozen, select the others with blocks= (muonclip: "
    "qk_clip_blocks=)."
)


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
                f"Attention block {block.path!r} is only partly visible: {_listed(hidden)} "
                f"{'is' if len(hidden) == 1 else 'are'} hidden.{_MASKED}"
            )
    if not any(block.selected for block in found):
        raise ValueError(
            f"No attention block was found in parameters {_listed(params.paths)}. Expected a query "
            "and a key projection side by side, such as 'attention/query/kernel' and "
            "'attention/key/kernel'. Where they have other names, say so: "
            "blocks=[(pattern, AttentionLayout(...))] (muonclip: qk_clip_blocks=). To train "
            "without the clip, leave it out (muonclip: qk_clip_threshold=None)."
            + (_MASKED if params.masked else "")
        )
    return found


def assign_maxima(
    found: Sequence[FoundBlock], modules: Sequence[str], masked: bool
) -> dict[str, tuple[str, ...]]:
    """Returns which modules recorded for which selected block.

    A recording belongs to the block of its own path; where there is none, to the nearest block
    around it, for some models record inside a submodule of the attention.

    Raises:
        ValueError: If a recording has no block, or a selected block no recording.
    """
    paths = [block.path for block in found]
    assigned: dict[str, tuple[str, ...]] = {module: (module,) for module in modules}
    for module in modules:
        if module in paths:
            continue
        owners = [path for path in paths if _inside(module, path)]
        if not owners:
            raise ValueError(
                f"A maximum was recorded for {module!r}, and no attention block has that path. "
                f"Blocks are: {_listed(paths)}. Where its projections have other names, say so: "
                "blocks=[(pattern, AttentionLayout(...))]." + (_MASKED if masked else "")
            )
        owner = max(owners, key=len)
        if owner not in modules:
            assigned[owner] = (*assigned.get(owner, ()), module)
    for block in found:
        if block.selected and block.path not in assigned:
            raise ValueError(
                f"Attention block {block.path!r} ({block.layout.name}) has no maximum. Maxima are "
                f"there for: {_listed(modules)}. Record one for it, or select the blocks to clip "
                "with blocks=, as in blocks='decoder/.*attention$'."
            )
    return {block.path: assigned[block.path] for block in found if block.selected}


def _shapes(arrays: Sequence[Any]) -> tuple[Shape, ...]:
    return tuple(Shape(tuple(getattr(x, "shape", ()))) for x in arrays)


@functools.lru_cache(maxsize=64)
def _plans(
    params: NamedLeaves,
    recorded: tuple[tuple[str, tuple[Shape, ...]], ...],
    rules: tuple[Rule, ...] | None,
) -> tuple[tuple[BlockPlan, tuple[str, ...]], ...]:
    """Returns every block's plan and the modules that recorded for it, from shapes alone."""
    found = find_in(params, rules)
    shapes = dict(recorded)
    if rules is not None:
        # A block that is hidden as a whole, frozen for example, is not among those selected.
        paths = [block.path for block in found]
        hidden = [m for m in shapes if any(_inside(path, m) for path in params.masked)]
        shapes = {m: x for m, x in shapes.items() if m in paths or m not in hidden}
    assigned = assign_maxima(found, list(shapes), bool(params.masked))
    plans: list[tuple[BlockPlan, tuple[str, ...]]] = []
    for block in found:
        if block.selected:
            modules = assigned[block.path]
            shape = trailing_shape([x for module in modules for x in shapes[module]])
            plans.append((read_block(block.layout, block.path, block.leaves, shape), modules))
    return tuple(plans)


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
    maxima = read_maxima(max_logits)
    planned = _plans(
        dataclasses.replace(params, leaves=_shapes(params.leaves), treedef=None),
        tuple((module, _shapes(arrays)) for module, arrays in maxima.items()),
        rules,
    )
    recorded = {
        plan.path: [x for module in modules for x in maxima[module]] for plan, modules in planned
    }
    return tuple(plan for plan, _ in planned), recorded
