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
from tests.helpers import assert_close, assert_equal, normal_tree
from tests.sharding.cases import mesh_of

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


def tree(seed: int) -> Any:
    return normal_tree(SHAPES, seed)


def shardings_of(mesh: Mesh, spec: P) -> Any:
    return jax.tree.map(lambda x: NamedSharding(mesh, spec if x.ndim > 1 else P()), tree(0))


def transformation(shardings: Any, zero: bool) -> Any:
    return mc.muonclip(
        optax.constant_schedule(0.02),
        qk_clip_threshold=None,
        ns_steps=2,
        param_shardings=shardings,
        distribution=mc.Distribution(shard_momentum=True) if zero else None,
    )


def step(tx: Any, params: Any, state: Any, seed: int) -> tuple[Any, Any]:
    gradients = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), tree(seed), params)
    updates, state = jax.jit(tx.update)(gradients, state, params)
    return optax.apply_updates(params, updates), state


def saved(tree: Any, folder: Path) -> tuple[Path, Any]:
    """Saves a tree; returns where, and what the checkpoint says that it holds."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", tree)
        checkpointer.wait_until_finished()
        return folder / "saved", checkpointer.metadata(folder / "saved").item_metadata


def restored(path: Path, target: Any = None) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def muon_state(state: Any) -> Any:
    return state.inner_states["muon"].inner_state[0]


# mesh, rule and ZeRO momentum, before and after
FSDP, BOTH = P("fsdp"), P("fsdp", "tp")
EIGHT = {"fsdp": 4, "tp": 2}
MOVES: dict[str, Any] = {
    "4 devices to 8": ({"fsdp": 2, "tp": 2}, BOTH, False, EIGHT, BOTH, False),
    "sharded momentum to FSDP": (EIGHT, P(), True, EIGHT, FSDP, False),
    "FSDP to sharded momentum": ({"fsdp": 8}, FSDP, False, EIGHT, FSDP, True),
}


def same_form(wanted: Any, made: Any) -> None:
    assert (wanted.shape, wanted.dtype) == (made.shape, made.dtype)
    if made.ndim:
        assert wanted.sharding.is_equivalent_to(made.sharding, made.ndim)
    else:
        assert wanted.sharding.is_fully_replicated


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_restore_on_another_mesh_is_the_same_bits_and_goes_on(move: Any, tmp_path: Path):
    from_mesh, from_rule, from_zero, to_mesh, to_rule, to_zero = move
    shardings = shardings_of(mesh_of(**from_mesh), from_rule)
    tx = transformation(shardings, from_zero)
    params = jax.tree.map(jax.device_put, tree(0), shardings)
    params, state = step(tx, params, tx.init(params), seed=1)
    path, metadata = saved((params, state), tmp_path)

    now = shardings_of(mesh_of(**to_mesh), to_rule)
    new_tx = transformation(now, to_zero)
    shapes = jax.eval_shape(lambda: tree(0))
    target = (
        checkpoint.abstract_params(shapes, now),
        checkpoint.abstract_state(new_tx, shapes, now),
    )
    checkpoint.check_saved(metadata, target)
    new_params, new_state = restored(path, target)
    assert_equal((new_params, new_state), (params, state))
    # As `init` would have it there, momentum under ZeRO included.
    made = muon_state(new_tx.init(new_params)).mu
    jax.tree.map(same_form, (muon_state(new_state).mu, new_params), (made, target[0]))
    undisturbed, _ = step(tx, params, state, seed=2)
    moved, _ = step(new_tx, new_params, new_state, seed=2)
    assert_close(moved, undisturbed)
    assert np.abs(np.asarray(moved["norm"]["scale"] - new_params["norm"]["scale"])).max() > 1e-3


@pytest.mark.parametrize(("kind", "zero"), [(AxisType.Auto, True), (AxisType.Explicit, False)])
def test_the_target_is_what_an_eager_init_makes(kind: AxisType, zero: bool):
    shardings = shardings_of(mesh_of(kind), FSDP)
    params = jax.tree.map(jax.device_put, tree(0), shardings)
    # The second asks for no sharding of its own.
    for tx in (transformation(shardings, zero), optax.adamw(0.1)):
        jax.tree.map(same_form, checkpoint.abstract_state(tx, params), tx.init(params))


def test_specs_with_a_mesh_are_the_same_as_shardings():
    mesh, shapes = mesh_of(), jax.eval_shape(lambda: tree(0))
    block = {"query": FSDP, "key": FSDP, "up": FSDP, "down": P()}
    specs = {"block": block, "embed": P("tp", "fsdp"), "norm": None}
    target = checkpoint.abstract_params(shapes, specs, mesh)
    step = checkpoint.abstract_params({**target["embed"], "step": jnp.int32(0)})["step"]
    for leaf, spec in (
        (step, P()),  # such as that of `nnx.Optimizer`
        (target["block"]["up"]["kernel"], FSDP),
        (target["embed"]["embedding"], P("tp", "fsdp")),
        (target["norm"]["scale"], P()),
    ):
        assert leaf.sharding == NamedSharding(mesh, spec)
    whole = checkpoint.abstract_params(shapes, P(), mesh)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))
    target = checkpoint.abstract_state(mc.muon(0.1), tree(0))
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(target))


def test_shardings_that_do_not_fit_are_refused():
    params, mesh = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}, mesh_of()
    for shardings, on, message in (
        ({"w": P("data")}, mesh, "at 'w', which does not fit .* on a mesh of {'fsdp': 4, 'tp': 2}"),
        ({"w": P("tp", "tp")}, mesh, "at 'w', which does not fit .* each axis once"),
        ({"v": P()}, mesh, "w of shape .8, 6. has no entry"),
        ({"w": P("fsdp")}, None, "at 'w', expected a jax.sharding.NamedSharding"),
        (None, mesh, "no param_shardings"),
    ):
        with pytest.raises(ValueError if on else TypeError, match=message):
            checkpoint.abstract_state(mc.muon(0.1), params, shardings, on)


def test_a_checkpoint_of_another_tree_is_refused_by_path(tmp_path: Path):
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones(3), "c": jnp.ones(2)}
    _, metadata = saved(params, tmp_path)
    checkpoint.check_saved(metadata, params)
    other = {"a": jnp.ones((4, 2)), "b": jnp.ones(3, jnp.bfloat16), "d": jnp.ones(2)}
    with pytest.raises(ValueError, match="does not match the restore target") as error:
        checkpoint.check_saved(metadata, other)
    assert str(error.value).split("\n")[1:5] == [
        "- 'c' is only in the checkpoint.",
        "- 'd' is only in the target.",
        "- 'a' has shape (4, 4) in the checkpoint, (4, 2) in the target.",
        "- 'b' has dtype float32 in the checkpoint, bfloat16 in the target.",
    ]
    with pytest.raises(ValueError, match="3 more"):
        checkpoint.check_saved({f"w{i}": jnp.ones(2) for i in range(11)}, {})
    for given, message in (({"w": "text"}, "'w'"), (None, "item_handlers")):
        with pytest.raises(TypeError, match=message):
            checkpoint.check_saved(given, {})


SCHEDULE = optax.cosine_decay_schedule(0.05, 20)


def train(tx: Any, params: Any, state: Any, seeds: Any) -> tuple[Any, Any]:
    update = jax.jit(tx.update)
    for seed in seeds:
        gradients = jax.tree.map(lambda p, n: 0.1 * p + n, params, tree(seed))
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.fixture(scope="module")
def optax_run(tmp_path_factory: Any) -> tuple[Any, Any, Any, Path]:
    """Optax's Muon after four steps, and where it is saved."""
    params = tree(0)
    tx = optax.contrib.muon(SCHEDULE, weight_decay=0.1)
    params, state = train(tx, params, tx.init(params), range(1, 5))
    return tx, params, state, saved(state, tmp_path_factory.mktemp("optax"))[0]


