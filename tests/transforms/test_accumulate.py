"""Accumulation: one update of the mean, the maxima of all micro-batches, Newton-Schulz once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
import muonclip_jax.linen
import muonclip_jax.nnx
from tests.helpers import update

WIDTH, HEADS = 4, 2
SHAPES = {
    "attn": {"query": {"kernel": (4, 2, 3)}, "key": {"kernel": (4, 2, 3)}},
    "dense": {"kernel": (4, 6), "bias": (6,)},
}
FORM = {"attn": jax.ShapeDtypeStruct((HEADS,), jnp.float32)}
#: One head over the threshold in the first micro-batch, the other in the second, none in the last.
MAXIMA = [{"attn": jnp.array(x)} for x in ([400.0, 30.0], [20.0, 250.0], [10.0, 40.0])]


def tree(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS = tree(0)
GRADIENTS = [tree(seed) for seed in (1, 2, 3)]
BAD = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADIENTS[0])


def double_mean(gradients: list[Any]) -> Any:
    return jax.tree.map(lambda *g: np.mean([np.float64(x) for x in g], axis=0), *gradients)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance), actual, expected
    )


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def is_zero(updates: Any) -> bool:
    return not any(np.asarray(x).any() for x in jax.tree.leaves(updates))


def keeps_what_it_gets() -> optax.GradientTransformationExtraArgs:
    """SGD whose state is what its last update got."""

    def init(params):
        got = {"max_logits": jax.tree.map(jnp.zeros_like, FORM), "value": jnp.zeros(())}
        return {"updates": optax.tree.zeros_like(params), **got}

    def keep(updates, state, params=None, *, max_logits=None, value=0.0, **extra_args):
        del params, extra_args
        got = state["max_logits"] if max_logits is None else max_logits
        return updates, {"updates": updates, "max_logits": got, "value": jnp.asarray(value)}

    return optax.GradientTransformationExtraArgs(init, keep)


def run(tx: Any, calls: list[dict[str, Any]], params: Any = PARAMS) -> tuple[list[Any], Any]:
    """Calls a jitted update for each micro-batch; returns all updates and the last state."""
    step, state, all_updates = jax.jit(tx.update), tx.init(params), []
    for call in calls:
        call = dict(call)
        updates, state = step(call.pop("gradients"), state, params, **call)
        all_updates.append(updates)
    return all_updates, state


CALLS = [{"gradients": g, "max_logits": s} for g, s in zip(GRADIENTS, MAXIMA, strict=True)]


# -- the mean --


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_it_equals_the_update_of_one_large_batch(jit: bool):
    inner = mc.muonclip(0.1, weight_decay=0.1)
    tx = mc.accumulate(inner, 3, max_logits=FORM)
    mean = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), double_mean(GRADIENTS))
    maxima = {"attn": jnp.array([400.0, 250.0])}
    step: Any = jax.jit(tx.update) if jit else tx.update
    state: Any = tx.init(PARAMS)
    updates: Any = None
    expected_state = inner.init(PARAMS)
    for _ in range(2):
        for number, call in enumerate(CALLS):
            updates, state = step(call["gradients"], state, PARAMS, max_logits=call["max_logits"])
            assert is_zero(updates) == (number < 2)
        expected, expected_state = jax.jit(inner.update)(
            mean, expected_state, PARAMS, max_logits=maxima
        )
        assert_close(updates, expected)
        assert_close(state.inner_state, expected_state)
    assert (int(state.mini_step), int(state.gradient_step)) == (0, 2)


def test_bfloat16_gradients_are_added_in_float32():
    # Sixteen ones after 256: a bfloat16 accumulator would not move.
    gradients = [{"w": jnp.full((2,), x, jnp.bfloat16)} for x in [256.0] + [1.0] * 15]
    tx = mc.accumulate(optax.identity(), 16)
    updates, state = run(tx, [{"gradients": g} for g in gradients], gradients[0])
    assert updates[-1]["w"].dtype == jnp.bfloat16
    assert state.gradients["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.gradients["w"], (256 + 15) / 16, rtol=1e-6)
    np.testing.assert_array_equal(updates[-1]["w"], np.float32(16.9375).astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["schedule", "traced"])
def test_the_number_of_micro_batches_may_change_between_steps(kind: str):
    steps = []
    tx = mc.accumulate(optax.identity(), lambda step: 1 + step)
    state: Any = tx.init(PARAMS)
    for _ in range(6):
        if kind == "traced":

            @jax.jit
            def one(every, state):
                return mc.accumulate(optax.identity(), every).update(GRADIENTS[0], state)

            _, state = one(jnp.float32(1 + int(state.gradient_step)), state)
        else:
            _, state = tx.update(GRADIENTS[0], state)
        steps.append(int(state.gradient_step))
    assert steps == [1, 1, 2, 2, 2, 3]


# -- Newton-Schulz once --


def counted(calls: list[int]) -> optax.GradientTransformationExtraArgs:
    """Counts how often a compiled program runs the update."""

    def count(updates, state, params=None, **extra_args):
        del params, extra_args
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), count)


@pytest.mark.parametrize(
    ("wrap", "times"),
    [(mc.accumulate, 2), (optax.MultiSteps, 6)],
    ids=["accumulate", "what MultiSteps does"],
)
def test_how_often_the_inner_update_runs_in_six_micro_batches(wrap: Any, times: int):
    calls: list[int] = []
    tx = wrap(counted(calls), 3)

    def micro_step(state, scale):
        updates, state = tx.update({"w": scale}, state, {"w": scale})
        return state, updates["w"]

    zero = {"w": jnp.zeros(())}
    _, updates = jax.jit(lambda s: jax.lax.scan(micro_step, s, jnp.arange(6.0)))(tx.init(zero))
    jax.block_until_ready(updates)
    jax.effects_barrier()
    np.testing.assert_array_equal(updates, [0, 0, 1, 0, 0, 4])
    assert len(calls) == times


def test_tracing_the_update_traces_the_inner_one_once():
    traces = 0

    def init(params):
        return optax.EmptyState()

    def inner(updates, state, params=None, **extra_args):
        nonlocal traces
        traces += 1
        value = extra_args["value"]
        return jax.tree.map(lambda u: u * value, updates), state

    tx = mc.accumulate(optax.GradientTransformationExtraArgs(init, inner), 2)
    calls = [{"gradients": g, "value": jnp.float32(2)} for g in GRADIENTS[:2]]
    updates, _ = run(tx, calls)
    assert traces == 1
    assert_close(updates[1], jax.tree.map(lambda m: 2 * m, double_mean(GRADIENTS[:2])))


# -- the maxima --

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([3.0, 7.0, 5.0], 7.0),
        ([7.0, 3.0, 5.0], 7.0),
        ([-3.0, -7.0, -5.0], -3.0),
        ([NAN, 7.0, 5.0], 7.0),
        ([7.0, NAN, INF], 7.0),
        ([INF, NAN, -INF], NAN),
        ([-INF, INF, -INF], INF),
        ([-INF, -INF, -INF], -INF),
    ],
)
def test_the_maxima_of_all_micro_batches_arrive_finite_ones_first(pieces, expected):
    tx = mc.accumulate(keeps_what_it_gets(), 3, max_logits=FORM)
    calls = [
        {"gradients": g, "max_logits": {"attn": jnp.array([x, 1.0], jnp.float32)}}
        for g, x in zip(GRADIENTS, pieces, strict=True)
    ]
    # What the step before has left is not in the way.
    _, state = run(tx, CALLS + calls)
    np.testing.assert_array_equal(state.inner_state["max_logits"]["attn"], [expected, 1.0])
    np.testing.assert_array_equal(state.max_logits["attn"], [expected, 1.0])


def test_multi_steps_hands_on_the_last_maxima_only():
    inner = keeps_what_it_gets()
    _, state = run(optax.MultiSteps(inner, 3), CALLS)
    assert_equal(state.inner_opt_state["max_logits"], MAXIMA[-1])
    # Both heads were over 100 in some micro-batch, and none of them is clipped.
    clip = optax.chain(optax.sgd(1.0), mc.qk_clip(threshold=100.0))
    plain, _ = run(optax.MultiSteps(optax.sgd(1.0), 3), [{"gradients": g} for g in GRADIENTS])
    lost, _ = run(optax.MultiSteps(clip, 3), CALLS)
    assert_close(lost[-1], plain[-1])  # the last bit: two programs
    ours, _ = run(mc.accumulate(clip, 3, max_logits=FORM), CALLS)
    kernels = [u["attn"]["key"]["kernel"] for u in (ours[-1], plain[-1])]
    assert np.abs(kernels[0] - kernels[1]).min() > 1e-4


def test_what_is_no_maximum_and_other_extra_arguments_come_from_the_last_micro_batch():
    def sown(number: int) -> Any:
        layer = {"max_logits": (MAXIMA[number]["attn"],), "other": (jnp.full(3, number),)}
        return {"intermediates": {"attn": layer}}

    seen: list[Any] = []

    def keep(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), keep)
    tx = mc.accumulate(inner, 3, max_logits=jax.eval_shape(lambda: sown(0)))
    state: Any = tx.init(PARAMS)
    assert list(state.max_logits) == ["intermediates/attn/max_logits/0"]
    for number, gradients in enumerate(GRADIENTS):
        _, state = update(
            tx, gradients, state, PARAMS, max_logits=sown(number), value=number, text="any"
        )
    arrived = seen[-1]
    assert (arrived["value"], arrived["text"]) == (2, "any")
    layer = arrived["max_logits"]["intermediates"]["attn"]
    np.testing.assert_array_equal(layer["max_logits"][0], [400, 250])
    np.testing.assert_array_equal(layer["other"][0], [2, 2, 2])


def test_the_state_shows_the_maxima_in_a_form_that_the_clip_takes():
    example = {"intermediates": {"attn": {"max_logits": (MAXIMA[0]["attn"],)}}}
    tx = mc.accumulate(optax.identity(), 1, max_logits=example)
    _, state = run(tx, [{"gradients": GRADIENTS[0], "max_logits": example}])
    clipped, _ = mc.apply_qk_clip(PARAMS, state.max_logits)
    expected, _ = mc.apply_qk_clip(PARAMS, MAXIMA[0])
    assert_equal(clipped, expected)


# -- skipping --


@pytest.mark.parametrize("place", range(4))
def test_a_skipped_micro_batch_leaves_no_trace(place: int):
    tx = mc.accumulate(
        keeps_what_it_gets(),
        3,
        max_logits=FORM,
        should_skip_update_fn=optax.skip_not_finite,
    )
    bad = {"gradients": BAD, "max_logits": {"attn": jnp.array([9e9, 9e9])}}
    expected, expected_state = run(tx, CALLS + CALLS)
    updates, state = run(tx, [*CALLS, *CALLS[:place], bad, *CALLS[place:]])
    assert is_zero(updates.pop(3 + place))
    assert_equal(updates, expected)
    last_was_bad = place == 3
    assert bool(state.skip_state["should_skip"]) == last_was_bad
    assert_equal(state._replace(skip_state=()), expected_state._replace(skip_state=()))


def test_skipping_means_what_it_means_to_multi_steps():
    limit = float(optax.tree.norm(GRADIENTS[1], squared=True)) * 1.01
    large = functools.partial(optax.skip_large_updates, max_squared_norm=limit)
    gradients = [GRADIENTS[1], optax.tree.scale(9.0, GRADIENTS[0]), GRADIENTS[1], GRADIENTS[1]]
    calls = [{"gradients": g} for g in gradients]
    theirs, their_state = run(
        optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=large), calls
    )
    ours, state = run(mc.accumulate(optax.sgd(1.0), 2, should_skip_update_fn=large), calls)
    assert [is_zero(u) for u in ours] == [is_zero(u) for u in theirs] == [True, True, False, True]
    assert_close(ours, theirs)
    assert_close(state.skip_state, their_state.skip_state)
    assert (int(state.mini_step), int(state.gradient_step)) == (1, 1)


# -- where it runs --


def test_scan_over_micro_batches_with_donation_equals_the_loop():
    tx = mc.accumulate(mc.muonclip(0.1), 3, max_logits=FORM)

    def micro_step(carry, call):
        params, state = carry
        updates, state = tx.update(call["gradients"], state, params, max_logits=call["max_logits"])
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(CALLS + CALLS))
    start = (PARAMS, tx.init(PARAMS))
    looped = start
    one = jax.jit(micro_step)
    for call in CALLS + CALLS:
        looped, _ = one(looped, call)
    # Donated as `init` made it: no two leaves of a state may share memory.
    given = (jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(micro_step, c, stacked), donate_argnums=0)(given)
    assert_close(scanned, looped, 1e-5)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))


def test_vmap_over_states_is_right():
    tx = mc.accumulate(optax.trace(0.9), 2)
    gradients = {"w": jnp.arange(6.0).reshape(3, 2)}
    state: Any = jax.vmap(tx.init)(gradients)
    vmapped: Any = jax.vmap(tx.update)
    # Of three states, one is a micro-batch behind.
    state = state._replace(mini_step=jnp.array([1, 0, 1]))
    updates, after = vmapped(gradients, state)
    np.testing.assert_array_equal(updates["w"], gradients["w"] * np.array([[0.5], [0], [0.5]]))
    np.testing.assert_array_equal(after.mini_step, [0, 1, 0])


def test_shard_map_over_the_batch():
    tx = mc.accumulate(mc.scale_by_muon(), 2, max_logits=FORM)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.eye(3, 4)}
    gradients = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 3, 4)), jnp.float32)
    maxima = jnp.arange(32.0).reshape(2, 8, 2)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), P(None, "batch"), P(None, "batch")),
        out_specs=P(),
    )
    def step(params, state, gradients, maxima):
        updates = params
        for g, s in zip(gradients, maxima, strict=True):
            mean = {"w": jax.lax.pmean(g[0], "batch")}
            largest = mc.reduce_max_logits({"attn": s[0]}, "batch")
            updates, state = tx.update(mean, state, params, max_logits=largest)
        return updates, state

    updates, state = step(params, tx.init(params), gradients, maxima)
    inner = mc.scale_by_muon()
    expected, _ = inner.update({"w": gradients.mean((0, 1))}, inner.init(params), params)
    assert_close(updates, expected, 1e-5)
    np.testing.assert_array_equal(state.max_logits["attn"], [30, 31])


def test_a_traced_init_places_the_mean_and_the_maxima():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = {"w": jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("x")))}
    shardings = jax.tree.map(lambda x: x.sharding, params)
    tx = mc.accumulate(optax.identity(), 2, max_logits=FORM, param_shardings=shardings)
    state: Any = jax.jit(tx.init)(params)
    assert state.gradients["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
    assert state.max_logits["attn"].sharding.is_fully_replicated
    assert len(state.max_logits["attn"].sharding.device_set) == 8


def test_states_that_hold_keys():
    tx = mc.accumulate(optax.add_noise(0.1, 0.55, jax.random.key(0)), 2)
    updates, _ = run(tx, [{"gradients": g} for g in GRADIENTS[:2]])
    assert is_zero(updates[0])
    assert not is_zero(updates[1])


def batches() -> jax.Array:
    return 5 * jax.random.normal(jax.random.key(0), (2, 3, 5, WIDTH))


class NNXModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(x + self.attn(x))


def test_an_nnx_model_with_an_optimizer():
    model, pieces = NNXModel(), batches()

    def loss(model, x):
        logits, maxima = muonclip_jax.nnx.capture_max_logits(model)(x)
        return (logits**2).mean(), maxima

    gradient = nnx.jit(nnx.grad(loss, has_aux=True))
    gradients, maxima = gradient(model, pieces.reshape(6, 5, WIDTH))
    inner = optax.chain(optax.sgd(0.1), mc.qk_clip(threshold=1.0))
    expected: Any = NNXModel()
    nnx.Optimizer(expected, inner, wrt=nnx.Param).update(expected, gradients, max_logits=maxima)

    tx = mc.accumulate(inner, 2, max_logits=maxima)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        gradients, maxima = nnx.grad(loss, has_aux=True)(model, x)
        optimizer.update(model, gradients, max_logits=maxima)

    for x in pieces:
        step(model, optimizer, x)
    pure = [nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, expected)]
    assert_close(pure[0], pure[1], 1e-5)


# -- refusals --


@pytest.mark.parametrize("every", [0, -2, 1.5, float("nan")])
def test_a_bad_number_of_micro_batches(every):
    with pytest.raises(ValueError, match="every must be an integer from 1"):
        mc.accumulate(optax.sgd(1.0), every)


def test_what_is_no_transformation():
    wrong: Any = optax.MultiSteps(optax.sgd(1.0), 2)
    with pytest.raises((TypeError, ValueError), match=r"accumulate|GradientTransformation"):
        mc.accumulate(wrong, 2)


@pytest.mark.parametrize(
    ("announced", "brought", "message"),
    [
        (
            None,
            MAXIMA[0],
            r"maxima of no block.*'attn': jax.ShapeDtypeStruct\(\(2,\), jnp",
        ),
        (FORM, None, "update got none"),
        (FORM, {"other": jnp.ones(2)}, r"expects the maxima \{'attn'.*got \{'other': \(2,\)\}"),
        (FORM, {"attn": jnp.ones(3)}, r"expects the maxima \{'attn'.*got \{'attn': \(3,\)\}"),
    ],
    ids=["not announced", "missing", "another block", "another shape"],
)
def test_other_maxima_than_announced_are_refused_with_what_to_write(announced, brought, message):
    tx = mc.accumulate(mc.qk_clip(), 2, max_logits=announced)
    with pytest.raises(ValueError, match=message):
        update(tx, GRADIENTS[0], tx.init(PARAMS), PARAMS, max_logits=brought)


def test_the_example_has_shapes_and_may_be_a_function_of_the_parameters():
    with pytest.raises(ValueError, match="at 'attn/0' it has 2"):
        mc.accumulate(mc.qk_clip(), 2, max_logits={"attn": (2,)})
    tx = mc.accumulate(
        mc.qk_clip(), 2, max_logits=lambda p: {"attn": p["attn"]["key"]["kernel"][0, :, 0]}
    )
    state: Any = tx.init(PARAMS)
    assert state.max_logits["attn"].shape == (HEADS,)


def test_a_skip_that_is_no_boolean():
    def skip(updates, step, params):
        return jnp.ones(2), ()

    tx = mc.accumulate(optax.sgd(1.0), 2, should_skip_update_fn=skip)
    with pytest.raises(ValueError, match=r"returned float32 of shape \(2,\).*boolean"):
        tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_infinities_are_debugged_and_promotion_may_be_strict(jit: bool):
    """Adam needs implicit promotion itself, so there is none inside."""
    chained = optax.chain(optax.sgd(0.1), mc.qk_clip())
    measured = mc.metrics(chained, qk_clip_threshold=100.0)
    (_, expected), _ = run(
        mc.accumulate(measured, 2, max_logits=FORM),
        [{"gradients": GRADIENTS[0], "max_logits": x} for x in MAXIMA[:2]],
    )
    for mode in (jax.debug_infs(True), jax.numpy_dtype_promotion("strict")):
        tx = mc.accumulate(measured, 2, max_logits=FORM)
        update = jax.jit(tx.update) if jit else tx.update
        with mode, jax.numpy_rank_promotion("raise"):
            _, state = update(GRADIENTS[0], tx.init(PARAMS), PARAMS, max_logits=MAXIMA[0])
            updates, _ = update(GRADIENTS[0], state, PARAMS, max_logits=MAXIMA[1])
        assert_close(updates, expected)
