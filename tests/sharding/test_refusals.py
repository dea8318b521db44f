"""Shardings that cannot be seen, that do not fit, or that say too little: a warning, or refused."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.sharding.cases import AUTO, EXPLICIT, mesh_of, same_places, stack_of, step

ZERO1 = mc.Distribution(shard_momentum=True)


def test_one_warning_where_shardings_cannot_be_seen_and_none_without_a_reason():
    case = stack_of(2, P("fsdp", "tp"))
    tx = case.transformation(ns_steps=1)
    with pytest.warns(UserWarning, match="param_shardings") as caught:
        updates, _ = jax.jit(tx.update)(case.params, tx.init(case.params))
    assert len(caught) == 1
    for name, expected in case.expected(ns_steps=1).items():
        np.testing.assert_allclose(updates[name], expected, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(tx.update)(case.alone, tx.init(case.alone))
        tx.update(case.params, tx.init(case.params))


AUTO_MESH, LINE, AUTO_LINE = mesh_of(), mesh_of(EXPLICIT, fsdp=8), mesh_of(fsdp=8)
REVERSED = Mesh(LINE.devices[::-1], ("fsdp",), axis_types=(EXPLICIT,))
W, PLACED = (
    {"w": jnp.ones((6, 16))},
    {"w": jax.device_put(np.ones((8, 16)), NamedSharding(LINE, P()))},
)


@pytest.mark.parametrize(
    ("params", "mesh", "given", "message"),
    [
        (W, AUTO_MESH, {"v": P("tp")}, "a/w of shape .* has no entry in param_shardings"),
        (W, AUTO_MESH, {"w": P(None, None, "tp")}, "'a/w', which does not fit .*rank at least 3"),
        (W, AUTO_MESH, {"w": P("fsdp")}, r"'a/w', .* fit the shape \(6, 16\).*partitioned 4 times"),
        (W, None, {"w": P("fsdp")}, "at 'a/w', expected a jax.sharding.Named"),
        (PLACED, REVERSED, {"w": P()}, r"is for the mesh .*\[7, 6,.* are on .*\[0, 1,"),
        (PLACED, mesh_of(EXPLICIT), {"w": P()}, "param_shardings is for the mesh"),
        (W, AUTO_LINE, {"w": P(P.UNCONSTRAINED, "fsdp")}, "a/w.*leaves a dimension unconstrained"),
        (W, LINE, {"w": P(unreduced=frozenset({"fsdp"}))}, "a/w.*unreduced over the mesh axes"),
    ],
)
def test_shardings_that_do_not_fit_or_say_too_little(
    params: Any, mesh: Mesh | None, given: Any, message: str
):
    shardings = {k: NamedSharding(mesh, at) if mesh else at for k, at in given.items()}
    tx = mc.scale_by_muon(param_shardings={"a": shardings})
    with pytest.raises(ValueError if mesh else TypeError, match=message):
        tx.init({"a": params})


@pytest.mark.parametrize(
    ("other", "given"),
    [
        (NamedSharding(mesh_of(EXPLICIT), P("fsdp")), False),  # other axes
        (NamedSharding(AUTO_LINE, P()), True),  # other types
        (NamedSharding(REVERSED, P()), False),  # another order
        (NamedSharding(mesh_of(EXPLICIT, fsdp=4), P()), True),  # fewer devices
        (jax.devices()[1], False),  # one device
    ],
)
def test_leaves_on_two_meshes_are_named(other: Any, given: bool):
    x = np.ones((8, 16), np.float32)
    up, down = jax.device_put(x, NamedSharding(LINE, P())), jax.device_put(x, other)
    gradients = {"layer": {"up": up, "down": down}}
    shardings = jax.tree.map(lambda x: x.sharding, gradients) if given else None
    tx = mc.scale_by_muon(param_shardings=shardings)
    for call in (tx.init, lambda x: tx.update(x, optax.tree.zeros_like(mc.MuonState(0, x)))):
        with pytest.raises(ValueError, match=r"layer/(up|down) (is )?on .*layer/(up|down) on"):
            call(gradients)


@pytest.mark.parametrize("kinds", [(AUTO, AUTO), (EXPLICIT, AUTO)])
def test_axes_of_zero1_that_cannot_be_seen_are_refused(kinds: tuple[AxisType, AxisType]):
    mesh = mesh_of(*kinds, fsdp=1, data=8)
    params = {"w": jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P()))}
    tx = mc.scale_by_muon(distribution=ZERO1)
    with jax.set_mesh(mesh):
        state = tx.init(params)
        with pytest.raises(ValueError, match=r"Auto axes \('data',\).*param_shardings"):
            jax.jit(tx.update).trace(params, state)


def test_init_of_shapes_without_a_mesh_says_what_to_do():
    tx = mc.scale_by_muon(distribution=ZERO1)
    with pytest.raises(ValueError, match=r"jax\.set_mesh"):
        tx.init(jax.eval_shape(lambda: PLACED))


def test_an_unreduced_gradient_is_named():
    x = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(LINE, P(None, "fsdp")))
    tx = mc.scale_by_muon()

    @jax.jit
    def update(x: jax.Array) -> Any:
        to = P(unreduced=frozenset({"fsdp"}))
        unreduced = jnp.einsum("ij,kj->ik", x, x, out_sharding=to)
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
    params, gradients = (
        {"down": jax.device_put(np.ones((16, 8), np.float32), NamedSharding(LINE, at))}
        for at in (P("fsdp"), P(None, "fsdp"))
    )
    tx: Any = mc.scale_by_muon()
    with pytest.raises(ValueError, match=r"down: the Explicit mesh axes shard"):
        tx.update(gradients, tx.init(params))
    shardings = jax.tree.map(lambda x: x.sharding, params)
    tx = mc.scale_by_muon(param_shardings=shardings)
    updates, state = tx.update(gradients, tx.init(params))
    same_places([updates, state.mu], [shardings, shardings])