@pytest.mark.parametrize("raw", [False, True], ids=["as it was", "as nested dicts"])
def test_training_goes_on_from_a_checkpoint_of_optax(optax_run: Any, raw: bool):
    old, params, state, path = optax_run
    target = None if raw else jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    # It lands where the parameters are.
    shardings = shardings_of(mesh_of(), BOTH)
    placed = jax.tree.map(jax.device_put, params, shardings)
    tx = mc.muon(SCHEDULE, weight_decay=0.1, param_shardings=shardings)
    ours = checkpoint.from_optax_state(restored(path, target), tx, placed)
    jax.tree.map(same_form, ours, tx.init(placed))
    assert_equal(muon_state(ours).mu["block"]["up"], muon_state(state).mu["block"]["up"])
    # And trains as Optax does.
    tx = mc.muon(SCHEDULE, weight_decay=0.1)
    ours = checkpoint.from_optax_state(restored(path, target), tx, params)
    assert jax.tree.structure(ours) == jax.tree.structure(tx.init(params))
    expected, _ = train(old, params, state, range(5, 15))
    actual, _ = train(tx, params, ours, range(5, 15))
    assert_close(actual, expected)
    assert all(np.abs(m).max() > 1e-2 for m in jax.tree.leaves(optax.tree.sub(actual, params)))


