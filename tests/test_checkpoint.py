"""States across checkpoints: another mesh, another device count, another library."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax import checkpoint
from tests.helpers import TOLERANCE

SHAPES = {
    "block": {
        "query": {"kernel": (8, 4, 4)},
        "key": {"kernel": (8, 4, 4)},
        "up": {"kernel": (8, 16)},
        "down": {"kernel": (16, 8), "bias": (8,)},
    },
    "embed": {"embedding": (16, 8)},
    "norm": {"scale": (8,)},
}


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def normal_tree(seed: int, shapes: Any = SHAPES) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=is_shape,
    )


def make_mesh(fsdp: int, tp: int, kind: AxisType = AxisType.Auto) -> Mesh:
    devices = np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp)
    return Mesh(devices, ("fsdp", "tp"), axis_types=(kind,) * 2)


fsdp, tensor_parallel, both, replicated = P("fsdp"), P(None, "tp"), P("fsdp", "tp"), P()


def shardings_of(mesh: Mesh, spec: P) -> Any:
    return jax.tree.map(
        lambda shape: NamedSharding(mesh, spec if len(shape) > 1 else P()), SHAPES, is_leaf=is_shape
    )


def transformation(shardings: Any, zero: bool = False) -> Any:
    return mc.muonclip(
        optax.constant_schedule(0.02),
        qk_clip_threshold=None,
        ns_steps=2,
        param_shardings=shardings,
        distribution=mc.Distribution(shard_momentum=True) if zero else None,
    )


def step(tx: Any, params: Any, state: Any, seed: int) -> tuple[Any, Any]:
    gradients = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), normal_tree(seed), params)
    updates, state = jax.jit(tx.update)(gradients, state, params)
    return optax.apply_updates(params, updates), state


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), actual, expected
    )


def assert_close(actual: Any, expected: Any) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE["float32"]),
        *(actual, expected),
    )


def saved(tree: Any, folder: Path) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", tree)
    return folder / "saved"


def restored(path: Path, target: Any = None) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


# -- another mesh --

# mesh, rule and ZeRO momentum, before and after
MOVES: dict[str, Any] = {
    "4 devices to 8": ((2, 2), both, False, (4, 2), both, False),
    "FSDP to TP": ((4, 1), fsdp, False, (1, 4), tensor_parallel, False),
    "sharded momentum to FSDP": ((4, 2), replicated, True, (4, 2), fsdp, False),
    "FSDP to sharded momentum": ((8, 1), fsdp, False, (4, 2), fsdp, True),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_restore_on_another_mesh_is_the_same_bits_and_goes_on(move: Any, tmp_path: Path):
    from_mesh, from_rule, from_zero, to_mesh, to_rule, to_zero = move
    shardings = shardings_of(make_mesh(*from_mesh), from_rule)
    tx = transformation(shardings, from_zero)
    params = jax.tree.map(jax.device_put, normal_tree(0), shardings)
    params, state = step(tx, params, tx.init(params), seed=1)
    path = saved((params, state), tmp_path)

    now = shardings_of(make_mesh(*to_mesh), to_rule)
    new_tx = transformation(now, to_zero)
    shapes = jax.eval_shape(lambda: normal_tree(0))
    target = (
        checkpoint.abstract_params(shapes, now),
        checkpoint.abstract_state(new_tx, shapes, now),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
    checkpoint.check_saved(metadata, target)
    new_params, new_state = restored(path, target)
    assert_same_bits((new_params, new_state), (params, state))
    # As `init` would have it there, momentum under ZeRO included.
    jax.tree.map(
        lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or pytest.fail(f"{x} {y}"),
        (new_state.inner_states["muon"].inner_state[0].mu, new_params),
        (new_tx.init(new_params).inner_states["muon"].inner_state[0].mu, new_params),
    )
    undisturbed, _ = step(tx, params, state, seed=2)
    moved, _ = step(new_tx, new_params, new_state, seed=2)
    assert_close(moved, undisturbed)
    assert np.abs(np.asarray(moved["norm"]["scale"] - new_params["norm"]["scale"])).max() > 1e-3


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("zero", [False, True])
def test_the_target_is_what_an_eager_init_makes(kind: AxisType, zero: bool):
    shardings = shardings_of(make_mesh(4, 2, kind), fsdp)
    params = jax.tree.map(jax.device_put, normal_tree(0), shardings)
    tx = transformation(shardings, zero)
    target = checkpoint.abstract_state(tx, params)
    state = tx.init(params)
    assert jax.tree.structure(target) == jax.tree.structure(state)

    def same(wanted: Any, made: Any) -> None:
        assert (wanted.shape, wanted.dtype) == (made.shape, made.dtype)
        if made.ndim:
            assert wanted.sharding.is_equivalent_to(made.sharding, made.ndim)
        else:
            assert wanted.sharding.is_fully_replicated

    jax.tree.map(same, target, state)


def test_specs_with_a_mesh_are_the_same_as_shardings():
    mesh = make_mesh(4, 2)
    shapes = jax.eval_shape(lambda: normal_tree(0))
    specs = {"block": P("fsdp"), "embed": P("tp", "fsdp"), "norm": None}
    specs["block"] = {"query": P("fsdp"), "key": P("fsdp"), "up": P("fsdp"), "down": P()}
    target = checkpoint.abstract_params(shapes, specs, mesh)
    assert target["block"]["up"]["kernel"].sharding == NamedSharding(mesh, P("fsdp"))
    assert target["norm"]["scale"].sharding == NamedSharding(mesh, P())
    whole = checkpoint.abstract_params(shapes, P(), mesh)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))
    target = checkpoint.abstract_state(mc.muon(0.1), normal_tree(0))
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(target))


REFUSED: dict[str, Any] = {
    "an axis that the mesh has not": (
        {"w": P("data")},
        "at 'w', which does not fit a mesh of {'fsdp': 4, 'tp': 2}",
    ),
    "a dimension that is not divided": ({"w": P(None, "fsdp")}, "dimension 1 of 'w'"),
    "too many dimensions": ({"w": P("fsdp", None, "tp")}, "for 3 dimensions"),
    "an axis twice": ({"w": P("tp", "tp")}, "at 'w', which does not fit a mesh"),
    "no entry": ({"v": P()}, "w of shape .8, 6. has no entry"),
}


@pytest.mark.parametrize(("specs", "message"), REFUSED.values(), ids=REFUSED)
def test_shardings_that_do_not_fit_are_refused(specs: Any, message: str):
    params = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
    with pytest.raises(ValueError, match=message):
        checkpoint.abstract_state(mc.muon(0.1), params, specs, make_mesh(4, 2))
    with pytest.raises(ValueError, match="'w', which needs a mesh"):
        checkpoint.abstract_params(params, {"w": P("fsdp")})
    with pytest.raises(ValueError, match="no param_shardings"):
        checkpoint.abstract_params(params, mesh=make_mesh(4, 2))


# -- another tree --


def test_a_checkpoint_of_another_tree_is_refused_by_path(tmp_path: Path):
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones(3), "c": jnp.ones(2)}
    path = saved(params, tmp_path)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
    checkpoint.check_saved(metadata, params)
    other = {"a": jnp.ones((4, 2)), "b": jnp.ones(3, jnp.bfloat16), "d": jnp.ones(2)}
    with pytest.raises(ValueError, match="not what is to be restored") as error:
        checkpoint.check_saved(metadata, other)
    assert str(error.value).split("\n")[1:5] == [
        "- 'c' is in the checkpoint only.",
        "- 'd' is in the target only.",
        "- 'a' has shape (4, 4) in the checkpoint, (4, 2) in the target.",
        "- 'b' has dtype float32 in the checkpoint, bfloat16 in the target.",
    ]


def test_many_differences_are_counted():
    before = {f"w{i}": jnp.ones(2) for i in range(11)}
    with pytest.raises(ValueError, match="3 more of this kind"):
        checkpoint.check_saved(before, {})
    with pytest.raises(TypeError, match="'w'"):
        checkpoint.check_saved({"w": "text"}, {})
    with pytest.raises(TypeError, match="item_handlers"):
        checkpoint.check_saved(None, {})


# -- Optax's state --

SCHEDULE = optax.cosine_decay_schedule(0.05, 20)


def train(tx: Any, params: Any, state: Any, seeds: Any) -> tuple[Any, Any]:
    update = jax.jit(tx.update)
    for seed in seeds:
        gradients = jax.tree.map(lambda p, n: 0.1 * p + n, params, normal_tree(seed))
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.fixture(scope="module")
def optax_run(tmp_path_factory: Any) -> tuple[Any, Any, Any, Path]:
    """Optax's Muon after four steps, and where it is saved."""
    params = normal_tree(0)
    tx = optax.contrib.muon(SCHEDULE, weight_decay=0.1)
    params, state = train(tx, params, tx.init(params), range(1, 5))
    return tx, params, state, saved(state, tmp_path_factory.mktemp("optax"))


