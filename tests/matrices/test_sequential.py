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
    m, n, count = 48, 64, 64
    shapes = [(m, n), (n, m)] * (count // 2)
    chunks = plan_sequentially(
        [plan_leaf(shape, MatrixSpec()) for shape in shapes], ["float32"] * count, 8 * m * n * 4
    )
    assert len(chunks.chunks) == 8

    def run(tree: list[jax.Array]) -> list[jax.Array]:
        return [-0.1 * x for x in map_sequentially(lambda x: x @ x.mT @ x, tree, chunks)]

    compiled = jax.jit(run).lower([jax.ShapeDtypeStruct(shape, "f4") for shape in shapes]).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    assert memory.temp_size_in_bytes < 3 * 8 * m * n * 4
    assert text.count(" dynamic-slice(") >= count
    assert text.count(" slice(") <= len(chunks.chunks)  # one for each predicate
    # XLA compiles a plain update slice wherever it stands, and equal fusions once.
    computations = [each for each in text.split("\n\n") if not each.startswith("%fused")]
    assert sum(each.count(" dynamic-update-slice(") for each in computations) == 0


def test_directions_reuse_the_buffers_of_gradients():
    """A training step holds its gradients and one chunk, not directions beside the gradients."""
    n, count = 64, 64
    chunks = plan_sequentially(
        [plan_leaf((n, n), MatrixSpec())] * count, ["float32"] * count, 8 * n * n * 4
    )

    def step(params: list[jax.Array], momenta: list[jax.Array], x: jax.Array):
        gradients = jax.grad(lambda ws: sum(jnp.sum(jnp.tanh(x @ w)) for w in ws))(params)
        momenta = [0.9 * m + g for m, g in zip(momenta, gradients, strict=True)]
        directions = [0.9 * m + g for m, g in zip(momenta, gradients, strict=True)]
        results = map_sequentially(lambda x: x @ x, directions, chunks)
        return [w - 0.1 * u for w, u in zip(params, results, strict=True)], momenta

    tree = [jax.ShapeDtypeStruct((n, n), jnp.float32)] * count
    x = jax.ShapeDtypeStruct((4, n), jnp.float32)
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(tree, tree, x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < (count + 1.5 * 8) * n * n * 4
