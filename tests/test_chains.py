"""What people put around `muonclip`: the clip acts on steps that are taken, and on no others."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import muonclip_jax as mc

RNG = np.random.default_rng(0)
ROLES = ("query", "key", "value")


def block() -> Any:
    return {n: {"kernel": jnp.asarray(RNG.standard_normal((8, 2, 4)), jnp.float32)} for n in ROLES}


PARAMS = {
    "b0": {"attention": block()},
    "b1": {"attention": block()},
    "mlp": {"kernel": jnp.asarray(RNG.standard_normal((8, 16)), jnp.float32)},
}
GRADIENTS = jax.tree.map(jnp.sin, PARAMS)
BAD = {**GRADIENTS, "mlp": {"kernel": GRADIENTS["mlp"]["kernel"].at[0, 0].set(jnp.inf)}}
#: One head of each block is over the threshold; and what a pass with a bad gradient may record.
MAXIMA = {"b0/attention": jnp.array([400.0, 30.0]), "b1/attention": jnp.array([30.0, 250.0])}
RATE, THRESHOLD = 0.01, 100.0

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def muonclip(**settings: Any) -> optax.GradientTransformationExtraArgs:
    return mc.muonclip(RATE, qk_clip_threshold=THRESHOLD, **settings)


def stepped(tx: Any, gradients: Any, state: Any, params: Any, maxima: Any = MAXIMA) -> Any:
    updates, state = tx.update(gradients, state, params, max_logits=maxima)
    return optax.apply_updates(params, updates), state


def expected_step(params: Any = PARAMS) -> Any:
    """Muon without the clip, then the pure clip."""
    plain = mc.muonclip(RATE, qk_clip_threshold=None)
    updates, _ = plain.update(GRADIENTS, plain.init(params), params)
    moved = optax.apply_updates(params, updates)
    return mc.apply_qk_clip(moved, MAXIMA, threshold=THRESHOLD)[0]


def assert_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual: Any, expected: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), actual, expected)


def finite(gradients: Any, *_: Any, **__: Any) -> jax.Array:
    return jnp.all(jnp.asarray([jnp.isfinite(x).all() for x in jax.tree.leaves(gradients)]))


#: Wrappers under which a step with a gradient that is not finite is skipped.
SKIPPING: dict[str, Callable[[], Any]] = {
    "apply_if_finite": lambda: optax.apply_if_finite(muonclip(), 5),
    "apply_if_finite in inject_hyperparams": lambda: optax.apply_if_finite(
        optax.inject_hyperparams(mc.muonclip)(RATE, qk_clip_threshold=THRESHOLD), 5
    ),
    "conditionally_mask": lambda: optax.conditionally_mask(
        muonclip(), lambda step, **extra: extra["good"], forward_extra_args=True
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        muonclip(), 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "accumulate": lambda: mc.accumulate(
        muonclip(), 1, max_logits=MAXIMA, should_skip_update_fn=optax.skip_not_finite
    ),
    "metrics": lambda: optax.apply_if_finite(
        mc.metrics(muonclip(), qk_clip_threshold=THRESHOLD), 5
    ),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_a_skipped_step_does_not_clip(name: str):
    """Bit for bit; and the next step is that of a loop without the skipped one."""
    tx = SKIPPING[name]()

    @jax.jit
    def step(gradients: Any, state: Any, params: Any) -> Any:
        extra = {"max_logits": MAXIMA, "good": finite(gradients)}
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state = step(BAD, tx.init(PARAMS), PARAMS)
    assert_equal(params, PARAMS)
    params, _ = step(GRADIENTS, state, params)
    assert_close(params, expected_step())


@pytest.mark.parametrize("wrap", ["MultiSteps", "accumulate"])
def test_micro_batches_before_the_last_do_not_clip(wrap: str):
    tx: Any = (
        optax.MultiSteps(muonclip(), 2)
        if wrap == "MultiSteps"
        else mc.accumulate(muonclip(), 2, max_logits=MAXIMA)
    )
    step = jax.jit(lambda g, s, p: stepped(tx, g, s, p))
    params, state = step(GRADIENTS, tx.init(PARAMS), PARAMS)
    assert_equal(params, PARAMS)
    params, _ = step(GRADIENTS, state, params)
    assert_close(params, expected_step())


def test_loss_scaling_with_the_step_selected_afterwards():
    """As Flax's examples do it: the step is computed, and taken where gradients are finite."""
    tx = muonclip()
    scaling = DynamicScale(scale=cast(float, jnp.asarray(4.0)))

    @jax.jit
    def step(scaling: Any, factor: Any, state: Any, params: Any) -> Any:
        def loss(params: Any) -> Any:
            products = jax.tree.map(lambda p, g: jnp.vdot(p, g) * factor, params, GRADIENTS)
            return sum(jax.tree.leaves(products))

        scaling, is_finite, _, gradients = scaling.value_and_grad(loss)(params)
        taken = stepped(tx, gradients, state, params)
        return scaling, jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old), taken, (params, state)
        )

    scaling, (params, state) = step(scaling, jnp.inf, tx.init(PARAMS), PARAMS)
    assert_equal(params, PARAMS)
    _, (params, _) = step(scaling, 1.0, state, params)
    assert_close(params, expected_step())


