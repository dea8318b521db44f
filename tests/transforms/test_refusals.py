"""What transformations refuse when they are made, by `init` and by `update`, with what to write."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax.heads.layouts import separate

REAL, COMPLEX = {"w": jnp.ones((4, 8))}, {"w": jnp.ones((4, 8), jnp.complex64)}


def muon(learning_rate: Any = 1e-3, **settings: Any) -> Any:
    return mc.muon(learning_rate, **settings)


def clip(learning_rate: Any = 1e-3, **settings: Any) -> Any:
    return mc.muonclip(learning_rate, **{"qk_clip_threshold": None, **settings})


def config(**settings: Any) -> Any:
    return mc.MuonClipConfig(**{"learning_rate": 1e-3, **settings})


ORTHOGONALIZE = functools.partial(mc.orthogonalize, REAL["w"])
MUON, NS = (mc.scale_by_muon, muon, clip), (mc.scale_by_muon, muon, clip, ORTHOGONALIZE)
CLIP, SHAPE, DECAY, QK_CLIP = (
    (clip, config),
    (mc.scale_by_shape,),
    (mc.add_weight_decay,),
    (mc.qk_clip,),
)
LOW: dict[str, Any] = {"mu_dtype": "bfloat16"}
ON: dict[str, Any] = {"qk_clip_threshold": 1.0}
AVERAGE = r"mu_dtype=.* cannot hold a moving average\. Pass one of"
#: Functions, arguments, and what each of them says.
SETTINGS: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    # The stored momentum: a dtype in which no average moves, and what is no dtype.
    (MUON, {"mu_dtype": "int8"}, AVERAGE),
    (MUON, {"mu_dtype": bool}, AVERAGE),
    (MUON, {"mu_dtype": jnp.float8_e4m3fn}, AVERAGE),
    (MUON, {"mu_dtype": "int4"}, AVERAGE),
    (MUON, {"mu_dtype": "bf16"}, r"mu_dtype='bf16' cannot hold .*\. Pass one of 'float32'"),
    ((mc.scale_by_muon, muon), {**LOW, "beta": 0.999}, "with beta=0.999: .* a smaller beta"),
    ((clip,), {**LOW, "beta": 0.998}, "with beta=0.998: .* a smaller beta"),
    ((muon, clip), {**LOW, "adam_b1": 0.9999}, "with adam_b1=0.9999: .* a smaller adam_b1"),
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
    ((functools.partial(mc.describe_cost, REAL),), {"platform": "gpus"}, "'gpus' is not known"),
    (CLIP, {"ns_coeffs": "kj"}, "ns_coeffs='kj' is not a coefficient set"),
    (CLIP, {"ns_method": "fast"}, "ns_method='fast' is not known"),
    # Numbers.
    (CLIP, {"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
    (
        CLIP,
        {"adam_learning_rate": -1.0},
        "adam_learning_rate must be positive and finite, got -1.0",
    ),
    (CLIP, {"weight_decay": -0.1}, "weight_decay must be finite and not negative, got -0.1"),
    (CLIP, {"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
    (CLIP, {"adam_b1": 1.0}, r"adam_b1 must be in \[0, 1\), got 1.0"),
    (CLIP, {"adam_b2": -0.1}, r"adam_b2 must be in \[0, 1\), got -0.1"),
    (CLIP, {"consistent_rms": -0.2}, "consistent_rms must be positive and finite, got -0.2"),
    (CLIP, {"qk_clip_threshold": 0.0}, "qk_clip_threshold must be positive"),
    (CLIP, {**ON, "qk_clip_blocks": ()}, r"qk_clip_blocks=\(\) selects no attention block"),
    (CLIP, {**ON, "qk_clip_alpha": 1.5}, r"qk_clip_alpha must be in \[0, 1\], got 1.5"),
    (CLIP, {**ON, "qk_clip_shared_keys": "all"}, "qk_clip_shared_keys must be one of 'query'"),
    ((config,), {"qk_clip_blocks": jnp.ones(3)}, "hashable Python values"),
    (QK_CLIP, {"threshold": 0.0}, "threshold must be positive"),
    (QK_CLIP, {"alpha": 1.5}, "alpha must be"),
    (QK_CLIP, {"shared_keys": "all"}, "shared_keys must be one of"),
    (QK_CLIP, {"blocks": ()}, "selects no attention block"),
    ((functools.partial(mc.clip_until, 5),), {"threshold": -1.0}, "threshold must be positive"),
    (SHAPE, {"consistent_rms": 0.0}, "consistent_rms must be positive and finite, got 0"),
    (SHAPE, {"consistent_rms": 0.2, "rule": "rms_to_rms"}, "takes consistent_rms or rule"),
    (SHAPE, {"rule": "keller"}, r"rule='keller' is not known.*consistent_rms=c"),
    ((mc.scale_by_neuron_rms,), {"b2": 1.0}, r"b2 must be in \[0, 1\)"),
    ((mc.hyperball,), {"learning_rate": -0.1}, "learning_rate must be positive"),
    (DECAY, {"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
    (DECAY, {"weight_decay": 0.1, "base_width": 0}, "base_width must be positive"),
    ((mc.orthogonalize_updates,), {"ns_coeffs": "none"}, "ns_coeffs"),
]


@pytest.mark.parametrize(("functions", "settings", "message"), SETTINGS)
def test_settings(functions: tuple[Any, ...], settings: dict[str, Any], message: str):
    for function in functions:
        with pytest.raises((TypeError, ValueError), match=message):
            function(**settings)


def init(tx: Any, **leaves: Any) -> Any:
    return tx.init({"layer": leaves})


def ones(dtype: Any = jnp.float32, *shape: int) -> jax.Array:
    return jnp.ones(shape or (4, 8), dtype)


HEADS = {"kernel": jnp.ones((6, 3, 4)), "bias": jnp.ones((3, 4))}
BLOCK = {"attn": {"query": HEADS, "key": HEADS}}
SHAPES = jax.eval_shape(lambda: BLOCK)
MAXIMA = {"attn": jnp.asarray([150.0, 90.0, 300.0])}
OTHER = separate("ask", "answer")
PARTLY = optax.multi_transform(
    {"a": mc.qk_clip(), "b": optax.sgd(0.2)},
    lambda params: jax.tree.map(lambda x: "a" if x.ndim > 2 else "b", params),
)
NO_QUERY = {"attn": BLOCK["attn"] | {"query": None}}
UNMATCHED = mc.MatrixRules([("c/kernel$", None)])


def update(tx: Any, updates: Any = BLOCK, params: Any = BLOCK, **extra: Any) -> Any:
    return tx.update(updates, tx.init(BLOCK), params, **extra)


REAL_MOMENTUM = "mu_dtype='float32' is real"
COMPLEX_MOMENTUM = "mu_dtype='complex64' is complex"
KERNEL, BIAS = {"w": ones()}, {"bias": ones(jnp.float32, 8)}
#: Calls of `init` and `update`.
CALLS: list[tuple[Any, str]] = [
    (lambda: init(mc.scale_by_muon(mu_dtype="complex64"), **KERNEL), f"r/w .*{COMPLEX_MOMENTUM}"),
    (lambda: init(muon(mu_dtype="complex64"), **BIAS), f"layer/bias .*{COMPLEX_MOMENTUM}"),
    (lambda: init(clip(mu_dtype="complex64"), **KERNEL), f"layer/w .*{COMPLEX_MOMENTUM}"),
    (lambda: mc.scale_by_muon(mu_dtype="float32").init(COMPLEX), f"w .*{REAL_MOMENTUM}"),
    (lambda: muon(mu_dtype="float32").init(COMPLEX), f"w .*{REAL_MOMENTUM}"),
    (
        lambda: init(clip(mu_dtype="float32"), bias=ones(jnp.complex64, 8)),
        f"layer/bias .*{REAL_MOMENTUM}",
    ),
    *(
        (lambda make=make: make(mu_dtype="float64").init(REAL), "'float64' needs 64-bit types")
        for make in MUON
    ),
    *(
        (lambda dtype=dtype: init(mc.scale_by_muon(), w=ones(dtype)), f"layer/w has dtype {dtype};")
        for dtype in ("int32", "bool", "float8_e4m3fn")
    ),
    (
        lambda: mc.scale_by_muon(ns_dtype="float16").init(COMPLEX),
        "w: ns_dtype='float16' is not pos",
    ),
    (lambda: mc.scale_by_muon(ns_dtype="float64").init(REAL), "w: ns_dtype='float64' needs 64-bit"),
    (lambda: init(mc.scale_by_muon(), bias=jnp.ones(4)), "layer/bias"),
    *(
        (lambda make=make: make(rules=UNMATCHED).init(BLOCK), r"'c/kernel\$' matches no path of")
        for make in (muon, clip)
    ),
    (lambda: update(mc.hyperball(0.1), params=None), "needs the parameters"),
    (lambda: update(mc.add_weight_decay(0.1), params=None), "needs the parameters"),
    (lambda: update(mc.qk_clip(), params=None, max_logits=MAXIMA), "needs the parameters"),
    (lambda: update(mc.qk_clip()), r"tx\.update\(grads, state, params, max_logits="),
    (lambda: update(mc.muonclip(0.02)), r"max_logits=max_logits.*qk_clip_threshold=None"),
    (lambda: update(mc.qk_clip(), NO_QUERY, max_logits=MAXIMA), "'attn/query/.*have no entry for"),
    (lambda: update(PARTLY, max_logits=MAXIMA), "partly visible.*multi_transform.*outer chain"),
    (lambda: mc.qk_clip(blocks="decoder").init(SHAPES), "'decoder' matches no path"),
    (lambda: mc.qk_clip(blocks=OTHER).init(SHAPES), "needs 'ask' and 'answer'"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_trees(call: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
