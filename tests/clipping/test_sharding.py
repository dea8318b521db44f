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

MAXIMA = jnp.asarray([150.0, 90.0, 40.0, 300.0, 1.0, 1.0, 200.0, 1.0])


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


# mesh shape, kernel's spec, maxima's spec
WITHOUT_CONTEXT = {
    "one device": ((1, 1), P("x", "y"), P("y")),
    "two devices, over heads": ((2, 1), P(None, "x"), P("x")),
    "replicated": ((4, 2), P(), P()),
    "over inputs": ((4, 2), P("y"), P()),
    "over inputs and heads": ((4, 2), P("y", "x"), P("x")),
    "maxima alone": ((4, 2), P(), P(("x", "y"))),
}


EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        *((case, (EXPLICIT, EXPLICIT)) for case in WITHOUT_CONTEXT),
        ("over inputs and heads", (AUTO, EXPLICIT)),
        ("maxima alone", (EXPLICIT, AUTO)),
        ("maxima alone", (AUTO, AUTO)),
    ],
    ids=str,
)
def test_without_set_mesh(case, kinds):
    """Every way to clip, outside of any mesh context: one device's bits, the leaf's sharding."""
    size, weights_at, maxima_at = WITHOUT_CONTEXT[case]
    devices = np.array(jax.devices()[: size[0] * size[1]]).reshape(size)
    on = Mesh(devices, ("x", "y"), axis_types=kinds)
    merged = case == "over inputs and heads"
    plain = tree((16, 64) if merged else (16, 8, 8))
    zeros = jax.tree.map(jnp.zeros_like, plain)
    tx = mc.qk_clip()

    def clip(params, zeros, maxima):
        updates, _ = tx.update(zeros, optax.EmptyState(), params, max_logits=maxima)
        return apply_qk_clip(params, maxima)[0], updates

    expected = clip(plain, zeros, {"attn": MAXIMA})
    where = NamedSharding(on, weights_at)
    params, zeros = jax.device_put((plain, zeros), where)
    maxima = {"attn": jax.device_put(MAXIMA, NamedSharding(on, maxima_at))}
    for jit in (False, True):
        new = (jax.jit(clip) if jit else clip)(params, zeros, maxima)
        jax.tree.map(np.testing.assert_array_equal, new, expected)
        if not jit or kinds[0] == kinds[1] == AxisType.Explicit:
            for leaf in jax.tree.leaves(new):
                assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


def test_muonclip_without_set_mesh():
    """The whole optimizer and its metrics, jitted, on Explicit axes."""
    on = Mesh(np.array(jax.devices()[:8]), ("x",), axis_types=(AxisType.Explicit,))
    params = tree((16, 8, 8))
    maxima = {"attn": MAXIMA}
    tx = mc.metrics(mc.muonclip(0.01, ns_steps=2), qk_clip_threshold=100.0)
    step = jax.jit(tx.update)
    expected, _ = step(params, tx.init(params), params, max_logits=maxima)
    params = jax.device_put(params, NamedSharding(on, P(None, "x")))
    maxima = jax.device_put(maxima, NamedSharding(on, P()))
    updates, state = step(params, tx.init(params), params, max_logits=maxima)
    assert_close(updates, expected)
    assert int(mc.read_metrics(state, params).clipped_heads["attn"]) == 3


# Heads over tensor-parallel axes, maxima over data, and stages

