"""`scale_by_muon` on eight devices: the results of one device, at an eighth of its work.

Results equal those of one device bit for bit where both run the same reductions over the same
arrays. Two programs may differ, though: XLA fuses a reduction (the norm, above all) with whatever
stands before it, such as the cut of a part or the selection of a branch, and the fused one adds in
another order. So does a product X X^T whose X^T is copied first, as the XLA of JAX 0.12 does where
a device has one matrix, and not where it has several. That is a difference in the last bit, 2^-24,
which the steps multiply by their slopes: two of keller_jordan by 3.4445^2 = 12, or if it is in the
first X X^T by 4.775 x 3.4445 = 16. So it is up to 1e-6 after two steps, 2e-6 after five. Where
devices add parts of one matrix, it is up to 1e-5.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import muonclip_jax as mc
from benchmarks.hlo import device_groups, tally
from muonclip_jax.routing import MatrixSpec, Split

P = PartitionSpec
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
TYPES = {"auto": (AUTO, AUTO), "explicit": (EXPLICIT, EXPLICIT), "mixed": (EXPLICIT, AUTO)}

# name -> (shape, spec, sharding)
TREE = {
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
STACK_SHARDINGS = {
    "replicated": P(),
    "rows": P("fsdp"),
    "columns": P(None, "fsdp"),
    "rows and columns": P("fsdp", "tp"),
    "columns and rows": P("tp", "fsdp"),
    "both on columns": P(None, ("fsdp", "tp")),
    "both on rows": P(("tp", "fsdp")),
}
SLOW_STACKS = ("columns", "columns and rows", "both on columns", "both on rows")


def but_slow(table: dict[str, Any], *names: str) -> list[Any]:
    """The rows of a table of cases, the named ones marked as slow."""
    marks = {name: [pytest.mark.slow] if name in names else [] for name in table}
    return [pytest.param(case, id=name, marks=marks[name]) for name, case in table.items()]


def make_mesh(types: Sequence[AxisType] = (AUTO, AUTO)) -> Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=tuple(types))


def tree_of(shapes: dict[str, tuple[int, ...]]) -> Any:
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }


def transformation(specs: dict[str, MatrixSpec], **arguments: Any) -> Any:
    # Two steps show what five do, and compile faster.
    return mc.scale_by_muon(
        **{
            "ns_coeffs": "keller_jordan",
            "ns_steps": 2,
            "weight_dimension_numbers": specs,
            **arguments,
        }
    )


@functools.cache
def on_one_device(leaves: tuple[tuple[str, tuple[int, ...], MatrixSpec], ...], arguments: Any):
    """The updates without a mesh, compiled once for all shardings of the same tree."""
    params = tree_of({name: shape for name, shape, _ in leaves})
    tx = transformation({name: spec for name, _, spec in leaves}, **dict(arguments))
    return jax.jit(tx.update)(params, tx.init(params))[0]


class Case:
    """A tree on a mesh, beside the same tree on one device."""

    def __init__(self, leaves: dict[str, tuple], mesh: Mesh):
        self.mesh = mesh
        self.specs = {name: spec for name, (_, spec, _) in leaves.items()}
        self.shardings = {name: NamedSharding(mesh, at) for name, (_, _, at) in leaves.items()}
        self.alone = tree_of({name: shape for name, (shape, _, _) in leaves.items()})
        self.params = jax.tree.map(jax.device_put, self.alone, self.shardings)

    def transformation(self, **arguments: Any) -> Any:
        return transformation(self.specs, **arguments)

    def expected(self, **arguments: Any) -> Any:
        shapes = tuple((name, x.shape, self.specs[name]) for name, x in self.alone.items())
        return on_one_device(shapes, tuple(arguments.items()))

    def check(self, updates: Any, atol: float = 0.0, **arguments: Any) -> None:
        for name, expected in self.expected(**arguments).items():
            np.testing.assert_allclose(updates[name], expected, atol=atol, rtol=0, err_msg=name)
            assert updates[name].dtype == expected.dtype
            assert updates[name].sharding.is_equivalent_to(self.shardings[name], expected.ndim), (
                name
            )


def stack_of(count: int, sharding: PartitionSpec) -> Case:
    leaf = ((8, 16), MatrixSpec(), sharding)
    return Case({f"w{number}": leaf for number in range(count)}, make_mesh())


def collectives(text: str, in_loops: bool | None = None) -> dict[str, int]:
    """How many collectives of each kind a program has; None: in loops or not."""
    kinds = tally(text).by_kind(in_loops)
    return {kind: int(row["count"]) for kind, row in kinds.items()}


def compiled(tx: Any, params: Any) -> Any:
    return jax.jit(tx.update).lower(params, tx.init(params)).compile()


# Results


@pytest.mark.parametrize("types", but_slow(TYPES, "mixed"))
def test_a_tree_of_mixed_shardings_equals_one_device(types: Sequence[AxisType]):
    case = Case(TREE, make_mesh(types))
    given = None if types == TYPES["explicit"] else case.shardings
    tx = case.transformation(param_shardings=given)
    state = tx.init(case.params)
    traces = []

    @jax.jit
    def step(grads: Any, state: Any) -> Any:
        traces.append(1)
        return tx.update(grads, state)

    updates, state = step(case.params, state)
    # The last bit, from the norm of a part and the cut before it.
    case.check(updates, atol=1e-6)
    for name, m in state.mu.items():
        assert m.sharding.is_equivalent_to(case.shardings[name], m.ndim), name
    step(case.params, state)
    assert len(traces) == 1


OTHER_MESHES = {
    "one axis": (
        {"fsdp": 8},
        {
            "rows": ((8, 16), MatrixSpec(), P("fsdp")),
            "columns": ((8, 16), MatrixSpec(), P(None, "fsdp")),
            "out": ((8, 4, 8), MatrixSpec(((0, 1), 2)), P("fsdp")),
            "stages": ((8, 8, 16), MatrixSpec((1, 2)), P("fsdp")),
            "replicated": ((8, 16), MatrixSpec(), P()),
        },
    ),
    "three axes": (
        {"stage": 2, "fsdp": 2, "tp": 2},
        {
            "layers": ((4, 8, 16), MatrixSpec((1, 2)), P("stage", "fsdp", "tp")),
            "query": ((2, 8, 4, 4), MatrixSpec((1, (2, 3))), P("stage", "fsdp", "tp")),
            "experts": ((2, 2, 8, 16), MatrixSpec((2, 3)), P("stage", "fsdp", None, "tp")),
            "tall": ((16, 8), MatrixSpec(), P(("stage", "fsdp"), "tp")),
            "replicated": ((8, 16), MatrixSpec(), P()),
        },
    ),
}


@pytest.mark.parametrize("kind", but_slow({"auto": AUTO, "explicit": EXPLICIT}, "explicit"))
@pytest.mark.parametrize(("sizes", "leaves"), OTHER_MESHES.values(), ids=OTHER_MESHES)
def test_a_tree_on_a_mesh_of_one_axis_or_of_three(
    sizes: dict[str, int], leaves: dict[str, tuple], kind: AxisType
):
    names = tuple(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), names, axis_types=(kind,) * len(names))
    case = Case(leaves, mesh)
    tx = case.transformation(param_shardings=case.shardings)
    program = compiled(tx, case.params)
    case.check(program(case.params, tx.init(case.params))[0], atol=1e-6)
    assert collectives(program.as_text(), in_loops=True) == {}


@pytest.mark.parametrize("sharding", but_slow(STACK_SHARDINGS, *SLOW_STACKS))
def test_a_stack_moves_twice_and_is_worked_on_once(sharding: PartitionSpec):
    case = stack_of(13, sharding)
    tx = case.transformation(param_shardings=case.shardings)
    program = compiled(tx, case.params)
    updates, _ = program(case.params, tx.init(case.params))
    case.check(updates)
    held = {axis for entry in sharding for axis in np.atleast_1d(entry) if axis}
    expected = {"all-to-all": 2} if held else {}
    if len(held) < 2:
        expected["all-gather"] = 1
    assert collectives(program.as_text()) == expected


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_stacks_smaller_than_and_equal_to_the_devices(count: int):
    case = stack_of(count, P("fsdp", "tp"))
    tx = case.transformation(param_shardings=case.shardings)
    # The last bit: a device has one matrix.
    case.check(jax.jit(tx.update)(case.params, tx.init(case.params))[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("types", [TYPES["explicit"], TYPES["mixed"]], ids=["explicit", "mixed"])
@pytest.mark.parametrize("sharding", [P(), P("fsdp"), P("tp", "fsdp")], ids=str)
@pytest.mark.parametrize("count", [3, 8, 13])
def test_every_count_on_every_kind_of_mesh(
    count: int, sharding: PartitionSpec, types: Sequence[AxisType]
):
    leaf = ((8, 16), MatrixSpec(), sharding)
    case = Case({f"w{number}": leaf for number in range(count)}, make_mesh(types))
    tx = case.transformation(param_shardings=case.shardings)
    case.check(jax.jit(tx.update)(case.params, tx.init(case.params))[0], atol=1e-6)


def test_the_work_is_shared():
    leaf = ((32, 64), MatrixSpec(), P("fsdp", "tp"))
    case = Case({f"w{number}": leaf for number in range(13)}, make_mesh())
    tx = case.transformation(param_shardings=case.shardings, ns_method="standard")
    one = 2 * (4 * 32 * 32 * 64 + 2 * 32**3)
    assert tally(compiled(tx, case.params).as_text()).flops == 2 * one


def test_leftovers_of_two_shapes_share_the_padding():
    wide, narrow = ((32, 128), MatrixSpec(), P("fsdp")), ((32, 64), MatrixSpec(), P("fsdp", "tp"))
    leaves = {f"a{number}": wide for number in range(5)}
    case = Case(leaves | {f"b{number}": narrow for number in range(3)}, make_mesh())
    arguments = {"ns_steps": 5, "ns_method": "standard"}
    tx = case.transformation(param_shardings=case.shardings, **arguments)
    program = compiled(tx, case.params)
    # The last bit, from the norm inside a branch; five steps.
    case.check(program(case.params, tx.init(case.params))[0], atol=2e-6, **arguments)
    one = 5 * (4 * 32 * 32 * 128 + 2 * 32**3)
    assert tally(program.as_text()).flops == one


def test_no_collective_is_in_a_loop():
    # Seven matrices a device: on a CPU those are a loop.
    case = stack_of(50, P("fsdp", "tp"))
    tx = case.transformation(param_shardings=case.shardings)
    text = compiled(tx, case.params).as_text()
    assert "body=" in text
    assert collectives(text, in_loops=True) == {}
    assert collectives(text) == {"all-to-all": 2}


@pytest.mark.parametrize(
    ("options", "coefficients"),
    [
        (mc.Distribution(flops_per_byte=0.0), "turbo"),
        (mc.Distribution(max_matrix_bytes=64), "keller_jordan"),
    ],
    ids=["few", "large"],
)
def test_matrices_that_are_split_over_devices(options: mc.Distribution, coefficients: str):
    case = Case({name: TREE[name] for name in ("key", "layers", "tall", "replicated")}, make_mesh())
    arguments = {"ns_coeffs": coefficients}
    tx = case.transformation(param_shardings=case.shardings, distribution=options, **arguments)
    updates, _ = jax.jit(tx.update)(case.params, tx.init(case.params))
    case.check(updates, atol=1e-5, **arguments)


def test_work_stays_on_the_axes_that_are_named():
    case = stack_of(4, P(None, "tp"))
    options = mc.Distribution(axes=("tp",))
    tx = case.transformation(param_shardings=case.shardings, distribution=options)
    program = compiled(tx, case.params)
    case.check(program(case.params, tx.init(case.params))[0])
    assert collectives(program.as_text()) == {"all-to-all": 2}
    # Devices are numbered along "tp" first.
    assert set(device_groups(program.as_text())) == {(0, 1), (2, 3), (4, 5), (6, 7)}


# Momentum


@pytest.mark.parametrize("types", [TYPES["auto"], TYPES["explicit"]], ids=["auto", "explicit"])
def test_init_places_the_momentum(types: Sequence[AxisType]):
    case = Case({name: TREE[name] for name in ("query", "tall", "replicated")}, make_mesh(types))
    tx = case.transformation(param_shardings=case.shardings)
    # Traced without arguments that count, a function on Explicit axes has to be told the mesh.
    with jax.set_mesh(case.mesh):
        traced = jax.jit(tx.init)(case.params)
    shapes = jax.eval_shape(lambda: case.alone)
    for state in (tx.init(case.params), tx.init(shapes), traced):
        for name, m in state.mu.items():
            assert m.sharding.is_equivalent_to(case.shardings[name], m.ndim), name


def test_no_device_ever_holds_the_whole_momentum(monkeypatch: pytest.MonkeyPatch):
    # A tree that fits on eight devices need not fit on one.
    case = stack_of(3, P("fsdp", "tp"))
    made = []
    zeros = jnp.zeros

    def watched(*args: Any, **keywords: Any) -> jax.Array:
        made.append(zeros(*args, **keywords))
        return made[-1]

    monkeypatch.setattr(jnp, "zeros", watched)
    case.transformation(param_shardings=case.shardings).init(case.params)
    momenta = [x for x in made if x.ndim == 2]
    assert len(momenta) == 3
    assert {x.addressable_shards[0].data.size for x in momenta} == {8 * 16 // 8}


def test_the_platform_is_that_of_the_mesh(monkeypatch: pytest.MonkeyPatch):
    # Devices of a mesh need not be those that JAX computes on by default.
    # A shape that no other test has traced for a CPU.
    leaf = ((8, 24), MatrixSpec(), P("fsdp"))
    case = Case({f"w{number}": leaf for number in range(3)}, make_mesh())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tx = case.transformation(param_shardings=case.shardings)
    text = jax.jit(tx.update).lower(case.params, tx.init(case.params)).as_text()
    assert "xf16>" not in text
    alone = case.transformation()
    with pytest.raises(NotImplementedError, match="planned for platform 'gpu'"):
        jax.jit(alone.update).lower(case.alone, alone.init(case.alone))
    for arrays, shardings in ((case.alone, None), (case.params, case.shardings)):
        told = case.transformation(platform="gpu", param_shardings=shardings)
        assert "xf16>" in jax.jit(told.update).lower(arrays, told.init(arrays)).as_text()


def test_eager_init_keeps_the_sharding():
    case = Case(TREE, make_mesh())
    for name, m in case.transformation().init(case.params).mu.items():
        assert m.sharding.is_equivalent_to(case.shardings[name], m.ndim), name


@pytest.mark.parametrize(
    "types", but_slow({"auto": TYPES["auto"], "explicit": TYPES["explicit"]}, "explicit")
)
def test_momentum_can_be_sharded_where_parameters_are_replicated(types: Sequence[AxisType]):
    case = Case({name: TREE[name] for name in ("tall", "replicated", "layers")}, make_mesh(types))
    options = mc.Distribution(shard_momentum=True)
    tx = case.transformation(param_shardings=case.shardings, distribution=options)
    state = tx.init(case.params)
    updates, after = jax.jit(tx.update)(case.params, state)
    # The last bits: the average is made of other pieces, and fused with other code.
    case.check(updates, atol=1e-6)
    for name, m in state.mu.items():
        assert m.addressable_shards[0].data.size == m.size // 8, name
        assert after.mu[name].sharding.is_equivalent_to(m.sharding, m.ndim), name


# Ways to run


def test_pmap_shares_the_work():
    case = stack_of(5, P())
    tx = case.transformation(axis_name="batch")
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), case.alone)
    state = jax.pmap(tx.init, axis_name="batch")(copies)
    updates, _ = jax.pmap(tx.update, axis_name="batch")(copies, state)
    for name, expected in case.expected().items():
        # The last bit: a device has one matrix. All devices have the same bits.
        np.testing.assert_allclose(updates[name][0], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(
            updates[name], np.broadcast_to(updates[name][0], (8, *expected.shape))
        )


@pytest.mark.parametrize("axis_name", [None, "fsdp", ("fsdp", "tp")])
def test_a_users_own_shard_map(axis_name: Any):
    case = stack_of(5, P())
    tx = case.transformation(axis_name=axis_name)
    step = jax.shard_map(
        lambda x: tx.update(x, tx.init(x))[0], mesh=case.mesh, in_specs=P(), out_specs=P()
    )
    program: Any = jax.jit(step).lower(case.alone).compile()
    expected = case.expected()
    updates = program(case.alone)
    for name in expected:
        np.testing.assert_allclose(updates[name], expected[name], atol=1e-6)
    assert collectives(program.as_text()) == ({} if axis_name is None else {"all-gather": 1})


def test_experts_that_differ_along_an_axis_of_a_users_shard_map():
    """A device of "fsdp" has its own experts; along "tp" all is equal, and shared."""
    experts = ((4, 3, 8, 16), MatrixSpec((2, 3)), P("fsdp"))
    case = Case({"experts": experts, "dense": ((8, 16), MatrixSpec(), P())}, make_mesh())
    tx = case.transformation(axis_name="tp")
    inside = {"experts": P("fsdp"), "dense": P()}
    step = jax.shard_map(
        lambda x: tx.update(x, tx.init(x))[0],
        mesh=case.mesh,
        in_specs=(inside,),
        out_specs=inside,
    )
    program: Any = jax.jit(step).lower(case.params).compile()
    case.check(program(case.params), atol=1e-6)
    # Four matrices a device without "tp"; with it two of three experts, and of the dense one, which
    # shares no stack with what differs along "fsdp", a half with some of the work done twice.
    one = 2 * (4 * 8 * 8 * 16 + 2 * 8**3)
    assert tally(program.as_text()).flops < 2.8 * one


@pytest.mark.parametrize("axis_name", [None, "tp"])
def test_a_users_shard_map_that_checks_what_differs(axis_name: Any):
    """With `check_vma`, the default: both branches of a conditional must differ along one axis."""
    leaves = {
        "experts": ((4, 3, 8, 16), MatrixSpec((2, 3)), P("fsdp")),
        "rows": ((4, 8, 16), MatrixSpec((1, 2)), P("fsdp")),
    }
    case = Case(leaves, make_mesh())
    tx = case.transformation(axis_name=axis_name)
    step = jax.shard_map(
        lambda x: tx.update(x, tx.init(x))[0],
        mesh=case.mesh,
        in_specs=P("fsdp"),
        out_specs=P("fsdp"),
    )
    case.check(jax.jit(step)(case.params), atol=1e-6)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_a_shard_map_over_some_axes(kind: AxisType):
    case = Case({name: TREE[name] for name in ("layers", "replicated")}, make_mesh((kind, kind)))
    inside = {"layers": P(None, None, "tp"), "replicated": P()}
    shardings = {name: NamedSharding(case.mesh, at) for name, at in inside.items()}
    params = jax.tree.map(jax.device_put, case.alone, shardings)
    tx = case.transformation(param_shardings=shardings, axis_name="fsdp")

    def step(x: Any) -> Any:
        state = mc.MuonState(count=jnp.zeros([], jnp.int32), mu=jax.tree.map(jnp.zeros_like, x))
        return tx.update(x, state)[0]

    run = jax.shard_map(
        step, mesh=case.mesh, in_specs=P(), out_specs=P(), axis_names=frozenset({"fsdp"})
    )
    updates = jax.jit(run)(params)
    for name, expected in case.expected().items():
        np.testing.assert_allclose(updates[name], expected, atol=1e-6)


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


# What is said


def test_one_warning_where_shardings_cannot_be_seen():
    case = stack_of(2, P("fsdp", "tp"))
    tx = case.transformation(ns_steps=1)
    state = tx.init(case.params)
    with pytest.warns(UserWarning, match="param_shardings") as caught:
        updates, _ = jax.jit(tx.update)(case.params, state)
    assert len(caught) == 1
    for name, expected in case.expected(ns_steps=1).items():
        np.testing.assert_allclose(updates[name], expected, atol=1e-5)


def test_no_warning_where_there_is_nothing_to_say():
    case = stack_of(2, P())
    tx = case.transformation(ns_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(tx.update)(case.alone, tx.init(case.alone))
        tx.update(case.params, tx.init(case.params))


def test_an_axis_that_the_mesh_has_not_is_an_error():
    case = stack_of(2, P("fsdp"))
    tx = case.transformation(
        param_shardings=case.shardings, distribution=mc.Distribution(axes=("dcn",))
    )
    with pytest.raises(ValueError, match=r"'dcn'.*'fsdp', 'tp'"):
        tx.update(case.params, tx.init(case.params))


@pytest.mark.parametrize(
    ("shardings", "error", "message"),
    [
        ({"a": {"v": "here"}}, ValueError, "a/w of shape .* has no entry"),
        ({"b": {"w": "here"}}, ValueError, "a/w of shape .* has no entry in param_shardings"),
        ({"a": {"w": "deep"}}, ValueError, r"'a/w', for 3 dimensions"),
        ({"a": {"w": "uneven"}}, ValueError, r"dimension 0 of 'a/w', shape \(6, 16\).*4 shards"),
        ({"a": {"w": P("fsdp")}}, TypeError, "at 'a/w', expected a jax.sharding.Named"),
    ],
)
def test_shardings_that_do_not_fit_are_errors(shardings: Any, error: type[Exception], message: str):
    mesh = make_mesh()
    named = {
        "here": NamedSharding(mesh, P("tp")),
        "deep": NamedSharding(mesh, P(None, None, "tp")),
        "uneven": NamedSharding(mesh, P("fsdp")),
    }
    tree = jax.tree.map(lambda x: named.get(x, x) if isinstance(x, str) else x, shardings)
    params = {"a": {"w": jnp.ones((6, 16))}}
    tx = mc.scale_by_muon(param_shardings=tree)
    with pytest.raises(error, match=message):
        tx.init(params)


def test_two_meshes_are_an_error():
    other = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AUTO, AUTO))
    params = {"a": jnp.ones((8, 16)), "b": jnp.ones((8, 16))}
    shardings = {"a": NamedSharding(make_mesh(), P("tp")), "b": NamedSharding(other, P("tp"))}
    with pytest.raises(ValueError, match=r"at a is on the mesh .* at b on"):
        mc.scale_by_muon(param_shardings=shardings).init(params)


def test_shardings_of_another_mesh_are_an_error():
    other = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AUTO, AUTO))
    case = stack_of(2, P("fsdp"))
    shardings = {name: NamedSharding(other, P("fsdp")) for name in case.params}
    tx = case.transformation(param_shardings=shardings)
    state = case.transformation().init(case.params)
    with pytest.raises(ValueError, match="param_shardings is for the mesh"):
        jax.jit(tx.update)(case.params, state)
