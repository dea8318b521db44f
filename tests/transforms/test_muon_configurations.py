"""`scale_by_muon` where meshes, types and callers differ: as on one device, or a clear error.

The reference is NumPy in float64, or the same transformation on one device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax.routing import MatrixSpec
from tests.helpers import TOLERANCE, polynomial_of_singular_values

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ROWS = [(3.4445, -4.7750, 2.0315)] * 2
#: Two of a shape share a stack; the tall one is worked on transposed; layers are a loop.
SHAPES = {"up": (8, 16), "gate": (8, 16), "down": (16, 8), "layers": (3, 8, 16)}
SPECS = {name: MatrixSpec((len(shape) - 2, len(shape) - 1)) for name, shape in SHAPES.items()}


def tree(seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def muon(**options: Any) -> Any:
    return mc.scale_by_muon(ROWS, weight_dimension_numbers=SPECS, **options)


def mesh_of(
    sizes: tuple[int, ...], types: tuple[AxisType, ...], names: tuple[str, ...] = ("fsdp", "tp")
) -> Mesh:
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, axis_types=types, devices=devices)


def on_mesh(params: Any, mesh: Mesh, at: P) -> tuple[Any, Any]:
    """The tree on a mesh, its matrices sharded `at`, and the shardings."""
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 2), *at)), params)
    return jax.device_put(params, shardings), shardings


def step(tx: Any, gradients: Any, state: Any) -> Any:
    return tx.update(gradients, state)[0]


def jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def alone(**options: Any) -> Any:
    tx = muon(**options)
    return jitted(functools.partial(step, tx))(tree(), tx.init(tree()))


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE["float32"]) -> None:
    for name, y in expected.items():
        x, y = np.asarray(actual[name], np.complex128), np.asarray(y, np.complex128)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name


# -- 64-bit mode --


@pytest.mark.parametrize(
    ("dtype", "platform"),
    [("float64", "cpu"), ("complex128", "gpu")],
)
def test_64_bit_mode(dtype: str, platform: str):
    with jax.enable_x64(True):
        gradients = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), tree(dtype=np.float64))
        if dtype == "complex128":
            gradients = jax.tree.map(lambda x: x + 1j * x[..., ::-1], gradients)
        ns_dtype = None if dtype.endswith(("64", "128")) else "float32"
        tx = muon(bias_correction=True, platform=platform, ns_dtype=ns_dtype)
        updates, state = jitted(tx.update)(gradients, tx.init(gradients))
        assert {x.dtype for x in jax.tree.leaves((updates, state.mu))} == {jnp.dtype(dtype)}
        assert state.count.dtype == jnp.int32
    assert_close(updates, jax.tree.map(polynomial, gradients), TOLERANCE[dtype])


def polynomial(gradient: Any) -> np.ndarray:
    """The first momentum has the direction of the gradient."""
    x = np.asarray(gradient, np.complex128)
    norms = np.linalg.norm(x, axis=(-2, -1))
    return polynomial_of_singular_values(x / norms[..., None, None], ROWS)


def test_64_bit_mode_on_a_mesh():
    with jax.enable_x64(True):
        gradients, _ = on_mesh(tree(dtype=np.float64), mesh_of((4, 2), (EXPLICIT,) * 2), P("fsdp"))
        tx = muon(distribution=mc.Distribution(max_matrix_bytes=64))
        updates = jitted(functools.partial(step, tx))(gradients, tx.init(gradients))
    assert_close(updates, jax.tree.map(polynomial, gradients), 1e-10)


# -- Explicit axes of size one --


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("at", [P(), P("fsdp", "tp")], ids=str)
def test_an_explicit_mesh_of_one_device(at: P, platform: str):
    gradients, shardings = on_mesh(tree(), mesh_of((1, 1), (EXPLICIT,) * 2), at)
    tx = muon(platform=platform, ns_dtype="float32")
    state = tx.init(gradients)
    for update in (tx.update, jitted(tx.update)):
        updates, new_state = update(gradients, state)
        assert_close(updates, alone())
        assert all(updates[name].sharding.is_equivalent_to(x, 3) for name, x in shardings.items())
        same = jax.tree.map(
            lambda x, y: x.sharding.is_equivalent_to(y.sharding, 3), new_state, state
        )
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("at", [P(), P(None, "tp")], ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_mapped_axis_beside_an_explicit_one_of_size_one(check_vma: bool, at: P):
    mesh = mesh_of((8, 1), (EXPLICIT,) * 2)
    gradients, shardings = on_mesh(tree(), mesh, at)
    tx = muon(axis_name="fsdp")
    mapped = jax.shard_map(
        functools.partial(step, tx),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        axis_names={"fsdp"},
        check_vma=check_vma,
    )
    updates = jitted(mapped)(gradients, tx.init(gradients))
    assert_close(updates, alone())
    assert all(updates[name].sharding.is_equivalent_to(x, 3) for name, x in shardings.items())


# -- states --


@pytest.mark.parametrize("shard_momentum", [False, True])
@pytest.mark.parametrize("types", [(AUTO, AUTO), (EXPLICIT, EXPLICIT)], ids=["auto", "explicit"])
def test_init_of_shapes_under_a_set_mesh(types: Any, shard_momentum: bool):
    mesh = mesh_of((4, 2), types)
    params, shardings = on_mesh(tree(), mesh, P("fsdp"))
    given = None if EXPLICIT in types else shardings
    options = mc.Distribution(shard_momentum=shard_momentum)
    tx = muon(param_shardings=given, distribution=options)
    with jax.set_mesh(mesh):
        made = tx.init(jax.eval_shape(lambda: params))
        expected = tx.init(params)

    def check(x: jax.Array, y: jax.Array) -> None:
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert x.dtype == y.dtype

    jax.tree.map(check, made, expected)


def test_init_of_shapes_without_a_mesh_says_what_to_do():
    params, _ = on_mesh(tree(), mesh_of((8,), (EXPLICIT,), ("fsdp",)), P())
    with pytest.raises(ValueError, match=r"jax\.set_mesh"):
        mc.scale_by_muon(
            weight_dimension_numbers=SPECS, distribution=mc.Distribution(shard_momentum=True)
        ).init(jax.eval_shape(lambda: params))


@pytest.mark.parametrize("make", [mc.muonclip, mc.muon], ids=["muonclip", "muon"])
@pytest.mark.parametrize("shapes_alone", [True, False])
def test_moments_of_adam_follow_the_shardings_that_are_given(make: Any, shapes_alone: bool):
    mesh = mesh_of((8,), (AUTO,), ("fsdp",))
    params = {
        "embedding": np.ones((16, 8, 1)),
        "bias": np.ones(8),
        "mlp": {"kernel": np.ones((8, 16))},
    }
    params = jax.device_put(params, NamedSharding(mesh, P("fsdp")))
    options = {} if make is mc.muon else {"qk_clip_threshold": None}
    tx = make(1e-3, param_shardings=jax.tree.map(lambda x: x.sharding, params), **options)
    state = tx.init(jax.eval_shape(lambda: params)) if shapes_alone else jitted(tx.init)(params)
    for x in jax.tree.leaves(state):
        assert x.sharding.is_equivalent_to(
            NamedSharding(mesh, P("fsdp") if x.ndim else P()), x.ndim
        )


@pytest.mark.parametrize("at", [P(), P("fsdp"), P(None, "fsdp")], ids=str)
def test_the_dual_norm_with_a_momentum_that_is_sharded_further(at: P):
    gradients, shardings = on_mesh(tree(), mesh_of((4, 2), (EXPLICIT,) * 2), at)
    tx = muon(adaptive=True, distribution=mc.Distribution(shard_momentum=True))
    updates = jitted(functools.partial(step, tx))(gradients, tx.init(gradients))
    assert_close(updates, alone(adaptive=True))
    assert all(updates[name].sharding.is_equivalent_to(x, 3) for name, x in shardings.items())


# -- gradients through an update --


def pulled_back(tx: Any, gradients: Any, state: Any, cotangents: Any, update: Any = None) -> Any:
    update = functools.partial(step, tx) if update is None else update

    def loss(gradients: Any) -> jax.Array:
        products = jax.tree.map(lambda x, y: jnp.sum(x * y), update(gradients, state), cotangents)
        return sum(jax.tree.leaves(products), jnp.zeros(()))

    return jax.grad(loss)(gradients)


@functools.cache
def pulled_back_alone() -> Any:
    tx = muon()
    return jitted(functools.partial(pulled_back, tx))(tree(), tx.init(tree()), tree(1))


DISTRIBUTIONS = {
    "whole": mc.Distribution(),
    "split": mc.Distribution(max_matrix_bytes=64),
    "one axis": mc.Distribution(axes=("fsdp",)),
    "zero": mc.Distribution(shard_momentum=True),
}


@pytest.mark.parametrize(
    ("at", "options", "kind"),
    [
        (P(), "whole", AUTO),
        (P(), "split", EXPLICIT),
        (P("tp"), "zero", EXPLICIT),
        (P(None, ("tp", "fsdp")), "one axis", EXPLICIT),
    ],
)
def test_gradients_through_an_update(at: P, options: str, kind: AxisType):
    gradients, shardings = on_mesh(tree(), mesh_of((4, 2), (kind, kind)), at)
    tx = muon(param_shardings=shardings, distribution=DISTRIBUTIONS[options])
    cotangents = jax.device_put(tree(1), shardings)
    actual = jitted(functools.partial(pulled_back, tx))(gradients, tx.init(gradients), cotangents)
    assert_close(actual, pulled_back_alone())


@pytest.mark.parametrize("options", ["whole", "split"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_through_an_update_of_mapped_axes(check_vma: bool, options: str):
    mesh = mesh_of((8,), (AUTO,), ("fsdp",))
    tx = muon(axis_name="fsdp", distribution=DISTRIBUTIONS[options])
    update = jax.shard_map(
        functools.partial(step, tx), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check_vma
    )
    actual = jitted(functools.partial(pulled_back, tx, update=update))(
        tree(), tx.init(tree()), tree(1)
    )
    assert_close(actual, pulled_back_alone())


# -- what cannot be one program --


def two(sharding: Any, other: Any) -> Any:
    x = np.ones((8, 16), np.float32)
    return {"layer": {"up": jax.device_put(x, sharding), "down": jax.device_put(x, other)}}


LINE = mesh_of((8,), (EXPLICIT,), ("fsdp",))
OTHERS = {
    "axes": NamedSharding(mesh_of((4, 2), (EXPLICIT,) * 2), P("fsdp")),
    "types": NamedSharding(mesh_of((8,), (AUTO,), ("fsdp",)), P()),
    "order": NamedSharding(Mesh(LINE.devices[::-1], ("fsdp",), axis_types=(EXPLICIT,)), P()),
    "fewer": NamedSharding(mesh_of((4,), (EXPLICIT,), ("fsdp",)), P()),
    "one": jax.devices()[1],
}


@pytest.mark.parametrize("given", [False, True], ids=["read", "given"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_leaves_on_two_meshes_are_named(other: Any, given: bool):
    gradients = two(NamedSharding(LINE, P()), other)
    shardings = jax.tree.map(lambda x: x.sharding, gradients) if given else None
    tx = mc.scale_by_muon(param_shardings=shardings)
    for call in (tx.init, lambda x: tx.update(x, optax.tree.zeros_like(mc.MuonState(0, x)))):
        with pytest.raises(ValueError, match=r"layer/(up|down) (is )?on .*layer/(up|down) on"):
            call(gradients)


def test_arrays_that_are_bound_to_no_device_join_those_of_a_mesh():
    gradients, _ = on_mesh(tree(), LINE, P())
    gradients["up"] = jnp.asarray(tree()["up"])
    tx = muon()
    assert_close(tx.update(gradients, tx.init(gradients))[0], alone())


def test_devices_in_another_order_than_given_are_an_error():
    gradients = two(OTHERS["order"], OTHERS["order"])
    shardings = jax.tree.map(lambda x: NamedSharding(LINE, P()), gradients)
    with pytest.raises(ValueError, match=r"is for the mesh .*\[0, 1,.* are on .*\[7, 6,"):
        mc.scale_by_muon(param_shardings=shardings).init(gradients)


def test_an_unreduced_gradient_is_named():
    x = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(LINE, P(None, "fsdp")))
    tx = mc.scale_by_muon()

    @jax.jit
    def update(x: jax.Array) -> Any:
        unreduced = jnp.einsum("ij,kj->ik", x, x, out_sharding=P(unreduced=frozenset({"fsdp"})))
        return tx.update({"layer": unreduced}, tx.init({"layer": jnp.zeros((8, 8))}))

    with (
        jax.set_mesh(LINE),
        pytest.raises(ValueError, match=r"layer is unreduced over the mesh axes \('fsdp',\)"),
    ):
        update(x)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        (AUTO, P(P.UNCONSTRAINED, "fsdp"), "leaves a dimension unconstrained"),
        (EXPLICIT, P(unreduced=frozenset({"fsdp"})), "unreduced over the mesh axes"),
    ],
)
def test_shardings_that_say_too_little_are_errors(kind: AxisType, spec: P, message: str):
    shardings = {"layer": {"up": NamedSharding(mesh_of((8,), (kind,), ("fsdp",)), spec)}}
    with pytest.raises(ValueError, match=message) as error:
        mc.scale_by_muon(param_shardings=shardings).init({"layer": {"up": jnp.ones((8, 16))}})
    assert "layer/up" in str(error.value)


def test_a_gradient_sharded_otherwise_than_its_momentum_is_named():
    params, shardings = on_mesh(tree(), LINE, P("fsdp"))
    gradients, _ = on_mesh(tree(), LINE, P(None, "fsdp"))
    tx = muon()
    with pytest.raises(ValueError, match=r"down: the Explicit mesh axes shard"):
        tx.update(gradients, tx.init(params))
    tx = muon(param_shardings=shardings)
    updates, state = tx.update(gradients, tx.init(params))
    assert_close(updates, alone())
    for x in (updates, state.mu):
        assert all(x[name].sharding.is_equivalent_to(at, 3) for name, at in shardings.items())


def test_the_bias_correction_is_in_float64_in_64_bit_mode():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params, *gradients = ({"w": jnp.asarray(rng.standard_normal((8, 12)))} for _ in range(4))
        ours: Any = mc.muon(0.1)
        theirs: Any = optax.contrib.muon(0.1)
        state, their_state = ours.init(params), theirs.init(params)
        for gradient in gradients:
            updates, state = ours.update(gradient, state, params)
            expected, their_state = theirs.update(gradient, their_state, params)
            error = np.linalg.norm(updates["w"] - expected["w"]) / np.linalg.norm(expected["w"])
            assert error < 1e-13


def test_zero_keeps_its_sharding_where_axes_are_mixed():
    mesh = jax.make_mesh((2, 4), ("tp", "data"), axis_types=(AxisType.Auto, AxisType.Explicit))
    params = {"w": jax.device_put(jnp.ones((13, 8)), NamedSharding(mesh, P()))}
    tx: Any = mc.scale_by_muon(
        param_shardings=jax.tree.map(lambda x: x.sharding, params),
        distribution=mc.Distribution(shard_momentum=True),
    )
    with jax.set_mesh(mesh):
        before = tx.init(params)
        after = jax.jit(tx.update)(params, before, params)[1]
    assert before.mu["w"].sharding.spec == P(None, ("data", "tp"))
    assert after.mu["w"].sharding.is_equivalent_to(before.mu["w"].sharding, 2)


def test_what_a_clip_and_adam_leave_stays_where_param_shardings_say():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    on = {"kernel": NamedSharding(mesh, P("data")), "bias": NamedSharding(mesh, P())}
    rng = np.random.default_rng(0)
    params = {
        "layers": {
            "attention": {
                name: {
                    "kernel": jax.device_put(rng.standard_normal((2, 8, 8, 5)), on["kernel"]),
                    "bias": jax.device_put(rng.standard_normal((2, 8, 5)), on["bias"]),
                }
                for name in ("query", "key")
            }
        }
    }
    tx: Any = mc.muonclip(
        0.1,
        rules=mc.MatrixRules(scan_axis=0),
        param_shardings=jax.tree.map(lambda x: x.sharding, params),
    )
    maxima = {"layers/attention": jnp.full((2, 8), 150.0)}
    before = tx.init(params)
    updates, after = jax.jit(tx.update)(params, before, params, max_logits=maxima)

    def same_place(x: jax.Array, y: jax.Array) -> None:
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)

    jax.tree.map(same_place, updates, params)
    jax.tree.map(same_place, after, before)


def test_leaves_that_differ_along_axis_name_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    tx: Any = mc.scale_by_muon(axis_name="data")
    params = {"w": jnp.ones((64, 16))}

    def step(params: Any) -> Any:
        return tx.update(params, tx.init(params))[0]

    with pytest.raises(ValueError, match=r"w varies over the mapped axes \('data',\).*pmean"):
        jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"))).trace(
            params
        )
