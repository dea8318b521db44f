"""DCN axes: which they are, and that nothing crosses them unless it has to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import device_groups
from muonclip_jax.sharding.dcn_axes import dcn_axes

AXES = ("slice", "fsdp")


@pytest.fixture
def two_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices 0 to 3 are one slice, 4 to 7 another."""
    monkeypatch.setattr("muonclip_jax.sharding.dcn_axes.slice_of", lambda device: device.id // 4)


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...], kind: AxisType = AxisType.Auto) -> Mesh:
    devices = np.array(jax.devices()).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def test_a_platform_without_slices_has_no_dcn_axis():
    assert dcn_axes(mesh_of((2, 4), AXES)) == ()


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((2, 4), AXES, ("slice",)),
        ((2, 2, 2), ("slice", "fsdp", "tp"), ("slice",)),
        # Four devices of each slice lie along it: left out, they would all repeat the work.
        ((8,), ("data",), ()),
        ((1, 8), AXES, ()),
    ],
)
@pytest.mark.usefixtures("two_slices")
def test_a_dcn_axis_leads_to_another_slice_at_every_step(
    shape: tuple[int, ...], names: tuple[str, ...], expected: tuple[str, ...]
):
    assert dcn_axes(mesh_of(shape, names)) == expected
    devices = mesh_of(shape, names).devices
    assert dcn_axes(Mesh(devices.T, names[::-1])) == expected


def trees(mesh: Mesh, at: P) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    names = [f"w{number}" for number in range(5)]
    alone = {name: jnp.asarray(rng.standard_normal((8, 16)), jnp.float32) for name in names}
    shardings = {name: NamedSharding(mesh, at) for name in names}
    return alone, jax.device_put(alone, shardings), shardings


@pytest.mark.parametrize(
    ("at", "options", "crosses"),
    [
        (P(), None, False),
        (P(None, "fsdp"), None, False),
        # What both slices shard has to cross in any case.
        (P(AXES), None, True),
        # And the caller may say so.
        (P("fsdp"), mc.Distribution(axes=AXES), True),
    ],
)
@pytest.mark.usefixtures("two_slices")
def test_what_crosses(at: P, options: mc.Distribution | None, crosses: bool):
    alone, params, shardings = trees(mesh_of((2, 4), AXES), at)
    tx: Any = mc.scale_by_muon(ns_steps=2, param_shardings=shardings, distribution=options)
    state = tx.init(params)
    program: Any = jax.jit(tx.update).lower(params, state).compile()
    groups = device_groups(program.as_text())
    assert any(len({device // 4 for device in group}) > 1 for group in groups) == crosses
    one: Any = mc.scale_by_muon(ns_steps=2)
    expected = one.update(alone, one.init(alone))[0]
    for name, update in program(params, state)[0].items():
        np.testing.assert_allclose(update, expected[name], atol=1e-6)


@pytest.mark.usefixtures("two_slices")
def test_momentum_is_sharded_inside_of_a_slice():
    _, params, shardings = trees(mesh_of((2, 4), AXES), P())
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
