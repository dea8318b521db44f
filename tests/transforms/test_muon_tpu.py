"""The sharded step through the TPU's own compiler, on a machine without a TPU."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import muonclip_jax as mc

pytest.importorskip("libtpu")

P = PartitionSpec
COLLECTIVE = re.compile(
    r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5p-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }.items():
            patch.setenv(name, value)
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return Mesh(np.array(devices).reshape(2, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


def compiled(
    mesh: Mesh, shapes: dict[str, tuple[int, ...]], at: PartitionSpec, **arguments: Any
) -> Any:
    shardings = {name: NamedSharding(mesh, at) for name in shapes}
    params: Any = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
        for name, shape in shapes.items()
    }
    tx = mc.scale_by_muon(
        param_shardings=shardings,
        weight_dimension_numbers=mc.MatrixSpec((1, 2)),
        ns_dtype="bfloat16",
        ns_method="standard",
        **arguments,
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    state = mc.MuonState(count=count, mu=params)
    return jax.jit(tx.update).lower(params, state).compile()


def flops(rows: int, columns: int) -> int:
    return 5 * (4 * rows * rows * columns + 2 * rows**3)


@pytest.mark.parametrize("at", [P(), P(None, "fsdp", "tp")], ids=["replicated", "sharded"])
def test_the_work_is_a_share_and_nothing_is_sent_in_between(mesh: Mesh, at: PartitionSpec):
    program = compiled(mesh, {"w": (5, 256, 256)}, at)
    assert program.cost_analysis()["flops"] < 1.1 * 2 * flops(256, 256)
    kinds = COLLECTIVE.findall(program.as_text())
    assert kinds == (["all-gather"] if at == P() else ["all-to-all", "all-to-all"])
    assert " while(" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 16 * 256 * 256 * 4


def test_leftovers_of_two_shapes_share_the_padding(mesh: Mesh):
    shapes = {"a": (1, 256, 256), "b": (3, 256, 1024)}
    program = compiled(mesh, shapes, P(None, "fsdp", "tp"))
    assert program.cost_analysis()["flops"] < 1.1 * flops(256, 1024)


def test_a_split_matrix_costs_each_device_its_share(mesh: Mesh):
    options = mc.Distribution(max_matrix_bytes=1024)
    program = compiled(mesh, {"w": (1, 256, 1024)}, P(None, "fsdp", "tp"), distribution=options)
    assert program.cost_analysis()["flops"] < 1.1 * flops(256, 1024) / 4
