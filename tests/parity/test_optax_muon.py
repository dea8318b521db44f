"""`muon` and `optax.contrib.muon` walk the same way, whatever they are asked for.

Every trajectory has 20 steps on a tree with Muon and AdamW leaves. The behaviours at the end are
asked of both libraries, so that a test which misreads the original fails too.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, _muon  # `scale_by_shape` is not exported

import muonclip_jax as mc

if not hasattr(_muon, "scale_by_shape"):
    pytest.skip("what `muon` is compared with came with Optax 0.2.8", allow_module_level=True)

STEPS = 20
#: Largest difference of any parameter (all about 1) after any of the 20 steps.
TOLERANCE = 1e-5

MUON = [pytest.param(optax.contrib.muon, id="optax"), pytest.param(mc.muon, id="ours")]

ROWS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037))


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def normal_tree(seed: int, shapes: Any, dtype: Any = np.float32, lead: tuple[int, ...] = ()) -> Any:
    """Returns a tree of normal numbers; `lead` are axes before each leaf's own."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...]) -> jax.Array:
        values = rng.standard_normal((2, *lead, *shape))
        return jnp.asarray(values[0] + (1j * values[1] if dtype == np.complex64 else 0), dtype)

    return jax.tree.map(normal, shapes, is_leaf=is_shape)


MIXED = {
    "block": {"wide": {"kernel": (12, 20), "bias": (20,)}, "tall": {"kernel": (10, 6)}},
    "norm": {"scale": (16,)},
    "stack": (3, 4, 6),
    "temperature": (),
}


def trajectory(
    tx: optax.GradientTransformation, shapes: Any = MIXED, dtype: Any = np.float32
) -> Any:
    """Returns the parameters after every step, stacked; gradients depend on them a little."""
    params = normal_tree(0, shapes, dtype)
    noise = normal_tree(1, shapes, dtype, lead=(STEPS,))

    def step(carry, noise_now):
        params, state = carry
        gradients = jax.tree.map(lambda p, n: 0.1 * p + n, params, noise_now)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    # The programs are tiny and many: most of the time would go into optimising them.
    run = jax.jit(
        lambda *carry: jax.lax.scan(step, carry, noise)[1],
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return run(params, tx.init(params))


def assert_same_trajectory(
    kwargs: dict[str, Any],
    shapes: Any = MIXED,
    dtype: Any = jnp.float32,
    original_kwargs: dict[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    kwargs = {"learning_rate": 0.03, **kwargs}
    original = optax.contrib.muon(**{**kwargs, **(original_kwargs or {})})
    expected = trajectory(original, shapes, dtype)
    actual = trajectory(mc.muon(**kwargs), shapes, dtype)

    def same(path: Any, ours: jax.Array, theirs: jax.Array) -> None:
        assert ours.dtype == theirs.dtype
        # The bound means nothing unless the way is far longer than it.
        assert np.abs(theirs[-1] - theirs[0]).max() > 100 * tolerance
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree.map_with_path(same, actual, expected)


def not_tall(params: Any) -> Any:
    return jax.tree.map(lambda x: x.shape != (10, 6), params)


#: Arguments that do not meet share a case: one that is ignored still moves the trajectory.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "schedules": {
        "learning_rate": optax.cosine_decay_schedule(0.05, STEPS),
        "adam_learning_rate": optax.linear_schedule(0.05, 0.01, STEPS),
    },
    "a named triple": {"ns_coeffs": "standard"},
    "a named set of rows": {"ns_coeffs": "dion"},
    "a triple": {"ns_coeffs": (2.0, -1.5, 0.5), "ns_steps": 7},
    "as many rows as steps": {"ns_coeffs": [list(row) for row in ROWS], "ns_steps": 3},
    "fewer rows than steps": {"ns_coeffs": ROWS},
    "beta": {"beta": 0.8, "ns_steps": 3},
    "eps": {"eps": 1e-3},
    "plain momentum": {"beta": 0.8, "nesterov": False},
    "decay": {"weight_decay": 0.3, "adam_weight_decay": 0.2},
    "decay masked by a function": {"weight_decay": 0.3, "weight_decay_mask": not_tall},
    "decay masked by a prefix": {
        "weight_decay": 0.3,
        "weight_decay_mask": {
            "block": {"wide": True, "tall": False},
            "norm": False,
            "stack": False,
            "temperature": False,
        },
    },
    "adaptive": {"adaptive": True, "learning_rate": 1e-3, "adam_learning_rate": 0.03},
    "adaptive, plain": {
        "adaptive": True,
        "nesterov": False,
        "learning_rate": 1e-3,
        "adam_learning_rate": 0.03,
    },
    "spectral": {"preconditioning": "spectral"},
    "aol": {"preconditioning": "aol"},
    "schatten": {"preconditioning": "schatten"},
    "adam and consistent_rms": {
        "adam_b1": 0.7,
        "adam_b2": 0.9,
        "adam_eps_root": 1e-2,
        "adam_learning_rate": 0.01,
        "consistent_rms": 0.2,
    },
}


@pytest.mark.parametrize("kwargs", ARGUMENTS.values(), ids=ARGUMENTS)
def test_every_argument(kwargs: dict[str, Any]):
    assert_same_trajectory(kwargs)


def test_every_argument_is_in_the_table():
    elsewhere = {"mu_dtype", "muon_weight_dimension_numbers"}
    asked = {name for kwargs in ARGUMENTS.values() for name in kwargs}
    assert asked | elsewhere == set(inspect.signature(optax.contrib.muon).parameters)


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
    ("preconditioning", "adaptive", "nesterov"),
    [
        ("frobenius", False, True),
        ("frobenius", False, False),
        ("frobenius", True, True),
        ("frobenius", True, False),
        ("spectral", False, True),
        ("aol", False, True),
    ],
)
def test_complex_parameters(preconditioning: str, adaptive: bool, nesterov: bool):
    # Not "schatten": the original forgets to conjugate there.
    assert_same_trajectory(
        {
            "preconditioning": preconditioning,
            "adaptive": adaptive,
            "nesterov": nesterov,
            "learning_rate": 1e-3 if adaptive else 0.03,
        },
        shapes={"square": (6, 6), "tall": (7, 4), "bias": (5,)},
        dtype=np.complex64,
    )


