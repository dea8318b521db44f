"""Stacks: what shares one, their bound, and that every matrix is replaced by its own result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.matrices import map_stacks, plan_leaf, plan_stacks
from muonclip_jax.routing import MatrixSpec, normalize_spec

SHAPES = {
    "wide": ((4, 6), MatrixSpec()),
    "tall": ((6, 4), MatrixSpec()),
    "layers": ((5, 4, 6), MatrixSpec((1, 2))),
    "square": ((4, 4), MatrixSpec()),
    "none": ((0, 4), MatrixSpec()),
}
MATRIX = 4 * 6 * 4


def plan(max_bytes: int, dtypes: list[str] | None = None):
    leaves = [plan_leaf(shape, normalize_spec(spec, shape)) for shape, spec in SHAPES.values()]
    return plan_stacks(leaves, dtypes or ["float32"] * len(leaves), max_bytes)


def test_tall_and_wide_share_a_stack_and_dtypes_do_not():
    dtypes = ["float32", "bfloat16", "float32", "float32", "float32"]
    assert sorted((s.rows, s.columns, s.dtype, s.count) for s in plan(10**9, dtypes).stacks) == [
        (4, 4, "float32", 1),
        (4, 6, "bfloat16", 1),
        (4, 6, "float32", 6),
    ]


@pytest.mark.parametrize(
    ("max_bytes", "counts"),
    [(1, [1] * 7), (2 * MATRIX, [2, 2, 2, 1]), (4 * MATRIX, [4, 3]), (10**9, [7])],
)
def test_stacks_are_even_and_every_matrix_is_replaced(max_bytes: int, counts: list[int]):
    seen = []

    def double_and_shift(stack: jax.Array) -> jax.Array:
        seen.append(stack.shape)
        return 2 * stack + jnp.max(stack, axis=(1, 2), keepdims=True)

    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    leaves = [
        jax.random.normal(key, shape) for key, (shape, _) in zip(keys, SHAPES.values(), strict=True)
    ]
    got = map_stacks(double_and_shift, leaves, plan(max_bytes))
    assert seen == [(count, 4, 6) for count in counts] + [(1, 4, 4)]
    for x, y in zip(leaves, got, strict=True):
        x = np.asarray(x)
        largest = x.max(axis=(-2, -1), keepdims=True) if x.size else 0
        np.testing.assert_array_equal(y, 2 * x + largest)
