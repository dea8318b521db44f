"""`muon` and `optax.contrib.muon` follow the same trajectory, whatever they are asked for."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims, _muon  # `scale_by_shape` is not exported

import muonclip_jax as mc
from tests.helpers import normal_tree

if not hasattr(_muon, "scale_by_shape"):
    pytest.skip("what `muon` is compared with came with Optax 0.2.8", allow_module_level=True)

STEPS = 20
#: Largest difference of any parameter (all about 1) after any of the 20 steps.
TOLERANCE = 1e-5

MIXED = {
    "block": {"wide": {"kernel": (12, 20), "bias": (20,)}, "tall": {"kernel": (10, 6)}},
    "norm": {"scale": (16,)},
    "stack": (3, 4, 6),
    "temperature": (),
}
NESTED = {"a": {"u": (6, 8), "v": (8, 6)}, "b": {"u": (6, 8), "v": (4, 4)}}
FOUR = {"w": (4, 3, 5, 2), "x": (6, 8), "bias": (8,)}
ATTENTION = {
    "attention": {
        "query": {"kernel": (8, 2, 4), "bias": (2, 4)},
        "out": {"kernel": (2, 4, 8), "bias": (8,)},
    },
    "mlp": {"kernel": (8, 16), "bias": (16,)},
}


def trajectory(
    tx: optax.GradientTransformation, shapes: Any = MIXED, dtype: Any = np.float32
) -> Any:
    """The parameters after every step, stacked; gradients depend on them a little."""
    params = normal_tree(shapes, 0, dtype)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    steps = jax.tree.map(lambda shape: (STEPS, *shape), shapes, is_leaf=is_shape)
    noise = normal_tree(steps, 1, dtype)

    def step(carry, noise_now):
        params, state = carry
        gradients = jax.tree.map(lambda p, n: 0.1 * p + n, params, noise_now)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda *carry: jax.lax.scan(step, carry, noise)[1])(params, tx.init(params))


def not_tall(params: Any) -> Any:
    return jax.tree.map(lambda x: x.shape != (10, 6), params)


def last_axis_is_output(params: Any) -> Any:
    return jax.tree.map(lambda x: Dims(0, x.ndim - 1) if x.ndim > 1 else None, params)


class Case(NamedTuple):
    """Arguments of both, and the tree they train."""

    kwargs: dict[str, Any]
    shapes: Any = MIXED
    dtype: Any = np.float32


def case(shapes: Any = MIXED, dims: Any = None, dtype: Any = np.float32, **kwargs: Any) -> Case:
    given = {} if dims is None else {"muon_weight_dimension_numbers": dims}
    return Case({**given, **kwargs}, shapes, dtype)


complex_case = functools.partial(
    case, {"square": (6, 6), "tall": (7, 4), "bias": (5,)}, dtype=np.complex64
)
ROWS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037))
COSINE, LINE = optax.cosine_decay_schedule(0.05, STEPS), optax.linear_schedule(0.05, 0.01, STEPS)
WIDE = {"block": {"wide": True, "tall": False}} | dict.fromkeys(
    ("norm", "stack", "temperature"), False
)
LISTS, DECAY = [list(row) for row in ROWS], {"weight_decay": 0.3, "adam_weight_decay": 0.2}
ADAM = {"adam_b1": 0.7, "adam_b2": 0.9, "adam_eps_root": 1e-2, "adam_learning_rate": 0.01}
ADAPTIVE: dict[str, Any] = {"adaptive": True, "learning_rate": 1e-3}
ORDER = {"w": Dims((3, 0), 2), "x": Dims(1, 0), "bias": None}
#: Arguments that do not meet share a case: one that is ignored still moves the trajectory.
CASES: dict[str, Case] = {
    "defaults": case(),
    "schedules, named rows": case(learning_rate=COSINE, adam_learning_rate=LINE, ns_coeffs="dion"),
    "a triple": case(ns_coeffs=(2.0, -1.5, 0.5), ns_steps=7, **DECAY, weight_decay_mask=not_tall),
    "as many rows as steps": case(ns_coeffs=LISTS, ns_steps=3, **DECAY, weight_decay_mask=WIDE),
    "fewer rows than steps": case(ns_coeffs=ROWS, **ADAM),
    "plain momentum": case(beta=0.8, nesterov=False, ns_steps=3, eps=1e-3, **DECAY),
    "adaptive": case(**ADAPTIVE, adam_learning_rate=0.03),
    "spectral": case(preconditioning="spectral"),
    "aol": case(preconditioning="aol"),
    "schatten": case(preconditioning="schatten"),
    "consistent_rms": case(consistent_rms=0.2),
    # Not "schatten": the original forgets to conjugate there.
    "complex": complex_case(),
    "complex, adaptive, plain": complex_case(**ADAPTIVE, nesterov=False),
    "complex, spectral": complex_case(preconditioning="spectral"),
    "complex, aol": complex_case(preconditioning="aol"),
    # Which leaves are Muon's, and along which axes.
    "one for all": case(NESTED, Dims()),
    "full": case({"w": (1, 2, 3), "v": (2, 3, 4)}, {"w": None, "v": Dims(1, 2)}),
    "prefix": case(NESTED, {"a": Dims(), "b": None}),
    "prefix, partly full": case(NESTED, {"a": None, "b": {"u": Dims(), "v": None}}),
    "tuples of axes": case(FOUR, {"w": Dims((2,), (0, 3)), "x": Dims(), "bias": None}),
    "negative axes": case(FOUR, {"w": Dims(-4, (-2, -1)), "x": Dims(), "bias": None}),
    "axes and their scale": case(FOUR, ORDER, consistent_rms=0.2),
    "one dual norm of a batch": case({"w": (3, 6, 8)}, {"w": Dims(1, 2)}, **ADAPTIVE),
    "a function": case(FOUR, last_axis_is_output),
    "a function that ignores masks": case(NESTED, lambda _: {"a": None, "b": Dims()}),
    "our inference": case(ATTENTION, mc.infer_dimension_numbers),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_trajectory(case: Case):
    kwargs = {"learning_rate": 0.03, **case.kwargs}
    theirs, ours = optax.contrib.muon(**kwargs), mc.muon(**kwargs)
    expected, actual = (trajectory(tx, case.shapes, case.dtype) for tx in (theirs, ours))

    def same(path: Any, ours: jax.Array, theirs: jax.Array) -> None:
        assert ours.dtype == theirs.dtype
        # The bound means nothing unless the way is far longer than it.
        assert np.abs(theirs[-1] - theirs[0]).max() > 100 * TOLERANCE
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=TOLERANCE, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree.map_with_path(same, actual, expected)
    # Their momentum is of the same leaves, and masked at the others.
    params = normal_tree(case.shapes, 0, case.dtype)
    states: Any = ours.init(params), theirs.init(params)
    momenta = [state[0]["muon"][0][0][1] for state in states]
    assert jax.tree.structure(momenta[0]) == jax.tree.structure(momenta[1])


def test_every_argument_is_in_the_table():
    asked = {name for case in CASES.values() for name in case.kwargs} | {"mu_dtype"}
    assert asked == set(inspect.signature(optax.contrib.muon).parameters)


def test_mu_dtype():
    # The original multiplies beta with the stored momentum in the momentum's own dtype, ours in
    # float32: in bfloat16 the two are apart by that product's rounding, 2**-9 an entry and a step.
    exact, original, ours = (
        trajectory(tx)["block"]["wide"]["kernel"]
        for tx in (
            optax.contrib.muon(0.03),
            optax.contrib.muon(0.03, mu_dtype=jnp.bfloat16),
            mc.muon(0.03, mu_dtype=jnp.bfloat16),
        )
    )
    np.testing.assert_allclose(ours, original, rtol=0, atol=5e-3)

    def error(x: jax.Array) -> float:
        return float(np.sqrt(np.mean((x - exact) ** 2)))

    assert error(ours) < error(original) < 2e-3


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        (optax.contrib.muon, mc.muon),
        (optax.contrib.scale_by_muon, mc.scale_by_muon),
        (_muon.scale_by_shape, mc.scale_by_shape),
    ],
)
def test_arguments_have_the_original_names_kinds_and_order(original: Any, ours: Any):
    theirs, mine = (
        [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]
        for function in (original, ours)
    )
    assert [argument for argument in mine if argument in theirs] == theirs
    # What is ours alone is given by name.
    assert {kind for name, kind in mine if (name, kind) not in theirs} <= {
        inspect.Parameter.KEYWORD_ONLY
    }


@pytest.mark.parametrize("muon", [optax.contrib.muon, mc.muon], ids=["optax", "ours"])
def test_where_the_state_is(muon: Any):
    params = normal_tree(MIXED, 0)
    tx = muon(0.1, mu_dtype=jnp.bfloat16)
    state = tx.init(params)
    inner = state[0]["muon"][0][0]
    assert set(state.inner_states) == {"muon", "adam"}
    assert inner is state.inner_states["muon"].inner_state[0]
    assert (inner[0], inner[1]) == (inner.count, inner.mu)
    assert inner.mu["block"]["tall"]["kernel"].shape == (10, 6)
    assert inner.mu["block"]["tall"]["kernel"].dtype == jnp.bfloat16
    assert inner.mu["norm"]["scale"] == optax.MaskedNode()
    adam = state.inner_states["adam"].inner_state[0]
    assert adam.mu["norm"]["scale"].shape == (16,)
    _, after = jax.jit(tx.update)(params, state, params)
    assert after[0]["muon"][0][0].count == 1
    assert jax.tree.structure(after) == jax.tree.structure(state)