# -- routing --

NESTED = {"a": {"u": (6, 8), "v": (8, 6)}, "b": {"u": (6, 8), "v": (4, 4)}}
FOUR = {"w": (4, 3, 5, 2), "x": (6, 8), "bias": (8,)}
DEFAULT = MuonDimensionNumbers()

DIMENSIONS: dict[str, tuple[Any, Any]] = {
    "one for all": (NESTED, DEFAULT),
    "full": (NESTED, {"a": {"u": DEFAULT, "v": DEFAULT}, "b": {"u": DEFAULT, "v": DEFAULT}}),
    "full, with None": (NESTED, {"a": {"u": DEFAULT, "v": None}, "b": {"u": None, "v": DEFAULT}}),
    "prefix": (NESTED, {"a": DEFAULT, "b": None}),
    "prefix, partly full": (NESTED, {"a": None, "b": {"u": DEFAULT, "v": None}}),
    "tuples of axes": (
        FOUR,
        {"w": MuonDimensionNumbers((2,), (0, 3)), "x": DEFAULT, "bias": None},
    ),
    "negative axes": (FOUR, {"w": MuonDimensionNumbers(-4, (-2, -1)), "x": DEFAULT, "bias": None}),
    "axes in another order": (
        FOUR,
        {"w": MuonDimensionNumbers((3, 0), 2), "x": MuonDimensionNumbers(1, 0), "bias": None},
    ),
    "a function": (
        FOUR,
        lambda params: jax.tree.map(
            lambda x: MuonDimensionNumbers(0, x.ndim - 1) if x.ndim > 1 else None, params
        ),
    ),
}


@pytest.mark.parametrize(("shapes", "dimensions"), DIMENSIONS.values(), ids=DIMENSIONS)
def test_dimension_numbers(shapes: Any, dimensions: Any):
    assert_same_trajectory({"muon_weight_dimension_numbers": dimensions}, shapes=shapes)


def test_dimension_numbers_decide_the_scale():
    shapes, dimensions = DIMENSIONS["axes in another order"]
    assert_same_trajectory(
        {"muon_weight_dimension_numbers": dimensions, "consistent_rms": 0.2}, shapes=shapes
    )


