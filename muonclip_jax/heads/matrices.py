"""Attention kernels as matrices: whole, by component, or head by head.

A query kernel `(d_model, heads, head_dim)` is one matrix with all heads side by side, which is what
the field does by default. It may also be seen as `heads` matrices that happen to share their
input, and a fused kernel as the queries, keys and values that it makes. Every matrix is
orthogonalised by itself and has the scale of its own shape:

| name | query `(d, heads, size)` | GPT-2's `(d, 3 d)` | DeepSeek's `(rank, heads (nope + rope))` |
|---|---|---|---|
| "merged" | one matrix | as names tell | one matrix |
| "split" | one matrix | queries, keys, values | without rotation, with rotation |
| "per_head" | one a head | one a head of each | two a head |

A block is read whole, for the rotary size of a query shows in the key's projection beside it, the
number of key heads of a fused kernel in the output's. Every number of heads that shapes allow is
tried; where those would cut the kernels differently, the size of a head has to be said.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

from muonclip_jax._fitting import normalize_spec, normalized_axes
from muonclip_jax._specs import MatrixSpec, Split
from muonclip_jax.heads.builtin import VALUE_NAMES
from muonclip_jax.heads.layouts import Projection
from muonclip_jax.heads.leaves import MisfitError, kernel_name
from muonclip_jax.heads.plan import LeafPlan, Segment
from muonclip_jax.heads.sizes import feature_grid
from muonclip_jax.heads.solver import Reading

MERGED = "merged"
#: A kernel's spec, and what its matrices are, for `describe_labels`.
Cut: TypeAlias = tuple[MatrixSpec, str]


def _by_part(kernel: LeafPlan, grid: str) -> MatrixSpec:
    """All heads of each part side by side, in one matrix a part."""
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
    """One matrix a head of each part: the last axis holds whole heads, the others count them."""
    (inputs,), last = kernel.input_axes, kernel.feature_axes[-1]
    one = [s.size for s in kernel.segments for _ in range(s.heads)]
    sizes = {"flat": one * kernel.repeat, "rows": one}.get(grid, one[:1])
    splits = (Split(last, tuple(sizes)),) if len(sizes) > 1 else ()
    return MatrixSpec((inputs, last), splits)


#: What `MatrixRules(attention=)` may be -> how it cuts a kernel; None leaves the table's spec.
ATTENTION: Mapping[str, Callable[[LeafPlan, str], MatrixSpec] | None] = MappingProxyType(
    {MERGED: None, "split": _by_part, "per_head": _by_head}
)
_CALLED = {"query_alone": "rotary query"}


def cuts_of(
    reading: Reading, specs: Mapping[str, MatrixSpec | None], attention: str
) -> Iterator[tuple[str, Cut]]:
    """Yields the cuts of a block's kernels under one reading, by their name in the block.

    `specs` is what names say of the kernels that may be cut, None where that is open.
    """
    cut = ATTENTION[attention]
    assert cut is not None, attention
    kernels = [(kernel, cut) for kernel in reading.kernels]
    if cut is _by_head:
        kernels += [(kernel, cut) for kernel in _values(reading)]
    if (latent := reading.attempt.latent()) is not None:
        down, size = latent
        segments = (Segment("latent", 1, size), Segment("shared rotary key", 1, down.total - size))
        kernels.append((dataclasses.replace(down, segments=segments), _by_part))
    for kernel, how in kernels:
        if kernel.path not in specs:
            continue
        grid = feature_grid(kernel.features, kernel.segments, kernel.repeat, reading.kv_heads)
        if grid is None:
            raise MisfitError(
                f"{kernel.path}: its features {kernel.features} do not hold the heads"
            )
        whole = specs[kernel.path]
        if whole is not None:
            _check_names_agree(kernel, grid, whole)
            if how is _by_part and len(kernel.segments) == 1:
                continue  # nothing to cut
        spec = normalize_spec(how(kernel, grid), kernel.shape, kernel.path)
        parts = ", ".join(_CALLED.get(s.role, s.role) for s in kernel.segments)
        yield kernel.path, (spec, f"attention: {parts}{', by head' * (how is _by_head)}")


def _check_names_agree(kernel: LeafPlan, grid: str, whole: MatrixSpec) -> None:
    reduction, output = normalized_axes(whole)
    more = set(kernel.feature_axes) - set(output)
    if (
        reduction != kernel.input_axes
        or set(kernel.stack_axes) & set(output)
        or (more and grid != "parts")
    ):
        raise MisfitError(
            f"{kernel.path}: by its name it reads axes {reduction} and produces {output}, other "
            "axes being stacked"
        )


def _values(reading: Reading) -> Iterator[LeafPlan]:
    """Yields the value projection beside separate queries and keys."""
    for path in VALUE_NAMES:
        if path in reading.layout.paths or kernel_name(reading.attempt.shapes, path) is None:
            continue
        kernel = reading.attempt.kernel(Projection(path, ("value",)))
        if kernel.total % reading.kv_heads:
            raise MisfitError(f"{path}: {kernel.total} features for {reading.kv_heads} key heads")
        segment = Segment("value", reading.kv_heads, kernel.total // reading.kv_heads)
        yield dataclasses.replace(kernel, segments=(segment,))
