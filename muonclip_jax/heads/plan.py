"""The positions of heads in a block, as frozen values, and the division of features into heads."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from muonclip_jax.heads.finding import Shape
from muonclip_jax.heads.layouts import ROLES, AttentionLayout, Projection


class MisfitError(Exception):
    """One interpretation of a block's shapes is impossible; the message has the reason."""


class RefusalError(MisfitError):
    """The block is understood, but it cannot be clipped; the message begins with `leaf`."""

    def __init__(self, why: str, leaf: str | None = None):
        super().__init__(why if leaf is None else f"{leaf!r} {why}")
        self.why, self.leaf = why, leaf

    def in_tree(self, paths: Mapping[str, str]) -> str:
        """Returns the message with the leaf's whole path in the tree."""
        return self.why if self.leaf is None else f"{paths[self.leaf]!r} {self.why}"


@dataclasses.dataclass(frozen=True)
class Segment:
    """`heads * size` consecutive features with one role, `size` per head."""

    role: str
    heads: int
    size: int


#: The segments of one row of features, and how often the row is repeated.
Row: TypeAlias = tuple[tuple[Segment, ...], int]


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
    def input_axes(self) -> tuple[int, ...]:
        """The other axes of one layer: a kernel's input axis."""
        known = self.stack_axes + self.feature_axes
        return tuple(axis for axis in range(len(self.shape)) if axis not in known)

    def grid(self, kv_heads: int) -> str | None:
        """Returns how the feature axes correspond to the segments, or None.

        One merged axis is "flat". Several axes must be repetitions and the features of each
        ("rows"), repetitions, heads and size ("units"), all heads and size ("heads"), or parts,
        heads and size ("parts"). Query heads may have two axes, `(key heads, group)`.
        """
        segments, repeat = self.segments, self.repeat
        row = sum(s.heads * s.size for s in segments)
        *lead, last = self.features
        if not lead:
            return "flat" if last == repeat * row else None

        def counted(heads: int) -> bool:
            return lead == [heads] or (math.prod(lead) == heads and lead == [kv_heads, lead[-1]])

        one_head_each = all(s.heads == 1 for s in segments)
        if last == row and counted(repeat) and (repeat > 1 or len(segments) == 1 or one_head_each):
            return "rows"
        if {s.size for s in segments} != {last}:
            return None
        units = sum(s.heads for s in segments)
        if lead == [repeat, units]:
            return "units"
        if lead == [repeat * units] or (len(segments) == 1 and counted(units)):
            return "heads"
        alike = repeat == 1 and len({s.heads for s in segments}) == 1
        return "parts" if alike and lead == [len(segments), segments[0].heads] else None


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
    layout: AttentionLayout, totals: Sequence[int], heads: int, rope: int | None, out: int | None
) -> tuple[int, int, list[Row]]:
    """Returns the size of a head, the number of key heads, and each projection's row.

    `totals` are the output features of the projections, `rope` is the size of latent attention's
    shared rotary key, `out` the input features of the output projection.
    """
    size = _head_size(layout, totals, heads, rope, out)
    counts = [n for n in divisors(heads)[::-1] if layout.kv_heads in (None, n)]
    if layout.own_keys or all(ROLES[part] for p in layout.projections for part in p.parts):
        counts = [heads]
    misfit = MisfitError(f"{heads} query heads do not share {layout.kv_heads} key heads evenly")
    for kv_heads in counts:
        try:
            pairs = zip(layout.projections, totals, strict=True)
            return size, kv_heads, [_row(p, n, heads, kv_heads, size, rope) for p, n in pairs]
        except MisfitError as error:
            misfit = error
    raise misfit


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive number in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _quotient(features: int, heads: int, what: str) -> int:
    if heads <= 0 or features % heads or features <= 0:
        raise MisfitError(f"{what}: {features} features are not a multiple of {heads} heads")
    return features // heads


def _head_size(
    layout: AttentionLayout, totals: Sequence[int], heads: int, rope: int | None, out: int | None
) -> int:
    """Returns the size of a query and key head.

    From the layout if it has one, else from a projection that produces only queries, else from the
    output projection, which has one value head per query head as input.
    """
    said = {
        part: n for p in layout.projections for part, n in zip(p.parts, p.sizes or (), strict=False)
    }
    if size := said.get("query") or said.get("key") or layout.head_dim:
        return size
    first = next((p for p in layout.projections if "query" in p.parts), layout.query)
    total, parts = totals[layout.projections.index(first)], first.parts
    if all(ROLES[part] for part in parts):
        if {"query", "query_alone"} <= set(parts):
            if rope is None:
                raise MisfitError(
                    f"{first.path}: how its features are divided is unknown; give sizes="
                )
            total, parts = total - rope * heads, parts[1:]
        return _quotient(total, heads * len(parts), first.path)
    if "query" in parts and out is not None:
        return _quotient(out, heads, "the output projection")
    if "query" in parts and layout.kv_heads is not None:
        shared = sum(heads if ROLES[part] else layout.kv_heads for part in parts)
        return _quotient(total, shared, first.path)
    raise MisfitError(
        "neither an output projection nor the layout gives the head size; pass "
        "AttentionLayout(..., head_dim=) or kv_heads="
    )


def _row(
    p: Projection, total: int, heads: int, kv_heads: int, head_dim: int, rope: int | None
) -> Row:
    """Returns the segments of a projection's features, and the number of repetitions."""
    of_queries = p.interleaved is True and all(ROLES[part] for part in p.parts)
    repeat = (heads if of_queries else kv_heads) if p.interleaved else 1
    counts = [heads if ROLES[part] else kv_heads for part in p.parts]
    sizes = list(p.sizes or (rope or 0 if x == "query_alone" else head_dim for x in p.parts))
    made = [count * size for count, size in zip(counts, sizes, strict=True)]
    # Values of latent attention, and queries without a key of their own, have another size.
    odd = "query_alone" if rope is None else "value"
    if p.sizes is None and odd in p.parts:
        i = p.parts.index(odd)
        sizes[i] = _quotient(total - sum(made) + made[i], counts[i], p.path)
        made[i] = counts[i] * sizes[i]
    if sum(made) != total or min(sizes) <= 0:
        expected = " + ".join(f"{c} x {s}" for c, s in zip(counts, sizes, strict=True))
        raise MisfitError(
            f"{p.path}: {total} features are not {expected} for its parts {p.parts}, whichever "
            f"number of key heads divides {heads} query heads"
        )
    parts = zip(p.parts, counts, sizes, strict=True)
    return tuple(Segment(part, count // repeat, size) for part, count, size in parts), repeat