def test_a_batched_leaf_has_one_dual_norm_when_adaptive():
    assert_same_trajectory(
        {
            "adaptive": True,
            "learning_rate": 1e-3,
            "muon_weight_dimension_numbers": {"w": MuonDimensionNumbers(1, 2)},
        },
        shapes={"w": (3, 6, 8)},
    )


def test_our_inference_is_one_of_the_forms():
    shapes = {
        "attention": {
            "query": {"kernel": (8, 2, 4), "bias": (2, 4)},
            "out": {"kernel": (2, 4, 8), "bias": (8,)},
        },
        "mlp": {"kernel": (8, 16), "bias": (16,)},
    }
    assert_same_trajectory(
        {"muon_weight_dimension_numbers": mc.infer_dimension_numbers},
        shapes=shapes,
        original_kwargs={
            "muon_weight_dimension_numbers": {
                "attention": {
                    "query": {"kernel": MuonDimensionNumbers(0, (1, 2)), "bias": None},
                    "out": {"kernel": MuonDimensionNumbers((0, 1), 2), "bias": None},
                },
                "mlp": {"kernel": DEFAULT, "bias": None},
            }
        },
    )


# -- signatures --

PAIRS = {
    "muon": (optax.contrib.muon, mc.muon),
    "scale_by_muon": (optax.contrib.scale_by_muon, mc.scale_by_muon),
    "scale_by_shape": (_muon.scale_by_shape, mc.scale_by_shape),
}