@pytest.mark.parametrize("raw", [False, True], ids=["as it was", "as nested dicts"])
def test_training_goes_on_from_a_checkpoint_of_optax(optax_run: Any, raw: bool):
    old, params, state, path = optax_run
    target = None if raw else jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    tx = mc.muon(SCHEDULE, weight_decay=0.1)
    ours = checkpoint.from_optax_state(restored(path, target), tx, params)
    assert jax.tree.structure(ours) == jax.tree.structure(tx.init(params))
    expected, _ = train(old, params, state, range(5, 15))
    actual, _ = train(tx, params, ours, range(5, 15))
    assert_close(actual, expected)
    assert all(np.abs(m).max() > 1e-2 for m in jax.tree.leaves(optax.tree.sub(actual, params)))


def test_the_state_lands_where_the_parameters_are(optax_run: Any):
    _, params, state, path = optax_run
    shardings = shardings_of(make_mesh(4, 2), both)
    params = jax.tree.map(jax.device_put, params, shardings)
    tx = mc.muon(SCHEDULE, weight_decay=0.1, param_shardings=shardings)
    ours = checkpoint.from_optax_state(restored(path), tx, params)
    mu = ours.inner_states["muon"].inner_state[0].mu["block"]["up"]["kernel"]
    assert mu.sharding == shardings["block"]["up"]["kernel"]
    theirs = state.inner_states["muon"].inner_state[0].mu["block"]["up"]["kernel"]
    np.testing.assert_array_equal(np.asarray(mu), np.asarray(theirs))


