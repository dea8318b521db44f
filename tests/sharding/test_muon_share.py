"""What one device of many does: its share of the work, no collective in a loop, bounded memory.

Read off the partitioned program, so that a change which costs a pod its speed fails here.
`test_muon_tpu.py` asks the same of the TPU's compiler where that is installed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import tally
from tests.sharding.share import SHAPE, check_share, compiled_step, mesh_of, work

BOTH_WAYS = {"all-to-all": 2}
# Sharding, and what is moved.
SHARDINGS = {
    "replicated": (P(), {"all-gather": 1}),
    # Replicated over "tp": gathered there in the end.
    "fsdp": (P(None, "fsdp"), BOTH_WAYS | {"all-gather": 1}),
    "fsdp x tp": (P(None, "fsdp", "tp"), BOTH_WAYS),
    "stages": (P("fsdp", None, "tp"), BOTH_WAYS),
}


@pytest.mark.parametrize(("at", "moves"), SHARDINGS.values(), ids=SHARDINGS)
def test_a_device_does_its_share(at: P, moves: dict[str, int]):
    mesh = mesh_of(jax.devices(), (4, 2))
    program = compiled_step(mesh, {"w": (16, *SHAPE)}, at)
    check_share(program, 16, devices=8, moves=moves)


def test_many_matrices_are_a_loop_without_collectives():
    mesh = mesh_of(jax.devices(), (4, 2))
    program = compiled_step(mesh, {"w": (48, *SHAPE)}, P(None, "fsdp", "tp"))
    counted = tally(program.as_text())
    assert counted.loops == 1
    assert counted.unknown_loops == 0
    check_share(program, 48, devices=8, moves=BOTH_WAYS)


def test_unequal_matrices_are_balanced():
    """Full rounds give way too: nine large ones and sixteen small ones on eight devices."""
    large, small = (32, 256), (32, 64)
    mesh = mesh_of(jax.devices(), (4, 2))
    shapes = {"a": (9, *large), "b": (16, *small)}
    program = compiled_step(mesh, shapes, P(None, "fsdp", "tp"))
    total = 9 * work(large) + 16 * work(small)
    # One device has two large ones; the small ones are all with the others.
    floor = max(total / 8, 2 * work(large))
    assert floor <= tally(program.as_text()).flops < 1.02 * floor


def test_a_stack_without_matrices_has_no_work():
    mesh = mesh_of(jax.devices(), (4, 2))
    shapes = {"none": (0, *SHAPE), "some": (8, *SHAPE)}
    program = compiled_step(mesh, shapes, P(None, "fsdp", "tp"))
    check_share(program, 8, devices=8, moves=BOTH_WAYS)


@pytest.mark.parametrize(
    ("shapes", "bounds"),
    [
        # Three matrices on eight devices: what comes home are three, not eight.
        ({"a": (2, 16, 24), "b": (1, 7, 9), "c": (1, 16, 24)}, {"_PADDING_BYTES": 1}),
        # One for every device; more than shall be gathered at once.
        (
            {"a": (6, 16, 24), "b": (2, 16, 24)},
            {"_PADDING_BYTES": 1, "_GATHERED_AT_ONCE": 4000},
        ),
    ],
    ids=["padding", "much"],
)
def test_results_come_home_by_owner_and_without_padding(
    shapes: dict[str, tuple[int, ...]], bounds: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    for name, bound in bounds.items():
        monkeypatch.setattr(f"muonclip_jax.sharding.exchange.{name}", bound)
    mesh = mesh_of(jax.devices(), (8,), ("data",))
    options = mc.Distribution(flops_per_byte=float("inf"))
    tx: Any = mc.scale_by_muon(
        "keller_jordan",
        weight_dimension_numbers=mc.MatrixSpec((1, 2)),
        param_shardings=jax.NamedSharding(mesh, P()),
        distribution=options,
        ns_steps=2,
    )
    one: Any = mc.scale_by_muon(
        "keller_jordan", weight_dimension_numbers=mc.MatrixSpec((1, 2)), ns_steps=2
    )
    params = {
        name: jax.random.normal(jax.random.key(number), shape)
        for number, (name, shape) in enumerate(shapes.items())
    }
    expected = jax.jit(one.update)(params, one.init(params))[0]
    on_mesh = jax.device_put(params, jax.NamedSharding(mesh, P()))
    state = tx.init(on_mesh)
    program: Any = jax.jit(tx.update).lower(on_mesh, state).compile()
    updates = program(on_mesh, state)[0]
    for name, wanted in expected.items():
        assert jnp.allclose(updates[name], wanted, atol=1e-6, rtol=0), name
    gathered = tally(program.as_text()).by_kind()["all-gather"]
    assert gathered["count"] == len(shapes)
    whole = sum(x.size * 4 for x in params.values())
    assert gathered["bytes"] < 1.05 * whole
