"""What people write by mistake, and the error that they read: what, where, and what to write."""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

from muonclip_jax import checkpoint

# Untyped, for the mistakes are ones that a type checker sees too.
mc: Any = importlib.import_module("muonclip_jax")
mc_linen: Any = importlib.import_module("muonclip_jax.linen")
mc_nnx: Any = importlib.import_module("muonclip_jax.nnx")

KERNEL = jax.random.normal(jax.random.key(0), (8, 2, 4))
PARAMS = {
    "attention": {"query": {"kernel": KERNEL}, "key": {"kernel": KERNEL[::-1]}},
    "mlp": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)},
}
GRADS = jax.tree.map(jnp.sin, PARAMS)
MAX_LOGITS = {"attention": jnp.array([400.0, 30.0])}
MLP = {"mlp": PARAMS["mlp"]}


@pytest.fixture(autouse=True)
def _as_users_call_it() -> Iterator[None]:
    """Without the check of annotations that the tests add to every function."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A pytree that can be called, as an Equinox module is."""

    kernel: Any
    bias: Any

    def __call__(self, x: Any) -> Any:
        return x @ self.kernel + self.bias


def step(tx: Any, grads: Any = GRADS, params: Any = PARAMS, state: Any = None, **extra: Any) -> Any:
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, **extra)


def unclipped(learning_rate: Any = 1e-3, **settings: Any) -> Any:
    return mc.muonclip(learning_rate, qk_clip_threshold=None, **settings)


def flax_train_state() -> Any:
    state = train_state.TrainState.create(apply_fn=len, params=PARAMS, tx=mc.muonclip(1e-3))
    return state.apply_gradients(grads=GRADS, max_logits=MAX_LOGITS)


