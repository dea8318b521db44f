"""Stacks: what shares one, their bound, and that every matrix comes home."""

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


def _plan(max_bytes: int | None, dtypes: list[str] | None = None):
    leaves = [plan_leaf(shape, normalize_spec(spec, shape)) for shape, spec in SHAPES.values()]
    return plan_stacks(leaves, dtypes or ["float32"] * len(leaves), max_bytes)


def _leaves() -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return [
        jax.random.normal(key, shape) for key, (shape, _) in zip(keys, SHAPES.values(), strict=True)
    ]


def test_tall_and_wide_share_a_stack_and_dtypes_do_not():
    stacks = [(s.rows, s.columns, s.dtype, s.count) for s in _plan(None).stacks]
    assert stacks == [(4, 6, "float32", 7), (4, 4, "float32", 1)]
    mixed = _plan(None, ["float32", "bfloat16", "float32", "float32", "float32"])
    assert sorted((s.rows, s.columns, s.dtype, s.count) for s in mixed.stacks) == [
        (4, 4, "float32", 1),
        (4, 6, "bfloat16", 1),
        (4, 6, "float32", 6),
    ]


@pytest.mark.parametrize(("matrices", "counts"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (4, [4, 3])])
def test_stacks_keep_their_bound_and_are_even(matrices: int, counts: list[int]):
    stacks = _plan(matrices * 4 * 6 * 4).stacks
    assert [s.count for s in stacks if s.columns == 6] == counts


@pytest.mark.parametrize("max_bytes", [None, 1, 96, 200, 300, 10**9])
def test_every_matrix_comes_home(max_bytes: int | None):
    """A function of each matrix alone gives the same whatever the stacks are."""

    def double_and_shift(stack: jax.Array) -> jax.Array:
        return 2 * stack + jnp.max(stack, axis=(1, 2), keepdims=True)

    leaves = _leaves()
    got = map_stacks(double_and_shift, jnp.add, (leaves, leaves), _plan(max_bytes))
    for x, y in zip(leaves, got, strict=True):
        x = 2 * np.asarray(x)
        largest = x.max(axis=(-2, -1), keepdims=True) if x.size else 0
        np.testing.assert_array_equal(y, 2 * x + largest)


def test_stack_is_wide():
    seen = []

    def look(stack: jax.Array) -> jax.Array:
        seen.append(stack.shape)
        return stack

    map_stacks(look, jnp.asarray, (_leaves(),), _plan(None))
    assert sorted(seen) == [(1, 4, 4), (7, 4, 6)]
