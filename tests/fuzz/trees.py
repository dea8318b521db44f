"""Random trees: attention kernels, stacks, experts, fused kernels, convolutions, awkward sizes."""

import dataclasses
import math
from typing import Any

from tests.fuzz.cases import Draw, Leaf

#: Axis sizes that meshes divide, and sizes that they do not.
EVEN = (8, 16, 24)
AWKWARD = (2, 3, 4, 5, 6, 7, 12, 13)


def _size(draw: Draw) -> int:
    return int(draw.choice(*EVEN)) if draw.chance(0.6) else int(draw.choice(*AWKWARD))


def draw_tree(draw: Draw, x64: bool) -> tuple[tuple[Leaf, ...], tuple[Any, ...] | None]:
    """Returns two to eight leaves, and path and maxima of an attention block if there is one."""
    dtype = draw.weighted(
        {"float64": 6, "float32": 3, "bfloat16": 1}
        if x64
        else {"float32": 7, "bfloat16": 2.5, "float16": 0.5}
    )
    count = draw.weighted({2: 6, 3: 3, 4: 1.5, 5: 0.5, 6: 0.4, 7: 0.3, 8: 0.3})
    leaves: list[Leaf] = []
    maxima = None
    kinds = {
        "dense": 5,
        "attention": 3,
        "stack": 2,
        "experts": 1.5,
        "fused": 1.5,
        "conv": 1,
        "vector": 1.5,
        "row": 1,
        "twin": 2,
    }
    while len(leaves) < count:
        kind = draw.weighted(kinds)
        own = draw.choice("float32", "bfloat16") if draw.chance(0.08) else dtype
        if kind == "attention":
            if maxima is None:
                block, maxima = _attention(draw, own, count - len(leaves))
                leaves += block
        elif kind == "twin":
            # A second leaf of a shape shares its stack.
            if leaves and leaves[-1].kind in ("dense", "stack", "experts", "conv", "fused"):
                last = leaves[-1]
                head, _, tail = last.path.partition("/")
                path = f"{head.rpartition('_')[0]}_{len(leaves)}/{tail}"
                leaves.append(dataclasses.replace(last, path=path))
        else:
            leaves.append(_MAKERS[kind](draw, own, len(leaves)))
    if all(leaf.dims is None for leaf in leaves):
        leaves.append(dense(draw, dtype, len(leaves)))
    return tuple(leaves), maxima


def dense(draw: Draw, dtype: str, number: int) -> Leaf:
    """Returns a plain matrix."""
    return Leaf("dense", f"mlp_{number}/kernel", (_size(draw), _size(draw)), dtype, ((0,), (1,)))


def _row(draw: Draw, dtype: str, number: int) -> Leaf:
    shape = (1, _size(draw)) if draw.chance(0.5) else (_size(draw), 1)
    return Leaf("row", f"row_{number}/kernel", shape, dtype, ((0,), (1,)))


def _stack(draw: Draw, dtype: str, number: int) -> Leaf:
    shape = (draw.choice(1, 2, 3, 4, 8), _size(draw), _size(draw))
    return Leaf("stack", f"layers_{number}/dense/kernel", shape, dtype, ((1,), (2,)))


def _experts(draw: Draw, dtype: str, number: int) -> Leaf:
    path = f"moe_{number}/experts/kernel"
    experts, sizes = draw.choice(2, 4, 5, 8), (_size(draw), _size(draw))
    if draw.chance(0.5):
        return Leaf("experts", path, (experts, *sizes), dtype, ((1,), (2,)))
    shape = (draw.choice(2, 3, 4), draw.choice(2, 4), *sizes)
    return Leaf("experts", f"layers_{number}/{path}", shape, dtype, ((2,), (3,)))


def _fused(draw: Draw, dtype: str, number: int) -> Leaf:
    rows, path = _size(draw), f"fused_{number}/kernel"
    if draw.chance(0.4):
        view = (draw.choice(2, 4, 3), 3, draw.choice(2, 4, 5))
        split = (1, (1, 1, 1), view, 1)
        return Leaf("fused", path, (rows, math.prod(view)), dtype, ((0,), (1,)), split)
    sizes = (_size(draw),) * 3 if draw.chance(0.5) else (_size(draw), 4, 4)
    return Leaf("fused", path, (rows, sum(sizes)), dtype, ((0,), (1,)), (1, sizes, None, 0))


def _conv(draw: Draw, dtype: str, number: int) -> Leaf:
    shape = (3, 2, draw.choice(2, 4, 8), _size(draw))
    return Leaf("conv", f"conv_{number}/kernel", shape, dtype, ((0, 1, 2), (3,)))


def _vector(draw: Draw, dtype: str, number: int) -> Leaf:
    return Leaf("vector", f"norm_{number}/scale", (_size(draw),), dtype, None)


_MAKERS = {
    "dense": dense,
    "row": _row,
    "stack": _stack,
    "experts": _experts,
    "fused": _fused,
    "conv": _conv,
    "vector": _vector,
}


def _attention(draw: Draw, dtype: str, room: int) -> tuple[list[Leaf], tuple[Any, ...]]:
    layers = (draw.choice(2, 3, 4),) if draw.chance(0.4) else ()
    width, heads, size = draw.choice(7, 8, 12, 16), draw.choice(2, 4, 8), draw.choice(2, 4, 5)
    kv_heads = draw.choice(1, 2) if draw.chance(0.3) else heads
    prefix = "layers/attention" if layers else "attention"
    at = len(layers)
    inwards, outwards = ((at,), (at + 1, at + 2)), ((at, at + 1), (at + 2,))

    def kernel(name: str, count: int) -> Leaf:
        shape = (*layers, width, count, size)
        return Leaf("attention", f"{prefix}/{name}/kernel", shape, dtype, inwards)

    def bias(name: str, count: int) -> Leaf:
        return Leaf("bias", f"{prefix}/{name}/bias", (*layers, count, size), dtype, None)

    block = [kernel("query", heads), kernel("key", kv_heads)]
    others = [
        kernel("value", kv_heads),
        Leaf("attention", f"{prefix}/out/kernel", (*layers, heads, size, width), dtype, outwards),
    ]
    if room >= 4:
        block += [bias("query", heads), bias("key", kv_heads)] if draw.chance(0.4) else others
    shape = (*layers, heads)
    values = [draw.choice(50.0, 90.0, 101.0, 150.0, 400.0) for _ in range(math.prod(shape))]
    if draw.chance(0.1):
        values[0] = draw.choice(math.nan, math.inf, -1.0, 0.0)
    nested: Any = values
    if layers:
        nested = [values[i : i + heads] for i in range(0, len(values), heads)]
    return block, (f"{prefix}", nested)
