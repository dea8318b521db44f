"""Division of attention kernels into matrices: whole, by part, or by head.

Every matrix is orthogonalised separately and has its own shape scale:

| name | query `(d, heads, size)` | GPT-2's `(d, 3 d)` | DeepSeek's `(rank, heads (nope + rope))` |
|---|---|---|---|
| "merged" | one matrix | by name | one matrix |
| "split" | one matrix | queries, keys, values | without rotation, with rotation |
| "per_head" | one per head | one per head of each | two per head |

All leaves of a block are used, because the rotary size of a query follows from the key projection,
and the number of key heads of a fused kernel from the output projection.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from muonclip_jax._specs import MatrixSpec, Split, matrix_shapes, normalize_spec, normalized_axes
from muonclip_jax.heads.finding import Rule, Shape, find_blocks, kernel_name
from muonclip_jax.heads.layouts import VALUE_NAMES, AttentionLayout, Projection
from muonclip_jax.heads.plan import BlockPlan, LeafPlan, MisfitError, Segment
from muonclip_jax.heads.reading import Attempt, attempts, refusal_in, solve

#: What `MatrixRules(attention=)` may be.
ATTENTION = ("merged", "split", "per_head")
#: A kernel's spec, and what its matrices are, for `describe_labels`.
Cut: TypeAlias = tuple[MatrixSpec, str]

_SOME_MATRIX = np.broadcast_to(0.0, (1, 1))  # in the place of a masked leaf


def attention_cuts(
    leaves: Mapping[str, Any],
    specs: Mapping[str, MatrixSpec | None],
    hidden: Iterable[str],
    *,
    attention: str,
    stack: tuple[int, ...],
    stacked: Collection[str],
    head_dim: int | None,
    blocks: tuple[Rule, ...] | None,
) -> dict[str, Cut]:
    """Returns spec and description, by path, of leaves that layouts split differently than names.

    `leaves` are all parameters by path, `specs` the leaves that may be split (None if their axes
    are ambiguous), `hidden` the paths of masked leaves, `stack` the axes of stacked layers of the
    leaves in `specs`, and `stacked` those whose paths indicate stacked layers.
    """
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
        try:
            found = _block_cuts(
                block.layout,
                tuple((n, x) for n, x in block.leaves.items() if block.paths[n] not in masked),
                tuple((n, specs[path]) for n, path in block.paths.items() if path in specs),
                attention,
                stack[0] if stack else 0,
                needed[0] in stacked,
                head_dim,
            )
        except MisfitError as misfit:
            raise ValueError(
                f"attention={attention!r} cannot split the kernels of attention block "
                f"{block.path!r} ({block.layout.name}): {misfit}. A rule for its kernels, such as "
                f'("{needed[0]}$", MatrixSpec((0, 1))), takes precedence over layouts.'
            ) from None
        cuts |= {block.paths[name]: cut for name, cut in found}
    return cuts


@functools.lru_cache(maxsize=1024)
def _block_cuts(
    layout: AttentionLayout,
    shapes: tuple[tuple[str, Shape], ...],
    table: tuple[tuple[str, MatrixSpec | None], ...],
    attention: str,
    scan_axis: int,
    stacked: bool,
    head_dim: int | None,
) -> tuple[tuple[str, Cut], ...]:
    """Returns the splits of one block's kernels by name; results are cached for equal blocks."""
    leaves, specs = dict(shapes), dict(table)
    stackings: list[tuple[int, ...]] = [(), (scan_axis,)]
    if scan_axis == 0:
        stackings = [tuple(range(n)) for n in range(max(map(len, leaves.values()), default=0))]

    def penalty(plan: BlockPlan) -> tuple[int, ...]:
        segments = [s for kernel in plan.leaves for s in kernel.segments]
        sizes = {s.role: s.size for s in segments if s.role in ("query", "query_alone")}
        misses = head_dim not in (None, sum(sizes.values()))
        return not plan.agrees, bool(plan.stack) != stacked, len(plan.stack), misses

    found, misfits = solve(
        attempts(layout, leaves, None, stackings),
        lambda attempt, plan: tuple(_cuts_of(attempt, plan, specs, attention == "per_head")),
        penalty,
    )
    if len(found) == 1:
        return next(iter(found))
    if found:
        heads = sorted({plan.heads for plans in found.values() for plan in plans})
        shown = ", ".join(map(str, heads[:8])) + (", ..." if len(heads) > 8 else "")
        raise MisfitError(
            f"its shapes allow {shown} heads. Give the head size: "
            f"MatrixRules(attention={attention!r}, head_dim=64), or for one block "
            "blocks=[(pattern, AttentionLayout(..., head_dim=64))]"
        )
    refusal = refusal_in(misfits)
    if refusal is None and attention == "split":
        # Names may have split every kernel of several parts into them already.
        kernels = ((kernel_name(leaves, p.path), len(p.parts)) for p in layout.projections)
        fused = [(specs.get(name), leaves[name], n) for name, n in kernels if name and n > 1]
        if all(
            spec and sum(m for m, *_ in matrix_shapes(spec, x)) % n == 0 for spec, x, n in fused
        ):
            return ()
    raise refusal or (misfits[0] if misfits else MisfitError("its kernels have too few axes"))


