"""The positions of heads in a block, as frozen values, and the division of features into heads."""

import dataclasses
import itertools
import math

from muonclip_jax.heads.finding import Shape
from muonclip_jax.heads.layouts import ROLES, AttentionLayout


class MisfitError(Exception):
    """One interpretation of a block's shapes is impossible; the message has the reason."""


class RefusalError(MisfitError):
    """The block is understood, but it cannot be clipped."""


class UnknownSizeError(RefusalError):
    """Nothing gives the head size, whatever the maxima are."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """`heads * size` consecutive features with one role, `size` per head."""

    role: str
    heads: int
    size: int


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """The positions of heads in one leaf.

    The features are the leaf's `feature_axes`, flattened in order. They consist of `repeat` copies
    of the row of `segments`; head `h` of a role is in copy `h // heads`.
    """

    path: str
    shape: Shape
    stack_axes: tuple[int, ...]  # ascending
    feature_axes: tuple[int, ...]  # ascending
    segments: tuple[Segment, ...] = ()
    repeat: int = 1

    @property
    def features(self) -> tuple[int, ...]:
        """Sizes of the feature axes."""
        return tuple(self.shape[axis] for axis in self.feature_axes)

    @property
    def total(self) -> int:
        """Output features in all."""
        return math.prod(self.features)

    @property
    def input_axis(self) -> int:
        """A kernel's other axis in one layer."""
        known = self.stack_axes + self.feature_axes
        return next(axis for axis in range(len(self.shape)) if axis not in known)

    def grid(self, kv_heads: int) -> str | None:
        """Returns how the feature axes correspond to the segments, or None if they do not.

        Query heads may have two axes, `(key heads, group)`.
        """
        segments, repeat = self.segments, self.repeat
        row, units = sum(s.heads * s.size for s in segments), sum(s.heads for s in segments)
        parts, heads = len(segments), segments[0].heads
        size = segments[0].size if len({s.size for s in segments}) == 1 else 0
        alike = repeat == 1 and {s.heads for s in segments} == {heads}
        whole = repeat > 1 or parts == 1 or units == parts
        forms: tuple[tuple[str, bool, Shape], ...] = (
            ("flat", True, (repeat * row,)),
            ("rows", whole, (repeat, row)),
            ("rows", whole, (kv_heads, repeat // kv_heads, row)),
            ("units", True, (repeat, units, size)),
            ("heads", True, (repeat * units, size)),
            ("heads", parts == 1, (kv_heads, units // kv_heads, size)),
            ("parts", alike, (parts, heads, size)),
        )
        return next((name for name, can, form in forms if can and form == self.features), None)


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """One attention block of a tree, or one interpretation of it."""

    path: str  # under which its maxima are recorded
    layout: str
    heads: int
    kv_heads: int
    head_dim: int  # features of one query and key head that clip together
    stack: tuple[int, ...]  # sizes of the stacked axes, in the kernel's order
    leaves: tuple[LeafPlan, ...]  # the kernels of all projections; of a clip, what it multiplies
    agrees: bool = False  # whether the output projection takes exactly the heads' values
    note: str = ""  # for `describe_attention`

    @property
    def maxima_shape(self) -> tuple[int, ...]:
        """The trailing shape of the block's maxima."""
        return (*self.stack, self.heads)


def divide(
    layout: AttentionLayout,
    kernels: list[LeafPlan],
    heads: int,
    rope: int | None,
    out: int | None,
) -> tuple[int, int, tuple[LeafPlan, ...]]:
    """Returns the size of a head, the number of key heads, and the kernels divided into heads.

    `rope` is the size of latent attention's shared rotary key, `out` the input features of the
    output projection.
    """
    size, kv_heads = _head_size(layout, kernels, heads, rope, out), heads
    if size == 1 and all(kernel.features[-1] > 1 for kernel in kernels):
        raise MisfitError(f"{heads} heads of one feature each are none")
    rows: list[list[int]] = []
    for kernel, p in zip(kernels, layout.projections, strict=True):
        sizes = list(p.sizes or (rope or 0 if x == "query_alone" else size for x in p.parts))
        # Values of latent attention, and queries without a key of their own, have another size.
        odd = "query_alone" if rope is None else "value"
        if p.sizes is None and odd in p.parts:
            i = p.parts.index(odd)
            sizes[i] = kernel.total // heads - (sum(sizes) - sizes[i])
        roles = zip(p.parts, sizes, strict=True)
        own = sum(n for part, n in roles if ROLES[part] or layout.own_keys)
        shared, rest = sum(sizes) - own, kernel.total - heads * own
        if shared:
            kv_heads, rest = divmod(rest, shared)
        asked = layout.kv_heads if shared else None
        if rest or kv_heads < 1 or heads % kv_heads or asked not in (None, kv_heads):
            raise MisfitError(
                f"{p.path}: {kernel.total} features are not {heads} query heads of {own}"
                + f" and a number of key heads of {shared}" * bool(shared)
            )
        rows.append(sizes)
    leaves: list[LeafPlan] = []
    for kernel, p, sizes in zip(kernels, layout.projections, rows, strict=True):
        of_queries = p.interleaved is True and all(ROLES[part] for part in p.parts)
        repeat = (heads if of_queries else kv_heads) if p.interleaved else 1
        counts = [(heads if ROLES[part] else kv_heads) // repeat for part in p.parts]
        segments = tuple(itertools.starmap(Segment, zip(p.parts, counts, sizes, strict=True)))
        leaves.append(dataclasses.replace(kernel, segments=segments, repeat=repeat))
        if min(sizes) <= 0 or leaves[-1].grid(kv_heads) is None:
            parts = " + ".join(f"{s.heads} x {s.size} ({s.role})" for s in segments)
            raise MisfitError(f"{p.path}: {kernel.features} are not {repeat} x ({parts})")
    return size, kv_heads, tuple(leaves)


def _head_size(
    layout: AttentionLayout,
    kernels: list[LeafPlan],
    heads: int,
    rope: int | None,
    out: int | None,
) -> int:
    """Returns the size of a query and key head; `divide` checks that it fits."""
    told = {part: n for p in layout.projections for part, n in zip(p.parts, p.sizes or ())}  # noqa: B905
    if size := told.get("query") or told.get("key") or layout.head_dim:
        return size
    first = next((p for p in layout.projections if "query" in p.parts), layout.query)
    kernel, parts = kernels[layout.projections.index(first)], first.parts
    if all(ROLES[part] for part in parts):
        # Beside a query, "query_alone" is as large as the shared rotary key.
        rotary = {"query", "query_alone"} <= set(parts)
        if rotary and rope is None:
            raise MisfitError(f"{first.path}: how its features are divided is unknown; give sizes=")
        return (kernel.total // heads - (rope or 0) * rotary) // (len(parts) - rotary)
    if "query" in parts and out is not None and out % heads == 0:
        return out // heads
    if "query" in parts and not first.interleaved and len(kernel.features) > 1:
        return kernel.features[-1]
    if "query" in parts and layout.kv_heads is not None:
        return kernel.total // sum(heads if ROLES[part] else layout.kv_heads for part in parts)
    if out is not None:
        raise MisfitError(f"the {out} inputs of the output projection are not {heads} heads")
    raise UnknownSizeError(
        "neither an output projection nor the layout gives the head size; pass "
        "AttentionLayout(..., head_dim=) or kv_heads="
    )
