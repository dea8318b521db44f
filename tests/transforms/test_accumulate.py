"""Accumulation: one update of the mean, the maxima of all micro-batches, Newton-Schulz once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.helpers import assert_close, assert_equal, normal_tree, update

SHAPES = {
    "attn": {"query": {"kernel": (4, 2, 3)}, "key": {"kernel": (4, 2, 3)}},
    "dense": {"kernel": (4, 6), "bias": (6,)},
}
FORM = {"attn": jax.ShapeDtypeStruct((2,), jnp.float32)}
#: One head over the threshold in the first micro-batch, the other in the second, none in the last.
MAXIMA = [{"attn": jnp.array(x)} for x in ([400.0, 30.0], [np.nan, 250.0], [10.0, 40.0])]
LARGEST = jnp.array([400.0, 250.0])
PARAMS, *GRADIENTS = (normal_tree(SHAPES, seed) for seed in range(4))


def is_zero(updates: Any) -> bool:
    return not any(np.asarray(x).any() for x in jax.tree.leaves(updates))


def keeping(seen: list[Any]) -> optax.GradientTransformationExtraArgs:
    """SGD that appends what its update got."""

    def keep(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), keep)


def run(tx: Any, gradients: list[Any], maxima: Any = None, params: Any = PARAMS) -> Any:
    """Calls a jitted update for each micro-batch; returns all updates and the last state."""
    step, state, all_updates = jax.jit(tx.update), tx.init(params), []
    for g, s in zip(gradients, maxima or [None] * len(gradients), strict=True):
        updates, state = step(g, state, params, max_logits=s)
        all_updates.append(updates)
    return all_updates, state


# -- the mean and the maxima --


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_it_equals_the_update_of_one_large_batch(jit: bool):
    """Finite maxima come first, and those of the step before do not count."""
    inner = mc.muonclip(0.1, weight_decay=0.1)
    tx = mc.accumulate(inner, 3, max_logits=FORM)
    mean = jax.tree.map(
        lambda *g: jnp.asarray(np.mean([np.float64(x) for x in g], axis=0), jnp.float32), *GRADIENTS
    )
    step: Any = jax.jit(tx.update) if jit else tx.update
    state: Any = tx.init(PARAMS)
    updates: Any = None
    expected_state = inner.init(PARAMS)
    for factor in (3.0, 1.0):
        for number, (g, s) in enumerate(zip(GRADIENTS, MAXIMA, strict=True)):
            s = optax.tree.scale(factor, s)
            updates, state = step(g, state, PARAMS, max_logits=s)
            assert is_zero(updates) == (number < 2)
        expected, expected_state = jax.jit(inner.update)(
            mean, expected_state, PARAMS, max_logits={"attn": factor * LARGEST}
        )
        assert_close((updates, state.inner_state), (expected, expected_state), 1e-6)
        np.testing.assert_array_equal(state.max_logits["attn"], factor * LARGEST)
    assert (int(state.mini_step), int(state.gradient_step)) == (0, 2)


def test_bfloat16_gradients_are_added_in_float32():
    # Fifteen ones after 256: a bfloat16 accumulator would not move.
    gradients = [{"w": jnp.full((2,), x, jnp.bfloat16)} for x in [256.0] + [1.0] * 15]
    updates, state = run(mc.accumulate(optax.identity(), 16), gradients, params=gradients[0])
    assert state.gradients["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.gradients["w"], (256 + 15) / 16, rtol=1e-6)
    assert_equal(updates[-1], {"w": np.full(2, 16.9375, jnp.bfloat16)})


@pytest.mark.parametrize("traced", [False, True])
def test_the_number_of_micro_batches_may_change_between_steps(traced: bool):
    def one(every: Any, state: Any) -> Any:
        return mc.accumulate(optax.identity(), every).update(GRADIENTS[0], state)[1]

    steps = []
    state: Any = mc.accumulate(optax.identity(), 1).init(PARAMS)
    for _ in range(6):
        every = 1.0 + state.gradient_step
        state = jax.jit(one)(every, state) if traced else one(lambda step: 1 + step, state)
        steps.append(int(state.gradient_step))
    assert steps == [1, 1, 2, 2, 2, 3]


def test_the_inner_update_is_traced_once_and_runs_once_a_step():
    traces, runs = [], []

    def count(updates, state, params=None, **extra):
        traces.append(1)
        jax.debug.callback(lambda: runs.append(1))
        return jax.tree.map(lambda u: u * extra["value"], updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), count)
    tx = mc.accumulate(inner, 3)

    def micro_step(state, scale):
        updates, state = update(tx, scale, state, scale, value=2.0)
        return state, updates

    state = tx.init(jnp.zeros(()))
    jax.make_jaxpr(micro_step)(state, jnp.ones(()))
    assert len(traces) == 1
    _, updates = jax.jit(lambda s: jax.lax.scan(micro_step, s, jnp.arange(6.0)))(state)
    jax.effects_barrier()
    np.testing.assert_array_equal(updates, [0, 0, 2, 0, 0, 8])
    assert len(runs) == 2


def test_what_is_no_maximum_and_other_extra_arguments_come_from_the_last_micro_batch():
    def sown(number: int) -> Any:
        layer = {"max_logits": (MAXIMA[number]["attn"],), "other": (jnp.full(3, number),)}
        return {"intermediates": {"attn": layer}}

    seen: list[Any] = []
    tx = mc.accumulate(keeping(seen), 3, max_logits=jax.eval_shape(lambda: sown(0)))
    state: Any = tx.init(PARAMS)
    for number, gradients in enumerate(GRADIENTS):
        extra = {"max_logits": sown(number), "value": number, "text": "any"}
        _, state = update(tx, gradients, state, PARAMS, **extra)
    assert (seen[-1]["value"], seen[-1]["text"]) == (2, "any")
    expected = {"max_logits": (LARGEST,), "other": (jnp.full(3, 2),)}
    assert_equal(seen[-1]["max_logits"], {"intermediates": {"attn": expected}})
    # And the clip takes what the state shows.
    assert_equal(state.max_logits, {"intermediates/attn/max_logits/0": LARGEST})
    assert_equal(
        mc.apply_qk_clip(PARAMS, state.max_logits)[0],
        mc.apply_qk_clip(PARAMS, {"attn": LARGEST})[0],
    )


# -- skipping --


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_skipped_micro_batch_leaves_no_trace(place: int):
    skip = optax.skip_not_finite
    tx = mc.accumulate(optax.trace(0.9), 3, max_logits=FORM, should_skip_update_fn=skip)
    nans = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADIENTS[0])
    expected, expected_state = run(tx, GRADIENTS * 2, MAXIMA * 2)
    (gradients, maxima), at = (GRADIENTS * 2, MAXIMA * 2), 3 + place
    gradients.insert(at, nans)
    maxima.insert(at, {"attn": jnp.array([9e9, 9e9])})
    updates, state = run(tx, gradients, maxima)
    assert is_zero(updates.pop(at))
    assert_equal(updates, expected)
    assert bool(state.skip_state["should_skip"]) == (place == 3)
    assert_equal(state._replace(skip_state=()), expected_state._replace(skip_state=()))


def test_skipping_means_what_it_means_to_multi_steps():
    limit = float(optax.tree.norm(GRADIENTS[1], squared=True)) * 1.01
    large = functools.partial(optax.skip_large_updates, max_squared_norm=limit)
    gradients = [GRADIENTS[1], optax.tree.scale(9.0, GRADIENTS[0]), GRADIENTS[1], GRADIENTS[1]]
    (theirs, their_state), (ours, state) = (
        run(wrap(optax.sgd(1.0), 2, should_skip_update_fn=large), gradients)
        for wrap in (optax.MultiSteps, mc.accumulate)
    )
    assert [is_zero(u) for u in ours] == [True, True, False, True]
    assert_close((ours, state.skip_state), (theirs, their_state.skip_state), 1e-6)
    assert (int(state.mini_step), int(state.gradient_step)) == (1, 1)


# -- where it runs --


def test_a_state_as_init_made_it_can_be_donated():
    """No two of its leaves share memory."""
    tx = mc.accumulate(mc.muonclip(0.1), 3, max_logits=FORM)
    given = tx.init(PARAMS)
    run_once = lambda s: tx.update(GRADIENTS[0], s, PARAMS, max_logits=MAXIMA[0])  # noqa: E731
    jax.jit(run_once, donate_argnums=0)(given)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))


def test_vmap_over_states_and_states_that_hold_keys():
    tx = mc.accumulate(optax.trace(0.9), 2)
    gradients = {"w": jnp.arange(6.0).reshape(3, 2)}
    state: Any = jax.vmap(tx.init)(gradients)
    vmapped: Any = jax.vmap(tx.update)
    # Of three states, one is a micro-batch behind.
    updates, after = vmapped(gradients, state._replace(mini_step=jnp.array([1, 0, 1])))
    np.testing.assert_array_equal(updates["w"], gradients["w"] * np.array([[0.5], [0], [0.5]]))
    np.testing.assert_array_equal(after.mini_step, [0, 1, 0])
    noise = optax.add_noise(0.1, 0.55, jax.random.key(0))
    updates, _ = run(mc.accumulate(noise, 2), GRADIENTS[:2])
    assert [is_zero(u) for u in updates] == [True, False]


def test_shard_map_over_the_batch():
    tx, inner = mc.accumulate(mc.scale_by_muon(), 2, max_logits=FORM), mc.scale_by_muon()
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.eye(3, 4)}
    gradients = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 3, 4)), jnp.float32)
    maxima = jnp.arange(32.0).reshape(2, 8, 2)

    def step(params, state, gradients, maxima):
        updates = params
        for g, s in zip(gradients, maxima, strict=True):
            mean = {"w": jax.lax.pmean(g[0], "batch")}
            largest = mc.reduce_max_logits({"attn": s[0]}, "batch")
            updates, state = tx.update(mean, state, params, max_logits=largest)
        return updates, state

    at = P(None, "batch")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), at, at), out_specs=P())
    updates, state = jax.jit(mapped)(params, tx.init(params), gradients, maxima)
    expected, _ = inner.update({"w": gradients.mean((0, 1))}, inner.init(params), params)
    assert_close(updates, expected)
    np.testing.assert_array_equal(state.max_logits["attn"], [30, 31])


def test_a_traced_init_places_the_mean_and_the_maxima():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = {"w": jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("x")))}
    shardings = jax.tree.map(lambda x: x.sharding, params)
    tx = mc.accumulate(optax.identity(), 2, max_logits=FORM, param_shardings=shardings)
    state: Any = jax.jit(tx.init)(params)
    assert state.gradients["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
    assert state.max_logits["attn"].sharding.is_equivalent_to(NamedSharding(mesh, P()), 1)


# -- refusals --

IS_NEW = r"'attn' is only in this update.*'attn': jax.ShapeDtypeStruct\(\(2,\), jnp"
OTHERS = "'other' is only in this update; 'attn' is only in the"
#: Settings, maxima of an update, and what the error says.
REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    *(({"every": x}, None, "every must be an integer from 1") for x in (0, 1.5, np.nan)),
    ({"tx": optax.MultiSteps(optax.sgd(1.0), 2)}, None, "accumulate|GradientTransformation"),
    ({"max_logits": {"attn": (2,)}}, None, "at 'attn/0' it has 2"),
    (
        {"should_skip_update_fn": lambda *_: (jnp.ones(2), ())},
        None,
        r"returned float32 of shape \(2,\).*boolean",
    ),
    ({}, MAXIMA[0], IS_NEW),
    ({"max_logits": FORM}, None, "'attn' is only in the example"),
    ({"max_logits": FORM}, {"other": jnp.ones(2)}, OTHERS),
    (  # An example may be a function of the parameters.
        {"max_logits": lambda p: {"attn": p["attn"]["key"]["kernel"][0, :, 0]}},
        {"attn": jnp.ones(3)},
        r"'attn' has shape \(3,\) in this update, \(2,\) in the",
    ),
]


@pytest.mark.parametrize(("settings", "maxima", "message"), REFUSED)
def test_what_is_refused(settings: dict[str, Any], maxima: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        run(mc.accumulate(**{"tx": mc.qk_clip(), "every": 2, **settings}), GRADIENTS[:1], [maxima])
