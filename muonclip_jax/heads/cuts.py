"""Division of attention kernels into matrices: whole, by part, or by head.

| name | query `(d, heads, size)` | GPT-2's `(d, 3 d)` | DeepSeek's `(rank, heads (nope + rope))` |
|---|---|---|---|
| "merged" | one matrix | by name | one matrix |
| "split" | one matrix | queries, keys, values | without rotation, with rotation |
| "per_head" | one per head | one per head of each | two per head |
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from muonclip_jax._specs import MatrixSpec, Split, matrix_shapes, normalize_spec, normalized_axes
from muonclip_jax.heads.finding import Shape, kernel_name
from muonclip_jax.heads.layouts import ROLES, VALUE_NAMES, AttentionLayout, Projection
from muonclip_jax.heads.plan import BlockPlan, LeafPlan, MisfitError, RefusalError, Segment
from muonclip_jax.heads.reading import Reading, solve

#: What `MatrixRules(attention=)` may be.
ATTENTION = ("merged", "split", "per_head")
#: A kernel's spec, and what its matrices are, for `describe_labels`.
Cut: TypeAlias = tuple[MatrixSpec, str]
#: Those of a block's kernels, by name in the block.
Cuts: TypeAlias = tuple[tuple[str, Cut], ...]


@functools.lru_cache(maxsize=1024)
def block_cuts(
    layout: AttentionLayout,
    shapes: tuple[tuple[str, Shape], ...],
    table: tuple[tuple[str, MatrixSpec | None], ...],
    attention: str,
    stacks: tuple[tuple[int, ...], ...],
    head_dim: int | None,
) -> Cuts:
    """Returns the splits of one block's kernels by name; results are cached for equal blocks.

    `table` has the specs of those that may be split, `stacks` the axes they may be stacked on.
    """
    leaves, specs = dict(shapes), dict(table)
    joint = not layout.own_keys and not all(ROLES[part] for part in layout.query.parts)
    if joint and layout.head_dim is None:
        layout = dataclasses.replace(layout, head_dim=head_dim)

    def finish(reading: Reading, plan: BlockPlan) -> tuple[tuple[int, ...], Cuts]:
        segments = [s for kernel in plan.leaves for s in kernel.segments]
        sizes = {s.role: s.size for s in segments if s.role in ("query", "query_alone")}
        misses = head_dim not in (None, sum(sizes.values()))
        cuts = tuple(_cuts_of(reading, plan, specs, attention == "per_head"))
        # A fused kernel with three outputs per input has three equal parts.
        whole = plan.leaves[layout.projections.index(layout.query)]
        wide = whole.total == len(whole.segments) * whole.shape[whole.input_axis]
        unequal = joint and wide and plan.heads != plan.kv_heads
        return (not plan.agrees, stacks.index(reading.stack_axes), misses, unequal), cuts

    found, misfits = solve(layout, leaves, finish, stacked=stacks)
    if len(found) == 1:
        return next(iter(found))
    if found:
        plans = [plan for plans in found.values() for plan in plans]
        sizes = {plan.heads: plan.head_dim for plan in plans}
        shown = ", ".join(f"{n} of {sizes[n]}" for n in sorted(sizes)[:8])
        # For example, near that of common models.
        heads, size = min(sizes.items(), key=lambda item: (item[0] == 1, abs(item[1] - 64)))
        cure, told = f"the head size, for {heads} heads ", f"head_dim={size}"
        cure += f"MatrixRules(attention={attention!r}, {told}), or for one block "
        if len({*sizes.values()}) == 1:
            cure, told = "the number of key heads: ", f"kv_heads={plans[0].kv_heads}"
        cure += f"blocks=[(pattern, AttentionLayout(..., {told}))]"
        more = ", ..." * (len(sizes) > 8)
        raise MisfitError(f"its shapes allow heads: {shown}{more} features. Give {cure}")
    if attention == "split" and not (misfits and type(misfits[0]) is RefusalError):
        # Names may have split every kernel of several parts into them already.
        kernels = ((kernel_name(leaves, p.path), len(p.parts)) for p in layout.projections)
        fused = [(specs.get(name), leaves[name], n) for name, n in kernels if name and n > 1]
        if all(
            spec and sum(m for m, *_ in matrix_shapes(spec, x)) % n == 0 for spec, x, n in fused
        ):
            return ()
    raise misfits[0] if misfits else MisfitError("its kernels have too few axes")


def _cuts_of(
    reading: Reading, plan: BlockPlan, specs: Mapping[str, MatrixSpec | None], by_head: bool
) -> Iterator[tuple[str, Cut]]:
    """Yields the splits of a block's kernels under one interpretation, by name in the block."""
    kernels = [(kernel, by_head) for kernel in plan.leaves]
    for path in VALUE_NAMES if by_head else ():  # values beside separate queries and keys
        if path not in reading.layout.paths and kernel_name(reading.shapes, path) is not None:
            kernel = reading.kernel(Projection(path, ("value",)))
            segment = Segment("value", plan.kv_heads, kernel.total // plan.kv_heads)
            kernels.append((dataclasses.replace(kernel, segments=(segment,)), True))
    if reading.layout.latent is not None:
        kernels.append((reading.latent(reading.layout.latent), False))
    for kernel, by_head in kernels:
        if kernel.path not in specs:
            continue
        grid, whole = kernel.grid(plan.kv_heads), specs[kernel.path]
        if grid is None:
            raise MisfitError(f"{kernel.path}: {kernel.features} do not contain the heads")
        if whole is not None:
            reduction, output = normalized_axes(whole)
            agree = reduction == (kernel.input_axis,) and not set(kernel.stack_axes) & set(output)
            if not agree or (grid != "parts" and set(kernel.feature_axes) - set(output)):
                raise MisfitError(
                    f"{kernel.path}: by its name it reads axes {reduction} and produces {output}, "
                    "other axes being stacked"
                )
            if not by_head and len(kernel.segments) == 1:
                continue  # nothing to cut
        cut = normalize_spec(_cut(kernel, grid, by_head), kernel.shape, kernel.path)
        parts = ", ".join(s.role.replace("query_alone", "rotary query") for s in kernel.segments)
        yield kernel.path, (cut, f"attention: {parts}{', by head' * by_head}")


def _cut(kernel: LeafPlan, grid: str, by_head: bool) -> MatrixSpec:
    """One matrix per part with all its heads, or one per head of each part."""
    inputs, axes, repeat = kernel.input_axis, kernel.feature_axes, kernel.repeat
    rows = tuple(s.heads * s.size for s in kernel.segments)
    if by_head:  # the last axis has whole heads, others are batch axes
        one = tuple(s.size for s in kernel.segments for _ in range(s.heads))
        sizes = {"flat": one * repeat, "rows": one}.get(grid, one[:1])
        return MatrixSpec((inputs, axes[-1]), (Split(axes[-1], sizes),) if len(sizes) > 1 else ())
    if len(rows) == 1:
        return MatrixSpec((inputs, axes))
    if grid == "parts":  # the parts have an axis of their own: one more batch axis
        return MatrixSpec((inputs, axes[1:]))
    sizes = rows if grid in ("flat", "rows") else tuple(s.heads for s in kernel.segments)
    axis = axes[{"rows": -1, "units": 1}.get(grid, 0)]
    interleaved = repeat > 1 and grid in ("flat", "heads")
    view = (repeat, sum(sizes)) if interleaved else None
    return MatrixSpec((inputs, axes), (Split(axis, sizes, view, int(interleaved)),))
