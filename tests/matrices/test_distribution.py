"""Who works on which matrix: plans, hands, and the moves there and back."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import PartitionSpec as P

from muonclip_jax.newton_schulz import plan_polar
from muonclip_jax.routing import MatrixSpec, Split
from muonclip_jax.sharding import Distribution, orthogonalize_leaves
from muonclip_jax.sharding.map import map_distributed
from muonclip_jax.sharding.plan import DistributionPlan, Item
from muonclip_jax.sharding.planning import plan_for
from muonclip_jax.sharding.schedule import branches, deal, spread

SIZES = (("fsdp", 4), ("tp", 2))
FSDP, TP, BOTH, SWAPPED = ("fsdp",), ("tp",), ("fsdp", "tp"), ("tp", "fsdp")
POLAR = plan_polar(ns_method="standard", ns_dtype="float32", platform="cpu")

# name -> (shape, spec, axes that shard each dimension)
LEAVES = {
    "replicated": ((8, 16), MatrixSpec(), ((), ())),
    "rows": ((8, 16), MatrixSpec(), (FSDP, ())),
    "columns": ((8, 16), MatrixSpec(), ((), FSDP)),
    "rows and columns": ((8, 16), MatrixSpec(), (TP, FSDP)),
    "both on rows": ((8, 16), MatrixSpec(), (SWAPPED, ())),
    "both on columns": ((8, 16), MatrixSpec(), ((), BOTH)),
    "tall": ((16, 8), MatrixSpec(), (FSDP, TP)),
    "square": ((8, 8), MatrixSpec(), (TP, FSDP)),
    "heads": ((8, 4, 4), MatrixSpec((0, (1, 2))), (TP, FSDP, ())),
    "inside of heads": ((8, 4, 4), MatrixSpec((0, (1, 2))), ((), TP, FSDP)),
    "attention out": ((4, 4, 8), MatrixSpec(((0, 1), 2)), (TP, (), FSDP)),
    "layers": ((5, 8, 12), MatrixSpec((1, 2)), ((), TP, FSDP)),
    "pipeline stages": ((8, 8, 12), MatrixSpec((1, 2)), (FSDP, TP, ())),
    "experts": ((4, 4, 8, 12), MatrixSpec((2, 3)), (FSDP, TP, (), ())),
    "fused": ((8, 24), MatrixSpec((0, 1), Split(1, (8, 8, 8))), (FSDP, TP)),
    "interleaved": (
        (8, 24),
        MatrixSpec((0, 1), Split(1, (1, 1, 1), view=(4, 3, 2), along=1)),
        (TP, FSDP),
    ),
    "one row": ((1, 8), MatrixSpec(), ((), FSDP)),
}

OPTIONS = {
    "all axes": Distribution(),
    "fast axis": Distribution(axes=TP),
    "split": Distribution(flops_per_byte=0.0),
    "too large": Distribution(max_matrix_bytes=64),
    "short stacks": Distribution(max_stack_bytes=64),
}
# Their plans are checked always; the program has nothing that the other ones have not.
SLOW_TO_COMPILE = ("fast axis", "too large", "short stacks")


def plan_of(
    leaves: list[tuple], options: Distribution | None = None, sizes: tuple = SIZES
) -> DistributionPlan:
    shapes, specs, axes = zip(*leaves, strict=True)
    return plan_for(
        POLAR,
        shapes,
        ("float32",) * len(leaves),
        specs,
        axes,
        axes,
        sizes,
        Distribution() if options is None else options,
    )


def flops(rows: int, columns: int) -> float:
    return POLAR.resolve((rows, columns), "float32").flops


def load(plan: DistributionPlan) -> float:
    """FLOPs of the busiest device; a branch it does not take costs it nothing."""
    total = 0.0
    for turn in plan.rounds:
        total += max(
            sum(
                count * flops(job.rows, job.columns)
                for count, job in zip(turn.branches[branch], turn.jobs, strict=True)
            )
            / turn.exchange.ways(dict(plan.sizes))
            for branch in turn.branch
        )
    return total


# Plans


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_matrix_has_exactly_one_place(options: Distribution):
    plan = plan_of(list(LEAVES.values()), options)
    places = [
        item
        for turn in plan.rounds
        for job in turn.jobs
        for group in job.groups
        for item in group.order
        if item is not None
    ]
    expected = {
        Item(leaf, part, index)
        for leaf, local in enumerate(plan.leaves)
        for part, matrices in enumerate(local.plan.parts)
        for index in range(matrices.count)
    }
    assert len(places) == len(expected)
    assert set(places) == expected


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_hand_covers_the_matrices_that_were_sent(options: Distribution):
    for turn in plan_of(list(LEAVES.values()), options).rounds:
        for number, job in enumerate(turn.jobs):
            for branch, row in zip(turn.branch, job.table, strict=True):
                assert len(row) <= turn.branches[branch][number]


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 13, 16])
def test_a_stack_is_padded_to_the_devices(count: int):
    plan = plan_of([LEAVES["rows"]] * count)
    assert load(plan) == math.ceil(count / 8) * flops(8, 16)


def test_leftovers_of_several_shapes_share_the_padding():
    large, small = ((8, 32), MatrixSpec(), (FSDP, TP)), ((8, 8), MatrixSpec(), ((), FSDP))
    plan = plan_of([large] * 5 + [small] * 3)
    assert load(plan) == flops(8, 32)
    plan = plan_of([large] * 12 + [small] * 5)
    assert load(plan) == 2 * flops(8, 32)


def test_a_stack_has_one_exchange():
    assert len(plan_of([LEAVES["rows"]] * 13).rounds) == 1


@pytest.mark.parametrize(
    ("count", "depths"),
    [(40, [2, 2, 1]), (35, [2, 2, 1]), (9, [2]), (100, [2, 2, 2, 2, 2, 2, 1])],
)
def test_stacks_are_bounded(count: int, depths: list[int]):
    options = Distribution(max_stack_bytes=2 * 8 * 16 * 4)
    plan = plan_of([LEAVES["rows"]] * count, options)
    assert [max(hand[0] for hand in turn.branches) for turn in plan.rounds] == depths


@pytest.mark.parametrize("flops_per_byte", [0.0, 2000.0, math.inf])
def test_balancing_keeps_the_bound_too(flops_per_byte: float):
    """Devices without a large matrix would take up to twenty small ones, for their cost."""
    large, small = ((16, 32), MatrixSpec(), ((), FSDP)), ((4, 32), MatrixSpec(), ((), FSDP))
    options = Distribution(max_stack_bytes=2 * 16 * 32 * 4, flops_per_byte=flops_per_byte)
    for count in (3, 5, 13):
        plan = plan_of([large] * count + [small] * 60, options)
        for turn in plan.rounds:
            ways = turn.exchange.ways(dict(plan.sizes))
            for number, job in enumerate(turn.jobs):
                most = max(hand[number] for hand in turn.branches)
                assert most * job.rows * job.columns * 4 <= options.max_stack_bytes * ways


def test_what_lies_on_another_pipeline_stage_stays_there():
    plan = plan_of([LEAVES["experts"]])
    (turn,) = plan.rounds
    assert turn.exchange.positions == ()
    assert not plan.leaves[0].blocks[0].axes


def test_the_slow_axis_does_not_share():
    plan = plan_of([LEAVES["columns"]] * 4, Distribution(axes=TP))
    (turn,) = plan.rounds
    assert turn.exchange.positions == TP
    assert plan.leaves[0].gathered == ((1, FSDP),)


def test_a_fused_axis_is_gathered_and_interleaved_heads_are_not():
    fused, interleaved = plan_of([LEAVES["fused"], LEAVES["interleaved"]]).leaves
    assert fused.gathered == ((1, TP),)
    assert interleaved.gathered == ()


def test_what_a_fused_kernel_sharded_on_its_cut_costs():
    """What docs/scaling.md says: the whole leaf comes to everyone along that axis, and only it."""
    cut, other = Split(1, (8, 8, 8)), Split(0, (4, 4))
    leaves = {
        "the cut axis": ((8, 24), MatrixSpec((0, 1), cut), (FSDP, TP)),
        "the other axis": ((8, 24), MatrixSpec((0, 1), cut), (FSDP, ())),
        "the cut rows": ((8, 24), MatrixSpec((0, 1), other), (FSDP, TP)),
    }
    found = plan_of(list(leaves.values())).leaves
    assert [local.gathered for local in found] == [((1, TP),), (), ((0, FSDP),)]
    # After it, a device holds all columns of each part.
    assert [block.shape for block in found[0].blocks] == [(2, 8)] * 3


def test_few_large_matrices_are_split_over_the_fast_axis():
    # Llama 7B's shapes on 512 devices: 96 and 72 matrices, too few to give everyone one.
    attention = ((24, 4096, 4096), MatrixSpec((1, 2)), ((), FSDP, TP))
    mlp = ((24, 4096, 11008), MatrixSpec((1, 2)), ((), FSDP, TP))
    sizes = (("fsdp", 128), ("tp", 4))
    plan = plan_of([attention] * 4 + [mlp] * 3, Distribution(flops_per_byte=1000.0), sizes)
    (turn,) = plan.rounds
    assert turn.exchange.split == TP
    total = 96 * flops(4096, 4096) + 72 * flops(4096, 11008)
    assert load(plan) < 1.1 * total / 512


def test_a_matrix_that_is_too_large_is_split_as_far_as_it_must_be():
    leaf = ((8, 16), MatrixSpec(), (FSDP, ()))
    assert plan_of([leaf], Distribution(max_matrix_bytes=512)).rounds[0].exchange.split == ()
    assert plan_of([leaf], Distribution(max_matrix_bytes=256)).rounds[0].exchange.split == TP
    assert plan_of([leaf], Distribution(max_matrix_bytes=100)).rounds[0].exchange.split == BOTH


def test_plans_are_values():
    plan = plan_of(list(LEAVES.values()))
    assert hash(plan) == hash(plan_of(list(LEAVES.values())))


# Hands


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 50)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_hands_hold_every_matrix_and_are_balanced(kinds: list[tuple[int, int]], groups: int):
    counts, costs = [count for count, _ in kinds], [float(cost) for _, cost in kinds]
    limits = [max(1, math.ceil(count / groups)) for count in counts]
    limited = deal(counts, costs, groups, limits)
    assert all(
        held <= limit for hand in limited.counts for held, limit in zip(hand, limits, strict=True)
    )
    assert [sum(column) for column in zip(*limited.counts, strict=True)] == counts
    for hands in (deal(counts, costs, groups), spread(counts, costs, groups)):
        assert [sum(column) for column in zip(*hands.counts, strict=True)] == counts
        if not hands.padded:
            loads = [float(np.dot(hand, costs)) for hand in hands.counts]
            assert hands.makespan == max(loads)
            # Graham's bound for list scheduling.
            assert hands.makespan <= np.dot(counts, costs) / groups + max(costs)


def test_branches_are_the_different_hands():
    hands, number = branches([(1, 0), (0, 0), (0, 2), (0, 2)])
    assert hands == ((0, 2), (1, 0))
    assert number == (1, 0, 0, 0)


# Moves


def subtract_sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Every entry of the result depends on every entry of the matrix."""
    total = jnp.sum(x, axis=(1, 2), keepdims=True)
    return x - (jax.lax.psum(total, axes) if axes else total)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] if name in SLOW_TO_COMPILE else [])
        for name, options in OPTIONS.items()
    ],
)
def test_matrices_become_whole_and_come_home(options: Distribution):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    plan = plan_of(list(LEAVES.values()), options)
    specs = [P(*(axes or None for axes in leaf[2])) for leaf in LEAVES.values()]
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal(shape).astype(np.float32) for shape, _, _ in LEAVES.values()]
    run = jax.jit(
        jax.shard_map(
            lambda *xs: map_distributed(
                subtract_sum, operator.sub, [[2 * x for x in xs], xs], plan
            ),
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=specs,
            check_vma=False,
        )
    )
    for name, x, y in zip(LEAVES, xs, run(*xs), strict=True):
        expected = subtract_sum_by_parts(np.asarray(x, np.float64), LEAVES[name][1])
        np.testing.assert_allclose(y, expected, atol=2e-5, err_msg=name)


