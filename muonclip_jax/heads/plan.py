"""The positions of heads in a block, as frozen values, and the division of features into heads."""

import dataclasses
import math
from collections.abc import Mapping

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

    def with_roles(self, roles: Mapping[str, str]) -> "LeafPlan":
        """Returns the plan with other roles for some segments."""
        segments = (dataclasses.replace(s, role=roles.get(s.role, s.role)) for s in self.segments)
        return dataclasses.replace(self, segments=tuple(segments))

    def grid(self, kv_heads: int) -> str | None:
        """Returns how the feature axes correspond to the segments, or None.

        One merged axis is "flat". Several axes must be repetitions and the features of each
        ("rows"), repetitions, heads and size ("units"), all heads and size ("heads"), or parts,
        heads and size ("parts"). Query heads may have two axes, `(key heads, group)`.

        Example:
            >>> fused = (Segment("query", 2, 8), Segment("key", 2, 8), Segment("value", 2, 8))
            >>> for shape in ((9, 48), (9, 3, 2, 8), (9, 6, 8), (9, 2, 24)):
            ...     print(LeafPlan("qkv", shape, (), tuple(range(1, len(shape))), fused).grid(2))
            flat
            parts
            heads
            None
            >>> LeafPlan("q", (9, 2, 3, 8), (), (1, 2, 3), (Segment("query", 6, 8),)).grid(2)
            'heads'
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
    """One attention block of a tree."""

    path: str  # under which its maxima are recorded
    layout: str
    heads: int
    kv_heads: int
    head_dim: int  # features of one query and key head that clip together
    stack: tuple[int, ...]  # sizes of the stacked axes, in the kernel's order
    leaves: tuple[LeafPlan, ...]  # what a clip multiplies
    note: str = ""  # for `describe_attention`

    @property
    def maxima_shape(self) -> tuple[int, ...]:
        """The trailing shape of the block's maxima."""
        return (*self.stack, self.heads)

    def in_tree(self, block: str, paths: Mapping[str, str]) -> "BlockPlan":
        """Returns the plan of a block with full paths instead of names inside it."""
        leaves = (dataclasses.replace(leaf, path=paths[leaf.path]) for leaf in self.leaves)
        return dataclasses.replace(self, path=block, leaves=tuple(leaves))


def divide(
    layout: AttentionLayout,
    features: Mapping[str, int],
    heads: int,
    rope: int | None,
    out_features: int | None,
) -> tuple[int, int, dict[str, tuple[tuple[Segment, ...], int]]]:
    """Returns the size of a head, the number of key heads, and each projection's row and repeats.

    Args:
        layout: The layout of the block.
        features: Output features of each projection, by its path.
        heads: Query heads.
        rope: Size of latent attention's shared rotary key.
        out_features: Input features of the output projection.

    Raises:
        MisfitError: If the features are not divisible in this way.
    """
    size = _head_size(layout, features, heads, rope, out_features)
    counts = [n for n in range(heads, 0, -1) if heads % n == 0]
    if layout.own_keys or all(ROLES[part] for p in layout.projections for part in p.parts):
        counts = [heads]
    elif layout.kv_heads is not None:
        counts = [n for n in counts if n == layout.kv_heads]
    misfit = MisfitError(f"{heads} query heads do not share {layout.kv_heads} key heads evenly")
    for kv_heads in counts:
        try:
            return (
                size,
                kv_heads,
                {
                    p.path: _row(p, features[p.path], heads, kv_heads, size, rope)
                    for p in layout.projections
                },
            )
        except MisfitError as error:
            misfit = error
    raise misfit


def _quotient(features: int, heads: int, what: str) -> int:
    if heads <= 0 or features % heads or features <= 0:
        raise MisfitError(f"{what}: {features} features are not a multiple of {heads} heads")
    return features // heads


def _head_size(
    layout: AttentionLayout,
    features: Mapping[str, int],
    heads: int,
    rope: int | None,
    out_features: int | None,
) -> int:
    """Returns the size of a query and key head.

    From the layout if it has one, else from a projection that produces only queries, else from the
    output projection, which has one value head per query head as input.
    """
    for p in layout.projections:
        sizes = dict(zip(p.parts, p.sizes or (), strict=False))
        if size := sizes.get("query", sizes.get("key", layout.head_dim)):
            return size
    first = next((p for p in layout.projections if "query" in p.parts), layout.query)
    total, count = features[first.path], len(first.parts)
    alone = "query_alone" in first.parts and "query" in first.parts
    if all(ROLES[part] for part in first.parts) and alone:
        if rope is None:
            raise MisfitError(f"{first.path}: how its features are divided is unknown; give sizes=")
        return _quotient(_quotient(total, heads, first.path) - rope, count - 1, first.path)
    if "query" not in first.parts or all(ROLES[part] for part in first.parts):
        return _quotient(total, heads * count, first.path)
    if out_features is not None:
        return _quotient(out_features, heads, "the output projection")
    if layout.kv_heads is not None:
        shared = sum(heads if ROLES[part] else layout.kv_heads for part in first.parts)
        return _quotient(total, shared, first.path)
    raise MisfitError(
        "neither an output projection nor the layout gives the head size; pass "
        "AttentionLayout(..., head_dim=) or kv_heads="
    )


def _row(
    p: Projection, total: int, heads: int, kv_heads: int, head_dim: int, rope: int | None
) -> tuple[tuple[Segment, ...], int]:
    """Returns the segments of a projection's features, and the number of repetitions."""
    of_queries = p.interleaved is True and all(ROLES[part] for part in p.parts)
    repeat = (heads if of_queries else kv_heads) if p.interleaved else 1
    counts = [heads if ROLES[part] else kv_heads for part in p.parts]
    sizes = list(p.sizes or (rope or 0 if x == "query_alone" else head_dim for x in p.parts))
    # Values of latent attention, and queries without a key of their own, have another size.
    odd = "query_alone" if rope is None else "value"
    if p.sizes is None and odd in p.parts:
        i = p.parts.index(odd)
        rest = sum(c * s for c, s in zip(counts, sizes, strict=True)) - counts[i] * sizes[i]
        sizes[i] = _quotient(total - rest, counts[i], p.path)
    if sum(c * s for c, s in zip(counts, sizes, strict=True)) != total or min(sizes) <= 0:
        expected = " + ".join(f"{c} x {s}" for c, s in zip(counts, sizes, strict=True))
        raise MisfitError(
            f"{p.path}: {total} features are not {expected} for its parts {p.parts}, whichever "
            f"number of key heads divides {heads} query heads"
        )
    parts = zip(p.parts, counts, sizes, strict=True)
    return tuple(Segment(part, count // repeat, size) for part, count, size in parts), repeat
