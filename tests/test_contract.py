"""What every transformation promises, asked of every row of `contract_cases.ROWS`."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tests.contract_cases import ROWS, Row

pytestmark = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)

#: Two programs of the same float32 mathematics, on updates and states of size one.
TOLERANCE = 1e-5


def jitted(tx: Any) -> Any:
    # The programs are tiny and many: most of the time would go into optimising them.
    return jax.jit(tx.update, compiler_options={"xla_backend_optimization_level": 0})


def one_step(row: Row, dtype: Any = jnp.float32) -> tuple[Any, Any, Any, Any]:
    """Returns parameters, gradients, updates and state of the first step."""
    params, gradients = row.tree(0, dtype), row.tree(1, dtype)
    tx = row.make()
    updates, state = jitted(tx)(gradients, tx.init(params), params, **row.extra_args())
    return params, gradients, updates, state


@functools.cache
def reference(name: str) -> tuple[Any, Any, Any, Any]:
    """`one_step` in float32, computed once for all tests."""
    return one_step(ROWS[name])


def reference_of(row: Row) -> tuple[Any, Any, Any, Any]:
    return reference(next(name for name, other in ROWS.items() if other is row))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), tree)


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance), actual, expected
    )


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_finite(tree: Any) -> None:
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(tree))


# -- the state and the updates --


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_state_keeps_its_form_and_updates_their_dtype(row: Row, dtype: Any):
    params, gradients, updates, state = one_step(row, dtype)
    assert abstract(updates) == abstract(gradients)
    assert abstract(state) == abstract(row.make().init(params))
    assert_finite(updates)


def test_init_accepts_shapes_without_values(row: Row):
    params, *_ = reference_of(row)
    tx = row.make()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def forms(tree: Any) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    expected = forms(tx.init(params))
    assert forms(tx.init(shapes)) == expected
    assert forms(jax.eval_shape(tx.init, params)) == expected


def test_unknown_extra_arguments_are_ignored(row: Row):
    params, gradients, updates, state = reference_of(row)
    tx = row.make()
    actual = jitted(tx)(
        gradients, tx.init(params), params, **row.extra_args(), value=jnp.ones(()), unknown=None
    )
    assert_equal(actual, (updates, state))


def test_the_second_step_is_not_traced_again(row: Row):
    params, gradients, *_ = reference_of(row)
    tx = row.make()
    traces = 0

    @jax.jit
    def step(gradients, state, params, extra):
        nonlocal traces
        traces += 1
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    lowered = [step.eval_shape(gradients, state, params, row.extra_args())]
    lowered.append(step.eval_shape(gradients, lowered[0][1], lowered[0][0], row.extra_args()))
    assert traces == 1


# -- under other transformations --


def test_scan(row: Row):
    params, gradients, *_ = reference_of(row)
    tx = row.make()

    def step(carry, scale):
        params, state = carry
        scaled = jax.tree.map(lambda g: g * scale, gradients)
        updates, state = tx.update(scaled, state, params, **row.extra_args())
        return (optax.apply_updates(params, updates), state), None

    scales = jnp.array([1.0, -0.5, 2.0])
    start = (params, tx.init(params))
    options = {"xla_backend_optimization_level": 0}
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, scales), compiler_options=options)(start)
    looped = start
    one = jax.jit(lambda c, s: step(c, s)[0], compiler_options=options)
    for scale in scales:
        looped = one(looped, scale)
    assert_close(scanned, looped)


def test_multi_steps(row: Row):
    params, gradients, expected, _ = reference_of(row)
    tx = optax.MultiSteps(row.make(), every_k_schedule=2)
    update = jitted(tx)
    halves = [jax.tree.map(lambda g, s=scale: g * s, gradients) for scale in (0.5, 1.5)]
    state: Any = tx.init(params)
    first, state = update(halves[0], state, params, **row.extra_args())
    assert not any(x.any() for x in jax.tree.leaves(first))
    second, state = update(halves[1], state, params, **row.extra_args())
    assert_close(second, expected)
    assert abstract(state) == abstract(tx.init(params))


def test_masked(row: Row):
    params, gradients, expected, _ = reference_of(row)
    tx = optax.masked(row.make(), row.chosen)
    state = tx.init(params)
    updates, new_state = jitted(tx)(gradients, state, params, **row.extra_args())
    wanted = jax.tree.map(
        lambda chosen, e, g: e if chosen else g, row.chosen(params), expected, gradients
    )
    assert_close(updates, wanted)
    assert abstract(new_state) == abstract(state)


def test_multi_transform(row: Row):
    params, gradients, expected, _ = reference_of(row)
    tx = optax.multi_transform(
        {"on": row.make(), "off": optax.set_to_zero()},
        lambda tree: jax.tree.map(lambda chosen: "on" if chosen else "off", row.chosen(tree)),
    )
    state = tx.init(params)
    updates, new_state = jitted(tx)(gradients, state, params, **row.extra_args())
    wanted = jax.tree.map(
        lambda chosen, e: e if chosen else jnp.zeros_like(e), row.chosen(params), expected
    )
    assert_close(updates, wanted)
    assert abstract(new_state) == abstract(state)


def test_inject_hyperparams(row: Row):
    params, gradients, expected, _ = reference_of(row)
    tx = optax.inject_hyperparams(row.factory, static_args=row.static)(**row.traced)
    state: Any = tx.init(params)
    assert set(row.traced) <= set(state.hyperparams)
    update = jitted(tx)
    updates, new_state = update(gradients, state, params, **row.extra_args())
    assert_close(updates, expected)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    # And what is injected is what counts: another value gives another plain transformation's step.
    for name in row.traced:
        changed = {**row.traced, name: row.traced[name] * 0.9}
        other = row.factory(**changed)
        wanted, _ = jitted(other)(gradients, other.init(params), params, **row.extra_args())
        moved = state._replace(
            hyperparams={**state.hyperparams, name: jnp.asarray(changed[name], jnp.float32)}
        )
        assert_close(update(gradients, moved, params, **row.extra_args())[0], wanted)


def test_apply_if_finite(row: Row):
    params, gradients, expected, _ = reference_of(row)
    tx = optax.apply_if_finite(row.make(), max_consecutive_errors=3)
    state: Any = tx.init(params)
    update = jitted(tx)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), gradients)
    skipped, after = update(bad, state, params, **row.extra_args())
    assert not any(x.any() for x in jax.tree.leaves(skipped))
    assert_equal(after.inner_state, state.inner_state)
    updates, after = update(gradients, after, params, **row.extra_args())
    assert_close(updates, expected)
    assert abstract(after) == abstract(state)


# -- tools that walk the state --


def test_map_params(row: Row):
    params, _, _, state = reference_of(row)
    tx = row.make()
    nothing = optax.tree.map_params(tx, lambda x: x, state)
    assert_equal(nothing, state)
    kinds = optax.tree.map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    shapes = {x.shape for x in jax.tree.leaves(params)}
    for leaf, kind in zip(jax.tree.leaves(state), jax.tree.leaves(kinds), strict=True):
        # Moments along axes of matrices have length one along the others, as Adafactor's have.
        reduced = leaf.ndim > 1 and 1 in leaf.shape
        assert (kind == "parameter") == (leaf.shape in shapes or reduced)


def test_saved_and_restored_bit_for_bit(row: Row, tmp_path: Path):
    params, gradients, _, state = reference_of(row)
    update = jitted(row.make())
    # A state without arrays is nothing to save: the step beside it is what a loop saves too.
    saved = {"step": jnp.asarray(1), "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved
        )
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    assert_equal(restored, saved)
    assert_equal(
        update(gradients, restored["state"], params, **row.extra_args()),
        update(gradients, state, params, **row.extra_args()),
    )


# -- the edges --


def test_an_empty_tree(row: Row):
    tx = row.make()
    extra = {**row.extra_args()}
    if "max_logits" in extra:
        extra["max_logits"] = {}
    updates, state = jitted(tx)({}, tx.init({}), {}, **extra)
    assert updates == {}
    assert abstract(state) == abstract(tx.init({}))


def edge(row: Row, kind: str) -> Any:
    gradients = row.tree(1)
    match kind:
        case "zero":
            return jax.tree.map(jnp.zeros_like, gradients)
        case "rank one":
            return jax.tree.map(jnp.ones_like, gradients)
        case "tiny":
            return jax.tree.map(lambda g: g * 1e-30, gradients)
        case "huge":
            return jax.tree.map(lambda g: g * 1e15, gradients)
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["zero", "rank one", "tiny", "huge"])
def test_degenerate_gradients_stay_finite(row: Row, kind: str):
    params = row.tree(0)
    tx = row.make()
    # The row matrix in every tree is the case of one row.
    updates, state = jitted(tx)(edge(row, kind), tx.init(params), params, **row.extra_args())
    assert_finite(updates)
    assert_finite(state)
