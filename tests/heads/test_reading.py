"""Which axes are stacked and which hold heads, where shapes alone are ambiguous."""

from typing import Any

import pytest

from muonclip_jax.heads.clips import read_block
from muonclip_jax.heads.finding import FoundBlock
from muonclip_jax.heads.layouts import AttentionLayout, Projection, separate
from muonclip_jax.heads.plan import Segment

LAYOUT = separate("query", "key")


def read(maxima_shape, layout: Any = LAYOUT, **shapes: Any):
    leaves = {name.replace("__", "/"): shape for name, shape in shapes.items()}
    paths = {name: f"attn/{name}" for name in leaves}
    return read_block(FoundBlock("attn", layout, True, leaves, paths), maxima_shape)


def pair(query, key=None) -> dict[str, Any]:
    return {"query__kernel": query, "key__kernel": key or query}


def biases(*shape: int) -> dict[str, Any]:
    return {"query__bias": shape, "key__bias": shape}


ROPE = AttentionLayout((*LAYOUT.projections, Projection("rope", ("query_alone",))))
TOLD_AXIS = AttentionLayout(LAYOUT.projections, stack_axes=(1,))


@pytest.mark.parametrize(
    ("maxima", "shapes", "stack_axes", "feature_axes", "size"),
    [
        ((4,), pair((64, 4, 16)), (), (1, 2), 16),
        ((4,), pair((64, 64)), (), (1,), 16),
        # (heads, inputs, size), as an array without a module.
        ((4,), {"query": (4, 64, 16), "key": (4, 64, 16)}, (), (0, 2), 16),
        ((3, 4), pair((3, 64, 4, 16)), (0,), (2, 3), 16),
        ((3, 4), pair((64, 3, 4, 16)), (1,), (2, 3), 16),
        ((3, 4), pair((64, 4, 16, 3)), (3,), (1, 2), 16),
        ((3, 4), pair((3, 64, 64)), (0,), (2,), 16),
        ((2, 3, 4), pair((2, 3, 64, 4, 16)), (0, 1), (3, 4), 16),
        ((2, 3, 4), pair((2, 64, 3, 4, 16)), (0, 2), (3, 4), 16),
        # More axes of maxima than the kernel has: micro-batches, reduced.
        ((5, 4), pair((64, 4, 16)), (), (1, 2), 16),
        # As many layers as heads or as model features: the first axis holds the layers,
        ((4, 4), pair((4, 64, 4, 16)), (0,), (2, 3), 16),
        ((64, 4), pair((64, 64, 4, 16)), (0,), (2, 3), 16),
        # unless the layout, or biases, say otherwise.
        ((64, 4), {"layout": TOLD_AXIS, **pair((64, 64, 4, 16))}, (1,), (2, 3), 16),
        ((16, 2), pair((16, 16, 2, 4)) | biases(2, 16, 4), (1,), (2, 3), 4),
        ((16, 2), pair((16, 16, 2, 4)) | biases(16, 2, 4), (0,), (2, 3), 4),
        # The output projection tells four layers on the second axis from four micro-batches.
        ((4, 4), pair((64, 4, 64)) | {"out__kernel": (64, 4, 64)}, (1,), (2,), 16),
    ],
)
def test_layers_and_heads_are_found(maxima, shapes, stack_axes, feature_axes, size):
    plan = read(maxima, **shapes)
    query = plan.leaves[0]
    assert (query.stack_axes, query.feature_axes) == (stack_axes, feature_axes)
    assert (plan.heads, plan.kv_heads, plan.head_dim) == (maxima[-1], maxima[-1], size)
    assert plan.maxima_shape == maxima[len(maxima) - len(stack_axes) - 1 :]


def test_a_tie_is_an_error_that_says_how_to_break_it():
    with pytest.raises(
        ValueError, match=r"several ways: .*stacked nowhere.*stacked \(4,\).*stack_axes"
    ):
        read((4, 4), **pair((4, 4, 16)))


@pytest.mark.parametrize(
    ("maxima", "shapes", "why"),
    [
        ((3,), pair((64, 4, 16)), "query: 64 features are not 3 query heads of 21"),
        ((8,), pair((64, 8, 16), (64, 3, 16)), "key: 48 features .* number of key heads"),
        ((8,), pair((64, 128), (64, 40)), "key: 40 features .* number of key heads"),
        ((4,), pair((3, 64, 4, 16)), "stacked|not a kernel"),
        ((4,), pair((64, 4, 16)) | {"query__bias": (5,)}, "query/bias"),
        ((64, 4), {"layout": TOLD_AXIS, **pair((64, 4, 16))}, "not stacked"),
        # In latent attention every head has its own key.
        ((4,), {"layout": ROPE, **pair((64, 64), (64, 32)), "rope": (64, 8)}, "key: 32 features"),
    ],
)
def test_what_does_not_fit_says_why(maxima, shapes, why):
    with pytest.raises(ValueError, match=f"'attn/query/kernel'.*do not match.*({why})"):
        read(maxima, **shapes)


PARTS = ("query", "key", "value")
FUSED, OUT = AttentionLayout((Projection("qkv", PARTS),), "fused"), {"out__kernel": (48, 48)}
#: What tells the size of six query heads on two key heads: the layout, and the shapes.
TOLD: dict[str, tuple[AttentionLayout, dict[str, Any]]] = {
    "output": (FUSED, {"qkv__kernel": (48, 80), **OUT}),
    "head_dim": (AttentionLayout(FUSED.projections, head_dim=8), {"qkv__kernel": (48, 80)}),
    "an axis": (AttentionLayout(FUSED.projections, head_dim=8), {"qkv__kernel": (48, 10, 8)}),
    "kv_heads": (AttentionLayout(FUSED.projections, kv_heads=2), {"qkv__kernel": (48, 80)}),
    "sizes": (
        AttentionLayout((Projection("qkv", PARTS, sizes=(8, 8, 4)),)),
        {"qkv__kernel": (48, 72)},
    ),
}


@pytest.mark.parametrize("told", TOLD)
def test_fused_kernels_with_grouped_keys(told):
    layout, shapes = TOLD[told]
    plan = read((6,), layout, **shapes)
    assert (plan.heads, plan.kv_heads, plan.head_dim) == (6, 2, 8)
    assert [s.heads for s in plan.leaves[0].segments] == [6, 2, 2]


def test_latent_sizes_come_from_the_down_projection():
    layout = AttentionLayout(
        (
            Projection("q", ("query", "query_alone"), interleaved=True),
            Projection("up", ("key", "value"), interleaved=True),
        ),
        latent=("down", "up"),
    )
    shapes = {"q__kernel": (64, 4, 24), "down__kernel": (64, 40), "up__kernel": (32, 4, 28)}
    plan = read((4,), layout, **shapes)
    assert plan.leaves[0].segments == (Segment("query", 1, 16), Segment("query_alone", 1, 8))
    assert plan.leaves[1].segments == (Segment("key", 1, 16), Segment("value", 1, 12))
    with pytest.raises(ValueError, match="down makes 32 features and up takes 32"):
        read((4,), layout, **shapes | {"down__kernel": (64, 32)})
