"""Division of attention kernels into matrices: whole, by part, or by head.

By default a query kernel `(d_model, heads, head_dim)` is one matrix with all heads. It may also be
divided into `heads` matrices, and a fused kernel into queries, keys and values. Every matrix is
orthogonalised separately and has its own shape scale:

| name | query `(d, heads, size)` | GPT-2's `(d, 3 d)` | DeepSeek's `(rank, heads (nope + rope))` |
|---|---|---|---|
| "merged" | one matrix | by name | one matrix |
| "split" | one matrix | queries, keys, values | without rotation, with rotation |
| "per_head" | one per head | one per head of each | two per head |

All leaves of a block are used, because the rotary size of a query follows from the key projection,
and the number of key heads of a fused kernel from the output projection. Every number of heads that
shapes allow is tried; if they give different splits, the head size must be given.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from muonclip_jax._specs import MatrixSpec, Split, normalize_spec, normalized_axes
from muonclip_jax.heads.finding import Rule, Shape, find_blocks, kernel_name
from muonclip_jax.heads.layouts import VALUE_NAMES, AttentionLayout, Projection
from muonclip_jax.heads.plan import LeafPlan, MisfitError, Segment
from muonclip_jax.heads.solver import Reading, attempts, refusal_in, solve

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

    Args:
        leaves: The parameters by path, without an outer "params" level.
        specs: Specs by name of the leaves that may be split, None if ambiguous, without leaves that
            AdamW trains or that a rule decides.
        hidden: Paths of masked leaves.
        attention: "split" or "per_head".
        stack: The axes of stacked layers of the leaves in `specs`.
        stacked: The leaves whose paths indicate stacked layers.
        head_dim: Size of a head, if it cannot be inferred from shapes.
        blocks: The result of `block_rules`.

    Raises:
        ValueError: If a block cannot be split, or part of it is masked.
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

    def penalty(reading: Reading) -> tuple[int, ...]:
        stack = reading.attempt.stack
        segments = [s for kernel in reading.kernels for s in kernel.segments]
        sizes = {s.role: s.size for s in segments if s.role in ("query", "query_alone")}
        misses = head_dim not in (None, sum(sizes.values()))
        return not reading.agrees, bool(stack) != stacked, len(stack), misses

    found, misfits = solve(
        attempts(layout, leaves, None, stackings),
        lambda reading: tuple(_cuts_of(reading, specs, attention)),
        penalty,
    )
    if len(found) == 1:
        return next(iter(found))
    if found:
        heads = sorted({r.attempt.heads for readings in found.values() for r in readings})
        shown = ", ".join(map(str, heads[:8])) + (", ..." if len(heads) > 8 else "")
        raise MisfitError(
            f"its shapes allow {shown} heads. Give the head size: "
            f"MatrixRules(attention={attention!r}, head_dim=64), or for one block "
            "blocks=[(pattern, AttentionLayout(..., head_dim=64))]"
        )
    refusal = refusal_in(misfits)
    by_name = attention == "split" and all(_is_cut(p, leaves, specs) for p in layout.projections)
    if refusal is None and by_name:
        return ()
    raise refusal or (misfits[0] if misfits else MisfitError("its kernels have too few axes"))


def _is_cut(
    p: Projection, shapes: Mapping[str, Shape], specs: Mapping[str, MatrixSpec | None]
) -> bool:
    """Whether a projection has only one part, or is already split into its parts by name."""
    name = kernel_name(shapes, p.path)
    if len(p.parts) == 1 or name is None:
        return True
    spec = specs.get(name)
    if spec is None:
        return False
    axes = {axis for group in normalized_axes(spec) for axis in group}
    batch = math.prod(n for axis, n in enumerate(shapes[name]) if axis not in axes)
    return bool(spec.splits) or (batch > 1 and batch % len(p.parts) == 0)


def _cuts_of(
    reading: Reading, specs: Mapping[str, MatrixSpec | None], attention: str
) -> Iterator[tuple[str, Cut]]:
    """Yields the splits of a block's kernels under one interpretation, by name in the block."""
    by_head = attention == "per_head"
    kernels = [(kernel, by_head) for kernel in reading.kernels]
    if by_head:
        kernels += [(kernel, True) for kernel in _values(reading)]
    if (latent := reading.attempt.latent()) is not None:
        down, size = latent
        segments = Segment("latent", 1, size), Segment("shared rotary key", 1, down.total - size)
        kernels.append((dataclasses.replace(down, segments=segments), False))
    for kernel, by_head in kernels:
        if kernel.path not in specs:
            continue
        grid = kernel.grid(reading.kv_heads)
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


def _values(reading: Reading) -> Iterator[LeafPlan]:
    """Yields the value projection next to separate query and key projections."""
    for path in VALUE_NAMES:
        if path in reading.layout.paths or kernel_name(reading.attempt.shapes, path) is None:
            continue
        kernel = reading.attempt.kernel(Projection(path, ("value",)))
        if kernel.total % reading.kv_heads:
            raise MisfitError(f"{path}: {kernel.total} features for {reading.kv_heads} key heads")
        segment = Segment("value", reading.kv_heads, kernel.total // reading.kv_heads)
        yield dataclasses.replace(kernel, segments=(segment,))


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