def frozen(*names: str) -> Callable[[Any], Any]:
    return lambda tree: jax.tree.map_with_path(
        lambda path, _: any(
            name in jax.tree_util.keystr(path, simple=True, separator="/") for name in names
        ),
        tree,
    )


def labels(*names: str) -> Callable[[Any], Any]:
    return lambda tree: jax.tree.map(lambda off: "off" if off else "on", frozen(*names)(tree))


#: What is frozen, and how.
FREEZING: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
    "a matrix, multi_transform": (
        ("mlp",),
        lambda: optax.multi_transform(
            {"on": muonclip(), "off": optax.set_to_zero()}, labels("mlp")
        ),
    ),
    "values, chain": (
        ("value",),
        lambda: optax.chain(muonclip(), optax.masked(optax.set_to_zero(), frozen("value"))),
    ),
    "a block, multi_transform": (
        ("b0",),
        lambda: optax.multi_transform(
            {"on": muonclip(qk_clip_blocks="b1"), "off": optax.set_to_zero()}, labels("b0")
        ),
    ),
    "a block, chain": (
        ("b0",),
        lambda: optax.chain(muonclip(), optax.masked(optax.set_to_zero(), frozen("b0"))),
    ),
    "a block, selective_transform": (
        ("b0",),
        lambda: optax.selective_transform(
            muonclip(qk_clip_blocks="b1"), freeze_mask=frozen("b0")(PARAMS)
        ),
    ),
}


@pytest.mark.parametrize("name", FREEZING)
def test_frozen_parts_keep_their_bits_and_the_others_are_clipped(name: str):
    names, make = FREEZING[name]
    tx = make()
    params, _ = jax.jit(lambda s, p: stepped(tx, GRADIENTS, s, p))(tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(
        lambda off, old, new: old if off else new, frozen(*names)(PARAMS), PARAMS, expected_step()
    )
    assert_close(params, expected)
    still = jax.tree.map(
        lambda off, old, new: not off or bool((old == new).all()),
        frozen(*names)(PARAMS),
        PARAMS,
        params,
    )
    assert all(jax.tree.leaves(still))


def test_a_frozen_block_with_maxima_names_the_selection():
    tx = optax.multi_transform({"on": muonclip(), "off": optax.set_to_zero()}, labels("b0"))
    with pytest.raises(ValueError, match=r"recorded for 'b0/attention'.*frozen.*qk_clip_blocks="):
        stepped(tx, GRADIENTS, tx.init(PARAMS), PARAMS)


def test_an_average_of_the_weights_follows_the_clipped_ones():
    """`optax.ema` beside the optimizer, against the recursion in float64 NumPy."""
    tx, average = muonclip(), optax.ema(0.75, debias=False)

    @jax.jit
    def step(state: Any, averages: Any, params: Any) -> Any:
        params, state = stepped(tx, GRADIENTS, state, params)
        _, averages = average.update(params, averages)
        return state, averages, params

    averages: Any = average.init(PARAMS)
    state, params = tx.init(PARAMS), PARAMS
    expected = jax.tree.map(lambda x: np.zeros(x.shape), PARAMS)
    for _ in range(3):
        state, averages, params = step(state, averages, params)
        expected = jax.tree.map(
            lambda e, p: 0.75 * e + 0.25 * np.asarray(p, np.float64), expected, params
        )
    assert_close(averages.ema, expected)


def test_schedule_free_with_the_clip_on_every_copy():
    """The clip after the step, on `z` and on the parameters, keeps their blend."""
    b1 = 0.9
    inner = mc.muonclip(RATE, qk_clip_threshold=None)
    tx = optax.contrib.schedule_free(inner, RATE, b1=b1)

    @jax.jit
    def step(state: Any, params: Any) -> Any:
        updates, state = tx.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
        z, _ = mc.apply_qk_clip(state.z, MAXIMA, threshold=THRESHOLD)
        return (
            state._replace(z=z),
            mc.apply_qk_clip(params, MAXIMA, threshold=THRESHOLD)[0],
            state,
            params,
        )

    state: Any = tx.init(PARAMS)
    state, params, before, unclipped = step(state, PARAMS)
    average = optax.contrib.schedule_free_eval_params(state, params)
    wanted = optax.contrib.schedule_free_eval_params(before, unclipped)
    assert_close(average, mc.apply_qk_clip(wanted, MAXIMA, threshold=THRESHOLD)[0])
    changed = np.abs(
        average["b0"]["attention"]["query"]["kernel"] - wanted["b0"]["attention"]["query"]["kernel"]
    )
    assert changed[:, 0].max() > 0.1
    assert changed[:, 1].max() < 1e-6
