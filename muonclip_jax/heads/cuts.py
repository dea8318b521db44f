"""Which kernels of a tree are cut, and how: attention blocks, read whole from their shapes."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from muonclip_jax._fitting import normalized_axes
from muonclip_jax._names import read_path
from muonclip_jax._paths import join
from muonclip_jax._specs import MatrixSpec
from muonclip_jax.heads.choices import choices_of, query_shape
from muonclip_jax.heads.finding import Rule, find_blocks
from muonclip_jax.heads.kernels import Choice, Reading
from muonclip_jax.heads.layouts import AttentionLayout, Projection
from muonclip_jax.heads.leaves import MisfitError, RefusalError, Shape, kernel_of
from muonclip_jax.heads.matrices import ATTENTION, Cut, cuts_of


def attention_cuts(
    leaves: Mapping[str, Any],
    specs: Mapping[str, MatrixSpec | None],
    hidden: Iterable[str],
    *,
    attention: str,
    scan_axis: int,
    head_dim: int | None,
    blocks: tuple[Rule, ...] | None,
) -> dict[str, Cut]:
    """Returns the specs that attention layouts give to kernels, by path.

    Args:
        leaves: The parameters by path, without an outer "params" level.
        specs: What names say of those leaves that may be cut: their spec, None where that is open.
            Leaves that AdamW trains or that a rule decides are not among them.
        hidden: Paths of masked leaves.
        attention: A name of `ATTENTION`.
        scan_axis: Where stacked layers sit.
        head_dim: Features of one head where shapes cannot tell.
        blocks: What `block_rules` returned.

    Returns:
        Path -> spec and description of the leaves that are cut otherwise than by name.

    Raises:
        ValueError: If a block cannot be read, or part of it is masked.
    """
    cut = ATTENTION[attention]
    if cut is None:
        return {}
    masked = {path: Shape((1, 1)) for path in hidden}
    cuts: dict[str, Cut] = {}
    for block in find_blocks({**masked, **leaves}, blocks, strict=False):
        if not block.selected:
            continue
        prefix = block.path + "/" if block.path else ""
        table = tuple(
            (name, specs[prefix + name]) for name in block.leaves if prefix + name in specs
        )
        needed = _kernel_names(block.layout, block.leaves)
        if not any(name in needed for name, _ in table):
            continue
        missing = [name for name in needed if prefix + name in masked]
        if missing:
            raise ValueError(
                f"attention={attention!r} reads attention block {block.path!r} "
                f"({block.layout.name}) whole, and {prefix + missing[0]!r} is masked here. Let all "
                "its kernels go to Muon, or pass weight_dimension_numbers="
                "infer_dimension_numbers(params, rules), made of the whole tree."
            )
        shapes = tuple(
            (name, tuple(leaf.shape))
            for name, leaf in block.leaves.items()
            if prefix + name not in masked
        )
        try:
            name = read_path(prefix + needed[0])
            stacked = name.stacked or (name.grouped and scan_axis != 0)
            found = _block_cuts(
                block.layout, shapes, table, attention, scan_axis, stacked, head_dim
            )
        except MisfitError as misfit:
            raise ValueError(
                f"attention={attention!r} cannot cut the kernels of attention block "
                f"{block.path!r} ({block.layout.name}): {misfit}. A rule for its kernels, such as "
                f'("{prefix}{next(iter(needed))}$", MatrixSpec((0, 1))), comes before layouts.'
            ) from None
        cuts |= {prefix + name: cut for name, cut in found}
    return cuts


def _kernel_names(layout: AttentionLayout, leaves: Mapping[str, Any]) -> list[str]:
    """Returns the names of the kernels that a layout speaks of."""
    names: list[str] = []
    for path in dict.fromkeys(layout.paths):
        found = kernel_of(leaves, path)
        if found is not None:
            names.append(join(filter(None, (path, found[0]))))
    return names


@functools.lru_cache(maxsize=1024)
def _block_cuts(
    layout: AttentionLayout,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    table: tuple[tuple[str, MatrixSpec | None], ...],
    attention: str,
    scan_axis: int,
    stacked: bool,
    head_dim: int | None,
) -> tuple[tuple[str, Cut], ...]:
    """Returns the cuts of one block's kernels by their name in it; equal blocks are read once."""
    leaves = {name: Shape(shape) for name, shape in shapes}
    specs = dict(table)
    found: dict[tuple[tuple[str, Cut], ...], list[tuple[Choice, Reading]]] = {}
    misfits: list[MisfitError] = []
    for choice in choices_of(layout, leaves, _stackings(layout, leaves, scan_axis)):
        try:
            reading = choice.read()
            cuts = tuple(cuts_of(choice, reading, specs, attention))
        except MisfitError as misfit:
            misfits.append(misfit)
        else:
            found.setdefault(cuts, []).append((choice, reading))
    found = _preferred(found, lambda _, reading: reading.agrees)
    found = _preferred(found, lambda choice, _: bool(choice.stack) == stacked)
    fewest = min((len(c.stack) for pairs in found.values() for c, _ in pairs), default=0)
    found = _preferred(found, lambda choice, _: len(choice.stack) == fewest)
    if head_dim is not None and len(found) > 1:
        found = _preferred(found, lambda _, reading: _features_a_head(reading) == head_dim)
    if len(found) == 1:
        return next(iter(found))
    if found:
        heads = sorted({choice.heads for pairs in found.values() for choice, _ in pairs})
        shown = ", ".join(map(str, heads[:8])) + (", ..." if len(heads) > 8 else "")
        raise MisfitError(
            f"its shapes allow {shown} heads. Say how many features a head has: "
            f"MatrixRules(attention={attention!r}, head_dim=64), or for one block "
            "blocks=[(pattern, AttentionLayout(..., head_dim=64))]"
        )
    refusal = next((misfit for misfit in misfits if isinstance(misfit, RefusalError)), None)
    by_name = attention == "split" and all(_is_cut(p, leaves, specs) for p in layout.projections)
    if refusal is None and by_name:
        return ()
    raise refusal or (misfits[0] if misfits else MisfitError("its kernels have too few axes"))


