"""Axes across a slow network: which they are, and that nothing crosses unless it has to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import device_groups
from muonclip_jax.sharding import dcn_axes as slow
from muonclip_jax.sharding.dcn_axes import slow_axes

AXES = ("slice", "fsdp")


@pytest.fixture
def two_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices 0 to 3 are one slice, 4 to 7 another."""
    monkeypatch.setattr(slow, "slice_of", lambda device: device.id // 4)


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...], kind: AxisType = AxisType.Auto) -> Mesh:
    devices = np.array(jax.devices()).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def test_a_platform_without_slices_has_no_slow_axis():
    assert slow_axes(mesh_of((2, 4), AXES)) == ()


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((2, 4), AXES, ("slice",)),
        ((2, 2, 2), ("slice", "fsdp", "tp"), ("slice",)),
        # Four devices of each slice lie along it: left out, they would all repeat the work.
        ((8,), ("data",), ()),
        ((4, 2), ("data", "tp"), ()),
        ((1, 8), AXES, ()),
    ],
)
@pytest.mark.usefixtures("two_slices")
def test_an_axis_is_slow_where_every_step_leads_to_another_slice(
    shape: tuple[int, ...], names: tuple[str, ...], expected: tuple[str, ...]
):
    assert slow_axes(mesh_of(shape, names)) == expected


@pytest.mark.usefixtures("two_slices")
def test_the_slow_axis_may_come_last():
    devices = np.array(jax.devices()).reshape(2, 4).T
    assert slow_axes(Mesh(devices, ("fsdp", "slice"))) == ("slice",)


def trees(mesh: Mesh, at: P, count: int = 5) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    names = [f"w{number}" for number in range(count)]
    alone = {name: jnp.asarray(rng.standard_normal((8, 16)), jnp.float32) for name in names}
    shardings = {name: NamedSharding(mesh, at) for name in names}
    return alone, jax.device_put(alone, shardings), shardings


def groups_that_cross(text: str) -> list[tuple[int, ...]]:
    """Groups of devices of any collective that are not of one slice."""
    return [group for group in device_groups(text) if len({each // 4 for each in group}) > 1]


@pytest.mark.parametrize("at", [P(), P("fsdp"), P(None, "fsdp")], ids=str)
@pytest.mark.usefixtures("two_slices")
def test_nothing_crosses_for_matrices_that_every_slice_has(at: P):
    mesh = mesh_of((2, 4), AXES)
    alone, params, shardings = trees(mesh, at)
    tx = mc.scale_by_muon(ns_steps=2, param_shardings=shardings)
    state = tx.init(params)
    program: Any = jax.jit(tx.update).lower(params, state).compile()
    assert groups_that_cross(program.as_text()) == []
    updates, _ = program(params, state)
    one: Any = mc.scale_by_muon(ns_steps=2)
    for name, expected in one.update(alone, one.init(alone))[0].items():
        np.testing.assert_allclose(updates[name], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("at", "options"),
    [
        # What lies on both slices has to cross anyway.
        (P(AXES), None),
        # And the caller may say so.
        (P("fsdp"), mc.Distribution(axes=AXES)),
    ],
    ids=["sharded", "named"],
)
@pytest.mark.usefixtures("two_slices")
def test_what_is_sharded_or_named_is_shared_across(at: P, options: mc.Distribution | None):
    mesh = mesh_of((2, 4), AXES)
    _, params, shardings = trees(mesh, at, count=8)
    tx = mc.scale_by_muon(ns_steps=2, param_shardings=shardings, distribution=options)
    program: Any = jax.jit(tx.update).lower(params, tx.init(params)).compile()
    assert groups_that_cross(program.as_text())


@pytest.mark.usefixtures("two_slices")
def test_momentum_is_spread_inside_of_a_slice():
    mesh = mesh_of((2, 4), AXES)
    _, params, shardings = trees(mesh, P())
    options = mc.Distribution(shard_momentum=True)
    tx = mc.scale_by_muon(param_shardings=shardings, distribution=options)
    state: Any = tx.init(params)
    assert {m.sharding.spec for m in jax.tree.leaves(state.mu)} == {P(None, "fsdp")}


@pytest.mark.usefixtures("two_slices")
def test_one_warning_where_devices_cannot_be_seen():
    mesh = mesh_of((2, 4), AXES, AxisType.Explicit)
    _, params, shardings = trees(mesh, P("fsdp"))
    with jax.set_mesh(mesh):
        tx = mc.scale_by_muon(ns_steps=1)
        with pytest.warns(UserWarning, match="of 2 slices.*param_shardings"):
            jax.jit(tx.update).lower(params, tx.init(params))
        told = mc.scale_by_muon(ns_steps=1, param_shardings=shardings)
        jax.jit(told.update).lower(params, told.init(params))
