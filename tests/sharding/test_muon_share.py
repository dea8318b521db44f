"""What one device of many does: its share of the work, no collective in a loop, bounded memory.

Read off the partitioned program, so that a change which costs a pod its speed fails here. The last
tests ask the same of the TPU's compiler, where that is installed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compilers import compiling_for, tpu_devices
from benchmarks.hlo import tally
from muonclip_jax.routing import MatrixSpec
from tests.sharding.cases import Case, mesh_of

#: Rows and columns of the matrices: products are nearly all of the work.
SHAPE, SQUARE, WIDE = (64, 128), (256, 256), (256, 1024)
TWO_WAYS = {"all-to-all": 2}
FSDP_TP = P(None, "fsdp", "tp")


def work(shape: tuple[int, int]) -> int:
    """FLOPs of five plain steps on one matrix."""
    rows, columns = sorted(shape)
    return 5 * (4 * rows * rows * columns + 2 * rows**3)


def compiled_step(mesh: Mesh, shapes: dict[str, tuple[int, ...]], at: P, **arguments: Any) -> Any:
    """The step on stacks of matrices `(count, rows, columns)`, all sharded alike."""
    on = NamedSharding(mesh, at)
    params: Any = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on)
        for name, shape in shapes.items()
    }
    tx = mc.scale_by_muon(
        param_shardings=on,
        weight_dimension_numbers=mc.MatrixSpec((1, 2)),
        **{"ns_coeffs": "keller_jordan", "ns_method": "standard", **arguments},
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    state = mc.MuonState(count=count, mu=params)
    return jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state).compile()


def check_share(
    program: Any, count: int, devices: int, moves: Mapping[str, int], shape: Any = SHAPE
) -> None:
    """Checks the program of one device for matrices that devices share evenly, and what moves."""
    counted = tally(program.as_text())
    share = count * work(shape) / devices
    assert share <= counted.flops < 1.1 * share
    assert counted.by_kind(in_loops=True) == {}
    assert {kind: row["count"] for kind, row in counted.by_kind().items()} == moves
    # Direction, stack, products and results of a share; whole results where all want them.
    size = count * shape[0] * shape[1] * 4
    allowed = 8 * size / devices + (0 if "all-to-all" in moves else 3 * size)
    assert program.memory_analysis().temp_size_in_bytes < allowed + 2**16


@pytest.mark.parametrize(
    ("shapes", "at", "moves"),
    [
        ({"w": (16, *SHAPE)}, P(), {"all-gather": 1}),
        # Replicated over "tp": gathered there in the end.
        ({"w": (16, *SHAPE)}, P(None, "fsdp"), TWO_WAYS | {"all-gather": 1}),
        # Parameters of one shape move together.
        ({"none": (0, *SHAPE), "v": (3, *SHAPE), "w": (13, *SHAPE)}, FSDP_TP, TWO_WAYS),
        ({"w": (16, *SHAPE)}, P("fsdp", None, "tp"), TWO_WAYS),
        # A loop.
        ({"w": (48, *SHAPE)}, FSDP_TP, TWO_WAYS),
    ],
)
def test_a_device_does_its_share(shapes: Any, at: P, moves: dict[str, int]):
    program = compiled_step(mesh_of(), shapes, at)
    check_share(program, sum(n for n, *_ in shapes.values()), devices=8, moves=moves)
    assert tally(program.as_text()).unknown_loops == 0


def test_unequal_matrices_are_balanced():
    """Full rounds give way too: nine large ones and sixteen small ones on eight devices."""
    large, small = (32, 256), (32, 64)
    program = compiled_step(mesh_of(), {"a": (9, *large), "b": (16, *small)}, FSDP_TP)
    # One device has two large ones; the small ones are all with the others.
    floor = max((9 * work(large) + 16 * work(small)) / 8, 2 * work(large))
    assert floor <= tally(program.as_text()).flops < 1.02 * floor


@pytest.mark.parametrize(
    ("shapes", "bounds"),
    [
        # Three matrices on eight devices: three are gathered, not eight.
        ({"a": (2, 16, 24), "b": (1, 7, 9), "c": (1, 16, 24)}, {"_PADDING_BYTES": 1}),
        # One for every device; more than is gathered at once.
        (
            {"a": (6, 16, 24), "b": (2, 16, 24)},
            {"_PADDING_BYTES": 1, "_GATHERED_AT_ONCE": 4000},
        ),
    ],
    ids=["padding", "much"],
)
def test_results_are_gathered_by_parameter_and_without_padding(
    shapes: dict[str, tuple[int, ...]], bounds: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    for name, bound in bounds.items():
        monkeypatch.setattr(f"muonclip_jax.sharding.exchange.{name}", bound)
    leaves = {name: (shape, MatrixSpec((1, 2)), P()) for name, shape in shapes.items()}
    case = Case(leaves, mesh_of(data=8))
    options = mc.Distribution(flops_per_byte=float("inf"))
    updates, text = case.compiled(case.sharded(distribution=options))
    case.check(updates)
    gathered = tally(text).by_kind()["all-gather"]
    assert gathered["count"] == len(shapes)
    assert gathered["bytes"] < 1.05 * sum(x.size * 4 for x in case.params.values())


# The TPU's compiler


def tpu_mesh(devices: Any, sizes: tuple[int, int], names: tuple[str, str]) -> Mesh:
    return Mesh(np.array(devices).reshape(sizes), names, axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def tpu() -> Iterator[Mesh]:
    pytest.importorskip("libtpu")
    with compiling_for("tpu"):
        yield tpu_mesh(tpu_devices("v5e:2x2"), (2, 2), ("fsdp", "tp"))


@pytest.mark.parametrize("at", [P(), FSDP_TP], ids=["replicated", "sharded"])
def test_a_tpu_does_its_share_and_sends_nothing_in_between(tpu: Mesh, at: P):
    program = compiled_step(tpu, {"w": (8, *SQUARE)}, at)
    moves = {"all-gather": 1} if at == P() else TWO_WAYS
    check_share(program, 8, devices=4, moves=moves, shape=SQUARE)
    counted = tally(program.as_text())
    # What XLA counts, for there is no loop.
    assert counted.loops == 0
    assert program.cost_analysis()["flops"] == pytest.approx(counted.flops, rel=0.05)
    # On a TPU float32 products take six passes; the library's rule is 16 bits.
    assert " bf16[" in program.as_text()
    if at != P():
        # Results are sent in what they were computed in.
        sent = counted.by_kind()["all-to-all"]["bytes"]
        assert sent == pytest.approx(2 * 256 * 256 * (4 + 2) * 3 / 4)


def test_what_a_tpu_computes_of_unequal_and_of_split_matrices(tpu: Mesh):
    for shapes, bound, share in (
        ({"a": (1, *SQUARE), "b": (3, *WIDE)}, 2**30, 1),
        ({"w": (1, *WIDE)}, 1024, 4),
    ):
        options = mc.Distribution(max_matrix_bytes=bound)
        program = compiled_step(tpu, shapes, FSDP_TP, distribution=options)
        assert program.cost_analysis()["flops"] < 1.1 * work(WIDE) / share


def test_slices_of_tpus_keep_to_themselves():
    """Two slices: along the axis between them matrices are repeated, and nothing is sent."""
    pytest.importorskip("libtpu")
    devices = tpu_devices("v5e:2x2", slices=2)
    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4
    with compiling_for("tpu"):
        mesh = tpu_mesh(devices, (2, 4), ("slice", "fsdp"))
        program = compiled_step(mesh, {"w": (8, *SQUARE)}, P(None, "fsdp"))
    check_share(program, 8, devices=4, moves=TWO_WAYS, shape=SQUARE)