def _preferred(found: dict[Any, list[Any]], wanted: Callable[..., bool]) -> dict[Any, list[Any]]:
    """Returns those readings that are as wanted, or all where none is."""
    kept = {cuts: [pair for pair in pairs if wanted(*pair)] for cuts, pairs in found.items()}
    return {cuts: pairs for cuts, pairs in kept.items() if pairs} or found


def _stackings(
    layout: AttentionLayout, leaves: Mapping[str, Shape], scan_axis: int
) -> list[tuple[int, ...]]:
    """Returns axes that layers may be stacked on."""
    if layout.stack_axes is not None:
        return [layout.stack_axes]
    if scan_axis:
        return [(), (scan_axis,)]
    return [tuple(range(n)) for n in range(max(len(query_shape(layout, leaves)) - 1, 0))]


def _features_a_head(reading: Reading) -> int:
    """Returns the features of one query, those with rotation included."""
    segments = [s for _, found in reading.projections for s in found.segments]
    sizes = {s.role: s.size for s in segments if s.role in ("query", "query_alone")}
    return sum(sizes.values())


def _is_cut(
    projection: Projection,
    leaves: Mapping[str, Shape],
    specs: Mapping[str, MatrixSpec | None],
) -> bool:
    """Whether a projection has one part only, or its name has cut it into its parts already."""
    found = kernel_of(leaves, projection.path)
    if len(projection.parts) == 1 or found is None:
        return True
    spec = specs.get(join(filter(None, (projection.path, found[0]))))
    if spec is None:
        return False
    axes = {axis for group in normalized_axes(spec) for axis in group}
    batch = math.prod(n for axis, n in enumerate(found[1].shape) if axis not in axes)
    return bool(spec.splits) or (batch > 1 and batch % len(projection.parts) == 0)
