"""Who works on which matrix: plans, assignments, and options that are refused."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from muonclip_jax.newton_schulz import plan_polar
from muonclip_jax.routing import MatrixSpec
from muonclip_jax.sharding.mesh_shardings import Distribution, axes_of
from muonclip_jax.sharding.planning import assign_longest_first, branches_of, plan_tree
from muonclip_jax.sharding.run import orthogonalize_leaves
from tests.sharding.cases import TREE

SIZES = (("fsdp", 4), ("tp", 2))
FSDP, TP, BOTH = ("fsdp",), ("tp",), ("fsdp", "tp")
POLAR = plan_polar(ns_steps=2, ns_method="standard", ns_dtype="float32", platform="cpu")

#: Name -> shape, spec, axes that shard each dimension.
LEAVES = {
    name: (shape, spec, axes_of(at, len(shape), BOTH)) for name, (shape, spec, at) in TREE.items()
}
LARGE, SMALL = ((8, 32), MatrixSpec(), (FSDP, TP)), ((8, 8), MatrixSpec(), ((), FSDP))


def plan_of(leaves: list[tuple[Any, ...]], options: Distribution | None = None, sizes: Any = SIZES):
    """The local leaves; and the exchange, shapes, branches of each round."""
    shapes, specs, axes = zip(*leaves, strict=True)
    shapes = [(shape, "float32") for shape in shapes]
    options = options or Distribution()
    local, rounds = plan_tree(POLAR, shapes, specs, axes, axes, dict(sizes), options)
    return local, [
        (
            exchange,
            [bucket.block.gathered_shape(dict(sizes), dict(sizes)) for bucket, *_ in jobs],
            branches_of(jobs)[0],
        )
        for exchange, jobs in rounds
    ]


def flops(*shape: int) -> float:
    return POLAR.resolve(shape, "float32").flops


def load(rounds: Any) -> float:
    """FLOPs of the busiest device."""
    return sum(
        max(np.dot(branch, [flops(*shape) for shape in shapes]) for branch in branches)
        / exchange.ways
        for exchange, shapes, branches in rounds
    )


LLAMA = (
    [((24, 4096, 4096), MatrixSpec((1, 2)), ((), FSDP, TP))] * 4
    + [((24, 4096, 11008), MatrixSpec((1, 2)), ((), FSDP, TP))] * 3
)  # fmt: skip


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        ([LEAVES["rows"]], flops(8, 16)),
        ([LEAVES["rows"]] * 8, flops(8, 16)),
        ([LEAVES["rows"]] * 4 + [LEAVES["columns"]] * 4, flops(8, 16)),
        ([LEAVES["rows"]] * 13, 2 * flops(8, 16)),
        # Leftovers of several shapes share the padding.
        ([LARGE] * 12 + [SMALL] * 5, 2 * flops(8, 32)),
        # Full rounds give way too: nobody has one large and two small ones.
        ([LARGE] * 9 + [SMALL] * 16, 2 * flops(8, 32)),
    ],
)
def test_the_busiest_device(leaves: list[Any], expected: float):
    assert load(plan_of(leaves)[1]) == expected


def test_few_large_matrices_are_split_over_the_fast_axis():
    """Llama 7B's shapes on 512 devices: 96 and 72 matrices, too few to give everyone one."""
    options = Distribution(flops_per_byte=1000.0)
    _, rounds = plan_of(LLAMA, options, (("fsdp", 128), ("tp", 4)))
    ((exchange, *_),) = rounds
    assert exchange.column_axes == TP
    assert load(rounds) < 1.1 * (96 * flops(4096, 4096) + 72 * flops(4096, 11008)) / 512


def test_stacks_are_even_and_bounded():
    for count, depths in ((40, [2, 2, 1]), (35, [2, 2, 1]), (9, [2]), (100, [2] * 6 + [1])):
        options = Distribution(max_stack_bytes=2 * 8 * 16 * 4)
        _, rounds = plan_of([LEAVES["rows"]] * count, options)
        assert [branches for *_, branches in rounds] == [[(depth,)] for depth in depths]
    # Devices without a large matrix would take up to twenty small ones, for their cost.
    large, small = ((16, 32), MatrixSpec(), ((), FSDP)), ((4, 32), MatrixSpec(), ((), FSDP))
    for flops_per_byte, count in ((0.0, 3), (2000.0, 13), (math.inf, 5)):
        options = Distribution(max_stack_bytes=2 * 16 * 32 * 4, flops_per_byte=flops_per_byte)
        for exchange, shapes, branches in plan_of([large] * count + [small] * 60, options)[1]:
            for shape, *counts in zip(shapes, *branches, strict=True):
                size = max(counts) * math.prod(shape) * 4
                assert size <= options.max_stack_bytes * exchange.ways


@pytest.mark.parametrize(
    ("leaf", "options", "matrix_axes", "column_axes", "gathered"),
    [
        ("rows", Distribution(), BOTH, (), ()),
        # Those of another pipeline stage or expert group stay there.
        ("stages", Distribution(), TP, (), ()),
        ("experts", Distribution(), (), (), ()),
        ("columns", Distribution(axes=TP), TP, (), ((1, FSDP),)),
        # A matrix that is too large is split as far as it must be, over the fastest axis first.
        ("rows", Distribution(max_matrix_bytes=512), BOTH, (), ()),
        ("rows", Distribution(max_matrix_bytes=256), FSDP, TP, ()),
        ("rows", Distribution(max_matrix_bytes=100), (), BOTH, ()),
        # What docs/scaling.md says of a fused kernel: gathered along the axis that it is split on.
        ("fused", Distribution(), BOTH, (), ((1, TP),)),
        ("fused, other axis", Distribution(), BOTH, (), ()),
        ("interleaved", Distribution(), BOTH, (), ()),
    ],
)
def test_axes_that_share_and_what_is_gathered_first(
    leaf: str, options: Distribution, matrix_axes: Any, column_axes: Any, gathered: Any
):
    count = 8 if options.max_matrix_bytes > 512 else 1
    local, ((exchange, *_),) = plan_of([LEAVES[leaf]] * count, options)
    assert (exchange.matrix_axes, exchange.column_axes) == (matrix_axes, column_axes)
    assert local[0].gathered == gathered


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 50)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_assignments_have_every_matrix_and_are_balanced(kinds: list[Any], groups: int):
    counts, costs = np.transpose(kinds).tolist()
    limits = [max(1, math.ceil(count / groups)) for count in counts]
    for most in (limits, [max(1, count) for count in counts]):
        assigned = np.array(
            assign_longest_first(counts, list(zip(costs, most, strict=True)), groups)
        )
        np.testing.assert_array_equal(assigned.sum(0), counts)
        assert np.all(assigned <= most)
    # Graham's bound for list scheduling.
    assert max(assigned @ costs) <= np.dot(counts, costs) / groups + max(costs)


def test_axes_that_do_not_exist_are_errors():
    with pytest.raises(ValueError, match=r"'dcn', and the mesh has the axes 'fsdp', 'tp'"):
        plan_of([LEAVES["rows"]], Distribution(axes=("dcn",)))
    with pytest.raises(ValueError, match=r"axis_name=.'batch',. has a name that is not a mapped"):
        orthogonalize_leaves(POLAR, 1e-7, [jnp.ones((2, 3))], [MatrixSpec()], axis_name=("batch",))
