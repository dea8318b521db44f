"""`scale_by_muon` on eight devices: the results of one device, at an eighth of its work.

Results equal those of one device bit for bit where both run the same reductions over the same
arrays. Two programs may differ, though: XLA fuses a reduction (the norm, above all) with whatever
stands before it, such as the split of a part or the selection of a branch, and the fused one adds
in another order. So does a product X X^T whose X^T is copied first. That is a difference in the
last bit, 2^-24, which two steps of keller_jordan multiply by 3.4445^2 = 12, or if it is in the
first X X^T by 4.775 x 3.4445 = 16: up to 1e-6. Where devices add parts of one matrix, it is up to
1e-5.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import device_groups, tally
from muonclip_jax.routing import MatrixSpec, Split

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MIXED = (EXPLICIT, AUTO)
SLOW = pytest.mark.slow
Leaves = dict[str, tuple[tuple[int, ...], MatrixSpec, P]]

TREE: Leaves = {
    "query": ((8, 4, 4), MatrixSpec((0, (1, 2))), P("fsdp", "tp")),
    "key": ((8, 4, 4), MatrixSpec((0, (1, 2))), P("tp", None, "fsdp")),
    "out": ((4, 4, 8), MatrixSpec(((0, 1), 2)), P("fsdp", None, "tp")),
    "layers": ((5, 8, 16), MatrixSpec((1, 2)), P(None, "fsdp", "tp")),
    "stages": ((4, 8, 16), MatrixSpec((1, 2)), P("fsdp", "tp", None)),
    "experts": ((4, 2, 8, 16), MatrixSpec((2, 3)), P("fsdp", "tp")),
    "fused": ((8, 24), MatrixSpec((0, 1), Split(1, (8, 8, 8))), P("fsdp", "tp")),
    "tall": ((16, 8), MatrixSpec(), P("fsdp")),
    "replicated": ((8, 16), MatrixSpec(), P()),
}
ONE_AXIS: Leaves = {
    "rows": ((8, 16), MatrixSpec(), P("fsdp")),
    "columns": ((8, 16), MatrixSpec(), P(None, "fsdp")),
    "out": ((8, 4, 8), MatrixSpec(((0, 1), 2)), P("fsdp")),
    "stages": ((8, 8, 16), MatrixSpec((1, 2)), P("fsdp")),
    "replicated": ((8, 16), MatrixSpec(), P()),
}
THREE_AXES: Leaves = {
    "layers": ((4, 8, 16), MatrixSpec((1, 2)), P("stage", "fsdp", "tp")),
    "query": ((2, 8, 4, 4), MatrixSpec((1, (2, 3))), P("stage", "fsdp", "tp")),
    "experts": ((2, 2, 8, 16), MatrixSpec((2, 3)), P("stage", "fsdp", None, "tp")),
    "tall": ((16, 8), MatrixSpec(), P(("stage", "fsdp"), "tp")),
    "replicated": ((8, 16), MatrixSpec(), P()),
}


def make_mesh(types: Sequence[AxisType] = (AUTO, AUTO)) -> Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=tuple(types))


def transformation(specs: dict[str, MatrixSpec], **arguments: Any) -> Any:
    # Two steps show what five do, and compile faster.
    defaults = {"ns_coeffs": "keller_jordan", "ns_steps": 2, "weight_dimension_numbers": specs}
    return mc.scale_by_muon(**{**defaults, **arguments})


def tree_of(shapes: dict[str, tuple[int, ...]]) -> Any:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(x), jnp.float32) for name, x in shapes.items()}


@functools.cache
def on_one_device(leaves: tuple[tuple[str, tuple[int, ...], MatrixSpec], ...], arguments: Any):
    """The updates without a mesh, compiled once for all shardings of the same tree."""
    params = tree_of({name: shape for name, shape, _ in leaves})
    tx = transformation({name: spec for name, _, spec in leaves}, **dict(arguments))
    return jax.jit(tx.update)(params, tx.init(params))[0]


class Case:
    """A tree on a mesh, beside the same tree on one device."""

    def __init__(self, leaves: Leaves, mesh: Mesh | None = None):
        self.mesh = mesh or make_mesh()
        self.specs = {name: spec for name, (_, spec, _) in leaves.items()}
        self.shardings = {name: NamedSharding(self.mesh, at) for name, (*_, at) in leaves.items()}
        self.alone = tree_of({name: shape for name, (shape, *_) in leaves.items()})
        self.params = jax.tree.map(jax.device_put, self.alone, self.shardings)

    def transformation(self, **arguments: Any) -> Any:
        return transformation(self.specs, **arguments)

    def sharded(self, **arguments: Any) -> Any:
        return self.transformation(param_shardings=self.shardings, **arguments)

    def expected(self, **arguments: Any) -> Any:
        shapes = tuple((name, x.shape, self.specs[name]) for name, x in self.alone.items())
        return on_one_device(shapes, tuple(arguments.items()))

    def check(self, updates: Any, atol: float = 1e-6, **arguments: Any) -> None:
        for name, expected in self.expected(**arguments).items():
            np.testing.assert_allclose(updates[name], expected, atol=atol, rtol=0, err_msg=name)
            assert updates[name].dtype == expected.dtype
            same = updates[name].sharding.is_equivalent_to(self.shardings[name], expected.ndim)
            assert same, name

    def compiled(self, tx: Any) -> tuple[Any, str]:
        """The updates, and the text of the program."""
        state = tx.init(self.params)
        program: Any = jax.jit(tx.update).lower(self.params, state).compile()
        return program(self.params, state)[0], program.as_text()


def stack_of(count: int, at: P, types: Sequence[AxisType] = (AUTO, AUTO)) -> Case:
    leaf = ((8, 16), MatrixSpec(), at)
    return Case({f"w{number}": leaf for number in range(count)}, make_mesh(types))


def collectives(text: str, in_loops: bool | None = None) -> dict[str, int]:
    """How many collectives of each kind a program has; None: in loops or not."""
    kinds = tally(text).by_kind(in_loops)
    return {kind: int(row["count"]) for kind, row in kinds.items()}


# Results


@pytest.mark.parametrize(
    "types", [(AUTO, AUTO), (EXPLICIT, EXPLICIT), pytest.param(MIXED, marks=SLOW)]
)
def test_a_tree_of_mixed_shardings_equals_one_device(types: Sequence[AxisType]):
    case = Case(TREE, make_mesh(types))
    tx = case.transformation() if AUTO not in types else case.sharded()
    state = tx.init(case.params)
    traces = []

    @jax.jit
    def step(grads: Any, state: Any) -> Any:
        traces.append(1)
        return tx.update(grads, state)

    updates, after = step(case.params, state)
    case.check(updates)
    for name, m in after.mu.items():
        assert m.sharding.is_equivalent_to(case.shardings[name], m.ndim), name
    step(case.params, after)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("sizes", "leaves", "kind"),
    [
        ({"fsdp": 8}, ONE_AXIS, EXPLICIT),
        ({"stage": 2, "fsdp": 2, "tp": 2}, THREE_AXES, AUTO),
        pytest.param({"fsdp": 8}, ONE_AXIS, AUTO, marks=SLOW),
        pytest.param({"stage": 2, "fsdp": 2, "tp": 2}, THREE_AXES, EXPLICIT, marks=SLOW),
    ],
)
def test_a_mesh_of_one_axis_or_of_three(sizes: dict[str, int], leaves: Leaves, kind: AxisType):
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
    case = Case(leaves, mesh)
    updates, text = case.compiled(case.sharded())
    case.check(updates)
    assert collectives(text, in_loops=True) == {}


@pytest.mark.parametrize(
    ("count", "at", "types"),
    [
        (13, P(), (AUTO, AUTO)),
        (13, P("fsdp"), (AUTO, AUTO)),
        (13, P("fsdp", "tp"), (AUTO, AUTO)),
        (3, P("fsdp", "tp"), MIXED),
        # Seven matrices a device: on a CPU those are a loop.
        (50, P("fsdp", "tp"), (AUTO, AUTO)),
        pytest.param(13, P(None, "fsdp"), (AUTO, AUTO), marks=SLOW),
        pytest.param(13, P("tp", "fsdp"), (EXPLICIT, EXPLICIT), marks=SLOW),
        pytest.param(13, P(None, ("fsdp", "tp")), (AUTO, AUTO), marks=SLOW),
        pytest.param(13, P(("tp", "fsdp")), (AUTO, AUTO), marks=SLOW),
        pytest.param(8, P(), (EXPLICIT, EXPLICIT), marks=SLOW),
        pytest.param(8, P("tp", "fsdp"), MIXED, marks=SLOW),
        pytest.param(3, P("fsdp"), (EXPLICIT, EXPLICIT), marks=SLOW),
        pytest.param(3, P(), MIXED, marks=SLOW),
    ],
)
def test_a_stack_moves_twice_and_is_worked_on_once(count: int, at: P, types: Sequence[AxisType]):
    case = stack_of(count, at, types)
    updates, text = case.compiled(case.sharded())
    case.check(updates)
    sharding = {axis for entry in at for axis in np.atleast_1d(entry) if axis}
    expected = {"all-to-all": 2} if sharding else {}
    if len(sharding) < 2:
        expected["all-gather"] = 1
    assert collectives(text) == expected
    assert collectives(text, in_loops=True) == {}


@pytest.mark.parametrize(
    ("options", "coefficients"),
    [
        (mc.Distribution(flops_per_byte=0.0), "turbo"),
        (mc.Distribution(max_matrix_bytes=64), "keller_jordan"),
    ],
    ids=["few", "large"],
)
def test_matrices_that_are_split_over_devices(options: mc.Distribution, coefficients: str):
    case = Case({name: TREE[name] for name in ("key", "layers", "tall", "replicated")})
    updates, _ = case.compiled(case.sharded(distribution=options, ns_coeffs=coefficients))
    case.check(updates, atol=1e-5, ns_coeffs=coefficients)


def test_work_stays_on_the_axes_that_are_named():
    case = stack_of(4, P(None, "tp"))
    updates, text = case.compiled(case.sharded(distribution=mc.Distribution(axes=("tp",))))
    case.check(updates)
    assert collectives(text) == {"all-to-all": 2}
    # Devices are numbered along "tp" first.
    assert set(device_groups(text)) == {(0, 1), (2, 3), (4, 5), (6, 7)}


# Momentum


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_init_places_the_momentum(kind: AxisType):
    leaves = {name: TREE[name] for name in ("query", "tall", "replicated")}
    case = Case(leaves, make_mesh((kind, kind)))
    tx = case.sharded()
    # Traced without arguments that count, a function on Explicit axes has to be told the mesh.
    with jax.set_mesh(case.mesh):
        traced = jax.jit(tx.init)(case.params)
    shapes = jax.eval_shape(lambda: case.alone)
    read = case.transformation().init(case.params)
    for state in (tx.init(case.params), tx.init(shapes), traced, read):
        for name, m in state.mu.items():
            assert m.sharding.is_equivalent_to(case.shardings[name], m.ndim), name


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


def test_the_platform_is_that_of_the_mesh(monkeypatch: pytest.MonkeyPatch):
    # Devices of a mesh need not be those that JAX computes on by default.
    # A shape that no other test has traced for a CPU.
    case = Case({f"w{number}": ((8, 24), MatrixSpec(), P("fsdp")) for number in range(3)})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tx = case.sharded()
    text = jax.jit(tx.update).lower(case.params, tx.init(case.params)).as_text()
    assert "xf16>" not in text
    alone = case.transformation()
    with pytest.raises(NotImplementedError, match="planned for platform 'gpu'"):
        jax.jit(alone.update).lower(case.alone, alone.init(case.alone))
    for arrays, shardings in ((case.alone, None), (case.params, case.shardings)):
        told = case.transformation(platform="gpu", param_shardings=shardings)
        assert "xf16>" in jax.jit(told.update).lower(arrays, told.init(arrays)).as_text()


# Ways to run


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


def mapped(case: Case, tx: Any, specs: Any, **options: Any) -> Any:
    """The updates of the first step inside of a `shard_map` of the user's own."""

    def step(x: Any) -> Any:
        state = mc.MuonState(count=jnp.zeros([], jnp.int32), mu=jax.tree.map(jnp.zeros_like, x))
        return tx.update(x, state)[0]

    run = jax.shard_map(step, mesh=case.mesh, in_specs=(specs,), out_specs=specs, **options)
    return jax.jit(run).lower(case.params).compile()


