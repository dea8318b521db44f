"""One step of `scale_by_muon` on a mesh as a compiled program, and what a device may do in it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import tally

#: Rows and columns of the matrices: products are nearly all of the work.
SHAPE = (64, 128)


def mesh_of(
    devices: Sequence[Any], shape: tuple[int, ...], names: tuple[str, ...] = ("fsdp", "tp")
) -> Mesh:
    kinds = (AxisType.Auto,) * len(shape)
    return Mesh(np.array(devices).reshape(shape), names, axis_types=kinds)


def work(shape: tuple[int, int]) -> int:
    """FLOPs of five plain steps on one matrix."""
    rows, columns = sorted(shape)
    return 5 * (4 * rows * rows * columns + 2 * rows**3)


def compiled_step(mesh: Mesh, shapes: dict[str, tuple[int, ...]], at: P, **arguments: Any) -> Any:
    """The step on stacks of matrices `(count, rows, columns)`, all sharded alike."""
    shardings = {name: NamedSharding(mesh, at) for name in shapes}
    params: Any = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
        for name, shape in shapes.items()
    }
    tx = mc.scale_by_muon(
        param_shardings=shardings,
        weight_dimension_numbers=mc.MatrixSpec((1, 2)),
        **{"ns_coeffs": "keller_jordan", "ns_method": "standard", **arguments},
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    state = mc.MuonState(count=count, mu=params)
    return jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state).compile()


def check_share(
    program: Any,
    count: int,
    devices: int,
    moves: Mapping[str, int],
    shape: tuple[int, int] = SHAPE,
) -> None:
    """Checks the program of one device for `count` matrices that the devices share evenly.

    `moves` are the collectives that it may have: kind -> how many.
    """
    counted = tally(program.as_text())
    share = count * work(shape) / devices
    assert share <= counted.flops < 1.1 * share
    assert counted.by_kind(in_loops=True) == {}
    assert {kind: row["count"] for kind, row in counted.by_kind().items()} == moves
    # Direction, stack, products and results of a share; whole results where all want them.
    size = count * shape[0] * shape[1] * 4
    allowed = 8 * size / devices + (0 if "all-to-all" in moves else 3 * size)
    assert program.memory_analysis().temp_size_in_bytes < allowed + 2**16
