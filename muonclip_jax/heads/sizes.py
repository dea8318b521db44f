"""How many heads, of which size: the arithmetic between feature counts and head counts."""

import math
from collections.abc import Mapping
from typing import TypeAlias

from muonclip_jax.heads.layouts import ROLES, AttentionLayout, Projection
from muonclip_jax.heads.leaves import MisfitError
from muonclip_jax.heads.plan import Segment

#: What lies along a projection's features, and how often it repeats.
Row: TypeAlias = tuple[tuple[Segment, ...], int]


def divide(
    layout: AttentionLayout,
    features: Mapping[str, int],
    heads: int,
    rope: int | None,
    out_features: int | None,
) -> tuple[int, int, dict[str, Row]]:
    """Returns the size of a head, the number of key heads, and what each projection's features are.

    `features` has the output features of each projection by its path, `rope` is the size of latent
    attention's shared rotary key, `out_features` what the output projection takes.
    """
    size = _head_size(layout, features, heads, rope, out_features)
    counts = [n for n in range(heads, 0, -1) if heads % n == 0]
    if layout.own_keys or all(ROLES[part] for p in layout.projections for part in p.parts):
        counts = [heads]
    elif layout.kv_heads is not None:
        counts = [layout.kv_heads] if heads % layout.kv_heads == 0 else []
    misfit = MisfitError(f"{heads} query heads do not share {layout.kv_heads} key heads evenly")
    for kv_heads in counts:
        try:
            rows = {
                p.path: _row(p, features[p.path], heads, kv_heads, size, rope)
                for p in layout.projections
            }
        except MisfitError as error:
            misfit = error
        else:
            return size, kv_heads, rows
    raise misfit


def _quotient(features: int, heads: int, what: str) -> int:
    if heads <= 0 or features % heads or features <= 0:
        raise MisfitError(f"{what}: {features} features are no multiple of {heads} heads")
    return features // heads


def _head_size(
    layout: AttentionLayout,
    features: Mapping[str, int],
    heads: int,
    rope: int | None,
    out_features: int | None,
) -> int:
    """Returns the size of the query and key head that clip together.

    From the layout where it says so, else from a projection that makes queries alone, else from
    the output projection, whose inputs are one value head a query head.
    """
    for p in layout.projections:
        sizes = dict(zip(p.parts, p.sizes or (), strict=False))
        if size := sizes.get("query", sizes.get("key", layout.head_dim)):
            return size
    first = next((p for p in layout.projections if "query" in p.parts), layout.query)
    total, count = features[first.path], len(first.parts)
    if "query" not in first.parts:
        return _quotient(total, heads * count, first.path)
    if all(ROLES[part] for part in first.parts):
        if "query_alone" not in first.parts:
            return _quotient(total, heads * count, first.path)
        if rope is None:
            raise MisfitError(f"{first.path}: how its features divide; give sizes=")
        return _quotient(_quotient(total, heads, first.path) - rope, count - 1, first.path)
    if out_features is not None:
        return _quotient(out_features, heads, "the output projection")
    if layout.kv_heads is not None:
        shared = sum(heads if ROLES[part] else layout.kv_heads for part in first.parts)
        return _quotient(total, shared, first.path)
    raise MisfitError(
        "neither an output projection nor the layout tells how large a head is; pass "
        "AttentionLayout(..., head_dim=) or kv_heads="
    )


def _row(
    p: Projection, total: int, heads: int, kv_heads: int, head_dim: int, rope: int | None
) -> Row:
    """Returns what lies along a projection's features, and how often it repeats."""
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


def feature_grid(
    shape: tuple[int, ...], segments: tuple[Segment, ...], repeat: int, kv_heads: int
) -> str | None:
    """Says how feature axes of these sizes hold the segments head by head, if they can.

    One merged axis ("flat") always can. Several axes must be the grid that the heads make:
    repetitions and what lies in each ("rows"), repetitions, heads and size ("units"), all heads and
    size ("heads"), or parts, heads and size ("parts"). Query heads may have two axes, key heads and
    the group of each.

    Example:
        >>> fused = (Segment("query", 2, 8), Segment("key", 2, 8), Segment("value", 2, 8))
        >>> [feature_grid(shape, fused, 1, 2) for shape in ((48,), (3, 2, 8), (6, 8), (2, 24))]
        ['flat', 'parts', 'heads', None]
        >>> feature_grid((2, 3, 8), (Segment("query", 6, 8),), 1, 2)
        'heads'
    """
    row = sum(s.heads * s.size for s in segments)
    if len(shape) == 1:
        return "flat" if shape == (repeat * row,) else None
    *lead, last = shape

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
