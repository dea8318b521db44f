"""`scale_by_muon` where meshes, types and callers differ, beyond `test_configurations.py`.

The reference is NumPy in float64, or the same transformation on one device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.helpers import TOLERANCE, normal_tree, polynomial_of_singular_values

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ROWS = [(3.4445, -4.7750, 2.0315)] * 2
#: Two of a shape share a stack; the tall one is worked on transposed; layers are a loop.
SHAPES = {"up": (8, 16), "gate": (8, 16), "down": (16, 8), "layers": (3, 8, 16)}
SPECS = {name: mc.MatrixSpec((len(shape) - 2, len(shape) - 1)) for name, shape in SHAPES.items()}


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


@functools.cache
def alone(**options: Any) -> Any:
    tx = muon(**options)
    return jax.jit(functools.partial(step, tx))(tree(), tx.init(tree()))


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE["float32"]) -> None:
    for name, y in expected.items():
        x, y = np.asarray(actual[name], np.complex128), np.asarray(y, np.complex128)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name


def same_places(actual: Any, shardings: Any) -> None:
    same = jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim), actual, shardings)
    assert all(jax.tree.leaves(same))


# -- 64-bit mode --


@pytest.mark.parametrize("kind", ["complex128", "float64 on a mesh"])
def test_64_bit_mode_is_the_polynomial(kind: str):
    def polynomial(gradient: Any) -> np.ndarray:
        """The first momentum has the direction of the gradient."""
        x = np.asarray(gradient, np.complex128)
        norms = np.linalg.norm(x, axis=(-2, -1))
        return polynomial_of_singular_values(x / norms[..., None, None], ROWS)

    gradients = tree(dtype=np.float64)
    with jax.enable_x64(True):
        if kind == "complex128":
            gradients = jax.tree.map(lambda x: jnp.asarray(x + 1j * x[..., ::-1]), gradients)
            tx = muon(bias_correction=True, platform="gpu")
        else:
            mesh = mesh_of((4, 2), (EXPLICIT,) * 2)
            gradients, _ = on_mesh(gradients, mesh, P("fsdp"))
            tx = muon(distribution=mc.Distribution(max_matrix_bytes=64))
        updates, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    assert {x.dtype for x in jax.tree.leaves((updates, state.mu))} == {gradients["up"].dtype}
    assert state.count.dtype == jnp.int32
    assert_close(updates, jax.tree.map(polynomial, gradients), TOLERANCE["float64"])


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
            assert_close(updates, expected, 1e-13)


# -- Explicit axes of size one --


def test_an_explicit_mesh_of_one_device():
    gradients, shardings = on_mesh(tree(), mesh_of((1, 1), (EXPLICIT,) * 2), P("fsdp", "tp"))
    tx = muon(platform="gpu", ns_dtype="float32")
    state = tx.init(gradients)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new_state = update(gradients, state)
        assert_close(updates, alone())
        same_places(updates, shardings)
        same_places(new_state, jax.tree.map(lambda x: x.sharding, state))


@pytest.mark.parametrize(("check_vma", "at"), [(True, P(None, "tp")), (False, P())])
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
    updates = jax.jit(mapped)(gradients, tx.init(gradients))
    assert_close(updates, alone())
    same_places(updates, shardings)


# -- states --


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_init_of_shapes_under_a_set_mesh(kind: AxisType):
    mesh = mesh_of((4, 2), (kind, kind))
    params, shardings = on_mesh(tree(), mesh, P("fsdp"))
    tx = muon(
        param_shardings=shardings if kind == AUTO else None,
        distribution=mc.Distribution(shard_momentum=True),
    )
    with jax.set_mesh(mesh):
        made, expected = tx.init(jax.eval_shape(lambda: params)), tx.init(params)
    same_places(made, jax.tree.map(lambda x: x.sharding, expected))
    assert optax.tree.dtype(made.mu) == optax.tree.dtype(expected.mu)


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
    state = tx.init(jax.eval_shape(lambda: params)) if shapes_alone else jax.jit(tx.init)(params)
    same_places(
        state, jax.tree.map(lambda x: NamedSharding(mesh, P("fsdp") if x.ndim else P()), state)
    )


def test_the_dual_norm_with_a_momentum_that_is_sharded_further():
    gradients, shardings = on_mesh(tree(), mesh_of((4, 2), (EXPLICIT,) * 2), P(None, "fsdp"))
    tx = muon(adaptive=True, distribution=mc.Distribution(shard_momentum=True))
    updates = jax.jit(functools.partial(step, tx))(gradients, tx.init(gradients))
    assert_close(updates, alone(adaptive=True))
    same_places(updates, shardings)


def test_zero_keeps_its_sharding_where_axes_are_mixed():
    mesh = mesh_of((2, 4), (AUTO, EXPLICIT), ("tp", "data"))
    params = {"w": jax.device_put(jnp.ones((13, 8)), NamedSharding(mesh, P()))}
    tx: Any = mc.scale_by_muon(
        param_shardings=jax.tree.map(lambda x: x.sharding, params),
        distribution=mc.Distribution(shard_momentum=True),
    )
    with jax.set_mesh(mesh):
        before = tx.init(params)
        after = jax.jit(tx.update)(params, before, params)[1]
    assert before.mu["w"].sharding.spec == P(None, ("data", "tp"))
    same_places(after.mu, {"w": before.mu["w"].sharding})


def test_what_a_clip_and_adam_leave_stays_where_param_shardings_say():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AUTO,), devices=jax.devices()[:2])
    shapes = {"kernel": (2, 8, 8, 5), "bias": (2, 8, 5)}
    params = normal_tree({"layers": {"attention": {"query": shapes, "key": shapes}}}, 0)
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, P("data") if x.ndim > 3 else P()), params
    )
    params = jax.device_put(params, shardings)
    tx: Any = mc.muonclip(0.1, rules=mc.MatrixRules(scan_axis=0), param_shardings=shardings)
    maxima = {"layers/attention": jnp.full((2, 8), 150.0)}
    before = tx.init(params)
    updates, after = jax.jit(tx.update)(params, before, params, max_logits=maxima)
    same_places(updates, shardings)
    same_places(after, jax.tree.map(lambda x: x.sharding, before))


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
    return jax.jit(functools.partial(pulled_back, tx))(tree(), tx.init(tree()), tree(1))


SPLIT = mc.Distribution(max_matrix_bytes=64)


@pytest.mark.parametrize(
    ("at", "options", "kind"),
    [
        (P(), None, AUTO),
        (P(), SPLIT, EXPLICIT),
        (P("tp"), mc.Distribution(shard_momentum=True), EXPLICIT),
        (P(None, ("tp", "fsdp")), mc.Distribution(axes=("fsdp",)), EXPLICIT),
    ],
)
def test_gradients_through_an_update(at: P, options: Any, kind: AxisType):
    gradients, shardings = on_mesh(tree(), mesh_of((4, 2), (kind, kind)), at)
    tx = muon(param_shardings=shardings, distribution=options or mc.Distribution())
    cotangents = jax.device_put(tree(1), shardings)
    actual = jax.jit(functools.partial(pulled_back, tx))(gradients, tx.init(gradients), cotangents)
    assert_close(actual, pulled_back_alone())


@pytest.mark.parametrize(("check_vma", "options"), [(True, SPLIT), (False, mc.Distribution())])
def test_gradients_through_an_update_of_mapped_axes(check_vma: bool, options: Any):
    tx = muon(axis_name="fsdp", distribution=options)
    update = jax.shard_map(
        functools.partial(step, tx),
        mesh=mesh_of((8,), (AUTO,), ("fsdp",)),
        in_specs=P(),
        out_specs=P(),
        check_vma=check_vma,
    )
    pull = functools.partial(pulled_back, tx, update=update)
    assert_close(jax.jit(pull)(tree(), tx.init(tree()), tree(1)), pulled_back_alone())


# -- what cannot be one program --


def two(sharding: Any, other: Any) -> Any:
    x = np.ones((8, 16), np.float32)
    return {"layer": {"up": jax.device_put(x, sharding), "down": jax.device_put(x, other)}}


LINE = mesh_of((8,), (EXPLICIT,), ("fsdp",))
AUTO_LINE = mesh_of((8,), (AUTO,), ("fsdp",))
OTHERS = {
    "axes": NamedSharding(mesh_of((4, 2), (EXPLICIT,) * 2), P("fsdp")),
    "types": NamedSharding(AUTO_LINE, P()),
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


UNREDUCED = P(unreduced=frozenset({"fsdp"}))
REVERSED, ONE = two(OTHERS["order"], OTHERS["order"]), {"layer": {"up": jnp.ones((8, 16))}}


@pytest.mark.parametrize(
    ("params", "given", "message"),
    [
        (REVERSED, NamedSharding(LINE, P()), r"is for the mesh .*\[0, 1,.* are on .*\[7, 6,"),
        (
            ONE,
            NamedSharding(AUTO_LINE, P(P.UNCONSTRAINED, "fsdp")),
            "layer/up.*leaves a dimension unconstrained",
        ),
        (ONE, NamedSharding(LINE, UNREDUCED), "layer/up.*unreduced over the mesh axes"),
    ],
    ids=["devices in another order", "an open dimension", "unreduced"],
)
def test_shardings_that_do_not_fit_or_say_too_little(params: Any, given: Any, message: str):
    tx = mc.scale_by_muon(param_shardings=jax.tree.map(lambda x: given, params))
    with pytest.raises(ValueError, match=message):
        tx.init(params)


def test_init_of_shapes_without_a_mesh_says_what_to_do():
    params, _ = on_mesh(tree(), LINE, P())
    tx = muon(distribution=mc.Distribution(shard_momentum=True))
    with pytest.raises(ValueError, match=r"jax\.set_mesh"):
        tx.init(jax.eval_shape(lambda: params))


def test_an_unreduced_gradient_is_named():
    x = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(LINE, P(None, "fsdp")))
    tx = mc.scale_by_muon()

    @jax.jit
    def update(x: jax.Array) -> Any:
        unreduced = jnp.einsum("ij,kj->ik", x, x, out_sharding=UNREDUCED)
        return tx.update({"layer": unreduced}, tx.init({"layer": jnp.zeros((8, 8))}))

    message = r"layer is unreduced over the mesh axes \('fsdp',\)"
    with jax.set_mesh(LINE), pytest.raises(ValueError, match=message):
        update(x)


def test_leaves_that_differ_along_axis_name_are_refused():
    tx: Any = mc.scale_by_muon(axis_name="fsdp")
    at = P("fsdp")
    mapped = jax.shard_map(
        lambda params: step(tx, params, tx.init(params)), mesh=AUTO_LINE, in_specs=at, out_specs=at
    )
    with pytest.raises(ValueError, match=r"w varies over the mapped axes \('fsdp',\).*pmean"):
        jax.jit(mapped).trace({"w": jnp.ones((64, 16))})


def test_a_gradient_sharded_otherwise_than_its_momentum_is_named():
    params, shardings = on_mesh(tree(), LINE, P("fsdp"))
    gradients, _ = on_mesh(tree(), LINE, P(None, "fsdp"))
    tx = muon()
    with pytest.raises(ValueError, match=r"down: the Explicit mesh axes shard"):
        tx.update(gradients, tx.init(params))
    tx = muon(param_shardings=shardings)
    updates, state = tx.update(gradients, tx.init(params))
    assert_close(updates, alone())
    same_places([updates, state.mu], [shardings, shardings])