@pytest.mark.parametrize(("original", "ours"), PAIRS.values(), ids=PAIRS)
def test_arguments_have_the_original_names_kinds_and_order(original: Any, ours: Any):
    def arguments(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]

    theirs = arguments(original)
    shared = [argument for argument in arguments(ours) if argument in theirs]
    assert shared == theirs
    positional = [a for a in arguments(ours) if a[1] is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [a for a in theirs if a[1] is inspect.Parameter.POSITIONAL_OR_KEYWORD]


# -- behaviours, asked of both libraries --


@pytest.mark.parametrize("muon", MUON)
def test_too_many_rows_are_an_error(muon: Any):
    params = normal_tree(0, {"w": (4, 4)})
    with pytest.raises(ValueError, match="coeff"):
        muon(0.1, ns_coeffs=ROWS, ns_steps=2).init(params)


@pytest.mark.parametrize("muon", MUON)
def test_an_unknown_set_of_coefficients_is_an_error(muon: Any):
    with pytest.raises(ValueError, match="chebyshov"):
        muon(0.1, ns_coeffs="chebyshov")


@pytest.mark.parametrize("muon", MUON)
def test_where_the_state_is(muon: Any):
    params = normal_tree(0, MIXED)
    tx = muon(0.1, mu_dtype=jnp.bfloat16)
    state = tx.init(params)
    inner = state[0]["muon"][0][0]
    assert set(state.inner_states) == {"muon", "adam"}
    assert inner is state.inner_states["muon"].inner_state[0]
    assert inner[1] is inner.mu
    assert inner[0] is inner.count
    assert inner.mu["block"]["tall"]["kernel"].shape == (10, 6)
    assert inner.mu["block"]["tall"]["kernel"].dtype == jnp.bfloat16
    adam = state.inner_states["adam"].inner_state[0]
    assert adam.mu["norm"]["scale"].shape == (16,)
    _, after = jax.jit(tx.update)(params, state, params)
    assert after[0]["muon"][0][0].count == 1
    assert jax.tree.structure(after) == jax.tree.structure(state)


def masked(tree: Any) -> Any:
    """Returns the tree of which leaves are masked out."""
    return jax.tree.map(
        lambda x: isinstance(x, optax.MaskedNode),
        tree,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


PLACES: dict[str, tuple[Any, Any, Any]] = {
    "by rank": ({"w": (3, 4), "b": (4,), "c": (1, 2, 3)}, None, {"w": False, "b": True, "c": True}),
    "full": (
        {"w": (1, 2, 3), "v": (2, 3, 4)},
        {"w": None, "v": MuonDimensionNumbers(1, 2)},
        {"w": True, "v": False},
    ),
    "prefix": (
        NESTED,
        {"a": DEFAULT, "b": None},
        {"a": {"u": False, "v": False}, "b": {"u": True, "v": True}},
    ),
    "prefix, partly full": (
        NESTED,
        {"a": None, "b": {"u": DEFAULT, "v": None}},
        {"a": {"u": True, "v": True}, "b": {"u": False, "v": True}},
    ),
}


@pytest.mark.parametrize("muon", MUON)
@pytest.mark.parametrize(("shapes", "dimensions", "expected"), PLACES.values(), ids=PLACES)
def test_the_momentum_is_masked_where_adam_works(
    muon: Any, shapes: Any, dimensions: Any, expected: Any
):
    params = normal_tree(0, shapes)
    tx = muon(0.1, muon_weight_dimension_numbers=dimensions)
    state = tx.init(params)
    assert masked(state[0]["muon"][0][0][1]) == expected
    _, state = jax.jit(tx.update)(params, state, params)
    assert masked(state[0]["muon"][0][0][1]) == expected


@pytest.mark.parametrize("muon", MUON)
def test_a_function_sees_masked_trees_and_may_ignore_them(muon: Any):
    params = normal_tree(0, {"w": (6, 6), "v": (2, 6)})
    tx = muon(0.1, muon_weight_dimension_numbers=lambda _: {"w": DEFAULT, "v": None})
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == {"w": (6, 6), "v": (2, 6)}


RESHAPES: dict[str, tuple[Callable[[Any], Any], MuonDimensionNumbers]] = {
    "(4, 1, 10, 3)": (
        lambda x: x.reshape(10, 3, 1, 4).transpose(3, 2, 0, 1),
        MuonDimensionNumbers(2, (3, 1, 0)),
    ),
    "(5, 12, 1, 2)": (
        lambda x: x.reshape(2, 1, 5, 12).transpose(2, 3, 1, 0),
        MuonDimensionNumbers((3, 0), 1),
    ),
    "transposed": (lambda x: x.T, MuonDimensionNumbers(1, 0)),
    "as it is": (lambda x: x, MuonDimensionNumbers(0, 1)),
}


@pytest.mark.parametrize("preconditioning", ["frobenius", "spectral", "aol", "schatten"])
@pytest.mark.parametrize("muon", MUON)
def test_a_reshaped_matrix_gets_the_reshaped_update(muon: Any, preconditioning: str):
    matrix = normal_tree(0, {"w": (10, 12)})
    tensors = {name: reshape(matrix["w"]) for name, (reshape, _) in RESHAPES.items()}
    plain = muon(1.0, preconditioning=preconditioning)
    with_dims = muon(
        1.0,
        preconditioning=preconditioning,
        muon_weight_dimension_numbers={name: dims for name, (_, dims) in RESHAPES.items()},
    )
    expected, _ = jax.jit(plain.update)(matrix, plain.init(matrix), matrix)
    actual, _ = jax.jit(with_dims.update)(tensors, with_dims.init(tensors), tensors)
    for name, (reshape, _) in RESHAPES.items():
        np.testing.assert_allclose(
            actual[name], reshape(expected["w"]), rtol=0, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("preconditioning", ["frobenius", "aol", "schatten"])
@pytest.mark.parametrize("muon", MUON)
def test_the_first_update_is_nearly_orthogonal(muon: Any, preconditioning: str):
    params = normal_tree(0, {"square": (50, 50), "tall": (50, 25), "wide": (25, 50)})
    tx = muon(1.0, preconditioning=preconditioning)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    for name, update in updates.items():
        scale = max(1.0, update.shape[1] / update.shape[0]) ** 0.5
        singular = np.linalg.svd(np.asarray(update, np.float64), compute_uv=False) / scale
        assert singular.max() < 1.3, name
        # A square Gaussian matrix has singular values near zero; five steps cannot lift them.
        assert np.median(singular) > 0.6, name


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("muon", MUON)
def test_complex_parameters_reach_a_complex_target(muon: Any, nesterov: bool, adaptive: bool):
    target = jnp.array([[0.5 + 1j, -2.0], [1j, 1.5 - 0.5j]], jnp.complex64)
    tx = muon(1e-2, nesterov=nesterov, adaptive=adaptive)

    def loss(params):
        return jnp.sum(jnp.abs(params - target) ** 2)

    def step(carry, _):
        params, state = carry
        # JAX's gradient of a real function is the conjugate of the steepest ascent.
        gradient = jnp.conj(jax.grad(loss)(params))
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros_like(target)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=800))(
        (params, tx.init(params))
    )
    np.testing.assert_allclose(params, target, rtol=0, atol=3e-2)
