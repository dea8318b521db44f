"""Fewer matrices than devices along the one axis of a mesh: groups of neighbours share them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import tally
from muonclip_jax.newton_schulz import plan_polar
from muonclip_jax.sharding.cut import Cut, possible_cuts
from muonclip_jax.sharding.plan import DistributionPlan
from muonclip_jax.sharding.planning import plan_for
from tests.transforms.share import SHAPE, work

SHARDINGS = [P(), P(None, "fsdp"), P(None, None, "fsdp"), P("fsdp")]
# At this price of a byte, two devices for each of four matrices are the best for eight devices.
OPTIONS = mc.Distribution(flops_per_byte=20.0)
ARGUMENTS: Any = {
    "ns_coeffs": "keller_jordan",
    "ns_method": "standard",
    "weight_dimension_numbers": mc.MatrixSpec((1, 2)),
}


def mesh_of(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))


def matrices(count: int = 4) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(0), (count, *SHAPE))}


def on_one_device(params: Any) -> Any:
    tx: Any = mc.scale_by_muon(**ARGUMENTS)
    return jax.jit(tx.update)(params, tx.init(params))[0]


@pytest.mark.parametrize("shard_momentum", [False, True])
@pytest.mark.parametrize("at", SHARDINGS[:3], ids=str)
def test_groups_share_a_matrix_and_the_caller_sees_its_own_mesh(at: P, shard_momentum: bool):
    options = dataclasses.replace(OPTIONS, shard_momentum=shard_momentum)
    shardings = {"w": NamedSharding(mesh_of(), at)}
    params = jax.device_put(matrices(), shardings)
    tx: Any = optax.chain(
        mc.scale_by_muon(**ARGUMENTS, param_shardings=shardings, distribution=options),
        optax.scale(-0.5),
    )

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), updates, state

    program: Any = jax.jit(step).lower(params, tx.init(params), params).compile()
    after, updates, state = program(params, tx.init(params), params)
    expected = -0.5 * on_one_device(matrices())["w"]
    np.testing.assert_allclose(updates["w"], expected, atol=2e-6)
    np.testing.assert_allclose(after["w"], params["w"] + expected, atol=2e-6)
    for x in (after["w"], updates["w"]):
        assert x.sharding.is_equivalent_to(shardings["w"], 3)
    assert state[0].mu["w"].sharding.is_equivalent_to(tx.init(params)[0].mu["w"].sharding, 3)
    counted = tally(program.as_text())
    assert counted.flops == work(SHAPE) / 2
    # Nothing is gathered of what is sharded: neither parameters nor updates.
    if at != P():
        whole = 4 * SHAPE[0] * SHAPE[1] * 4
        assert counted.by_kind()["all-gather"]["bytes"] < whole
        assert program.memory_analysis().temp_size_in_bytes < 2 * whole


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "set_mesh"])
def test_a_mesh_that_types_name_is_not_cut(kind: AxisType):
    mesh = mesh_of(kind)
    shardings = {"w": NamedSharding(mesh, P(None, "fsdp"))}
    with jax.set_mesh(mesh):
        params = jax.device_put(matrices(), shardings)
        tx: Any = mc.scale_by_muon(**ARGUMENTS, param_shardings=shardings, distribution=OPTIONS)
        program: Any = jax.jit(tx.update).lower(params, tx.init(params)).compile()
        updates, _ = program(params, tx.init(params))
    np.testing.assert_allclose(updates["w"], on_one_device(matrices())["w"], atol=2e-6)
    assert tally(program.as_text()).flops == work(SHAPE)


def plan(
    count: int, at: P, options: mc.Distribution = OPTIONS, shape: tuple[int, int] = SHAPE
) -> DistributionPlan:
    held = tuple((axis,) if axis else () for axis in (*at, None, None, None)[:3])
    return plan_for(
        plan_polar("keller_jordan", ns_method="standard", ns_dtype="float32"),
        ((count, *shape),),
        ("float32",),
        (mc.MatrixSpec((1, 2)),),
        (held,),
        (held,),
        (("fsdp", 8),),
        options,
        cuts=(Cut("fsdp", 2), Cut("fsdp", 4)),
    )


@pytest.mark.parametrize("at", SHARDINGS[:3], ids=str)
@pytest.mark.parametrize("count", range(1, 20))
def test_a_cut_pays(count: int, at: P):
    cut, whole = plan(count, at), plan(count, at, mc.Distribution(flops_per_byte=float("inf")))
    assert whole.cut is None
    assert cut.mean == pytest.approx(count * work(SHAPE) / 8)
    assert cut.mean <= cut.busiest <= whole.busiest
    if cut.cut is not None:
        assert cut.busiest < whole.busiest / 1.1
        assert dict(cut.sizes) == {
            "fsdp_groups": 8 // cut.cut.group,
            "fsdp_within": cut.cut.group,
        }
    items = [
        item
        for turn in cut.rounds
        for job in turn.jobs
        for group in job.groups
        for item in group.order
        if item is not None
    ]
    assert sorted(item.index for item in items) == list(range(count))


def test_only_neighbours_share():
    # Groups of four; those with a stride of two, of the other cut, would do as well.
    found = plan(10, P(None, "fsdp"), mc.Distribution(flops_per_byte=500.0), (4096, 4096))
    assert found.cut is not None
    assert found.cut.group == 4
    assert {turn.exchange.split for turn in found.rounds} == {(), ("fsdp_within",)}


def test_what_may_be_cut(monkeypatch: pytest.MonkeyPatch):
    mesh = mesh_of()
    assert [cut.group for cut in possible_cuts(mesh, (("fsdp", 8),), ())] == [2, 4]
    assert possible_cuts(mesh, (("fsdp", 8),), ("fsdp",)) == ()
    assert possible_cuts(mesh, (("fsdp_within", 2), ("fsdp", 8)), ()) == ()
    # Slices of two devices: no group of four is in one.
    where = "muonclip_jax.sharding.cut.slice_of"
    monkeypatch.setattr(where, lambda device: device.id // 2)
    assert [cut.group for cut in possible_cuts(mesh, (("fsdp", 8),), ())] == [2]


def test_a_full_round_is_not_cut():
    assert plan(8, P(None, "fsdp")).cut is None
    # Matrices of another device's own are nothing to share.
    assert plan(8, P("fsdp")).cut is None
    assert plan(4, P(None, "fsdp")).cut is not None


def test_named_axes_stay_named():
    options = mc.Distribution(axes=("fsdp",), flops_per_byte=20.0)
    assert plan(4, P(None, "fsdp"), options).cut is not None
    assert plan(4, P(None, "fsdp"), mc.Distribution(axes=())).cut is None


def test_updates_outside_of_jit_too():
    shardings = {"w": NamedSharding(mesh_of(), P(None, "fsdp"))}
    params = jax.device_put(matrices(), shardings)
    tx: Any = mc.scale_by_muon(**ARGUMENTS, param_shardings=shardings, distribution=OPTIONS)
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_allclose(updates["w"], on_one_device(matrices())["w"], atol=2e-6)
    assert updates["w"].sharding.is_equivalent_to(shardings["w"], 3)
    assert jnp.shape(updates["w"]) == (4, *SHAPE)
