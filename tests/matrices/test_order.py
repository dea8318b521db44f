"""Matrices in stacks, or one after another: bounds, exact results, the memory of one chunk."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.matrices import map_parts, plan_leaf, plan_stacks
from muonclip_jax.matrices.parts import Run, from_matrices
from muonclip_jax.matrices.sequential import map_sequentially, plan_chunks
from muonclip_jax.routing import MatrixSpec, Split, normalize_spec
from tests.helpers import normal_tree

SHAPES: dict[str, tuple[tuple[int, ...], MatrixSpec]] = {
    "wide": ((4, 6), MatrixSpec()),
    "tall": ((6, 4), MatrixSpec()),
    "tall too": ((6, 4), MatrixSpec()),
    "layers": ((5, 4, 6), MatrixSpec((1, 2))),
    "inner layers": ((4, 5, 6), MatrixSpec((0, 2))),
    "fused": ((4, 12), MatrixSpec((0, 1), (Split(1, (6, 6)),))),
    "square": ((4, 4), MatrixSpec()),
    "none": ((0, 4), MatrixSpec()),
}
LEAVES = [plan_leaf(shape, normalize_spec(spec, shape)) for shape, spec in SHAPES.values()]
FLOATS, MATRIX = ["float32"] * len(LEAVES), 4 * 6 * 4
ONE_BFLOAT16 = ["float32", "float32", "bfloat16", *FLOATS[3:]]


def leaves_of() -> list[jax.Array]:
    return normal_tree([shape for shape, _ in SHAPES.values()], 0)


def counts(stacks: Sequence[Sequence[Run]]) -> list[int]:
    return [sum(run.stop - run.start for run in stack) for stack in stacks]


def test_a_chunk_or_stack_keeps_its_bound_and_has_one_dtype_and_tall_and_wide_share_it():
    assert counts(plan_chunks(LEAVES, FLOATS, 3 * MATRIX)) == [5, 5, 3, 2, 1]
    assert counts(plan_chunks(LEAVES, FLOATS, 6 * MATRIX)) == [3, 5, 5, 2, 1]
    assert sorted(counts(plan_chunks(LEAVES, ONE_BFLOAT16, MATRIX))) == 6 * [1] + 2 * [5]
    stacks = plan_stacks(LEAVES, ONE_BFLOAT16, 10**9).stacks
    assert [runs[0].leaf for runs in stacks] == [0, 2, 6]
    assert counts(stacks) == [14, 1, 1]
    for most, expected in ((1, [1] * 15), (2, [2] * 7 + [1]), (9, [8, 7]), (15, [15])):
        assert counts(plan_stacks(LEAVES, FLOATS, most * MATRIX).stacks) == [*expected, 1]


def largest(x: jax.Array) -> jax.Array:
    return 2 * x + jnp.max(x, axis=(-2, -1), keepdims=True)


WAYS: dict[str, Any] = {
    "sequentially": lambda leaves, most: map_sequentially(
        largest, leaves, LEAVES, plan_chunks(LEAVES, FLOATS, most)
    ),
    "stacks": lambda leaves, most: map(
        from_matrices, map_parts(largest, leaves, plan_stacks(LEAVES, FLOATS, most)), LEAVES
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("max_bytes", "jitted"), [(1, False), (300, True), (10**9, True)])
def test_every_matrix_is_replaced_by_its_own_result(way: str, max_bytes: int, jitted: bool):
    def run(leaves: list[jax.Array]) -> list[jax.Array]:
        return list(WAYS[way](leaves, max_bytes))

    leaves = leaves_of()
    got = (jax.jit(run) if jitted else run)(leaves)
    for (name, (_, spec)), x, y in zip(SHAPES.items(), leaves, got, strict=True):
        x, axes = np.asarray(x), tuple(np.ravel(np.asarray(spec.dims)))
        parts = np.split(x, 2, axis=1) if name == "fused" else [x]
        want = [2 * part + part.max(axis=axes, keepdims=True, initial=-9) for part in parts]
        np.testing.assert_array_equal(y, np.concatenate(want, axis=1), err_msg=name)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -3e38])
def test_no_number_in_one_matrix_stops_the_others(bad: float):
    """Neither in the first matrix, which the first predicate reads, nor in a later one."""
    for index in (0, 3):
        leaves = leaves_of()
        leaves[index] = jnp.full_like(leaves[index], bad)
        got = map_sequentially(lambda x: -x, leaves, LEAVES, plan_chunks(LEAVES, FLOATS, 1))
        for x, y in zip(leaves, got, strict=True):
            np.testing.assert_array_equal(-x, y)


def compiled(run: Any, *arguments: Any, **options: Any) -> tuple[Any, str]:
    """The memory that a program needs, and its text."""
    program = jax.jit(run, **options).lower(*arguments).compile()
    return program.memory_analysis(), program.as_text() or ""


def test_one_chunk_at_a_time_is_in_memory_and_every_offset_shares_its_code():
    """64 matrices in chunks of 8: without the order all their stacks would be alive at once."""
    m, n, count = 48, 64, 64
    shapes = [(m, n), (n, m)] * (count // 2)
    plans = [plan_leaf(shape, MatrixSpec()) for shape in shapes]
    chunks = plan_chunks(plans, ["float32"] * count, 8 * m * n * 4)
    assert len(chunks) == 8

    def run(tree: list[jax.Array]) -> list[jax.Array]:
        return [-0.1 * x for x in map_sequentially(lambda x: x @ x.mT @ x, tree, plans, chunks)]

    memory, text = compiled(run, [jax.ShapeDtypeStruct(shape, "f4") for shape in shapes])
    assert memory.temp_size_in_bytes < 3 * 8 * m * n * 4
    assert text.count(" dynamic-slice(") >= count
    assert text.count(" slice(") <= len(chunks)  # one for each predicate
    # XLA compiles a plain update slice wherever it stands, and equal fusions once.
    computations = [each for each in text.split("\n\n") if not each.startswith("%fused")]
    assert sum(each.count(" dynamic-update-slice(") for each in computations) == 0


def test_directions_reuse_the_buffers_of_gradients():
    n, count = 64, 64
    plans = [plan_leaf((n, n), MatrixSpec())] * count
    chunks = plan_chunks(plans, ["float32"] * count, 8 * n * n * 4)

    def step(params: list[jax.Array], momenta: list[jax.Array], x: jax.Array):
        gradients = jax.grad(lambda ws: sum(jnp.sum(jnp.tanh(x @ w)) for w in ws))(params)
        momenta = [0.9 * m + g for m, g in zip(momenta, gradients, strict=True)]
        directions = [0.9 * m + g for m, g in zip(momenta, gradients, strict=True)]
        results = map_sequentially(lambda x: x @ x, directions, plans, chunks)
        return [w - 0.1 * u for w, u in zip(params, results, strict=True)], momenta

    tree = [jax.ShapeDtypeStruct((n, n), jnp.float32)] * count
    x = jax.ShapeDtypeStruct((4, n), jnp.float32)
    memory, _ = compiled(step, tree, tree, x, donate_argnums=(0, 1))
    assert memory.temp_size_in_bytes < (count + 1.5 * 8) * n * n * 4
