"""The sharded step through the TPU's own compiler, on a machine without a TPU."""

from collections.abc import Iterator

import pytest
from jax.sharding import Mesh, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compilers import compiling_for, tpu_devices
from benchmarks.hlo import tally
from tests.sharding.share import check_share, compiled_step, mesh_of, work

pytest.importorskip("libtpu")

SQUARE, WIDE = (256, 256), (256, 1024)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with compiling_for("tpu"):
        yield mesh_of(tpu_devices("v5e:2x2"), (2, 2))


@pytest.mark.parametrize("at", [P(), P(None, "fsdp", "tp")], ids=["replicated", "sharded"])
def test_a_device_does_its_share_and_nothing_is_sent_in_between(mesh: Mesh, at: P):
    program = compiled_step(mesh, {"w": (8, *SQUARE)}, at)
    moves = {"all-gather": 1} if at == P() else {"all-to-all": 2}
    check_share(program, 8, devices=4, moves=moves, shape=SQUARE)
    # What XLA counts, for there is no loop.
    assert tally(program.as_text()).loops == 0
    counted = program.cost_analysis()["flops"]
    assert counted == pytest.approx(tally(program.as_text()).flops, rel=0.05)


def test_products_are_of_16_bits(mesh: Mesh):
    """On a TPU float32 products take six passes; the library's rule is to take none."""
    text = compiled_step(mesh, {"w": (4, *SQUARE)}, P(None, "fsdp", "tp")).as_text()
    assert " bf16[" in text
    # Results travel home in what they were computed in.
    sent = tally(text).by_kind()["all-to-all"]["bytes"]
    assert sent == pytest.approx(256 * 256 * (4 + 2) * 3 / 4)


def test_leftovers_of_two_shapes_share_the_padding(mesh: Mesh):
    shapes = {"a": (1, *SQUARE), "b": (3, *WIDE)}
    program = compiled_step(mesh, shapes, P(None, "fsdp", "tp"))
    assert program.cost_analysis()["flops"] < 1.1 * work(WIDE)


def test_a_split_matrix_costs_each_device_its_share(mesh: Mesh):
    options = mc.Distribution(max_matrix_bytes=1024)
    at = P(None, "fsdp", "tp")
    program = compiled_step(mesh, {"w": (1, *WIDE)}, at, distribution=options)
    assert program.cost_analysis()["flops"] < 1.1 * work(WIDE) / 4


def test_slices_keep_to_themselves():
    """Two slices: along the axis between them matrices are repeated, and nothing is sent."""
    devices = tpu_devices("v5e:2x2", slices=2)
    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4
    with compiling_for("tpu"):
        mesh = mesh_of(devices, (2, 4), ("slice", "fsdp"))
        program = compiled_step(mesh, {"w": (8, *SQUARE)}, P(None, "fsdp"))
    check_share(program, 8, devices=4, moves={"all-to-all": 2}, shape=SQUARE)