@pytest.mark.parametrize("axis_name", [None, "fsdp", ("fsdp", "tp")])
def test_a_users_own_shard_map(axis_name: Any):
    case = stack_of(5, P())
    program = mapped(case, case.transformation(axis_name=axis_name), P())
    case.check(program(case.params))
    expected = {} if axis_name is None else {"all-gather": 1}
    assert collectives(program.as_text()) == expected


def test_experts_that_differ_along_an_axis_of_a_users_shard_map():
    """A device of "fsdp" has its own experts; along "tp" all is equal, and shared."""
    experts = ((4, 3, 8, 16), MatrixSpec((2, 3)), P("fsdp"))
    case = Case({"experts": experts, "dense": ((8, 16), MatrixSpec(), P())})
    tx = case.transformation(axis_name="tp")
    program = mapped(case, tx, {"experts": P("fsdp"), "dense": P()})
    case.check(program(case.params))
    # Four matrices a device without "tp"; with it two of three experts, and of the dense one, which
    # shares no stack with what differs along "fsdp", a half with some of the work done twice.
    one = 2 * (4 * 8 * 8 * 16 + 2 * 8**3)
    assert tally(program.as_text()).flops < 2.8 * one


@pytest.mark.parametrize("axis_name", [None, "tp"])
def test_a_users_shard_map_that_checks_what_differs(axis_name: Any):
    """With `check_vma`, the default: both branches of a conditional must differ along one axis."""
    leaves: Leaves = {
        "experts": ((4, 3, 8, 16), MatrixSpec((2, 3)), P("fsdp")),
        "rows": ((4, 8, 16), MatrixSpec((1, 2)), P("fsdp")),
    }
    case = Case(leaves)
    case.check(mapped(case, case.transformation(axis_name=axis_name), P("fsdp"))(case.params))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_a_shard_map_over_some_axes(kind: AxisType):
    leaves: Leaves = {
        "layers": (*TREE["layers"][:2], P(None, None, "tp")),
        "replicated": TREE["replicated"],
    }
    case = Case(leaves, make_mesh((kind, kind)))
    tx = case.sharded(axis_name="fsdp")
    case.check(mapped(case, tx, P(), axis_names=frozenset({"fsdp"}))(case.params))