def subtract_sum_by_parts(x: np.ndarray, spec: MatrixSpec) -> np.ndarray:
    """The same on the whole parameter, in NumPy."""
    reduction, output = ((d,) if isinstance(d, int) else d for d in spec.dims)
    axes = (*reduction, *output)
    if not spec.splits:
        return x - x.sum(axis=axes, keepdims=True)
    (split,) = spec.splits
    grid = x.reshape(8, *(split.view or (3, 8)))
    kept = 1 + split.along
    return (
        grid - grid.sum(axis=tuple(a for a in range(grid.ndim) if a != kept), keepdims=True)
    ).reshape(x.shape)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": ("fsdp", "fsdp")}, "different names"),
        ({"max_matrix_bytes": 0}, "max_matrix_bytes must be a positive"),
        ({"max_stack_bytes": -1}, "max_stack_bytes must be a positive"),
        ({"flops_per_byte": -1.0}, "flops_per_byte must not be negative"),
        ({"flops_per_byte": math.nan}, "flops_per_byte must not be negative"),
    ],
)
def test_bad_options_are_errors(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Distribution(**arguments)


def test_an_axis_that_the_mesh_has_not_is_an_error():
    with pytest.raises(ValueError, match=r"'dcn', and the mesh has the axes 'fsdp', 'tp'"):
        plan_of([LEAVES["rows"]], Distribution(axes=("dcn",)))


def test_an_axis_name_that_is_not_mapped_is_an_error():
    with pytest.raises(ValueError, match=r"axis_name='batch' is not the name of a mapped axis"):
        orthogonalize_leaves(POLAR, 1e-7, [jnp.ones((2, 3))], [MatrixSpec()], axis_name=("batch",))