def test_other_routing_is_refused_or_estimated(optax_run: Any):
    _, params, state, _ = optax_run
    tx = mc.muonclip(SCHEDULE, qk_clip_threshold=mc.clip_until(100), mu_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="trained by Adam, which tx trains by Muon") as error:
        checkpoint.from_optax_state(state, tx, params)
    for path in ("block/key/kernel", "block/query/kernel", "embed/embedding"):
        assert repr(path) in str(error.value)
    ours, clip = checkpoint.from_optax_state(state, tx, params, rerouted="estimate")
    assert int(clip.count) == int(muon_state(ours).count) == 4
    adam, adamw = (
        each.inner_states[name].inner_state[0] for each, name in ((state, "adam"), (ours, "adamw"))
    )
    # Muon's momentum is Adam's first moment and the other way, in the dtype that was asked for.
    narrow: Any = optax.tree.cast((adam.mu, muon_state(state).mu), jnp.bfloat16)
    assert_equal(muon_state(ours).mu["block"]["query"], narrow[0]["block"]["query"])
    assert_equal(adamw.mu["embed"], narrow[1]["embed"])
    assert adamw.mu["embed"]["embedding"].dtype == jnp.bfloat16
    assert_equal(adamw.nu["norm"], adam.nu["norm"])
    embedding = muon_state(state).mu["embed"]["embedding"]
    mean_square = 1.95 / 0.05 * np.mean(np.asarray(embedding) ** 2)
    nu = adamw.nu["embed"]["embedding"]
    np.testing.assert_allclose(nu, np.full(embedding.shape, mean_square), rtol=1e-5)


def test_what_the_transformation_keeps_besides_starts_as_it_would():
    params = tree(0)
    old = optax.contrib.muon(0.05)
    _, state = train(old, params, old.init(params), range(1, 4))
    tx = mc.accumulate(optax.inject_hyperparams(mc.muon)(learning_rate=0.05), 2)
    ours: Any = checkpoint.from_optax_state(state, tx, params)
    assert (int(ours.mini_step), int(ours.gradient_step)) == (0, 3)
    assert float(ours.inner_state.hyperparams["learning_rate"]) == pytest.approx(0.05)
    assert_equal(ours.gradients, optax.tree.zeros_like(params))
    matrices = {"w": params["block"]["up"]["kernel"]}
    chain = optax.chain(mc.scale_by_muon(), mc.scale_by_neuron_rms())
    _, state_of = old.update(matrices, old.init(matrices), matrices)
    momentum, neurons = checkpoint.from_optax_state(state_of, chain, matrices)
    assert_equal(momentum.mu, muon_state(state_of).mu)
    assert_equal(neurons.nu, {"w": jnp.zeros((1, 16))})
    with pytest.raises(TypeError, match="params must be arrays"):
        checkpoint.from_optax_state(state, tx, jax.eval_shape(lambda: params))
    # Counts share no memory, so that the state can be donated.
    jax.jit(lambda state: state, donate_argnums=0)(ours)


def test_nnx_states():
    params = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Param)
    old, tx = optax.contrib.muon(0.05), mc.muon(0.05)
    _, state = jax.jit(old.update)(params, old.init(params), params)
    ours = checkpoint.from_optax_state(state, tx, params)
    assert jax.tree.structure(ours) == jax.tree.structure(tx.init(params))
    assert_equal(muon_state(ours).mu, muon_state(state).mu)


def test_nothing_is_lost_in_silence():
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    old, tx = optax.contrib.muon(0.05), mc.muon(0.05)
    state = old.init(params)
    later = optax.tree.set(state, lambda path, _: "muon" in str(path), count=jnp.int32(7))
    finite = optax.apply_if_finite(old, 2).init(params)
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "no mu for 'v', which tx trains by Muon": (state, {**params, "v": jnp.ones((2, 2))}, {}),
        r"has 'inner_states/muon/inner_state/0/mu/w', which the state of tx": (
            state,
            {"b": params["b"]},
            {},
        ),
        r"0/mu/w' of shape \(4, 6\), and the parameter 'w' has shape \(4, 5\)": (
            *(state, {**params, "w": jnp.ones((4, 5))}, {}),
        ),
        "counts are .*0/count': 7": (later, params, {}),
        "rerouted='zero' is not known": (state, params, {"rerouted": "zero"}),
        "ignore 'nowhere' matches no path": (state, params, {"ignore": ["nowhere"]}),
        "two moments for 'b'": ((state, state), params, {}),
        "'notfinite_count'": (finite, params, {}),
    }
    for message, (given, tree, kwargs) in cases.items():
        with pytest.raises(ValueError, match=message):
            checkpoint.from_optax_state(given, tx, tree, **kwargs)
    frozen = optax.masked(tx, {"w": True, "b": False})
    with pytest.raises(ValueError, match=r"/mu/b', .*, which the state of tx does not have"):
        checkpoint.from_optax_state(state, frozen, params)
    checkpoint.from_optax_state(finite, tx, params, ignore=["finite"])