@pytest.mark.parametrize("make", [mc.muon, mc.muonclip])
def test_the_assemblies_take_the_shardings_of_all_parameters(make: Any):
    mesh = make_mesh()
    shapes = {"dense": {"kernel": (8, 16), "bias": (16,)}, "up": {"kernel": (8, 16)}}
    alone = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    alone["dense"]["kernel"] = jax.random.normal(jax.random.key(0), (8, 16))
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, P("fsdp", "tp") if x.ndim == 2 else P()), alone
    )
    params = jax.tree.map(jax.device_put, alone, shardings)
    arguments = {"ns_steps": 1} if make is mc.muon else {"ns_steps": 1, "qk_clip_threshold": None}
    one = make(learning_rate=0.1, **arguments)
    tx = make(learning_rate=0.1, param_shardings=shardings, **arguments)
    expected, _ = jax.jit(one.update)(alone, one.init(alone), alone)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), updates, expected)


def test_the_config_builds_with_shardings():
    config = mc.MuonClipConfig(learning_rate=0.1, distribution=mc.Distribution(axes=("tp",)))
    assert hash(config) == hash(config)
    shardings = {"w": NamedSharding(make_mesh(), P("fsdp", "tp"))}
    params = {"w": jax.device_put(jnp.ones((8, 16)), shardings["w"])}
    state = config.build(shardings).init(params)
    (mu,) = [x for x in jax.tree.leaves(state) if x.shape == (8, 16)]
    assert mu.sharding == shardings["w"]


