"""A clip is elementwise: the partitioner has nothing to move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from muonclip_jax.clipping import apply_qk_clip

MAXIMA = jnp.asarray([150.0, 90.0, 40.0, 300.0, 1.0, 1.0, 200.0, 1.0])
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")


def mesh(kind):
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    return Mesh(devices, ("x", "y"), axis_types=(kind, kind))


def tree(shape, names=("query", "key")):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "attn": {
            name: {"kernel": jax.random.normal(key, shape)}
            for name, key in zip(names, keys, strict=True)
        }
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec", [P(), P("x"), P(None, "x"), P("y", "x"), P(None, "x", "y")], ids=str
)
@pytest.mark.parametrize("merged", [False, True])
def test_sharded_leaves_stay_where_they_are(kind, spec, merged):
    if merged and len(spec) > 2:
        pytest.skip("a merged kernel has two axes")
    params = tree((16, 64) if merged else (16, 8, 8))
    expected, _ = apply_qk_clip(params, {"attn": MAXIMA})
    where = NamedSharding(mesh(kind), spec)
    params = jax.device_put(params, where)
    maxima = {"attn": jax.device_put(MAXIMA, NamedSharding(mesh(kind), P()))}
    with jax.set_mesh(mesh(kind)):
        weights = jax.jit(
            lambda params, maxima: apply_qk_clip(params, maxima)[0],
            out_shardings=jax.tree.map(lambda _: where, params),
        )
        text = weights.lower(params, maxima).compile().as_text() or ""
        new = weights(params, maxima)
        eager, info = apply_qk_clip(params, maxima)
    assert not [name for name in COLLECTIVES if name in text]
    for leaf in jax.tree.leaves(new) + jax.tree.leaves(eager):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    jax.tree.map(np.testing.assert_array_equal, eager, expected)
    assert int(info.total_clipped) == 3


def test_inside_shard_map_over_heads():
    """Every device clips its own heads from its own maxima."""
    params = tree((16, 8, 8))
    expected, _ = apply_qk_clip(params, {"attn": MAXIMA})

    def clip(params, maxima):
        return apply_qk_clip(params, {"attn": maxima})[0]

    heads = P(None, "x")
    step = jax.shard_map(clip, mesh=mesh(AxisType.Auto), in_specs=(heads, P("x")), out_specs=heads)
    new = jax.jit(step)(params, MAXIMA)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