def by_state(state: Any, label: str) -> Any:
    return state.inner_states[label].inner_state[0]


def test_other_routing_is_refused_or_estimated(optax_run: Any):
    _, params, state, _ = optax_run
    tx = mc.muonclip(SCHEDULE, qk_clip_threshold=mc.clip_until(100), mu_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="trained by Adam, which tx trains by Muon") as error:
        checkpoint.from_optax_state(state, tx, params)
    for path in ("block/key/kernel", "block/query/kernel", "embed/embedding"):
        assert repr(path) in str(error.value)
    ours, clip = checkpoint.from_optax_state(state, tx, params, rerouted="estimate")
    adam, muon = by_state(state, "adam"), by_state(state, "muon")
    assert int(clip.count) == int(by_state(ours, "muon").count) == 4
    # Muon's momentum is Adam's first moment, in the dtype that was asked for.
    np.testing.assert_array_equal(
        by_state(ours, "muon").mu["block"]["query"]["kernel"],
        adam.mu["block"]["query"]["kernel"].astype(jnp.bfloat16),
    )
    embedding = muon.mu["embed"]["embedding"]
    np.testing.assert_array_equal(
        by_state(ours, "adamw").mu["embed"]["embedding"], embedding.astype(jnp.bfloat16)
    )
    np.testing.assert_allclose(
        by_state(ours, "adamw").nu["embed"]["embedding"],
        np.full(embedding.shape, 1.95 / 0.05 * np.mean(np.asarray(embedding) ** 2)),
        rtol=1e-5,
    )
    np.testing.assert_array_equal(
        by_state(ours, "adamw").nu["norm"]["scale"], adam.nu["norm"]["scale"]
    )


def test_the_estimate_is_the_variance_of_noise():
    # An average with decay .95 over 400 steps of noise with variance 4, and 4096 entries.
    rng = np.random.default_rng(0)
    mu = np.zeros((64, 64))
    for _ in range(400):
        mu = 0.95 * mu + 0.05 * 2.0 * rng.standard_normal(mu.shape)
    params = {"embed": {"embedding": jnp.zeros((64, 64))}}
    state = optax.contrib.muon(0.1).init(params)
    momentum = {"embed": {"embedding": jnp.asarray(mu, jnp.float32)}}
    state = optax.tree.set(state, lambda path, _: "muon" in str(path), mu=momentum)
    tx = mc.muonclip(0.1, qk_clip_threshold=None)
    ours = checkpoint.from_optax_state(state, tx, params, rerouted="estimate")
    np.testing.assert_allclose(by_state(ours, "adamw").nu["embed"]["embedding"], 4.0, rtol=0.05)


