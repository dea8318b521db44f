"""How many heads, of which size: the arithmetic between feature counts and head counts."""

from collections.abc import Mapping

from muonclip_jax.heads.layouts import ROLES, AttentionLayout, Projection
from muonclip_jax.heads.leaves import MisfitError
from muonclip_jax.heads.plan import Segment


def _quotient(features: int, heads: int, what: str) -> int:
    if heads <= 0 or features % heads or features <= 0:
        raise MisfitError(f"{what}: {features} features are no multiple of {heads} heads")
    return features // heads


def _known_size(projection: Projection, roles: tuple[str, ...]) -> int | None:
    if projection.sizes is None:
        return None
    return next(
        (s for part, s in zip(projection.parts, projection.sizes, strict=True) if part in roles),
        None,
    )


def head_size(
    layout: AttentionLayout,
    features: Mapping[str, int],
    heads: int,
    kv_heads: int | None,
    rope: int | None,
    out_features: int | None,
) -> int:
    """Returns the size of the query and key head that clip together.

    From the layout where it says so, else from a projection that makes queries alone, else from
    the output projection, whose inputs are one value head a query head.

    Raises:
        MisfitError: If nothing tells it or the numbers do not divide.
    """
    for projection in layout.projections:
        size = _known_size(projection, ("query", "key"))
        if size is not None:
            return size
    if layout.head_dim is not None:
        return layout.head_dim
    for projection in layout.projections:
        parts, total = projection.parts, features[projection.path]
        if "query" not in parts or not all(ROLES[part] for part in parts):
            continue
        per_head = _quotient(total, heads, projection.path)
        if "query_alone" in parts:
            if rope is None:
                raise MisfitError(f"{projection.path}: how its features divide; give sizes=")
            per_head -= rope
        return _quotient(per_head, len(parts) - ("query_alone" in parts), projection.path)
    if not any("query" in projection.parts for projection in layout.projections):
        alone = next(p for p in layout.projections if "query_alone" in p.parts)
        return _quotient(features[alone.path], heads * len(alone.parts), alone.path)
    if out_features is not None:
        return _quotient(out_features, heads, "the output projection")
    for projection in layout.projections:
        if "query" in projection.parts and kv_heads is not None:
            count = sum(heads if ROLES[part] else kv_heads for part in projection.parts)
            return _quotient(features[projection.path], count, projection.path)
    raise MisfitError(
        "neither an output projection nor the layout tells how large a head is; pass "
        "AttentionLayout(..., head_dim=) or kv_heads="
    )


def key_heads(
    layout: AttentionLayout, features: Mapping[str, int], heads: int, head_dim: int
) -> int:
    """Returns the number of key heads.

    Raises:
        MisfitError: If it does not come out whole or does not divide the query heads.
    """
    found = heads if layout.own_keys else layout.kv_heads
    for projection in layout.projections:
        parts = projection.parts
        if "key" not in parts or found is not None:
            continue
        of_queries = sum(ROLES[part] for part in parts)
        rest = features[projection.path] - of_queries * heads * head_dim
        unit = (len(parts) - of_queries) * head_dim
        if projection.sizes is not None:
            sizes = list(zip(parts, projection.sizes, strict=True))
            rest = features[projection.path] - heads * sum(s for p, s in sizes if ROLES[p])
            unit = sum(s for p, s in sizes if not ROLES[p])
        if rest <= 0 or rest % unit:
            raise MisfitError(
                f"{projection.path}: {features[projection.path]} features do not hold whole key "
                f"heads beside query heads of size {head_dim}"
            )
        found = rest // unit
    found = heads if found is None else found
    if found <= 0 or heads % found:
        raise MisfitError(f"{heads} query heads do not divide into {found} groups, one a key head")
    return found


def segments_of(
    projection: Projection, total: int, heads: int, kv_heads: int, head_dim: int, rope: int | None
) -> tuple[tuple[Segment, ...], int]:
    """Returns what lies along a projection's features, and how often it repeats.

    Raises:
        MisfitError: If the parts do not add up to `total` features.
    """
    repeat = 1
    if projection.interleaved == "group":
        repeat = kv_heads
    elif projection.interleaved:
        repeat = heads if all(ROLES[part] for part in projection.parts) else kv_heads
    counts = [heads if ROLES[part] else kv_heads for part in projection.parts]
    sizes: list[int | None]
    if projection.sizes is not None:
        sizes = list(projection.sizes)
    else:
        sizes = [head_dim] * len(counts)
        for i, part in enumerate(projection.parts):
            if part == "query_alone" and rope is not None:
                sizes[i] = rope
            elif part == "query_alone":
                sizes[i] = None
            elif part == "value" and rope is not None:
                sizes[i] = None  # latent attention: values have a size of their own
        known = sum(c * s for c, s in zip(counts, sizes, strict=True) if s is not None)
        for i, size in enumerate(sizes):
            if size is None:
                sizes[i] = _quotient(total - known, counts[i], projection.path)
    filled = [size for size in sizes if size is not None]
    if sum(c * s for c, s in zip(counts, filled, strict=True)) != total or min(filled) <= 0:
        expected = " + ".join(f"{c} x {s}" for c, s in zip(counts, filled, strict=True))
        raise MisfitError(
            f"{projection.path}: {total} features, but its parts {projection.parts} are {expected}"
        )
    return (
        tuple(
            Segment(part, count // repeat, size)
            for part, count, size in zip(projection.parts, counts, filled, strict=True)
        ),
        repeat,
    )


def feature_grid(shape: tuple[int, ...], segments: tuple[Segment, ...], repeat: int) -> str | None:
    """Says how feature axes of these sizes hold the segments head by head, if they can.

    One merged axis ("flat") always can. Several axes must be the grid that the heads make:
    repetitions and what lies in each ("rows"), repetitions, heads and size ("units"), all heads and
    size ("heads"), or parts, heads and size ("parts").

    Example:
        >>> fused = (Segment("query", 2, 8), Segment("key", 2, 8), Segment("value", 2, 8))
        >>> [feature_grid(shape, fused, 1) for shape in ((48,), (3, 2, 8), (6, 8), (2, 24))]
        ['flat', 'parts', 'heads', None]
    """
    row = sum(s.heads * s.size for s in segments)
    if shape == (repeat * row,):
        return "flat"
    one_head_each = all(s.heads == 1 for s in segments)
    if shape == (repeat, row) and (repeat > 1 or len(segments) == 1 or one_head_each):
        return "rows"
    if len({s.size for s in segments}) > 1:
        return None
    units, size = sum(s.heads for s in segments), segments[0].size
    if shape == (repeat, units, size):
        return "units"
    if shape == (repeat * units, size):
        return "heads"
    alike = repeat == 1 and len({s.heads for s in segments}) == 1
    return "parts" if alike and shape == (len(segments), segments[0].heads, size) else None
