"""A clip is elementwise: the partitioner moves no weight, and of the maxima as little as can be."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import tally
from muonclip_jax.clipping import apply_qk_clip
from tests.helpers import assert_close

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto


def mesh(*kinds, shape=(4, 2)):
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    return Mesh(devices, ("x", "y"), axis_types=kinds)


def block(shape):
    keys = jax.random.split(jax.random.key(0), 2)
    names = zip(("query", "key"), keys, strict=True)
    return {name: {"kernel": jax.random.normal(key, shape)} for name, key in names}


def clipped(how, params, maxima):
    """The clip by the pure function or by the transformation."""
    if how == "apply_qk_clip":
        return apply_qk_clip(params, maxima)[0]
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = mc.qk_clip().update(zeros, optax.EmptyState(), params, max_logits=maxima)
    return optax.apply_updates(params, updates)


# mesh shape, kinds of its axes, kernel's shape and spec, maxima's shape and spec
EACH, ALL = (EXPLICIT, EXPLICIT), P(("x", "y"))
SHARDED = {
    "one device": ((1, 1), EACH, (16, 8, 8), P("x", "y"), (8,), P("y")),
    "inputs and heads, mixed": ((4, 2), (AUTO, EXPLICIT), (16, 64), P("y", "x"), (8,), P("x")),
    "merged heads": ((4, 2), (AUTO, AUTO), (16, 64), P("x", "y"), (8,), P("y")),
    "inputs and features": ((4, 2), EACH, (16, 8, 8), P("y", None, "x"), (8,), P()),
    "maxima alone": ((4, 2), EACH, (16, 8, 8), P(), (8,), ALL),
    "shards of the batch": ((4, 2), EACH, (16, 8, 8), P(None, "y"), (4, 8), P("x", "y")),
    "stages, merged heads": ((4, 2), EACH, (4, 16, 64), P("x", None, "y"), (4, 8), P("x", "y")),
    "stages": (
        *((4, 2), (AUTO, AUTO), (4, 16, 8, 8), P("x", None, "y")),
        *((3, 4, 8), P(None, "x", "y")),
    ),
}


@pytest.mark.parametrize("case", SHARDED.values(), ids=SHARDED)
def test_weights_stay_and_maxima_travel_once(case):
    """Every way to clip, with a mesh that is set and without, has the bits of one device."""
    mesh_shape, kinds, shape, weights_at, maxima_shape, maxima_at = case
    layers, on = 3, mesh(*kinds, shape=mesh_shape)
    plain = {str(layer): block(shape) for layer in range(layers)}
    maxima = {
        name: 300 * jax.random.uniform(jax.random.key(int(name)), maxima_shape) for name in plain
    }

    def clip(params, maxima):
        return [clipped(how, params, maxima) for how in ("apply_qk_clip", "qk_clip")]

    expected = clip(plain, maxima)
    assert not jax.tree.all(jax.tree.map(np.array_equal, expected[0], plain))
    where = NamedSharding(on, weights_at)
    params = jax.device_put(plain, where)
    maxima = jax.device_put(maxima, NamedSharding(on, maxima_at))
    with jax.set_mesh(on):
        program = jax.jit(apply_qk_clip).lower(params, maxima).compile()
        found = [[program(params, maxima)[0]] * 2, clip(params, maxima)]
    found += [clip(params, maxima), jax.jit(clip)(params, maxima)]
    for number, new in enumerate(found):
        jax.tree.map(np.testing.assert_array_equal, new[0], expected[0])
        jax.tree.map(np.testing.assert_array_equal, new[1], expected[1 if number else 0])
        # Under jit on Auto axes XLA may shard what is replicated as the maxima are.
        if AUTO not in kinds or number in (1, 2) or (number == 0 and weights_at != P()):
            for leaf in jax.tree.leaves(new):
                assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    counted = tally(program.as_text()).by_kind()
    # Less than a number a head, layer and purpose: no weight is among them.
    assert counted.get("all-gather", {"bytes": 0})["bytes"] <= 4 * 4 * layers * 8 * 8
    if mesh_shape == (4, 2) and weights_at not in (P(), P("y"), P("y", None, "x")):
        assert set(counted) <= {"all-reduce"}
        # The maxima of all layers together; how many heads were clipped; whether any was.
        assert counted["all-reduce"]["count"] <= 4
        assert counted["all-reduce"]["bytes"] < 1000


@pytest.mark.parametrize("at", [None, P(), P(None, "y")])
def test_an_update_sharded_unlike_its_parameter(at):
    """Under jit it takes the parameter's sharding; eager `zeros_like` of JAX 0.12 has none."""
    on, plain = mesh(EXPLICIT, EXPLICIT), {"attn": block((16, 8, 8))}
    where, maxima = NamedSharding(on, P("x", "y")), {"attn": jnp.arange(1.0, 301.0, 40.0)}
    ones = jax.tree.map(lambda p: jnp.ones(p.shape), plain)
    updates = ones if at is None else jax.device_put(ones, NamedSharding(on, at))
    clip = functools.partial(mc.qk_clip().update, state=optax.EmptyState(), max_logits=maxima)
    expected, params = clip(ones, params=plain)[0], jax.device_put(plain, where)
    own = updates["attn"]["key"]["kernel"].sharding
    for update, sharding in ((clip, own), (jax.jit(clip), where)):
        new = update(updates, params=params)[0]
        jax.tree.map(np.testing.assert_array_equal, new, expected)
        assert all(x.sharding.is_equivalent_to(sharding, 3) for x in jax.tree.leaves(new))


@pytest.mark.parametrize(("how", "axes"), [("apply_qk_clip", "x"), ("qk_clip", ("x", "y"))])
def test_maxima_that_were_not_reduced_are_an_error(how, axes):
    """Inside a checked `shard_map` the types tell; without a check nothing can."""
    mapped = jax.shard_map(
        lambda params, maxima: clipped(how, params, {"attn": maxima.max(0)}),
        mesh=mesh(AUTO, AUTO),
        in_specs=(P(), P(axes)),
        out_specs=P(),
    )
    message = r"'attn/query/kernel' vary over the mapped mesh axes .*reduce_max_logits\("
    with pytest.raises(ValueError, match=message + rf"max_logits, {re.escape(repr(axes))}\)"):
        jax.jit(mapped)({"attn": block((6, 4, 2))}, jnp.ones((8, 4)))


@pytest.mark.parametrize("how", ["apply_qk_clip", "qk_clip"])
def test_reduced_maxima_pass_a_checked_shard_map(how):
    """Also where every device has heads of its own, weights and maxima alike."""
    params = {"attn": block((6, 4, 2))}
    maxima = jnp.asarray([[150.0, 90.0, 400.0, 3.0], [3.0, 100.0, 200.0, 5.0]])
    heads = P(None, "x")
    mapped = jax.shard_map(
        lambda p, m: clipped(how, p, mc.reduce_max_logits({"attn": m[0]}, "y")),
        mesh=mesh(AUTO, AUTO),
        in_specs=(heads, P("y", "x")),
        out_specs=heads,
    )
    expected = mc.apply_qk_clip(params, {"attn": maxima.max(0)})[0]
    assert_close(jax.jit(mapped)(params, maxima), expected)
