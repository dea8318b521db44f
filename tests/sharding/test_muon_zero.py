"""ZeRO-1: momentum sharded over more axes than its parameter, in every way to share a matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc

#: Wide and tall: the wide matrix of the plan is the parameter's transpose.
SHAPES = {"wide": (3, 16, 32), "tall": (1, 32, 16)}
WHOLE, SPLIT, LARGE = (
    {"flops_per_byte": float("inf")},
    # The axis that the parameter lacks shares its columns, or all of both do.
    {"flops_per_byte": 0.0},
    {"max_matrix_bytes": 64},
)


@pytest.mark.parametrize(
    ("at", "options", "kind"),
    [
        (P(), WHOLE, AxisType.Auto),
        (P(), LARGE, AxisType.Explicit),
        (P(None, "fsdp"), SPLIT, AxisType.Auto),
        (P(None, None, "fsdp"), WHOLE, AxisType.Explicit),
        (P(None, None, "fsdp"), LARGE, AxisType.Auto),
        (P(None, "tp"), LARGE, AxisType.Auto),
        (P(None, "tp"), WHOLE, AxisType.Auto),
        (P(None, None, "tp"), SPLIT, AxisType.Explicit),
    ],
)
def test_updates_are_those_of_one_device(at: P, options: dict[str, Any], kind: AxisType):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind, kind))
    alone = {
        name: jax.random.normal(jax.random.key(number), shape)
        for number, (name, shape) in enumerate(SHAPES.items())
    }
    shardings = {name: NamedSharding(mesh, at) for name in SHAPES}
    arguments: Any = {
        "ns_coeffs": "keller_jordan",
        "ns_method": "standard",
        "ns_steps": 2,
        "weight_dimension_numbers": mc.MatrixSpec((1, 2)),
    }
    one: Any = mc.scale_by_muon(**arguments)
    tx: Any = mc.scale_by_muon(
        **arguments,
        param_shardings=shardings,
        distribution=mc.Distribution(shard_momentum=True, **options),
    )
    params = jax.device_put(alone, shardings)
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    for name, expected in jax.jit(one.update)(alone, one.init(alone))[0].items():
        np.testing.assert_allclose(updates[name], expected, atol=1e-6, err_msg=name)
        assert updates[name].sharding.is_equivalent_to(shardings[name], 3)
        momentum = state.mu[name]
        assert momentum.addressable_shards[0].data.size == momentum.size // 8


@pytest.mark.parametrize("kinds", [("Auto", "Auto"), ("Explicit", "Auto")], ids="-".join)
def test_axes_that_cannot_be_seen_are_refused(kinds: tuple[str, str]):
    mesh = jax.make_mesh((1, 8), ("fsdp", "data"), axis_types=tuple(AxisType[k] for k in kinds))
    params = {"w": jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P()))}
    tx = mc.scale_by_muon(distribution=mc.Distribution(shard_momentum=True))
    with jax.set_mesh(mesh):
        state = tx.init(params)
        with pytest.raises(ValueError, match=r"Auto axes \('data',\).*param_shardings"):
            jax.jit(tx.update).trace(params, state)