# Warnings and errors


def test_one_warning_where_shardings_cannot_be_seen():
    case = stack_of(2, P("fsdp", "tp"))
    tx = case.transformation(ns_steps=1)
    state = tx.init(case.params)
    with pytest.warns(UserWarning, match="param_shardings") as caught:
        updates, _ = jax.jit(tx.update)(case.params, state)
    assert len(caught) == 1
    for name, expected in case.expected(ns_steps=1).items():
        np.testing.assert_allclose(updates[name], expected, atol=1e-5)


def test_no_warning_without_a_reason():
    case = stack_of(2, P())
    tx = case.transformation(ns_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(tx.update)(case.alone, tx.init(case.alone))
        tx.update(case.params, tx.init(case.params))


OTHER = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AUTO, AUTO))
NAMED = {
    "here": NamedSharding(make_mesh(), P("tp")),
    "deep": NamedSharding(make_mesh(), P(None, None, "tp")),
    "uneven": NamedSharding(make_mesh(), P("fsdp")),
    "elsewhere": NamedSharding(OTHER, P()),
}


@pytest.mark.parametrize(
    ("shardings", "error", "message"),
    [
        ({"a": {"v": "here"}}, ValueError, "a/w of shape .* has no entry"),
        ({"b": {"w": "here"}}, ValueError, "a/w of shape .* has no entry in param_shardings"),
        ({"a": {"w": "deep"}}, ValueError, r"'a/w', for 3 dimensions"),
        ({"a": {"w": "uneven"}}, ValueError, r"dimension 0 of 'a/w', shape \(6, 16\).*4 shards"),
        ({"a": {"w": P("fsdp")}}, TypeError, "at 'a/w', expected a jax.sharding.Named"),
        ({"a": {"w": "here", "x": "elsewhere"}}, ValueError, "a/w is on the mesh .* at a/x on"),
    ],
)
def test_shardings_that_do_not_fit_are_errors(shardings: Any, error: type[Exception], message: str):
    tree = jax.tree.map(lambda x: NAMED.get(x, x) if isinstance(x, str) else x, shardings)
    names = ("w", "x") if "x" in shardings.get("a", {}) else ("w",)
    params = {"a": {name: jnp.ones((6, 16)) for name in names}}
    with pytest.raises(error, match=message):
        mc.scale_by_muon(param_shardings=tree).init(params)


def test_shardings_of_another_mesh_are_an_error():
    case = stack_of(2, P("fsdp"))
    shardings = {name: NamedSharding(OTHER, P("fsdp")) for name in case.params}
    tx = case.transformation(param_shardings=shardings)
    state = case.transformation().init(case.params)
    with pytest.raises(ValueError, match="param_shardings is for the mesh"):
        jax.jit(tx.update)(case.params, state)
