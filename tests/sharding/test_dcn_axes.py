"""DCN axes: which they are, and that nothing crosses them unless it has to."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import device_groups
from muonclip_jax.routing import MatrixSpec
from muonclip_jax.sharding.mesh_shardings import dcn_axes
from tests.sharding.cases import EXPLICIT, Case, mesh_of

AXES = ("slice", "fsdp")


@pytest.fixture
def two_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices 0 to 3 are one slice, 4 to 7 another."""
    monkeypatch.setattr(
        "muonclip_jax.sharding.mesh_shardings.slice_of", lambda device: device.id // 4
    )


def test_a_dcn_axis_leads_to_another_slice_at_every_step(request: pytest.FixtureRequest):
    assert dcn_axes(mesh_of(slice=2, fsdp=4)) == ()  # a platform without slices
    request.getfixturevalue("two_slices")
    for sizes, expected in (
        ({"slice": 2, "fsdp": 4}, ("slice",)),
        ({"slice": 2, "fsdp": 2, "tp": 2}, ("slice",)),
        # Four devices of each slice lie along it: left out, they would all repeat the work.
        ({"data": 8}, ()),
        ({"slice": 1, "fsdp": 8}, ()),
    ):
        devices, names = np.array(jax.devices()).reshape(*sizes.values()), tuple(sizes)
        assert dcn_axes(Mesh(devices, names)) == expected
        assert dcn_axes(Mesh(devices.T, names[::-1])) == expected


def on_slices(at: P, mesh: Mesh | None = None) -> Case:
    leaf = ((8, 16), MatrixSpec(), at)
    return Case({f"w{number}": leaf for number in range(5)}, mesh or mesh_of(slice=2, fsdp=4))


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
    case = on_slices(at)
    updates, text = case.compiled(case.sharded(distribution=options or mc.Distribution()))
    case.check(updates)
    groups = device_groups(text)
    assert any(len({device // 4 for device in group}) > 1 for group in groups) == crosses


@pytest.mark.usefixtures("two_slices")
def test_momentum_is_sharded_inside_of_a_slice():
    case = on_slices(P())
    state = case.sharded(distribution=mc.Distribution(shard_momentum=True)).init(case.params)
    assert {m.sharding.spec for m in jax.tree.leaves(state.mu)} == {P(None, "fsdp")}


@pytest.mark.usefixtures("two_slices")
def test_one_warning_where_devices_cannot_be_seen():
    case = on_slices(P("fsdp"), mesh_of(EXPLICIT, slice=2, fsdp=4))
    with jax.set_mesh(case.mesh):
        tx, told = case.transformation(ns_steps=1), case.sharded(ns_steps=1)
        with pytest.warns(UserWarning, match="of 2 slices.*param_shardings"):
            jax.jit(tx.update).trace(case.params, tx.init(case.params))
        jax.jit(told.update).trace(case.params, told.init(case.params))
