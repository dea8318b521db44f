"""What every transformation promises, asked of every row of `contract_cases.ROWS`."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from tests.contract_cases import ROWS, Row
from tests.helpers import assert_close, assert_equal

pytestmark = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def run(row: Row, tx: Any, trees: Sequence[Any], params: Any = None, **extra: Any) -> Any:
    """The updates of some jitted steps without applying them, and the last state."""
    params = row.tree(0) if params is None else params
    step, state, results = jax.jit(tx.update), tx.init(params), []
    for gradients in trees:
        updates, state = step(gradients, state, params, **extra, **row.extra_args())
        results.append(updates)
    assert abstract(state) == abstract(tx.init(params))
    return results, state


@functools.cache
def first_step(row: Row, dtype: str = "float32") -> tuple[Any, Any, Any, Any]:
    """Parameters, gradients, updates and state of the first step, with arguments nobody knows."""
    params, gradients = row.tree(0, dtype), row.tree(1, dtype)
    extra = {"value": jnp.ones(()), "unknown": None}
    (updates,), state = run(row, row.make(), [gradients], params, **extra)
    return params, gradients, updates, state


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), tree)


def is_finite(tree: Any) -> bool:
    return all(jnp.isfinite(x).all() for x in jax.tree.leaves(tree))


def is_zero(tree: Any) -> bool:
    return not any(x.any() for x in jax.tree.leaves(tree))


# -- the state and the updates --


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_state_keeps_its_form_and_updates_their_dtype(row: Row, dtype: str):
    _, gradients, updates, _ = first_step(row, dtype)
    assert abstract(updates) == abstract(gradients)
    assert is_finite(updates)


def test_init_accepts_shapes_without_values(row: Row):
    params, tx = row.tree(0), row.make()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    made = tx.init(params), tx.init(shapes), jax.eval_shape(tx.init, params)
    expected, *others = (jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in made)
    assert others == [expected, expected]


# -- under other transformations --


def test_scan(row: Row):
    params, gradients, *_ = first_step(row)
    tx = row.make()

    def step(carry, scale):
        params, state = carry
        updates, state = tx.update(
            optax.tree.scale(scale, gradients), state, params, **row.extra_args()
        )
        return (optax.apply_updates(params, updates), state), None

    scales = jnp.array([1.0, -0.5, 2.0])
    start = looped = (params, tx.init(params))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, scales))(start)
    one = jax.jit(lambda c, s: step(c, s)[0])
    for scale in scales:
        looped = one(looped, scale)
    assert_close(scanned, looped)


def test_multi_steps(row: Row):
    _, gradients, expected, _ = first_step(row)
    tx = optax.MultiSteps(row.make(), every_k_schedule=2)
    (first, second), _ = run(row, tx, [optax.tree.scale(x, gradients) for x in (0.5, 1.5)])
    assert is_zero(first)
    assert_close(second, expected)


def test_apply_if_finite(row: Row):
    _, gradients, expected, _ = first_step(row)
    tx = optax.apply_if_finite(row.make(), max_consecutive_errors=3)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), gradients)
    _, after = run(row, tx, [bad])
    assert_equal(after.inner_state, row.make().init(row.tree(0)))
    (skipped, updates), _ = run(row, tx, [bad, gradients])
    assert is_zero(skipped)
    assert_close(updates, expected)


@pytest.mark.parametrize("wrap", ["masked", "multi_transform"])
def test_some_leaves_alone(row: Row, wrap: str):
    params, gradients, expected, _ = first_step(row)
    if wrap == "masked":
        tx, others = optax.masked(row.make(), row.chosen), gradients
    else:
        tx = optax.multi_transform({True: row.make(), False: optax.set_to_zero()}, row.chosen)
        others = optax.tree.zeros_like(gradients)
    (updates,), _ = run(row, tx, [gradients])
    pick = lambda chosen, e, other: e if chosen else other  # noqa: E731
    assert_close(updates, jax.tree.map(pick, row.chosen(params), expected, others))


def test_inject_hyperparams(row: Row):
    """A number or a schedule; and another injected value gives that value's step."""
    params, gradients, expected, _ = first_step(row)
    inject = optax.inject_hyperparams(row.factory, static_args=row.static)
    tx = inject(**row.traced)
    (updates,), _ = run(row, tx, [gradients])
    assert_close(updates, expected)
    update = jax.jit(tx.update)
    state: Any = tx.init(params)
    assert set(row.traced) <= set(state.hyperparams)
    for name, value in row.traced.items():
        (wanted,), _ = run(row, row.factory(**{**row.traced, name: value * 0.9}), [gradients])
        changed = {**state.hyperparams, name: jnp.asarray(value * 0.9, jnp.float32)}
        moved = state._replace(hyperparams=changed)
        assert_close(update(gradients, moved, params, **row.extra_args())[0], wanted)
    schedules = {name: functools.partial(lambda x, _: x, x) for name, x in row.traced.items()}
    (updates,), _ = run(row, inject(**schedules), [gradients])
    assert_close(updates, expected)


# -- tools that walk the state --


def test_map_params(row: Row):
    params, _, _, state = first_step(row)
    tx = row.make()
    assert_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    kinds = optax.tree.map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    shapes = {x.shape for x in jax.tree.leaves(params)}
    for leaf, kind in zip(jax.tree.leaves(state), jax.tree.leaves(kinds), strict=True):
        # Moments along axes of matrices have length one along the others, as Adafactor's have.
        reduced = leaf.ndim > 1 and 1 in leaf.shape
        assert (kind == "parameter") == (leaf.shape in shapes or reduced)


def test_saved_and_restored_bit_for_bit(row: Row, tmp_path: Path):
    params, gradients, _, state = first_step(row)
    # A state without arrays is nothing to save: the step beside it is what a loop saves too.
    saved = {"step": jnp.asarray(1), "state": state}
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    assert_equal(restored, saved)
    step = functools.partial(jax.jit(row.make().update), **row.extra_args())
    assert_equal(step(gradients, restored["state"], params), step(gradients, state, params))


# -- the edges --


def test_an_empty_tree(row: Row):
    tx = row.make()
    extra = {"max_logits": {}} if row.clips else {}
    updates, state = jax.jit(tx.update)({}, tx.init({}), {}, **extra)
    assert updates == {}
    assert abstract(state) == abstract(tx.init({}))


def test_degenerate_gradients_stay_finite(row: Row):
    """The matrix of one row in every tree is another such case."""
    params, gradients, tx = row.tree(0), row.tree(1), row.make()
    update = jax.jit(tx.update)
    for scale, offset in ((0.0, 0.0), (0.0, 1.0), (1e-30, 0.0), (1e15, 0.0)):  # the second: rank 1
        edge = jax.tree.map(lambda g, a=scale, b=offset: a * g + b, gradients)
        assert is_finite(update(edge, tx.init(params), params, **row.extra_args()))
