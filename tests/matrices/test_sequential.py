"""One matrix after another: the bound on a chunk, exact results, the memory of one chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.matrices import map_sequentially, plan_leaf, plan_sequentially
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


def plan(max_bytes: int, dtypes: list[str] | None = None):
    leaves = [plan_leaf(shape, normalize_spec(spec, shape)) for shape, spec in SHAPES.values()]
    return plan_sequentially(leaves, dtypes or ["float32"] * len(leaves), max_bytes)


def leaves_of(seed: int = 0) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return [
        jax.random.normal(key, shape) for key, (shape, _) in zip(keys, SHAPES.values(), strict=True)
    ]


def test_a_chunk_keeps_its_bound_and_has_one_dtype():
    chunks = plan(3 * 4 * 6 * 4).chunks
    assert [chunk.counts for chunk in chunks] == [(5,), (5,), (1, 1, 1), (1, 1)]
    dtypes = ["float32", "float32", "bfloat16", "float32", "float32", "float32", "float32"]
    assert sorted(chunk.counts for chunk in plan(96, dtypes).chunks) == 5 * [(1,)] + 2 * [(5,)]


@pytest.mark.parametrize(("max_bytes", "jitted"), [(1, False), (300, True), (10**9, True)])
def test_every_matrix_is_replaced_by_its_own_result(max_bytes: int, jitted: bool):
    def run(leaves: list[jax.Array]) -> list[jax.Array]:
        return map_sequentially(lambda x: 2 * x + jnp.max(x), leaves, plan(max_bytes))

    leaves = leaves_of()
    got = (jax.jit(run) if jitted else run)(leaves)
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


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, -3e38])
def test_no_number_in_one_matrix_stops_the_others(bad: float):
    """Neither in the first matrix, which the first predicate reads, nor in a later one."""
    for index in (0, 3):
        leaves = leaves_of()
        leaves[index] = jnp.full_like(leaves[index], bad)
        got = map_sequentially(lambda x: -x, leaves, plan(1))
        for x, y in zip(leaves, got, strict=True):
            np.testing.assert_array_equal(-x, y)


def test_one_chunk_at_a_time_is_in_memory_and_every_offset_shares_its_code():
    """64 matrices in chunks of 8: without the order all their stacks would be alive at once."""
    n, count = 64, 64
    chunks = plan_sequentially(
        [plan_leaf((n, n), MatrixSpec())] * count, ["float32"] * count, 8 * n * n * 4
    )
    assert len(chunks.chunks) == 8

    def run(tree: list[jax.Array]) -> list[jax.Array]:
        return [-0.1 * x for x in map_sequentially(lambda x: x @ x, tree, chunks)]

    compiled = jax.jit(run).lower([jax.ShapeDtypeStruct((n, n), jnp.float32)] * count).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    assert memory.temp_size_in_bytes < 3 * 8 * n * n * 4
    assert text.count(" dynamic-slice(") >= count
    assert text.count(" slice(") <= len(chunks.chunks)  # one for each predicate