# name -> (kernel shape, its sharding, maxima shape, their sharding)
SHARDED = {
    "heads and inputs": ((16, 8, 8), P("x", "y"), (8,), P("y")),
    "inputs and features": ((16, 8, 8), P("y", None, "x"), (8,), P()),
    "merged heads": ((16, 64), P("x", "y"), (8,), P("y")),
    "maxima of shards of the batch": ((16, 8, 8), P(None, "y"), (4, 8), P("x", "y")),
    "stages, merged heads": ((4, 16, 64), P("x", None, "y"), (4, 8), P("x", "y")),
    "stages, micro-batches": ((4, 16, 8, 8), P("x", None, "y"), (3, 4, 8), P(None, "x", "y")),
    "maxima over heads, weights over inputs": ((16, 8, 8), P("y"), (8,), P("y")),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", SHARDED.values(), ids=SHARDED)
def test_weights_stay_and_maxima_travel_once(kind, case):
    shape, weights_at, maxima_shape, maxima_at = case
    layers = 3
    params = {str(layer): tree(shape)["attn"] for layer in range(layers)}
    maxima = {
        name: 200 * jax.random.uniform(jax.random.key(int(name)), maxima_shape) for name in params
    }
    expected, _ = apply_qk_clip(params, maxima)
    on = mesh(kind)
    params = jax.device_put(params, NamedSharding(on, weights_at))
    maxima = jax.device_put(maxima, NamedSharding(on, maxima_at))
    with jax.set_mesh(on):
        program = jax.jit(apply_qk_clip).lower(params, maxima).compile()
        new, info = program(params, maxima)
        eager, _ = apply_qk_clip(params, maxima)
    jax.tree.map(np.testing.assert_array_equal, eager, expected)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    assert not jax.tree.all(jax.tree.map(np.array_equal, new, params))
    assert int(info.total_clipped) > 0
    for leaf in jax.tree.leaves((new, eager)):
        assert leaf.sharding.is_equivalent_to(NamedSharding(on, weights_at), leaf.ndim)
    counted = tally(program.as_text()).by_kind()
    # Less than a number a head, layer and purpose: no weight is among them.
    assert counted.get("all-gather", {"bytes": 0})["bytes"] <= 4 * 4 * layers * 8 * 8
    if weights_at not in (P("y"), P("y", None, "x")):
        assert set(counted) <= {"all-reduce"}
        # The maxima of all layers together; how many heads were clipped; whether any was.
        assert counted["all-reduce"]["count"] <= 4
        assert counted["all-reduce"]["bytes"] < 1000


# A train step where the user maps: gradients by `lax.pmean`, maxima by `reduce_max_logits`


LAYERS, HEADS, SIZE, WIDTH = 2, 4, 4, 8


def model():
    keys = iter(jax.random.split(jax.random.key(1), 3 * LAYERS))
    return {
        f"block_{layer}": {
            "attn": {
                name: {"kernel": 3 * jax.random.normal(next(keys), (WIDTH, HEADS, SIZE))}
                for name in ("query", "key", "value")
            }
        }
        for layer in range(LAYERS)
    }


def loss(params, batch):
    """The loss, and every layer's largest logits."""
    x, maxima = batch, {}
    for name, block in params.items():
        q, k, v = (
            jnp.einsum("btd,dhk->bthk", x, block["attn"][role]["kernel"])
            for role in ("query", "key", "value")
        )
        maxima[f"{name}/attn"] = mc.attention_max_logits(q, k)
        out = jax.nn.dot_product_attention(q, k, v)
        x = x + out.reshape(*x.shape[:2], -1)[..., :WIDTH]
    return jnp.mean(x**2), maxima


def train_step(tx, axis_name, params, state, batch):
    grads, maxima = jax.grad(loss, has_aux=True)(params, batch)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
        maxima = mc.reduce_max_logits(maxima, axis_name)
    updates, state = tx.update(grads, state, params, max_logits=maxima)
    return optax.apply_updates(params, updates), state, maxima


def on_one_device(steps=2):
    tx = mc.muonclip(0.01, ns_steps=2, qk_clip_threshold=20.0)
    params = model()
    state, maxima = tx.init(params), {}
    for batch in batches(steps):
        params, state, maxima = jax.jit(functools.partial(train_step, tx, None))(
            params, state, batch
        )
    assert max(float(m.max()) for m in maxima.values()) > 20.0
    return params


def batches(steps=2):
    return [jax.random.normal(jax.random.key(step), (8, 3, WIDTH)) for step in range(steps)]


def assert_close(params, expected, rows=None):
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got if rows is None else got[rows], want, atol=1e-5, rtol=1e-5)


def test_a_train_step_in_shard_map_equals_one_device():
    tx = mc.muonclip(0.01, ns_steps=2, qk_clip_threshold=20.0, axis_name=("x", "y"))
    params, expected = model(), on_one_device()
    state = tx.init(params)
    step = jax.jit(
        jax.shard_map(
            functools.partial(train_step, tx, ("x", "y")),
            mesh=mesh(AxisType.Auto),
            in_specs=(P(), P(), P(("x", "y"))),
            out_specs=P(),
            check_vma=False,
        )
    )
    for batch in batches():
        params, state, _ = step(params, state, batch)
    assert_close(params, expected)


@pytest.mark.parametrize("axes", ["x", ("x", "y")])
@pytest.mark.parametrize("how", ["apply_qk_clip", "qk_clip"])
def test_maxima_that_were_not_reduced_are_an_error(how, axes):
    """Inside a checked `shard_map` the types tell; without a check nothing can."""

    def step(params, batch):
        _, maxima = loss(params, batch)
        if how == "apply_qk_clip":
            return mc.apply_qk_clip(params, maxima)[0]
        return mc.qk_clip().update(params, optax.EmptyState(), params, max_logits=maxima)[0]

    mapped = jax.shard_map(step, mesh=mesh(AxisType.Auto), in_specs=(P(), P(axes)), out_specs=P())
    message = r"'block_0/attn/query/kernel' vary over the mapped mesh axes .*reduce_max_logits\("
    with pytest.raises(ValueError, match=message + rf"max_logits, {re.escape(repr(axes))}\)"):
        jax.jit(mapped)(model(), batches(1)[0])


@pytest.mark.parametrize("how", ["apply_qk_clip", "qk_clip"])
def test_reduced_maxima_pass_a_checked_shard_map(how):
    """Also where every device has heads of its own, weights and maxima alike."""
    params = {"attn": {name: {"kernel": jnp.ones((6, 4, 2))} for name in ("query", "key")}}
    maxima = jnp.asarray([[150.0, 90.0, 400.0, 3.0], [3.0, 100.0, 200.0, 5.0]])

    def step(params, maxima):
        maxima = mc.reduce_max_logits({"attn": maxima[0]}, "y")
        if how == "apply_qk_clip":
            return mc.apply_qk_clip(params, maxima)[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        updates, _ = mc.qk_clip().update(zeros, optax.EmptyState(), params, max_logits=maxima)
        return optax.apply_updates(params, updates)

    heads = P(None, "x")
    mapped = jax.shard_map(
        step, mesh=mesh(AxisType.Auto), in_specs=(heads, P("y", "x")), out_specs=heads
    )
    expected, _ = mc.apply_qk_clip(params, {"attn": maxima.max(0)})
    got = jax.jit(mapped)(params, maxima)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_a_train_step_in_pmap_equals_one_device():
    tx = mc.muonclip(0.01, ns_steps=2, qk_clip_threshold=20.0, axis_name="batch")
    expected = on_one_device()
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), model())
    state = jax.pmap(tx.init, axis_name="batch")(copies)
    step = jax.pmap(functools.partial(train_step, tx, "batch"), axis_name="batch")
    for batch in batches():
        copies, state, _ = step(copies, state, batch.reshape(8, 1, 3, WIDTH))
    for device in (0, 7):
        assert_close(copies, expected, device)
