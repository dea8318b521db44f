"""Which kernels of a tree are cut, and how: attention blocks, read whole from their shapes."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from muonclip_jax._fitting import normalized_axes
from muonclip_jax._specs import MatrixSpec
from muonclip_jax.heads.finding import Rule, find_blocks
from muonclip_jax.heads.layouts import AttentionLayout, Projection
from muonclip_jax.heads.leaves import MisfitError, Shapes, kernel_name
from muonclip_jax.heads.matrices import ATTENTION, Cut, cuts_of
from muonclip_jax.heads.names import read_path
from muonclip_jax.heads.solver import Reading, attempts, preferred, refusal_in, solve

_SOME_MATRIX = np.broadcast_to(0.0, (1, 1))  # in the place of a masked leaf


def attention_cuts(
    leaves: Mapping[str, Any],
    specs: Mapping[str, MatrixSpec | None],
    hidden: Iterable[str],
    *,
    attention: str,
    scan_axis: int | None,
    head_dim: int | None,
    blocks: tuple[Rule, ...] | None,
) -> dict[str, Cut]:
    """Returns spec and description, by path, of leaves that layouts cut otherwise than names do.

    Args:
        leaves: The parameters by path, without an outer "params" level.
        specs: What names say of those leaves that may be cut: their spec, None where that is open.
            Leaves that AdamW trains or that a rule decides are not among them.
        hidden: Paths of masked leaves.
        attention: A name of `ATTENTION`.
        scan_axis: Where stacked layers sit; None tries every axis that the specs leave open.
        head_dim: Features of one head where shapes cannot tell.
        blocks: What `block_rules` returned.

    Raises:
        ValueError: If a block cannot be read, or part of it is masked.
    """
    if ATTENTION[attention] is None:
        return {}
    masked = dict.fromkeys(hidden, _SOME_MATRIX)
    cuts: dict[str, Cut] = {}
    for block in find_blocks({**masked, **leaves}, blocks, strict=False):
        names = (kernel_name(block.leaves, path) for path in block.layout.paths)
        needed = [block.paths[name] for name in names if name is not None]
        if not block.selected or not any(path in specs for path in needed):
            continue
        missing = [path for path in needed if path in masked]
        if missing:
            raise ValueError(
                f"attention={attention!r} reads attention block {block.path!r} "
                f"({block.layout.name}) whole, and {missing[0]!r} is masked here. Let all "
                "its kernels go to Muon, or pass weight_dimension_numbers="
                "infer_dimension_numbers(params, rules), made of the whole tree."
            )
        name = read_path(needed[0])
        stacked = name.stacked or (name.grouped and scan_axis != 0)
        try:
            found = _block_cuts(
                block.layout,
                tuple((n, x) for n, x in block.leaves.items() if block.paths[n] not in masked),
                tuple((n, specs[path]) for n, path in block.paths.items() if path in specs),
                attention,
                scan_axis,
                stacked,
                head_dim,
            )
        except MisfitError as misfit:
            raise ValueError(
                f"attention={attention!r} cannot cut the kernels of attention block "
                f"{block.path!r} ({block.layout.name}): {misfit}. A rule for its kernels, such as "
                f'("{needed[0]}$", MatrixSpec((0, 1))), comes before layouts.'
            ) from None
        cuts |= {block.paths[name]: cut for name, cut in found}
    return cuts


@functools.lru_cache(maxsize=1024)
def _block_cuts(
    layout: AttentionLayout,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    table: tuple[tuple[str, MatrixSpec | None], ...],
    attention: str,
    scan_axis: int | None,
    stacked: bool,
    head_dim: int | None,
) -> tuple[tuple[str, Cut], ...]:
    """Returns the cuts of one block's kernels by their name in it; equal blocks are read once."""
    leaves, specs = dict(shapes), dict(table)
    stackings = None if scan_axis is None else [(), (scan_axis,)]
    if scan_axis == 0:
        stackings = [
            tuple(range(n)) for n in range(max((len(x) for x in leaves.values()), default=0))
        ]
    tried = attempts(layout, leaves, None, stackings)
    found, misfits = solve(tried, lambda reading: tuple(cuts_of(reading, specs, attention)))
    found = preferred(found, lambda reading: reading.agrees)
    found = preferred(found, lambda reading: bool(reading.attempt.stack) == stacked)
    stacks = [len(r.attempt.stack) for readings in found.values() for r in readings]
    fewest = min(stacks, default=0)
    found = preferred(found, lambda reading: len(reading.attempt.stack) == fewest)
    if head_dim is not None and len(found) > 1:
        found = preferred(found, lambda reading: _features_a_head(reading) == head_dim)
    if len(found) == 1:
        return next(iter(found))
    if found:
        heads = sorted({r.attempt.heads for readings in found.values() for r in readings})
        shown = ", ".join(map(str, heads[:8])) + (", ..." if len(heads) > 8 else "")
        raise MisfitError(
            f"its shapes allow {shown} heads. Say how many features a head has: "
            f"MatrixRules(attention={attention!r}, head_dim=64), or for one block "
            "blocks=[(pattern, AttentionLayout(..., head_dim=64))]"
        )
    refusal = refusal_in(misfits)
    by_name = attention == "split" and all(_is_cut(p, leaves, specs) for p in layout.projections)
    if refusal is None and by_name:
        return ()
    raise refusal or (misfits[0] if misfits else MisfitError("its kernels have too few axes"))


def _features_a_head(reading: Reading) -> int:
    """Returns the features of one query, those with rotation included."""
    segments = [s for kernel in reading.kernels for s in kernel.segments]
    sizes = {s.role: s.size for s in segments if s.role in ("query", "query_alone")}
    return sum(sizes.values())


def _is_cut(p: Projection, shapes: Shapes, specs: Mapping[str, MatrixSpec | None]) -> bool:
    """Whether a projection has one part only, or its name has cut it into its parts already."""
    name = kernel_name(shapes, p.path)
    if len(p.parts) == 1 or name is None:
        return True
    spec = specs.get(name)
    if spec is None:
        return False
    axes = {axis for group in normalized_axes(spec) for axis in group}
    batch = math.prod(n for axis, n in enumerate(shapes[name]) if axis not in axes)
    return bool(spec.splits) or (batch > 1 and batch % len(p.parts) == 0)
