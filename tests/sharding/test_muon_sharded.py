"""`scale_by_muon` on eight devices: the results of one device, at an eighth of its work.

Results equal those of one device bit for bit where both run the same reductions over the same
arrays. Two programs may differ, though: XLA fuses a reduction (the norm, above all) with whatever
stands before it, such as the split of a part or the selection of a branch, and the fused one adds
in another order. So does a product X X^T whose X^T is copied first. That is a difference in the
last bit, 2^-24, which two steps of keller_jordan multiply by 3.4445^2 = 12, or if it is in the
first X X^T by 4.775 x 3.4445 = 16: up to 1e-6.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import tally
from muonclip_jax.routing import MatrixSpec, normalized_axes
from tests.helpers import TOLERANCE, normal_tree, polynomial_of_singular_values
from tests.sharding.cases import (
    AUTO,
    EXPLICIT,
    TREE,
    Case,
    Leaves,
    collectives,
    mesh_of,
    same_places,
    stack_of,
    step,
)

SLOW = pytest.mark.slow
THREE_AXES: Leaves = {
    "layers": ((4, 8, 16), MatrixSpec((1, 2)), P("stage", "fsdp", "tp")),
    "query": ((2, 8, 4, 4), MatrixSpec((1, (2, 3))), P("stage", "fsdp", "tp")),
    "experts": ((2, 2, 8, 16), MatrixSpec((2, 3)), P("stage", "fsdp", None, "tp")),
    "tall": ((16, 8), MatrixSpec(), P(("stage", "fsdp"), "tp")),
    "replicated": ((8, 16), MatrixSpec(), P()),
}
#: Of these layers a device has three: two in a first round, one in a second.
MANY: Leaves = {"rows": TREE["rows"], "layers": ((20, 8, 16), MatrixSpec((1, 2)), P())}
#: Two of a shape share a stack; the tall one is worked on transposed; layers are a loop.
SMALL: dict[str, tuple[int, ...]] = {"up": (8, 16), "down": (16, 8), "layers": (3, 8, 16)}


def small(at: P, mesh: Mesh) -> Case:
    """The small tree, whose matrices are all sharded alike."""
    leaves: Leaves = {
        name: (shape, MatrixSpec((n := len(shape) - 2, n + 1)), P(*[None] * n, *at))
        for name, shape in SMALL.items()
    }
    return Case(leaves, mesh)


ROWS = [(3.4445, -4.7750, 2.0315)] * 2


def by_matrices(x: np.ndarray, spec: MatrixSpec) -> np.ndarray:
    """Two steps on every matrix of a parameter, in float64."""
    if spec.splits:
        (split,) = spec.splits
        grid = np.moveaxis(x.reshape(8, *(split.view or (3, 8))), 1 + split.along, 0)
        done = two_steps(grid.reshape(3, 8, 8)).reshape(grid.shape)
        return np.moveaxis(done, 0, 1 + split.along).reshape(x.shape)
    reduction, output = normalized_axes(spec)
    batch = tuple(axis for axis in range(x.ndim) if axis not in reduction + output)
    order = (*batch, *reduction, *output)
    y = x.transpose(order)
    rows = math.prod(x.shape[axis] for axis in reduction)
    done = two_steps(y.reshape(math.prod(x.shape[axis] for axis in batch), rows, -1))
    return done.reshape(y.shape).transpose(np.argsort(order))


def two_steps(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    return polynomial_of_singular_values(x / norms, ROWS)


@pytest.mark.parametrize(
    ("leaves", "mesh", "options"),
    [
        (TREE, mesh_of(AUTO), {}),
        (TREE, mesh_of(EXPLICIT), {"flops_per_byte": 0.0}),
        pytest.param(TREE, mesh_of(EXPLICIT), {"axes": ("tp",)}, marks=SLOW),
        pytest.param(TREE, mesh_of(AUTO), {"max_matrix_bytes": 64}, marks=SLOW),
        pytest.param(TREE, mesh_of(AUTO), {"max_stack_bytes": 64}, marks=SLOW),
        # JAX lists the Explicit axes of a dimension first.
        pytest.param(
            {name: leaf for name, leaf in TREE.items() if "both" not in name},
            mesh_of(EXPLICIT, AUTO),
            {},
            marks=SLOW,
        ),
        (MANY, mesh_of(EXPLICIT, fsdp=8), {"max_stack_bytes": 2 * 8 * 16 * 4}),
        (THREE_AXES, mesh_of(AUTO, stage=2, fsdp=2, tp=2), {}),
    ],
)
def test_a_tree_of_mixed_shardings_equals_one_device_and_float64(
    leaves: Leaves, mesh: Mesh, options: dict[str, Any]
):
    case = Case(leaves, mesh)
    make = case.sharded if AUTO in mesh.axis_types else case.transformation
    tx = make(ns_method="standard", distribution=mc.Distribution(**options))
    state = tx.init(case.params)
    program: Any = jax.jit(tx.update).lower(case.params, state).compile()
    updates, after = program(case.params, state)
    case.check(updates, ns_method="standard")
    for name, x in case.alone.items():
        expected = by_matrices(np.asarray(x, np.float64), case.specs[name])
        error = np.linalg.norm(updates[name] - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE["float32"], name
    same_places(after.mu, case.shardings)
    program(case.params, after)  # refuses arrays of another form or place than the first state's
    assert collectives(program.as_text(), in_loops=True) == {}


def test_the_platform_is_that_of_the_mesh(monkeypatch: pytest.MonkeyPatch):
    # Devices of a mesh need not be those that JAX computes on by default.
    # A shape that no other test has traced for a CPU.
    case = Case({f"w{number}": ((8, 24), MatrixSpec(), P("fsdp")) for number in range(3)})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def text(tx: Any, params: Any) -> str:
        return jax.jit(tx.update).lower(params, tx.init(params)).as_text()

    assert "xf16>" not in text(case.sharded(), case.params)
    with pytest.raises(NotImplementedError, match="planned for platform 'gpu'"):
        text(case.transformation(), case.alone)
    assert "xf16>" in text(case.transformation(platform="gpu"), case.alone)
    assert "xf16>" in text(case.sharded(platform="gpu"), case.params)


def test_arrays_that_are_bound_to_no_device_join_those_of_a_mesh():
    case = small(P(), mesh_of(EXPLICIT))
    tx, gradients = case.transformation(), {**case.params, "up": case.alone["up"]}
    case.check(tx.update(gradients, tx.init(gradients))[0])


# -- ZeRO-1: momentum sharded over more axes than its parameter --

WHOLE: dict[str, Any] = {"flops_per_byte": float("inf")}
#: The axis that the parameter lacks shares its columns, or all of both do.
SPLIT: dict[str, Any] = {"flops_per_byte": 0.0}
LARGE: dict[str, Any] = {"max_matrix_bytes": 64}


@pytest.mark.parametrize(
    ("at", "options", "kind"),
    [
        (P(), WHOLE, AUTO),
        (P(), LARGE, EXPLICIT),
        (P(None, "fsdp"), SPLIT, AUTO),
        (P(None, None, "fsdp"), WHOLE, EXPLICIT),
        (P(None, None, "fsdp"), LARGE, AUTO),
        (P(None, None, "tp"), SPLIT, EXPLICIT),
    ],
)
def test_zero1_updates_are_those_of_one_device(at: P, options: dict[str, Any], kind: AxisType):
    # Wide and tall: the wide matrix of the plan is the parameter's transpose.
    shapes = {"wide": (3, 16, 32), "tall": (1, 32, 16)}
    case = Case({k: (shape, MatrixSpec((1, 2)), at) for k, shape in shapes.items()}, mesh_of(kind))
    sharded = mc.Distribution(shard_momentum=True, **options)
    tx = case.sharded(ns_method="standard", distribution=sharded)
    updates, state = jax.jit(tx.update)(case.params, tx.init(case.params))
    case.check(updates, ns_method="standard")
    for momentum in state.mu.values():
        assert momentum.addressable_shards[0].data.size == momentum.size // 8


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_init_places_the_momentum(kind: AxisType):
    case = Case({name: TREE[name] for name in ("query", "tall", "replicated")}, mesh_of(kind))
    shapes = jax.eval_shape(lambda: case.alone)
    # Traced without arguments that count, a function on Explicit axes has to be told the mesh.
    with jax.set_mesh(case.mesh):
        traced = jax.jit(case.sharded().init)(case.params)
    read = case.transformation().init(case.params)
    for state in (case.sharded().init(case.params), case.sharded().init(shapes), traced, read):
        same_places(state.mu, case.shardings)
    further = {"distribution": mc.Distribution(shard_momentum=True)}
    tx = case.sharded(**further) if kind == AUTO else case.transformation(**further)
    with jax.set_mesh(case.mesh):
        made, expected = tx.init(jax.eval_shape(lambda: case.params)), tx.init(case.params)
    same_places(made, jax.tree.map(lambda x: x.sharding, expected))


def test_no_device_ever_holds_the_whole_momentum(monkeypatch: pytest.MonkeyPatch):
    # A tree that fits on eight devices need not fit on one.
    case = stack_of(3, P("fsdp", "tp"))
    made, zeros = [], jnp.zeros

    def watched(*args: Any, **keywords: Any) -> jax.Array:
        made.append(zeros(*args, **keywords))
        return made[-1]

    monkeypatch.setattr(jnp, "zeros", watched)
    case.sharded().init(case.params)
    sizes = [x.addressable_shards[0].data.size for x in made if x.ndim == 2]
    assert sizes == [8 * 16 // 8] * 3


def test_zero_keeps_its_sharding_where_axes_are_mixed():
    mesh = mesh_of(AUTO, EXPLICIT, tp=2, data=4)
    case = Case({"w": ((13, 8), MatrixSpec(), P())}, mesh)
    tx = case.sharded(distribution=mc.Distribution(shard_momentum=True))
    with jax.set_mesh(mesh):
        before = tx.init(case.params)
        after = jax.jit(tx.update)(case.params, before)[1]
    assert before.mu["w"].sharding.spec == P(None, ("data", "tp"))
    same_places(after.mu, {"w": before.mu["w"].sharding})


def test_the_first_state_is_where_param_shardings_say():
    """Moments of Adam and all counts; else the second call of a jitted step is compiled anew."""
    at = NamedSharding(mesh_of(fsdp=8), P("fsdp"))
    everywhere = NamedSharding(at.mesh, P())
    shapes = {"embedding": (16, 8), "bias": (8,), "mlp": {"kernel": (8, 16)}}
    params = jax.device_put(normal_tree(shapes, 0), at)
    rate = optax.linear_schedule(0.1, 0.0, 9)
    config = mc.MuonClipConfig(learning_rate=rate, weight_decay=rate, qk_clip_threshold=None)
    for make in (config.build, functools.partial(mc.muon, rate)):
        tx = make(param_shardings=jax.tree.map(lambda x: x.sharding, params))
        for state in (tx.init(jax.eval_shape(lambda: params)), jax.jit(tx.init)(params)):
            same_places(state, jax.tree.map(lambda x: at if x.ndim else everywhere, state))


def test_what_a_clip_and_adam_leave_stays_where_param_shardings_say():
    mesh = mesh_of(data=2)
    shapes = {"kernel": (2, 8, 8, 5), "bias": (2, 8, 5)}
    params = normal_tree({"layers": {"attention": {"query": shapes, "key": shapes}}}, 0)
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, P("data") if x.ndim > 3 else P()), params
    )
    params = jax.device_put(params, shardings)
    tx: Any = mc.muonclip(0.1, rules=mc.MatrixRules(scan_axis=0), param_shardings=shardings)
    maxima = {"layers/attention": jnp.full((2, 8), 150.0)}
    before, gradients = tx.init(params), jax.device_put(params, NamedSharding(mesh, P("data")))
    updates, after = jax.jit(tx.update)(gradients, before, params, max_logits=maxima)
    same_places(updates, shardings)
    same_places(after, jax.tree.map(lambda x: x.sharding, before))


# -- inside of pmap and of a user's own shard_map --


def test_pmap_shares_the_work():
    case = stack_of(5, P())
    tx = case.transformation(axis_name="batch")
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), case.alone)
    state = jax.pmap(tx.init, axis_name="batch")(copies)
    updates, _ = jax.pmap(tx.update, axis_name="batch")(copies, state)
    for name, expected in case.expected().items():
        np.testing.assert_allclose(updates[name][0], expected, rtol=0, atol=1e-6)
        same = np.broadcast_to(updates[name][0], (8, *expected.shape))
        np.testing.assert_array_equal(updates[name], same)


@pytest.mark.parametrize("axis_name", [None, "fsdp", ("fsdp", "tp")])
def test_a_users_own_shard_map(axis_name: Any):
    case = stack_of(5, P())
    program = case.mapped(case.transformation(axis_name=axis_name), P())
    case.check(program(case.params))
    assert collectives(program.as_text()) == ({} if axis_name is None else {"all-gather": 1})


def test_experts_that_differ_along_an_axis_of_a_users_shard_map():
    """A device of "fsdp" has its own experts; along "tp" all is equal, and shared."""
    experts = ((4, 3, 8, 16), MatrixSpec((2, 3)), P("fsdp"))
    case = Case({"experts": experts, "dense": ((8, 16), MatrixSpec(), P())})
    tx = case.transformation(axis_name="tp")
    program = case.mapped(tx, {"experts": P("fsdp"), "dense": P()})
    case.check(program(case.params))
    # Four matrices a device without "tp"; with it two of three experts, and of the dense one, which
    # shares no stack with what differs along "fsdp", a half with some of the work done twice.
    one = 2 * (4 * 8 * 8 * 16 + 2 * 8**3)
    assert tally(program.as_text()).flops < 2.8 * one
    # With `check_vma` both branches of a conditional must differ along one axis, without too.
    case.check(
        case.mapped(case.transformation(), {"experts": P("fsdp"), "dense": P()})(case.params)
    )


@pytest.mark.parametrize(
    ("at", "options"), [(P(), LARGE), (P(), {"shard_momentum": True}), (P("fsdp"), {})]
)
def test_gradients_through_an_update(at: P, options: Any):
    case = small(at, mesh_of(EXPLICIT))

    def pulled_back(tx: Any, gradients: Any) -> Any:
        update = jax.jit(functools.partial(step, tx, state=tx.init(gradients)))
        return jax.vjp(update, gradients)[1](gradients)[0]

    # Types say where arrays with Explicit axes are; the state is a constant of the program.
    with jax.set_mesh(mesh_of(EXPLICIT)):
        tx = case.transformation(distribution=mc.Distribution(**options))
        actual = pulled_back(tx, case.params)
    for name, expected in pulled_back(case.transformation(), case.alone).items():
        error = np.linalg.norm(actual[name] - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE["float32"], name