LINEN = nn.MultiHeadDotProductAttention(num_heads=2)
SCHEDULE = optax.cosine_decay_schedule(1e-3, 10)
CLIP = functools.partial(mc.apply_qk_clip, PARAMS, MAX_LOGITS)
MUON, MUONCLIP = functools.partial(mc.muon, 1e-3), functools.partial(mc.muonclip, 1e-3)
NUMBER = "must be a number"
#: A function, arguments, and the error's kind and text.
ARGUMENTS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (mc.muonclip, {"lr": 1e-3}, "muonclip has no argument 'lr'.*learning_rate"),
    (MUON, {"mask": None}, "'mask'. Did you mean weight_decay_mask"),
    (mc.qk_clip, {"colour": 1}, "Its arguments are threshold, alpha"),
    (mc.MuonClipConfig, {"lr": 1e-3}, "MuonClipConfig has no.*learning_ra"),
    (CLIP, {"treshold": 9.0}, "apply_qk_clip has no argument 'treshold'. Did you mean threshold"),
    (MUONCLIP, {"qk_clip_threshold": "100"}, f"{NUMBER}, a .*'100' of type str. Write .*=100.0"),
    (CLIP, {"threshold": "100"}, rf"threshold {NUMBER} or .*, got '100'.*threshold=100\.0"),
    (CLIP, {"threshold": SCHEDULE}, f"threshold {NUMBER} or a traced scalar, got the function"),
    (
        MUONCLIP,
        {"consistent_rms": SCHEDULE},
        rf"consistent_rms {NUMBER}.*got the function.*, consistent_rms=schedule\)",
    ),
    (mc.muonclip, {"learning_rate": None}, f"learning_rate {NUMBER}, a"),
    (mc.muon, {"learning_rate": "1e-3"}, r"got '1e-3'.*Write learning_rate=0\.001"),
    (MUONCLIP, {"weight_decay": [0.1]}, rf"{NUMBER}, .* or a schedule, got \[0.1\] of type list"),
    (MUONCLIP, {"adam_b2": SCHEDULE}, f"adam_b2 {NUMBER} or a traced scalar, got the function"),
    (MUONCLIP, {"nesterov": "yes"}, "must be True or False, got 'yes'"),
    (MUONCLIP, {"rules": {"w$": None}}, "MatrixRules"),
    (MUONCLIP, {"axis_name": 1}, "axis_name must be 'data' or"),
    (MUONCLIP, {"distribution": "fsdp"}, "distribution must be Distribution"),
    (
        mc.accumulate,
        {"tx": optax.sgd(1.0), "every": "4"},
        r"every must be an integer from 1, a traced scalar or a schedule.*every=4\.0",
    ),
    (MUON, {"weight_decay_mask": True}, "weight_decay_mask must be a tree of bools like the param"),
]
CAPTURE = mc_linen.capture_max_logits
#: Further calls, by what the error says.
TYPE_ERRORS: dict[str, Callable[[], Any]] = {
    r"weight_decay_mask must be a tree.*static_args=\('weight_decay_mask',\)": lambda: (
        optax.inject_hyperparams(mc.muonclip)(
            1e-3, weight_decay_mask=functools.partial(jax.tree.map, lambda x: x.ndim > 1)
        ).init(PARAMS)
    ),
    r"'mlp/scale' is 1\.0 of type float, expected an array. Write jnp.asarray\(1\.0\)": lambda: (
        unclipped().init({"mlp": {"scale": 1.0}})
    ),
    r"'bias' is .*expected an array.*eqx\.filter\(model, eqx\.is_inexact_array\)": lambda: (
        unclipped().init(Module(kernel=jnp.ones((4, 4)), bias=jax.nn.relu))
    ),
    "'scale' is 2 of type int": lambda: mc.apply_qk_clip({**PARAMS, "scale": 2}, MAX_LOGITS),
    "'scale' is 2.0 of type float": lambda: mc.label_params({"scale": 2.0}),
    r"got a jitted function.*Write jax\.jit\(capture_max_logits\(model\.apply\)\)": lambda: CAPTURE(
        jax.jit(LINEN.apply)
    ),
    r"got the model, a.*Write capture_max_logits\(model\.apply\)": lambda: CAPTURE(LINEN),
    r"capture_max_logits takes model\.apply, got": lambda: CAPTURE(jnp.ones(3)),
    r"takes an nnx\.Module.*; got .*linen\.capture_max_logits": lambda: mc_nnx.capture_max_logits(
        jnp.ones(3)
    ),
    r"takes an nnx\.Module.*Of a Linen model, muonclip_jax\.linen": lambda: (
        mc_nnx.capture_max_logits(LINEN)(jnp.ones((1, 3, 8)))
    ),
    r"muonclip_jax\.nnx\.capture_max_logits\(model\)": lambda: CAPTURE(
        nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    )(jnp.ones(2)),
}
MATRIX = {"kernel": jnp.ones((8, 16))}
VALUE_ERRORS: dict[str, Callable[[], Any]] = {
    "No attention block was found.*muonclip: qk_clip_threshold=None": lambda: step(
        mc.muonclip(1e-3), MLP, MLP, max_logits=MAX_LOGITS
    ),
    "The gradients have no leaf 'mlp/bias', which the parameters have": lambda: step(
        unclipped(), {**GRADS, "mlp": {"kernel": GRADS["mlp"]["kernel"]}}
    ),
    "The gradients have 'head', which the parameters do not have": lambda: step(
        unclipped(), {**GRADS, "head": jnp.ones(3)}
    ),
    r"The gradient of 'mlp/bias' has shape \(2, 16\), the parameter has \(16,\)": lambda: step(
        mc.muon(1e-3), {**GRADS, "mlp": {**GRADS["mlp"], "bias": jnp.ones((2, 16))}}
    ),
    "The gradients have no leaf 'mlp/bias'; no leaf 'mlp/kernel'|no leaf 'mlp/": lambda: step(
        mc.accumulate(unclipped(), 2), {"attention": GRADS["attention"]}
    ),
    "The state is not one that qk_clip's init creates.*it has no 'count'": lambda: step(
        mc.qk_clip(mc.clip_until(5)), state=optax.EmptyState(), max_logits=MAX_LOGITS
    ),
    "The state is not one that scale_by_muon's init creates": lambda: step(
        mc.scale_by_muon(), MATRIX, MATRIX, state=()
    ),
    "qk_clip needs the largest attention logits": lambda: step(mc.muonclip(1e-3)),
    r"muonclip_jax\.linen\.TrainState does": flax_train_state,
    "adam_b2 must be in .* got 1.*hyperparam_dtype=jnp.float32": lambda: optax.inject_hyperparams(
        mc.muon
    )(1e-3).init(jax.tree.map(lambda x: x.astype(jnp.bfloat16), MLP)),
}


