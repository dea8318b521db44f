"""`matrix_axes` and what stands on it, against float64 NumPy written apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import muonclip_jax as mc
from tests.helpers import assert_close, assert_equal, normal_tree, update

P, ALL = PartitionSpec, slice(None)
#: A plain matrix, stacked layers, heads as batch, fused kernels cut on either side, interleaved:
#: shape, spec, partition, and the indices that cut each matrix `(inputs, outputs)` out of the leaf.
LEAVES: dict[str, tuple[Any, ...]] = {
    "plain": ((8, 16), mc.MatrixSpec((0, 1)), P("a", "b"), [ALL]),
    "stack": ((2, 8, 4), mc.MatrixSpec((1, 2)), P("b", None, "a"), [0, 1]),
    "heads": ((8, 4, 4), mc.MatrixSpec((0, 2)), P(None, "a", "b"), [(ALL, h) for h in range(4)]),
    "fused": (
        (8, 16),
        mc.MatrixSpec((0, 1), mc.Split(1, (1, 2, 1), view=(2, 4, 2), along=1)),
        P("a", "b"),
        # Of two groups of 4 x 2 columns: 2, 4 and 2 columns each.
        [(ALL, [0, 1, 8, 9]), (ALL, [2, 3, 4, 5, 10, 11, 12, 13]), (ALL, [6, 7, 14, 15])],
    ),
    "rows": (
        (16, 8),
        mc.MatrixSpec((0, 1), mc.Split(0, (12, 4))),
        P("a", "b"),
        [slice(0, 12), slice(12, 16)],
    ),
}
SHAPES, SPECS, PARTITIONS, ENTRIES = (
    {name: row[column] for name, row in LEAVES.items()} for column in range(4)
)


def by_matrix(function: Any, *trees: Any) -> dict[str, np.ndarray]:
    """Applies a function of float64 matrices to each matrix of some trees."""
    result = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for name, indices in ENTRIES.items():
        for index in indices:
            result[name][index] = function(*(np.asarray(t[name], np.float64)[index] for t in trees))
    return result


PARAMS, FIRST, SECOND = (normal_tree(SHAPES, seed) for seed in range(3))
ZERO = {**PARAMS, "plain": jnp.zeros(SHAPES["plain"])}
#: Rules that the library must not read off the names.
GIVEN: dict[str, Any] = {"weight_dimension_numbers": SPECS}


def run(tx: Any, params: Any = PARAMS, apply: bool = False) -> tuple[Any, Any]:
    """The updates of two steps."""
    state, results = tx.init(params), []
    for gradients in (FIRST, SECOND):
        updates, state = update(tx, gradients, state, params)
        results.append(updates)
        if apply:
            params = optax.apply_updates(params, updates)
    return tuple(results)


# -- the axes and reductions --


@pytest.mark.parametrize("over", ["inputs", "outputs", "matrix"])
def test_reductions_are_those_of_each_matrix(over: Any):
    axes = mc.matrix_axes(PARAMS, weight_dimension_numbers=SPECS)
    axis: Any = {"inputs": 0, "outputs": 1, "matrix": (0, 1)}[over]
    for method, of in (("sum", np.sum), ("mean", np.mean), ("norm", np.linalg.norm)):
        expected = by_matrix(
            lambda x, of=of, axis=axis: np.broadcast_to(of(x, axis=axis, keepdims=True), x.shape),
            PARAMS,
        )
        actual = jax.tree.map(lambda x, a, m=method: getattr(a, m)(x, over), PARAMS, axes)
        for name, x in actual.items():
            reduced = [axis for axis in axes[name].over(over) if x.shape[axis] > 1]
            assert reduced == [s.axis for s in axes[name].splits if s.axis in axes[name].over(over)]
        broadcast = {name: np.broadcast_to(x, SHAPES[name]) for name, x in actual.items()}
        assert_close(broadcast, expected)


def test_axes_follow_rules_masks_and_refuse_what_is_no_matrix():
    heads = {name: {"kernel": jnp.ones((8, 4, 2))} for name in ("query", "key", "value")}
    model = {"attention": heads, "gone": optax.MaskedNode()}
    found = mc.matrix_axes(model, mc.MatrixRules(attention="per_head"))
    axes = found["attention"]["query"]["kernel"]
    assert (axes.batch, axes.inputs, axes.outputs) == ((1,), (0,), (2,))
    with pytest.raises(ValueError, match="bias of shape"):
        mc.matrix_axes({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="over='rows' is not known"):
        axes.sum(jnp.ones((8, 4, 2)), "rows")


def test_orthogonalize_updates_is_the_polar_factor_and_scale_by_muon_momentum_before_it():
    def polar(x: np.ndarray) -> np.ndarray:
        u, _, vh = np.linalg.svd(x, full_matrices=False)
        return u @ vh

    tx = mc.orthogonalize_updates(ns_method="svd", **GIVEN)
    assert_close(run(tx)[0], by_matrix(polar, FIRST), 1e-4)
    # The heavy-ball form has the direction of the moving average.
    chain = optax.chain(optax.trace(0.9, nesterov=True), mc.orthogonalize_updates(**GIVEN))
    for a, b in zip(run(chain), run(mc.scale_by_muon(beta=0.9, **GIVEN)), strict=True):
        assert_close(a, b, 1e-4)


# -- the variants --


def normuon(x: np.ndarray, nu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    nu = 0.9 * nu + 0.1 * (x**2).mean(0)
    scaled = x / (np.sqrt(nu) + 1e-8)
    return scaled * np.linalg.norm(x) / np.linalg.norm(scaled), nu


def test_neuron_rms_is_normuon():
    def second(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return normuon(y, normuon(x, np.zeros(x.shape[1]))[1])[0]

    first, then = run(mc.scale_by_neuron_rms(0.9, **GIVEN))
    assert_close(first, by_matrix(lambda x: normuon(x, np.zeros(x.shape[1]))[0], FIRST))
    assert_close(then, by_matrix(second, FIRST, SECOND))


def hyperball(w: np.ndarray, u: np.ndarray, first: np.ndarray, rate: float) -> np.ndarray:
    """The weights after a step; `first` are those before the first step."""
    fixed = np.linalg.norm(first)
    radius = fixed if fixed else np.sqrt(w.shape[1])
    v = w - rate * radius * u / np.linalg.norm(u)
    length = np.linalg.norm(v)
    return v if not fixed and length <= radius else v * radius / length


@pytest.mark.parametrize("params", [PARAMS, ZERO], ids=["nonzero", "zero"])
def test_hyperball_keeps_norms_and_lets_a_zero_matrix_grow(params: Any):
    tx = mc.hyperball(lambda count: 0.5 / (count + 1), **GIVEN)
    first, then = run(tx, params, apply=True)
    after = by_matrix(lambda w, u: hyperball(w, u, w, 0.5), params, FIRST)
    last = by_matrix(lambda w, u, f: hyperball(w, u, f, 0.25), after, SECOND, params)
    assert_close({n: params[n] + first[n] for n in SHAPES}, after)
    assert_close({n: params[n] + first[n] + then[n] for n in SHAPES}, last)
    # And it stops at its bound: sqrt(fan_out), in a single step that is longer than it.
    far, _ = run(mc.hyperball(2.0, **GIVEN), ZERO)
    assert float(jnp.linalg.norm(far["plain"])) == pytest.approx(4.0, rel=1e-5)


def test_map_params_finds_the_moments_with_a_spec_for_every_leaf():
    for tx in (mc.scale_by_neuron_rms(**GIVEN), mc.hyperball(0.1, **GIVEN)):
        state = tx.init(PARAMS)
        found = optax.tree.map_params(tx, lambda x: x.shape, state, transform_non_params=jnp.shape)
        assert found == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("attention", ["merged", "per_head"])
def test_hyperball_keeps_the_norm_that_a_clip_left(attention: str):
    """The clip is last in the chain; restoring the first norm would undo it in the next step."""
    names = {name: {"kernel": (8, 2, 4)} for name in ("query", "key", "value")}
    params, grads = (normal_tree({"attn": names}, seed) for seed in (0, 1))
    rules = mc.MatrixRules(attention=attention)
    tx = optax.chain(mc.scale_by_muon(rules=rules), mc.hyperball(0.1, rules=rules), mc.qk_clip())
    state, axes = tx.init(params), (0, 2) if attention == "per_head" else (0, 1, 2)

    def norms(params: Any) -> list[np.ndarray]:
        kernels = (np.float64(params["attn"][name]["kernel"]) for name in ("query", "key"))
        return [np.sqrt(np.square(kernel).sum(axes)) for kernel in kernels]

    first, seen = norms(params), []
    for largest in (400.0, 50.0, 50.0):
        maxima = {"attn": jnp.asarray([largest, 1.0])}
        updates, state = update(tx, grads, state, params, max_logits=maxima)
        params = optax.apply_updates(params, updates)
        seen.append(norms(params))
    np.testing.assert_allclose(seen[1:], [seen[0]] * 2, rtol=1e-6)
    if attention == "per_head":
        np.testing.assert_allclose(np.divide(seen[0], first), [[0.5, 1.0]] * 2, rtol=1e-6)


@pytest.mark.parametrize("cautious", [False, True])
def test_weight_decay_is_cautious_and_falls_with_the_width(cautious: bool):
    def decayed(u: np.ndarray, w: np.ndarray) -> np.ndarray:
        where = (np.sign(u) == np.sign(w)) if cautious else 1.0
        return u + 0.3 * 4 / w.shape[0] * w * where

    tx = mc.add_weight_decay(0.3, cautious=cautious, base_width=4, **GIVEN)
    assert_close(run(tx)[1], by_matrix(decayed, SECOND, PARAMS))


def test_weight_decay_without_options_is_optax_and_takes_masks_and_schedules():
    mask = {name: name != "plain" for name in SHAPES}
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    ours = run(mc.add_weight_decay(schedule, mask))
    theirs = run(optax.add_decayed_weights(schedule, mask))
    assert_equal(ours, theirs)
    # Products of small numbers underflow; their signs do not.
    tiny = {"w": jnp.full((1, 2), 1e-30)}
    tx = mc.add_weight_decay(0.5, cautious=True)
    opposite = {"w": jnp.array([[1e-30, -1e-30]])}
    decayed = update(tx, opposite, tx.init(tiny), tiny)[0]["w"]
    np.testing.assert_array_equal(decayed, np.array([[1.5e-30, -1e-30]], np.float32))


# -- the scale by shape --

ONES = {"wide": jnp.ones((4, 9)), "tall": jnp.ones((9, 4)), "heads": jnp.ones((3, 8, 2, 5))}
SHAPED = {
    "wide": mc.MuonDimensionNumbers(0, 1),
    "tall": mc.MuonDimensionNumbers(0, 1),
    "heads": mc.MuonDimensionNumbers(1, (2, 3)),
}


def scaled(tx: Any, updates: Any) -> Any:
    return update(tx, updates, tx.init(updates))[0]


def test_factors_are_those_of_optax():
    """`sqrt(max(1, out / in))`, or `0.2 sqrt(max(in, out))`."""
    for consistent_rms, factors in ((None, (1.5, 1.0, 1.25**0.5)), (0.2, (0.6, 0.6, 0.4**0.5))):
        expected = {name: x * ONES[name] for name, x in zip(ONES, factors, strict=True)}
        assert_close(scaled(mc.scale_by_shape(SHAPED, consistent_rms), ONES), expected, 1e-6)


def test_parts_of_a_fused_kernel_have_their_own_factor_and_rules_have_names():
    spec = mc.MatrixSpec((0, 1), (mc.Split(1, (16, 4)),))
    w = scaled(mc.scale_by_shape({"w": spec}), {"w": jnp.ones((4, 20))})["w"]
    np.testing.assert_array_equal(w, [[2.0] * 16 + [1.0] * 4] * 4)
    w = scaled(mc.scale_by_shape(rule="rms_to_rms"), {"w": jnp.ones((4, 1), jnp.bfloat16)})
    assert_equal(w, {"w": jnp.full((4, 1), 0.5, jnp.bfloat16)})
    assert w["w"].dtype == jnp.bfloat16


# -- one device and eight --

TRANSFORMATIONS = {
    "orthogonalize_updates": mc.orthogonalize_updates,
    "neuron_rms": mc.scale_by_neuron_rms,
    "hyperball": lambda **kwargs: mc.hyperball(0.1, **kwargs),
    "decay": lambda param_shardings=None, **kwargs: mc.add_weight_decay(
        0.1, cautious=True, base_width=8, **kwargs
    ),
}


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = [*zip(TRANSFORMATIONS, [AUTO, EXPLICIT] * 2, strict=True), ("hyperball", EXPLICIT)]


@pytest.mark.parametrize(("name", "kind"), [*KINDS, ("orthogonalize_updates", EXPLICIT)])
def test_one_device_equals_eight(name: str, kind: AxisType):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    shardings = {leaf: NamedSharding(mesh, spec) for leaf, spec in PARTITIONS.items()}
    given = {"param_shardings": shardings} if kind == AxisType.Auto else {}
    tx = TRANSFORMATIONS[name](**GIVEN, **given)
    expected = run(TRANSFORMATIONS[name](**GIVEN))
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings)
        state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
        placed = jax.tree.map(lambda x: x.sharding, state)
        for gradients, wanted in zip((FIRST, SECOND), expected, strict=True):
            updates, state = step(jax.device_put(gradients, shardings), state, params)
            assert jax.tree.map(lambda x: x.sharding, state) == placed
            assert_close(updates, wanted, 1e-4)
