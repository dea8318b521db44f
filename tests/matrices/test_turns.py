"""Turns: their bound, that every matrix comes home, and what the compiler makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.matrices import map_in_turn, plan_leaf, plan_turns
from muonclip_jax.routing import MatrixSpec, Split, normalize_spec

SHAPES = {
    "wide": ((4, 6), MatrixSpec()),
    "tall": ((6, 4), MatrixSpec()),
    "tall too": ((6, 4), MatrixSpec()),
    "layers": ((5, 4, 6), MatrixSpec((1, 2))),
    "inner layers": ((4, 5, 6), MatrixSpec((0, 2))),
    "fused": ((4, 12), MatrixSpec((0, 1), (Split(1, (6, 6)),))),
    "none": ((0, 4), MatrixSpec()),
}


def _plan(max_bytes: int, dtypes: list[str] | None = None):
    leaves = [plan_leaf(shape, normalize_spec(spec, shape)) for shape, spec in SHAPES.values()]
    return plan_turns(leaves, dtypes or ["float32"] * len(leaves), max_bytes)


def _leaves() -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return [
        jax.random.normal(key, shape) for key, (shape, _) in zip(keys, SHAPES.values(), strict=True)
    ]


def test_a_turn_keeps_its_bound_and_large_parts_stand_alone():
    turns = _plan(3 * 4 * 6 * 4).turns
    assert [turn.counts for turn in turns] == [(5,), (5,), (1, 1, 1), (1, 1)]
    assert [turn.offsets for turn in turns] == [(0,), (0,), (0, 1, 2), (0, 1)]


def test_dtypes_share_no_turn():
    dtypes = ["float32", "float32", "bfloat16", "float32", "float32", "float32", "float32"]
    assert sorted(turn.counts for turn in _plan(96, dtypes).turns) == [
        (1,), (1,), (1,), (1,), (1,), (5,), (5,),
    ]  # fmt: skip


@pytest.mark.parametrize("max_bytes", [1, 100, 300, 600, 10**9])
@pytest.mark.parametrize("jitted", [True, False])
def test_every_matrix_comes_home(max_bytes: int, jitted: bool):
    """A function of each matrix alone gives the same whatever the turns are."""

    def run(leaves: list[jax.Array], count: jax.Array) -> list[jax.Array]:
        def largest(x: jax.Array) -> jax.Array:
            return 2 * x + jnp.max(x)

        return map_in_turn(largest, jnp.subtract, (leaves, zeros), _plan(max_bytes), count)

    leaves = _leaves()
    zeros = jax.tree.map(jnp.zeros_like, leaves)
    got = (jax.jit(run) if jitted else run)(leaves, jnp.asarray(-3))
    for (name, (_, spec)), x, y in zip(SHAPES.items(), leaves, got, strict=True):
        x = np.asarray(x)
        if name == "fused":
            want = [2 * part + part.max() for part in np.split(x, 2, axis=1)]
            np.testing.assert_array_equal(y, np.concatenate(want, axis=1))
        elif x.size:
            axes: tuple = tuple(np.ravel(spec.dims))
            np.testing.assert_array_equal(y, 2 * x + x.max(axis=axes, keepdims=True))
        else:
            assert y.shape == x.shape


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, -3e38, 1.5e30, -1.5e30])
def test_what_one_matrix_holds_leaves_the_others_alone(bad: float):
    leaves = _leaves()
    leaves[0] = jnp.full_like(leaves[0], bad)
    plan = _plan(1)
    assert plan.turns[0].parts == ((3, 0),) or plan.turns[0].counts == (5,)
    got = map_in_turn(lambda x: -x, jnp.asarray, (leaves,), plan, jnp.asarray(0))
    for x, y in zip(leaves, got, strict=True):
        np.testing.assert_array_equal(-x, y)


def test_temporary_memory_is_that_of_a_turn():
    """64 matrices in turns of 8: without the tie all their stacks would be alive at once."""
    n, leaves = 64, 64
    shapes = [jax.ShapeDtypeStruct((n, n), jnp.float32)] * leaves
    plan = plan_turns(
        [plan_leaf((n, n), MatrixSpec())] * leaves, ["float32"] * leaves, 8 * n * n * 4
    )
    assert len(plan.turns) == 8

    def run(tree: list[jax.Array], count: jax.Array) -> list[jax.Array]:
        polars = map_in_turn(lambda x: x @ x, jnp.sin, (tree,), plan, count)
        return [-0.1 * x for x in polars]

    count = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(run).lower(shapes, count).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 3 * 8 * n * n * 4


def test_code_does_not_grow_with_the_positions():
    """What reads and writes the stack is the same code for every position, so it compiles once."""
    plan = plan_turns([plan_leaf((8, 8), MatrixSpec())] * 6, ["float32"] * 6, 10**6)

    def run(tree: list[jax.Array], count: jax.Array) -> list[jax.Array]:
        return map_in_turn(lambda x: x @ x, jnp.sin, (tree,), plan, count)

    shapes = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 6
    text = jax.jit(run).lower(shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    assert text is not None
    assert text.count(" dynamic-slice(") >= 6
    assert " slice(" not in text
