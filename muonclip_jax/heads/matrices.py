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

Which features belong to which head is what attention layouts know. Names and one head's axis are
not enough for that: the rotary size of a query shows in the key's projection beside it, the number
of key heads of a fused kernel in the output's. So a block is read whole, and every number of heads
that its shapes allow is tried. Where those would cut the kernels differently, the size of a head
has to be said.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from muonclip_jax._fitting import normalize_spec, normalized_axes
from muonclip_jax._paths import join
from muonclip_jax._specs import MatrixSpec, Split
from muonclip_jax.heads.builtin import VALUE_NAMES
from muonclip_jax.heads.kernels import Choice, Heads, Kernel, Reading, rows_of
from muonclip_jax.heads.leaves import MisfitError, kernel_of
from muonclip_jax.heads.plan import Segment
from muonclip_jax.heads.sizes import feature_grid

MERGED = "merged"
#: A kernel's spec, and what its matrices are, for `describe_labels`.
Cut = tuple[MatrixSpec, str]


def _by_part(heads: Heads) -> MatrixSpec:
    """All heads of each part side by side, in one matrix a part."""
    kernel, rows = heads.kernel, rows_of(heads)
    counts, axes = tuple(s.heads for s in heads.segments), kernel.feature_axes
    if len(rows) == 1:
        return MatrixSpec((kernel.input_axis, axes))
    interleaved = heads.repeat > 1
    match heads.grid:
        case "flat":
            view = (heads.repeat, sum(rows)) if interleaved else None
            split = Split(axes[0], rows, view, int(interleaved))
        case "rows":
            split = Split(axes[1], rows)
        case "units":
            split = Split(axes[1], counts)
        case "heads":
            view = (heads.repeat, sum(counts)) if interleaved else None
            split = Split(axes[0], counts, view, int(interleaved))
        case _:  # the parts have an axis of their own: one more batch axis
            return MatrixSpec((kernel.input_axis, axes[1:]))
    return MatrixSpec((kernel.input_axis, axes), (split,))


def _by_head(heads: Heads) -> MatrixSpec:
    """One matrix a head of each part: the last axis holds whole heads, the others count them."""
    kernel = heads.kernel
    last = kernel.feature_axes[-1]
    one = [s.size for s in heads.segments for _ in range(s.heads)]
    sizes = {"flat": one * heads.repeat, "rows": one}.get(heads.grid, one[:1])
    splits = (Split(last, tuple(sizes)),) if len(sizes) > 1 else ()
    return MatrixSpec((kernel.input_axis, last), splits)


#: What `MatrixRules(attention=)` may be -> how it cuts a kernel; None leaves the table's spec.
ATTENTION: Mapping[str, Callable[[Heads], MatrixSpec] | None] = MappingProxyType(
    {MERGED: None, "split": _by_part, "per_head": _by_head}
)


def cuts_of(
    choice: Choice, reading: Reading, specs: Mapping[str, MatrixSpec | None], attention: str
) -> Iterator[tuple[str, Cut]]:
    """Yields the cuts of a block's kernels under one reading, by their name in the block.

    Args:
        choice: The choice.
        reading: What it found.
        specs: What names say of the kernels that may be cut, None where that is open.
        attention: A name of `ATTENTION`.

    Raises:
        MisfitError: If a kernel's name says otherwise which axes are which.
    """
    cut = ATTENTION[attention]
    assert cut is not None, attention
    kernels = [(found, cut, ", by head" * (cut is _by_head)) for _, found in reading.projections]
    if attention == "per_head":
        kernels += [(found, cut, ", by head") for found in _values(choice, reading)]
    if choice.layout.latent is not None:
        kernels.append((_down(choice, *choice.layout.latent), _by_part, ""))
    for heads, cut_, how in kernels:
        name = join(filter(None, (heads.kernel.path, heads.kernel.name)))
        if name not in specs:
            continue
        whole = specs[name]
        if whole is not None:
            _check_names_agree(name, heads, whole)
            if cut_ is _by_part and len(heads.segments) == 1:
                continue  # nothing to cut
        spec = normalize_spec(cut_(heads), choice.leaves[name].shape, name)
        parts = ", ".join(_CALLED.get(s.role, s.role) for s in heads.segments)
        yield name, (spec, f"attention: {parts}{how}")


_CALLED = {"query_alone": "rotary query"}


def _check_names_agree(name: str, heads: Heads, whole: MatrixSpec) -> None:
    reduction, output = normalized_axes(whole)
    kernel = heads.kernel
    more = set(kernel.feature_axes) - set(output)
    if (
        reduction != (kernel.input_axis,)
        or set(kernel.stack_axes) & set(output)
        or (more and heads.grid != "parts")
    ):
        raise MisfitError(
            f"{name}: by its name it reads axes {reduction} and produces {output}, other axes "
            "being stacked"
        )


def _down(choice: Choice, down: str, up: str) -> Heads:
    """Returns the latent and the shared rotary key in latent attention's down projection."""
    kernel, latent = choice.kernel(down), choice.kernel(up).inputs
    segments = (
        Segment("latent", 1, latent),
        Segment("shared rotary key", 1, kernel.total - latent),
    )
    return Heads(kernel, segments, 1, _grid(kernel, segments, 1))


def _values(choice: Choice, reading: Reading) -> Iterator[Heads]:
    """Yields the value projection beside separate queries and keys."""
    for path in VALUE_NAMES:
        if path in choice.layout.paths or kernel_of(choice.leaves, path) is None:
            continue
        kernel = choice.kernel(path)
        if kernel.total % reading.kv_heads:
            raise MisfitError(f"{path}: {kernel.total} features for {reading.kv_heads} key heads")
        segments = (Segment("value", reading.kv_heads, kernel.total // reading.kv_heads),)
        yield Heads(kernel, segments, 1, _grid(kernel, segments, 1))


def _grid(kernel: Kernel, segments: tuple[Segment, ...], repeat: int) -> str:
    grid = feature_grid(kernel.features, segments, repeat)
    if grid is None:
        raise MisfitError(f"{kernel.path}: its features {kernel.features} do not hold the heads")
    return grid