def _cuts_of(
    attempt: Attempt, plan: BlockPlan, specs: Mapping[str, MatrixSpec | None], by_head: bool
) -> Iterator[tuple[str, Cut]]:
    """Yields the splits of a block's kernels under one interpretation, by name in the block."""
    kernels = [(kernel, by_head) for kernel in plan.leaves]
    for path in VALUE_NAMES if by_head else ():  # values beside separate queries and keys
        if path not in attempt.layout.paths and kernel_name(attempt.shapes, path) is not None:
            kernel, heads = attempt.kernel(Projection(path, ("value",))), plan.kv_heads
            if kernel.total % heads:
                raise MisfitError(f"{path}: {kernel.total} features for {heads} key heads")
            segment = Segment("value", heads, kernel.total // heads)
            kernels.append((dataclasses.replace(kernel, segments=(segment,)), True))
    if (latent := attempt.latent()) is not None:
        kernels.append((latent, False))
    for kernel, by_head in kernels:
        if kernel.path not in specs:
            continue
        grid = kernel.grid(plan.kv_heads)
        if grid is None:
            raise MisfitError(
                f"{kernel.path}: its features {kernel.features} do not contain the heads"
            )
        whole = specs[kernel.path]
        if whole is not None:
            _check_names_agree(kernel, grid, whole)
            if not by_head and len(kernel.segments) == 1:
                continue  # nothing to cut
        cut = _by_head(kernel, grid) if by_head else _by_part(kernel, grid)
        parts = ", ".join(s.role.replace("query_alone", "rotary query") for s in kernel.segments)
        why = f"attention: {parts}{', by head' * by_head}"
        yield kernel.path, (normalize_spec(cut, kernel.shape, kernel.path), why)


def _check_names_agree(kernel: LeafPlan, grid: str, whole: MatrixSpec) -> None:
    reduction, output = normalized_axes(whole)
    more = set(kernel.feature_axes) - set(output)
    agree = reduction == kernel.input_axes and not set(kernel.stack_axes) & set(output)
    if not agree or (more and grid != "parts"):
        raise MisfitError(
            f"{kernel.path}: by its name it reads axes {reduction} and produces {output}, other "
            "axes being stacked"
        )


def _by_part(kernel: LeafPlan, grid: str) -> MatrixSpec:
    """One matrix per part, with all its heads."""
    (inputs,), axes, repeat = kernel.input_axes, kernel.feature_axes, kernel.repeat
    if len(kernel.segments) == 1:
        return MatrixSpec((inputs, axes))
    if grid == "parts":  # the parts have an axis of their own: one more batch axis
        return MatrixSpec((inputs, axes[1:]))
    counts = tuple(s.heads for s in kernel.segments)
    rows = tuple(s.heads * s.size for s in kernel.segments)
    sizes = rows if grid in ("flat", "rows") else counts
    axis = axes[0] if grid in ("flat", "heads") else axes[-1 if grid == "rows" else 1]
    interleaved = repeat > 1 and grid in ("flat", "heads")
    view = (repeat, sum(sizes)) if interleaved else None
    return MatrixSpec((inputs, axes), (Split(axis, sizes, view, int(interleaved)),))


def _by_head(kernel: LeafPlan, grid: str) -> MatrixSpec:
    """One matrix per head of each part; the last axis has whole heads, others are batch axes."""
    (inputs,), last = kernel.input_axes, kernel.feature_axes[-1]
    one = [s.size for s in kernel.segments for _ in range(s.heads)]
    sizes = {"flat": one * kernel.repeat, "rows": one}.get(grid, one[:1])
    splits = (Split(last, tuple(sizes)),) if len(sizes) > 1 else ()
    return MatrixSpec((inputs, last), splits)
