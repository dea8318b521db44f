"""What is refused when a transformation is made and when it is used, and what the error says."""

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

from muonclip_jax import checkpoint
from muonclip_jax.heads.layouts import separate

# Untyped, for the mistakes are ones that a type checker sees too.
mc: Any = importlib.import_module("muonclip_jax")
mc_linen: Any = importlib.import_module("muonclip_jax.linen")
mc_nnx: Any = importlib.import_module("muonclip_jax.nnx")

pytestmark = pytest.mark.usefixtures("unchecked")  # as users call it

KERNEL = jax.random.normal(jax.random.key(0), (8, 2, 4))
PARAMS = {
    "attention": {"query": {"kernel": KERNEL}, "key": {"kernel": KERNEL[::-1]}},
    "mlp": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)},
}
GRADS = jax.tree.map(jnp.sin, PARAMS)
MAX_LOGITS = {"attention": jnp.array([400.0, 30.0])}
MLP = {"mlp": PARAMS["mlp"]}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A pytree that can be called, as an Equinox module is."""

    kernel: Any
    bias: Any

    def __call__(self, x: Any) -> Any:
        return x @ self.kernel + self.bias


def step(tx: Any, grads: Any = GRADS, params: Any = PARAMS, state: Any = None, **extra: Any) -> Any:
    state = tx.init(params or PARAMS) if state is None else state
    return tx.update(grads, state, params, **extra)


def muon(learning_rate: Any = 1e-3, **settings: Any) -> Any:
    return mc.muon(learning_rate, **settings)


def muonclip(learning_rate: Any = 1e-3, **settings: Any) -> Any:
    return mc.muonclip(learning_rate, **settings)


def unclipped(learning_rate: Any = 1e-3, **settings: Any) -> Any:
    return mc.muonclip(learning_rate, **{"qk_clip_threshold": None, **settings})


def config(**settings: Any) -> Any:
    return mc.MuonClipConfig(**{"learning_rate": 1e-3, **settings})


def flax_train_state() -> Any:
    state = train_state.TrainState.create(apply_fn=len, params=PARAMS, tx=mc.muonclip(1e-3))
    return state.apply_gradients(grads=GRADS, max_logits=MAX_LOGITS)


SCHEDULE = optax.cosine_decay_schedule(1e-3, 10)
REAL, COMPLEX = {"w": jnp.ones((4, 8))}, {"w": jnp.ones((4, 8), jnp.complex64)}
orthogonalize = functools.partial(mc.orthogonalize, REAL["w"])
describe_cost = functools.partial(mc.describe_cost, REAL)
apply_qk_clip = functools.partial(mc.apply_qk_clip, PARAMS, MAX_LOGITS)
clip_until = functools.partial(mc.clip_until, 5)
accumulate = functools.partial(mc.accumulate, optax.sgd(1.0))
MUON = (mc.scale_by_muon, muon, unclipped)
NS, CLIP = (*MUON, orthogonalize), (unclipped, config)
LOW: dict[str, Any] = {"mu_dtype": "bfloat16"}
ON: dict[str, Any] = {"qk_clip_threshold": 1.0}
AVERAGE = r"mu_dtype=.* cannot hold a moving average\. Pass one of 'float32'"
POSITIVE, NUMBER = "must be positive and finite, got", "must be a number"
#: A function or several, arguments, and what each of them says.
Settings = list[tuple[Any, dict[str, Any], str]]
TYPES: Settings = [
    (mc.muonclip, {"lr": 1e-3}, "muonclip has no argument 'lr'.*learning_rate"),
    (mc.muonclip, {"betas": (0.9, 0.95)}, "Did you mean beta or adam_b1 or adam_b2"),
    (mc.muonclip, {"adjust_lr_fn": "original"}, "Did you mean consistent_rms"),
    (lambda: mc.muonclip(1e-3, 0.9, 0.95), {}, "only learning_rate without names.*weight_decay"),
    (muon, {"mask": None}, "'mask'. Did you mean weight_decay_mask"),
    (mc.qk_clip, {"colour": 1}, "Its arguments are threshold, alpha"),
    (mc.MuonClipConfig, {"lr": 1e-3}, "MuonClipConfig has no.*learning_ra"),
    (apply_qk_clip, {"treshold": 9.0}, "apply_qk_clip has no .*'treshold'. Did you mean threshold"),
    (muonclip, {"qk_clip_threshold": "100"}, f"{NUMBER}, a .*'100' of type str. Write .*=100.0"),
    (apply_qk_clip, {"threshold": "100"}, rf"{NUMBER} or .*, got '100'.*threshold=100\.0"),
    (apply_qk_clip, {"threshold": SCHEDULE}, f"{NUMBER} or a traced scalar, got the function"),
    (muonclip, {"consistent_rms": SCHEDULE}, rf"{NUMBER}.*function.*, consistent_rms=schedule\)"),
    (mc.muonclip, {"learning_rate": None}, f"learning_rate {NUMBER}, a"),
    (mc.muon, {"learning_rate": "1e-3"}, r"got '1e-3'.*Write learning_rate=0\.001"),
    (muonclip, {"weight_decay": [0.1]}, rf"{NUMBER}, .* or a schedule, got \[0.1\] of type list"),
    (muonclip, {"adam_b2": SCHEDULE}, f"adam_b2 {NUMBER} or a traced scalar, got the function"),
    (muonclip, {"nesterov": "yes"}, "must be True or False, got 'yes'"),
    (muonclip, {"rules": {"w$": None}}, "MatrixRules"),
    (muonclip, {"axis_name": 1}, "axis_name must be 'data' or"),
    (muonclip, {"distribution": "fsdp"}, "distribution must be Distribution"),
    (mc.Distribution, {"axes": "fsdp"}, "tuple of names"),
    (mc.Distribution, {"shard_momentum": "yes"}, "True or False"),
    (accumulate, {"every": "4"}, r"an integer from 1, a traced scalar or a schedule.*every=4\.0"),
    (muon, {"weight_decay_mask": True}, "weight_decay_mask must be a tree of bools like the param"),
    (config, {"qk_clip_blocks": jnp.ones(3)}, "hashable Python values"),
]
VALUES: Settings = [
    # The stored momentum: a dtype in which no average moves, and what is no dtype.
    *((MUON, {"mu_dtype": x}, AVERAGE) for x in ("int8", bool, jnp.float8_e4m3fn, "int4", "bf16")),
    ((mc.scale_by_muon, muon), {**LOW, "beta": 0.999}, "with beta=0.999: .* a smaller beta"),
    (unclipped, {**LOW, "beta": 0.998}, "with beta=0.998: .* a smaller beta"),
    ((muon, unclipped), {**LOW, "adam_b1": 0.9999}, "with adam_b1=0.9999: .* a smaller adam_b1"),
    # Newton-Schulz.
    (NS, {"ns_dtype": "int8"}, "ns_dtype='int8' is not known"),
    (NS, {"ns_dtype": jnp.float8_e5m2}, "ns_dtype='float8_e5m2' is not known"),
    (NS, {"ns_method": "svd", "ns_dtype": "float16"}, 'not possible for ns_method="svd"'),
    (
        NS,
        {"ns_method": "gram", "ns_dtype": jnp.bfloat16},
        r'ns_method="gram" is unstable .* in bfloat16: .*Pass ns_dtype=.*\'float32\'',
    ),
    (NS, {"platform": "gpus"}, "platform='gpus' is not known. Pass one of 'cpu', 'gpu'"),
    (describe_cost, {"platform": "gpus"}, "'gpus' is not known"),
    (CLIP, {"ns_coeffs": "kj"}, "ns_coeffs='kj' is not a coefficient set"),
    (CLIP, {"ns_method": "fast"}, "ns_method='fast' is not known"),
    (muon, {"ns_coeffs": [(2, -1.5, 0.5)] * 3, "ns_steps": 2}, "3 rows and ns_steps is 2"),
    # Numbers.
    (CLIP, {"learning_rate": 0.0}, f"learning_rate {POSITIVE} 0.0"),
    (CLIP, {"adam_learning_rate": -1.0}, f"adam_learning_rate {POSITIVE} -1.0"),
    (CLIP, {"weight_decay": -0.1}, "weight_decay must be finite and not negative, got -0.1"),
    (CLIP, {"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
    (CLIP, {"adam_b1": 1.0}, r"adam_b1 must be in \[0, 1\), got 1.0"),
    (CLIP, {"adam_b2": -0.1}, r"adam_b2 must be in \[0, 1\), got -0.1"),
    (CLIP, {"consistent_rms": -0.2}, f"consistent_rms {POSITIVE} -0.2"),
    (CLIP, {"qk_clip_threshold": 0.0}, "qk_clip_threshold must be positive"),
    (CLIP, {**ON, "qk_clip_blocks": ()}, r"qk_clip_blocks=\(\) selects no attention block"),
    (CLIP, {**ON, "qk_clip_alpha": 1.5}, r"qk_clip_alpha must be in \[0, 1\], got 1.5"),
    (CLIP, {**ON, "qk_clip_shared_keys": "all"}, "qk_clip_shared_keys must be one of 'query'"),
    *((mc.qk_clip, {"threshold": x}, "threshold must be positive") for x in (0, -2.0, math.nan)),
    *((mc.qk_clip, {"alpha": x}, "alpha must be") for x in (1.5, -0.1, math.nan)),
    (mc.qk_clip, {"shared_keys": "all"}, "shared_keys must be one of"),
    (mc.qk_clip, {"blocks": ()}, "selects no attention block"),
    (clip_until, {"threshold": -1.0}, "threshold must be positive"),
    (mc.scale_by_shape, {"consistent_rms": 0.0}, f"consistent_rms {POSITIVE} 0"),
    (mc.scale_by_shape, {"consistent_rms": 0.2, "rule": "rms_to_rms"}, "consistent_rms or rule"),
    (mc.scale_by_shape, {"rule": "keller"}, "rule='keller' is not known. Pass one of None, 'w"),
    (mc.scale_by_neuron_rms, {"b2": 1.0}, r"b2 must be in \[0, 1\)"),
    (mc.hyperball, {"learning_rate": -0.1}, f"learning_rate {POSITIVE} -0.1"),
    (mc.add_weight_decay, {"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
    (mc.add_weight_decay, {"weight_decay": 0.1, "base_width": 0}, f"base_width {POSITIVE} 0"),
    (mc.orthogonalize_updates, {"ns_coeffs": "none"}, "ns_coeffs"),
    (mc.Distribution, {"axes": ("fsdp", "fsdp")}, "different names"),
    (mc.Distribution, {"max_matrix_bytes": 0}, "max_matrix_bytes must be positive"),
    (mc.Distribution, {"max_stack_bytes": -1}, "max_stack_bytes must be positive"),
    *((mc.Distribution, {"flops_per_byte": x}, "must be not negative") for x in (-1.0, math.nan)),
]


def assert_told(kind: type[Exception], call: Callable[[], Any], message: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert re.search(message, " ".join(str(raised.value).split())), str(raised.value)


@pytest.mark.parametrize(
    ("kind", "functions", "settings", "message"),
    [(TypeError, *row) for row in TYPES] + [(ValueError, *row) for row in VALUES],
)
def test_settings(kind: type[Exception], functions: Any, settings: dict[str, Any], message: str):
    for function in functions if isinstance(functions, tuple) else (functions,):
        assert_told(kind, lambda function=function: function(**settings), message)


LINEN = nn.MultiHeadDotProductAttention(num_heads=2)
CAPTURE, CAPTURE_NNX = mc_linen.capture_max_logits, mc_nnx.capture_max_logits
VECTOR, UNMATCHED = {"bias": jnp.ones(8)}, mc.MatrixRules([("c/kernel$", None)])
QUERY = {"kernel": KERNEL, "bias": jnp.ones((2, 4))}
BIASED = {**PARAMS, "attention": {**PARAMS["attention"], "query": QUERY}}
PARTLY = optax.multi_transform(
    {"a": mc.qk_clip(), "b": optax.sgd(0.2)},
    functools.partial(jax.tree.map, lambda x: "a" if x.ndim > 2 else "b"),
)
are_matrices = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
NO_QUERY = {**GRADS, "attention": {**GRADS["attention"], "query": None}}
#: Calls of `init`, `update` and others, and what the error says.
Calls = list[tuple[Callable[[], Any], str]]
TYPE_ERRORS: Calls = [
    (
        lambda: optax.inject_hyperparams(mc.muonclip)(1e-3, weight_decay_mask=are_matrices).init(
            MLP
        ),
        r"weight_decay_mask must be a tree.*static_args=\('weight_decay_mask',\)",
    ),
    (
        lambda: unclipped().init({"mlp": {"scale": 1.0}}),
        r"'mlp/scale' is 1\.0 of type float, expected an array. Write jnp.asarray\(1\.0\)",
    ),
    (
        lambda: unclipped().init(Module(kernel=jnp.ones((4, 4)), bias=jax.nn.relu)),
        r"'bias' is .*expected an array.*eqx\.filter\(model, eqx\.is_inexact_array\)",
    ),
    (lambda: mc.apply_qk_clip({**PARAMS, "scale": 2}, MAX_LOGITS), "'scale' is 2 of type int"),
    (lambda: mc.label_params({"scale": 2.0}), r"'scale' is 2.0 of type float.*eqx\.filter"),
    (
        lambda: CAPTURE(jax.jit(LINEN.apply)),
        r"got a jitted function.*whole: jax\.jit\(capture_max_logits\(model\.apply\)\)",
    ),
    (lambda: CAPTURE(LINEN), r"got a MultiHead.*Write .*capture_max_logits\(model\.apply\)"),
    (lambda: CAPTURE(jnp.ones(3)), r"capture_max_logits takes model\.apply, got"),
    (lambda: CAPTURE_NNX(jnp.ones(3)), r"an nnx\.Module.*; got .*linen\.capture_max_logits"),
    (
        lambda: CAPTURE_NNX(LINEN)(jnp.ones((1, 3, 8))),
        r"takes an nnx\.Module.*Of a Linen model, muonclip_jax\.linen",
    ),
    (
        lambda: CAPTURE(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))(jnp.ones(2)),
        r"muonclip_jax\.nnx\.capture_max_logits\(model\)",
    ),
    *(
        (lambda x=x: mc.scale_by_muon().init({"w": jnp.ones((4, 8), x)}), f"w has dtype {x};")
        for x in ("int32", "bool", "float8_e4m3fn")
    ),
]
VALUE_ERRORS: Calls = [
    # Dtypes of moments and products.
    *(
        (lambda make=make, dtype=dtype, tree=tree: make(mu_dtype=dtype).init(tree), message)
        for make in MUON
        for dtype, tree, message in (
            ("complex64", REAL, "w .*'complex64' is complex"),
            ("float32", COMPLEX, "w .*'float32' is real"),
            ("float64", REAL, "'float64' needs 64-bit types"),
        )
    ),
    (lambda: muon(mu_dtype="complex64").init(VECTOR), "bias .*'complex64' is complex"),
    (lambda: mc.scale_by_muon(ns_dtype="float16").init(COMPLEX), "w: ns_dtype='float16' is not"),
    (lambda: mc.scale_by_muon(ns_dtype="float64").init(REAL), "w: ns_dtype='float64' needs 64-bit"),
    (
        lambda: optax.inject_hyperparams(mc.muon)(1e-3).init(optax.tree.cast(MLP, jnp.bfloat16)),
        "adam_b2 must be in .* got 1.*hyperparam_dtype=jnp.float32",
    ),
    # Leaves and rules.
    (lambda: mc.scale_by_muon().init(VECTOR), "bias"),
    *(
        (lambda make=make: make(rules=UNMATCHED).init(PARAMS), r"'c/kernel\$' matches no path of")
        for make in (muon, unclipped)
    ),
    *(
        (
            lambda make=make: make(rules=mc.MatrixRules([("w$", None)])).init(REAL),
            r"w of shape \(4, 8\) is under Muon, and rule 'w\$' gives.*partial\(label_params, ru",
        )
        for make in (mc.scale_by_muon, mc.orthogonalize_updates)
    ),
    # Gradients, parameters and states.
    (
        lambda: step(unclipped(), {**GRADS, "mlp": {"kernel": GRADS["mlp"]["kernel"]}}),
        "The gradients do not match .*: 'mlp/bias' is only in the parameters",
    ),
    (
        lambda: step(unclipped(), {**GRADS, "head": jnp.ones(3)}),
        "'head' is only in the gradients",
    ),
    (
        lambda: step(muon(), {**GRADS, "mlp": {**GRADS["mlp"], "bias": jnp.ones((2, 16))}}),
        r"'mlp/bias' has shape \(2, 16\) in the gradients, \(16,\) in the parameters",
    ),
    (
        lambda: step(accumulate(2), {"attention": GRADS["attention"]}),
        "'mlp/bias' is only in the parameters; 'mlp/kernel' is only in the parameters",
    ),
    (
        lambda: step(mc.qk_clip(clip_until()), state=optax.EmptyState(), max_logits=MAX_LOGITS),
        "The state is not one that qk_clip's init creates.*'count' is only in a new one",
    ),
    (
        lambda: step(mc.scale_by_muon(), REAL, REAL, mc.scale_by_muon().init(REAL)._asdict()),
        "not one that scale_by_muon's init creates.*it is a dict, expected a MuonState",
    ),
    (lambda: mc.hyperball(0.1).update(REAL, None, None), "hyperball needs the parameters"),
    (lambda: step(mc.add_weight_decay(0.1), params=None), "add_weight_decay needs the parameters"),
    # The clip.
    (
        lambda: step(mc.qk_clip(), params=None, max_logits=MAX_LOGITS),
        "qk_clip needs the parameters",
    ),
    (lambda: step(mc.qk_clip()), r"tx\.update\(grads, state, params, max_logits="),
    (lambda: step(muonclip()), "the largest attention logits.*qk_clip_threshold=None"),
    (flax_train_state, r"muonclip_jax\.linen\.TrainState does"),
    (
        lambda: step(muonclip(), MLP, MLP, max_logits=MAX_LOGITS),
        "No attention block was found.*muonclip: qk_clip_threshold=None",
    ),
    (
        lambda: step(mc.qk_clip(), NO_QUERY, max_logits=MAX_LOGITS),
        "'attention/query/.*have no entry for",
    ),
    (
        lambda: step(PARTLY, BIASED, BIASED, max_logits=MAX_LOGITS),
        "partly visible.*multi_transform.*outer chain",
    ),
    (lambda: mc.qk_clip(blocks="decoder").init(PARAMS), "'decoder' matches no path"),
    (lambda: mc.qk_clip(blocks=separate("a", "b")).init(PARAMS), "needs 'a' and 'b'"),
]


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [(TypeError, *row) for row in TYPE_ERRORS] + [(ValueError, *row) for row in VALUE_ERRORS],
)
def test_calls(kind: type[Exception], call: Callable[[], Any], message: str):
    assert_told(kind, call, message)


def test_the_state_of_another_transformation_is_refused():
    ours = mc.muonclip(1e-3)
    message = r"The state is not one that muonclip's .*\.checkpoint\.from_optax_state\(state, tx, p"
    for tx, old in (
        (ours, optax.adamw(1e-3)),
        (ours, unclipped()),
        (unclipped(), ours),
        (ours, optax.contrib.muon(1e-3)),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
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


#: A transformation, its argument, and the entry of a leaf.
CALLABLE_TREES: list[tuple[Callable[..., Any], str, Callable[[Any], Any]]] = [
    (unclipped, "param_shardings", lambda x: x.sharding),
    (unclipped, "weight_decay_mask", lambda x: x.ndim > 1),
    (mc.muon, "muon_weight_dimension_numbers", lambda x: mc.MatrixSpec() if x.ndim > 1 else None),
]


@pytest.mark.parametrize(("factory", "argument", "entry"), CALLABLE_TREES)
def test_a_tree_that_can_be_called_is_a_tree(factory: Any, argument: str, entry: Any):
    """The same as a function that returns the tree."""
    model = Module(kernel=jnp.ones((8, 16)), bias=jnp.ones(16))
    gradients, tree = jax.tree.map(jnp.sin, model), jax.tree.map(entry, model)
    as_tree, as_function = (
        step(factory(1e-3, **{argument: given}), gradients, model)[0]
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
    expected = step(unclipped(weight_decay=0.0))[0]
    jax.tree.map(np.testing.assert_array_equal, step(tx)[0], expected)