def assert_told(kind: type[Exception], call: Callable[[], Any], message: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert re.search(message, " ".join(str(raised.value).split())), str(raised.value)


@pytest.mark.parametrize(("function", "arguments", "message"), ARGUMENTS)
def test_a_mistaken_argument_is_told(function: Any, arguments: Any, message: str):
    assert_told(TypeError, lambda: function(**arguments), message)


@pytest.mark.parametrize("message", [*TYPE_ERRORS, *VALUE_ERRORS])
def test_a_mistake_is_told(message: str):
    kind = TypeError if message in TYPE_ERRORS else ValueError
    assert_told(kind, (TYPE_ERRORS | VALUE_ERRORS)[message], message)


def test_the_state_of_another_transformation_is_refused():
    ours, message = mc.muonclip(1e-3), "The state is not one that muonclip's init creates for these"
    cure = r".*muonclip_jax\.checkpoint\.from_optax_state\(state, tx, p"
    for tx, old in (
        (ours, optax.adamw(1e-3)),
        (ours, unclipped()),
        (unclipped(), ours),
        (ours, optax.contrib.muon(1e-3)),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}{cure}"):
            step(tx, state=old.init(PARAMS), max_logits=MAX_LOGITS)


def test_what_the_error_about_a_state_says_works():
    """A state with another clip or other rules is carried over, moment by moment."""
    old = unclipped()
    _, state = step(old)
    tx = mc.muonclip(1e-3, rules=mc.MatrixRules([("mlp/bias", None)]))
    carried: Any = checkpoint.from_optax_state(state, tx, PARAMS)
    updates, _ = step(tx, state=carried, max_logits={"attention": jnp.ones(2)})
    expected, _ = step(old, state=state)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_a_constant_rate_for_adam_beside_a_schedule_warns():
    for build in (mc.muonclip, mc.muon, mc.MuonClipConfig):
        with pytest.warns(UserWarning, match=r"adam_learning_rate=lambda count: ratio \* schedule"):
            build(learning_rate=SCHEDULE, adam_learning_rate=1e-3)
        # A schedule of a constant says that it is meant.
        build(learning_rate=SCHEDULE, adam_learning_rate=optax.constant_schedule(1e-3))
        build(learning_rate=1e-3, adam_learning_rate=1e-4)


def test_traced_decays_of_16_bits_warn_and_float32_works():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MLP)
    narrow = optax.inject_hyperparams(mc.muon)(1e-3)
    with pytest.warns(UserWarning, match="is held in bfloat16, where 0.999 is 1;") as warned:
        jax.eval_shape(narrow.init, params)
    assert {str(w.message).split()[0] for w in warned} == {"adam_b1", "adam_b2", "beta"}
    wide = optax.inject_hyperparams(mc.muon, hyperparam_dtype=jnp.float32)(1e-3)
    updates, _ = jax.jit(lambda: step(wide, params, params))()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(updates))


def shardings(x: Any) -> Any:
    return x.sharding


def is_matrix(x: Any) -> bool:
    return x.ndim > 1


def specs(x: Any) -> Any:
    return mc.MatrixSpec((0, 1)) if is_matrix(x) else None


#: A transformation, its argument, and the entry of a leaf.
CALLABLE_TREES: list[tuple[Callable[..., Any], str, Callable[[Any], Any]]] = [
    (unclipped, "param_shardings", shardings),
    (unclipped, "weight_decay_mask", is_matrix),
    (mc.muon, "muon_weight_dimension_numbers", specs),
]


@pytest.mark.parametrize(("factory", "argument", "entry"), CALLABLE_TREES)
def test_a_tree_that_can_be_called_is_a_tree(factory: Any, argument: str, entry: Any):
    """The same as a function that returns the tree, on a model and on what it holds as a dict."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = Module(kernel=jnp.ones((8, 16)), bias=jnp.ones(16))
    model = jax.device_put(model, place) if entry is shardings else model
    gradients, tree = jax.tree.map(jnp.sin, model), jax.tree.map(entry, model)
    as_tree, as_function = (
        jax.jit(lambda g, p, given=given: step(factory(1e-3, **{argument: given}), g, p)[0])(
            gradients, model
        )
        for given in (tree, lambda params: tree)
    )
    jax.tree.map(np.testing.assert_array_equal, as_tree, as_function)
    assert isinstance(as_tree, Module)


def test_labels_and_maxima_that_can_be_called_are_trees():
    tx = optax.multi_transform(
        {"muon": mc.scale_by_muon(), "adamw": optax.sgd(1.0)}, mc.label_params
    )
    model = Module(kernel=jnp.ones((8, 16)), bias=jnp.ones(16))
    assert isinstance(step(tx, model, model)[0], Module)
    maxima = Module(kernel=jnp.ones(2), bias=jnp.ones(3))
    state: Any = mc.accumulate(optax.sgd(1.0), 2, max_logits=maxima).init(MLP)
    assert jax.tree.map(jnp.shape, state.max_logits) == {"kernel": (2,), "bias": (3,)}
    target = checkpoint.abstract_params(
        model, jax.tree.map(lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]), model)
    )
    assert isinstance(target, Module)


def test_a_partial_is_a_function():
    mask = jax.tree_util.Partial(lambda flag, params: jax.tree.map(lambda _: flag, params), False)
    tx = unclipped(weight_decay_mask=mask)
    plain = unclipped(weight_decay=0.0)
    jax.tree.map(np.testing.assert_array_equal, step(tx)[0], step(plain)[0])