def test_muon_starts_from_adamw():
    params = normal_tree(0)
    old = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE))
    _, state = train(old, params, old.init(params), range(1, 3))
    tx = optax.chain(optax.clip_by_global_norm(1.0), mc.muonclip(SCHEDULE, qk_clip_threshold=None))
    with pytest.raises(ValueError, match="trained by Adam, which tx trains by Muon"):
        checkpoint.from_optax_state(state, tx, params)
    ours = checkpoint.from_optax_state(state, tx, params, rerouted="estimate")
    assert jax.tree.structure(ours) == jax.tree.structure(tx.init(params))
    adam = optax.tree.get(state, "mu")
    np.testing.assert_array_equal(
        by_state(ours[1], "muon").mu["block"]["up"]["kernel"], adam["block"]["up"]["kernel"]
    )
    np.testing.assert_array_equal(
        by_state(ours[1], "adamw").mu["norm"]["scale"], adam["norm"]["scale"]
    )
    train(tx, params, ours, [3])


def test_what_the_transformation_keeps_besides_starts_as_it_would():
    params = normal_tree(0)
    old = optax.contrib.muon(0.05)
    _, state = train(old, params, old.init(params), range(1, 4))
    tx = mc.accumulate(optax.inject_hyperparams(mc.muon)(learning_rate=0.05), 2)
    ours = checkpoint.from_optax_state(state, tx, params)
    assert (int(ours.mini_step), int(ours.gradient_step)) == (0, 3)
    assert float(ours.inner_state.hyperparams["learning_rate"]) == pytest.approx(0.05)
    assert_same_bits(ours.gradients, optax.tree.zeros_like(params))
    with pytest.raises(TypeError, match="params must be arrays"):
        checkpoint.from_optax_state(state, tx, jax.eval_shape(lambda: params))
    # Counts share no memory, so that the state can be donated.
    jax.jit(lambda state: state, donate_argnums=0)(ours)


def test_nnx_states():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    old, tx = optax.contrib.muon(0.05), mc.muon(0.05)
    _, state = jax.jit(old.update)(params, old.init(params), params)
    ours = checkpoint.from_optax_state(state, tx, params)
    assert jax.tree.structure(ours) == jax.tree.structure(tx.init(params))
    np.testing.assert_array_equal(
        jax.tree.leaves(by_state(ours, "muon").mu)[0],
        jax.tree.leaves(by_state(state, "muon").mu)[0],
    )


def test_nothing_is_lost_in_silence():
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    old, tx = optax.contrib.muon(0.05), mc.muon(0.05)
    state = old.init(params)
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "no mu for 'v', which tx trains by Muon": (state, {**params, "v": jnp.ones((2, 2))}, {}),
        r"has 'inner_states/muon/inner_state/0/mu/w', for which": (
            state,
            {"b": params["b"]},
            {},
        ),
        r"0/mu/w' of shape \(4, 6\), and the parameter 'w' has shape \(4, 5\)": (
            state,
            {**params, "w": jnp.ones((4, 5))},
            {},
        ),
        "counts are .*0/count': 7": (
            optax.tree.set(state, lambda path, _: "muon" in str(path), count=jnp.int32(7)),
            params,
            {},
        ),
        "one of 'error', 'estimate', got 'zero'": (state, params, {"rerouted": "zero"}),
        "ignore 'nowhere' matches no path": (state, params, {"ignore": ["nowhere"]}),
        "two moments for 'b'": ((state, state), params, {}),
        "'notfinite_count'": (optax.apply_if_finite(old, 2).init(params), params, {}),
    }
    for message, (given, tree, kwargs) in cases.items():
        with pytest.raises(ValueError, match=message):
            checkpoint.from_optax_state(given, tx, tree, **kwargs)
    finite = optax.apply_if_finite(old, 2).init(params)
    checkpoint.from_optax_state(finite, tx, params, ignore=["finite"])
