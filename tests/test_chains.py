"""What people put around `muonclip`: the clip acts on steps that are taken, and on no others."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import muonclip_jax as mc
from tests.helpers import assert_close, assert_equal, normal_tree

BLOCK = {"attention": {name: {"kernel": (8, 2, 4)} for name in ("query", "key", "value")}}
PARAMS = normal_tree({"b0": BLOCK, "b1": BLOCK, "mlp": {"kernel": (8, 16)}}, 0)
GRADIENTS = jax.tree.map(jnp.sin, PARAMS)
BAD = {**GRADIENTS, "mlp": {"kernel": GRADIENTS["mlp"]["kernel"].at[0, 0].set(jnp.inf)}}
#: One head of each block is over the threshold.
MAXIMA = {"b0/attention": jnp.array([400.0, 30.0]), "b1/attention": jnp.array([30.0, 250.0])}
RATE, THRESHOLD = 0.01, 100.0


def muonclip(**settings: Any) -> optax.GradientTransformationExtraArgs:
    return mc.muonclip(RATE, qk_clip_threshold=THRESHOLD, **settings)


def stepped(tx: Any, gradients: Any, state: Any, params: Any) -> Any:
    good = jnp.all(jnp.asarray([jnp.isfinite(x).all() for x in jax.tree.leaves(gradients)]))
    updates, state = tx.update(gradients, state, params, max_logits=MAXIMA, good=good)
    return optax.apply_updates(params, updates), state


def expected_step() -> Any:
    """Muon without the clip, then the pure clip."""
    plain = mc.muonclip(RATE, qk_clip_threshold=None)
    updates, _ = plain.update(GRADIENTS, plain.init(PARAMS), PARAMS)
    moved = optax.apply_updates(PARAMS, updates)
    return mc.apply_qk_clip(moved, MAXIMA, threshold=THRESHOLD)[0]


TAU: dict[str, Any] = {"qk_clip_threshold": THRESHOLD}
INJECTED = optax.inject_hyperparams(mc.muonclip)(RATE, **TAU)
SKIP: Any = {"should_skip_update_fn": optax.skip_not_finite}
#: Wrappers that skip a step with a gradient that is not finite; the contract asks others.
SKIPPING: dict[str, Any] = {
    "apply_if_finite in inject_hyperparams": optax.apply_if_finite(INJECTED, 5),
    "conditionally_mask": optax.conditionally_mask(
        muonclip(), lambda step, **extra: extra["good"], forward_extra_args=True
    ),
    "MultiSteps": optax.MultiSteps(muonclip(), 1, **SKIP),
    "accumulate": mc.accumulate(muonclip(), 1, max_logits=MAXIMA, **SKIP),
    "metrics": optax.apply_if_finite(mc.metrics(muonclip(), **TAU), 5),
}


@pytest.mark.parametrize("tx", SKIPPING.values(), ids=SKIPPING)
def test_a_skipped_step_does_not_clip(tx: Any):
    """Bit for bit; and the next step is that of a loop without the skipped one."""
    step = jax.jit(lambda g, s, p: stepped(tx, g, s, p))
    params, state = step(BAD, tx.init(PARAMS), PARAMS)
    assert_equal(params, PARAMS)
    params, _ = step(GRADIENTS, state, params)
    assert_close(params, expected_step(), 2e-6)


def frozen(name: str) -> Callable[[Any], Any]:
    return lambda tree: jax.tree.map_with_path(
        lambda path, _: name in jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def multi_transform(name: str, tx: Any) -> Any:
    return optax.multi_transform({False: tx, True: optax.set_to_zero()}, frozen(name))


#: How a matrix, the values or a block are frozen.
FREEZING: dict[str, tuple[str, Any]] = {
    "a matrix, multi_transform": ("mlp", multi_transform("mlp", muonclip())),
    "a block, multi_transform": ("b0", multi_transform("b0", muonclip(qk_clip_blocks="b1"))),
    "values, chain": (
        "value",
        optax.chain(muonclip(), optax.masked(optax.set_to_zero(), frozen("value"))),
    ),
    "a block, selective_transform": (
        "b0",
        optax.selective_transform(muonclip(qk_clip_blocks="b1"), freeze_mask=frozen("b0")(PARAMS)),
    ),
}


@pytest.mark.parametrize(("name", "tx"), FREEZING.values(), ids=FREEZING)
def test_frozen_parts_keep_their_bits_and_the_others_are_clipped(name: str, tx: Any):
    params, _ = jax.jit(lambda s, p: stepped(tx, GRADIENTS, s, p))(tx.init(PARAMS), PARAMS)
    off = frozen(name)(PARAMS)
    expected = jax.tree.map(lambda off, x, y: x if off else y, off, PARAMS, expected_step())
    assert_close(params, expected, 2e-6)
    kept, given = (jax.tree.map(lambda off, x: x if off else 0, off, t) for t in (params, PARAMS))
    assert_equal(kept, given)


def test_a_frozen_block_with_maxima_names_the_selection():
    tx = multi_transform("b0", muonclip())
    with pytest.raises(ValueError, match=r"recorded for 'b0/attention'.*frozen.*qk_clip_blocks="):
        stepped(tx, GRADIENTS, tx.init(PARAMS), PARAMS)


def test_schedule_free_with_the_clip_on_every_copy():
    """The clip after the step, on `z` and on the parameters, keeps their blend."""
    inner = mc.muonclip(RATE, qk_clip_threshold=None)
    tx = optax.contrib.schedule_free(inner, RATE, b1=0.9)
    evaluate = optax.contrib.schedule_free_eval_params

    @jax.jit
    def step(state: Any, params: Any) -> Any:
        def clipped(tree: Any) -> Any:
            return mc.apply_qk_clip(tree, MAXIMA, threshold=THRESHOLD)[0]

        updates, state = tx.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
        average = evaluate(state._replace(z=clipped(state.z)), clipped(params))
        return average, evaluate(state, params), clipped(evaluate(state, params))

    average, unclipped, wanted = step(tx.init(PARAMS), PARAMS)
    assert_close(average, wanted, 2e-6)
    first, second = (x["b0"]["attention"]["query"]["kernel"] for x in (average, unclipped))
    assert np.abs(first - second)[:, 0].max() > 0.1
    assert np.abs(first - second)[:, 1].max() < 1e-6


def test_a_sharded_state_in_host_memory_is_the_same_state():
    """As docs/memory.md writes it, on a mesh."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec("fsdp")), PARAMS)
    params, gradients = jax.device_put((PARAMS, GRADIENTS), (shardings, shardings))
    tx = muonclip(param_shardings=shardings)
    state = expected = jax.jit(tx.init)(params)
    device, host = (
        jax.tree.map(lambda x, kind=kind: x.sharding.with_memory_kind(kind), state)
        for kind in ("device", "pinned_host")
    )
    plain = jax.jit(lambda state: tx.update(gradients, state, params, max_logits=MAXIMA)[1])
    on_host = jax.jit(lambda state: plain(jax.device_put(state, device)), out_shardings=host)
    state = jax.device_put(state, host)
    for _ in range(2):
        state, expected = on_host(state), plain(expected)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}
    assert_close(state, expected, 1e-6)
