"""Small models as people write them, in plain JAX: forward, clip, forward again.

The forward pass runs in the dtype of the weights, with a causal mask, and looks at its own logits;
nothing in it is the library's. Afterwards a clipped head's largest logit is the threshold and every
other head's is what it was.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.clipping import apply_qk_clip
from muonclip_jax.heads.layouts import AttentionLayout, Projection
from tests.clipping.models import normal
from tests.helpers import TOLERANCE

TOKENS, WIDTH, HEADS, SIZE = 9, 16, 4, 8
X = normal(2, TOKENS, WIDTH, seed=7)

Params = dict[str, Any]


class Model(NamedTuple):
    """A model: its weights' shapes, and queries, keys and values made from them."""

    shapes: dict[str, tuple[int, ...]]
    project: Callable[[Params, jax.Array], tuple[jax.Array, ...]]
    change: Callable[[jax.Array], jax.Array] = lambda logits: logits
    sink: float | None = None
    blocks: Any = None


def rotate(x: jax.Array) -> jax.Array:
    """Turns pairs of features by the token's position, in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    frequencies = 10.0 ** -jnp.linspace(0.0, 2.0, a.shape[-1])
    angle = jnp.arange(x.shape[1])[:, None, None] * frequencies
    turned = (a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle))
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def by_heads(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("btd,dnh->btnh", x, kernel)


def separate(p, x):
    return tuple(by_heads(x, p[name]["kernel"]) for name in ("query", "key", "value"))


def grouped(p, x):
    q, k, v = (x @ p[name]["kernel"] for name in ("q_proj", "k_proj", "v_proj"))
    q = q.reshape(*q.shape[:2], HEADS, SIZE)
    k, v = (jnp.repeat(y.reshape(*y.shape[:2], 2, SIZE), 2, axis=2) for y in (k, v))
    return rotate(q), rotate(k), v


def fused(p, x):
    y = x @ p["qkv"]["kernel"] + p["qkv"]["bias"]
    return tuple(part.reshape(*x.shape[:2], HEADS, SIZE) for part in jnp.split(y, 3, axis=-1))


def latent(p, x):
    q = by_heads(x @ p["wq_a"]["kernel"], p["wq_b"]["kernel"])
    q_nope, q_rope = jnp.split(q, [SIZE], axis=-1)
    down = x @ p["wkv_a"]["kernel"]
    latent, k_rope = jnp.split(down, [6], axis=-1)
    k_nope, v = jnp.split(by_heads(latent, p["wkv_b"]["kernel"]), [SIZE], axis=-1)
    k_rope = jnp.broadcast_to(rotate(k_rope[:, :, None]), (*k_nope.shape[:-1], 4))
    q = jnp.concatenate([q_nope, rotate(q_rope)], axis=-1)
    return q, jnp.concatenate([k_nope, k_rope], axis=-1), v


def gated(p, x):
    q, gate = jnp.split(by_heads(x, p["query"]["kernel"]), 2, axis=-1)
    k, v = (jnp.repeat(by_heads(x, p[name]["kernel"]), 2, axis=2) for name in ("key", "value"))
    return rotate(q), rotate(k), v * jax.nn.sigmoid(gate)


def interleaved(p, x):
    q = (x @ p["to_q"]["kernel"]).reshape(*x.shape[:2], HEADS, SIZE)
    kv = (x @ p["to_kv"]["kernel"]).reshape(*x.shape[:2], HEADS, 2, SIZE)
    return q, kv[:, :, :, 0], kv[:, :, :, 1]


def transposed(p, x):
    return tuple(
        jnp.einsum("btd,nhd->btnh", x, p[name]["weight"])
        for name in ("query_proj", "key_proj", "value_proj")
    )


HEAD_AXIS = (WIDTH, HEADS, SIZE)
SEPARATE = {
    **{f"{name}/kernel": HEAD_AXIS for name in ("query", "key", "value")},
    "out/kernel": (HEADS, SIZE, WIDTH),
}
MODELS: dict[str, Model] = {
    "multi-head": Model(SEPARATE, separate),
    "grouped": Model(
        {
            "q_proj/kernel": (WIDTH, HEADS * SIZE),
            "k_proj/kernel": (WIDTH, 2 * SIZE),
            "v_proj/kernel": (WIDTH, 2 * SIZE),
            "o_proj/kernel": (HEADS * SIZE, WIDTH),
        },
        grouped,
    ),
    "fused": Model(
        {
            "qkv/kernel": (WIDTH, 3 * HEADS * SIZE),
            "qkv/bias": (3 * HEADS * SIZE,),
            "proj/kernel": (HEADS * SIZE, WIDTH),
        },
        fused,
    ),
    "latent with rotary": Model(
        {
            "wq_a/kernel": (WIDTH, 6),
            "wq_b/kernel": (6, HEADS, SIZE + 4),
            "wkv_a/kernel": (WIDTH, 6 + 4),
            "wkv_b/kernel": (6, HEADS, SIZE + SIZE),
            "out/kernel": (HEADS, SIZE, WIDTH),
        },
        latent,
    ),
    "gated": Model(
        {
            "query/kernel": (WIDTH, HEADS, 2 * SIZE),
            "key/kernel": (WIDTH, 2, SIZE),
            "value/kernel": (WIDTH, 2, SIZE),
            "out/kernel": (HEADS, SIZE, WIDTH),
        },
        gated,
    ),
    "keys and values head by head": Model(
        {"to_q/kernel": (WIDTH, HEADS * SIZE), "to_kv/kernel": (WIDTH, 2 * HEADS * SIZE)},
        interleaved,
        blocks=AttentionLayout(
            (
                Projection("to_q", ("query",)),
                Projection("to_kv", ("key", "value"), interleaved=True),
            )
        ),
    ),
    "heads on the first axis of a weight": Model(
        {f"{name}_proj/weight": (HEADS, SIZE, WIDTH) for name in ("query", "key", "value")},
        transposed,
    ),
    "soft cap": Model(SEPARATE, separate, change=lambda s: 20.0 * jnp.tanh(s / 20.0)),
    "sink": Model(SEPARATE, separate, sink=50.0),
}


def weights(model: Model, dtype: Any) -> Params:
    params: Params = {}
    for seed, (path, shape) in enumerate(model.shapes.items()):
        module, leaf = path.split("/")
        params.setdefault(module, {})[leaf] = normal(*shape, dtype=dtype, seed=seed + 1)
    return {"block": {"attention": params}}


def forward(model: Model, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention, and the largest logit of every head over the pairs attended to."""
    q, k, v = model.project(params["block"]["attention"], x)
    logits = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k.astype(jnp.float32))
    logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), logits / q.shape[-1] ** 0.5, -jnp.inf)
    maxima = logits.max((0, 2, 3))  # before a cap, and without a sink
    logits = jnp.where(jnp.isfinite(logits), model.change(logits), -jnp.inf)
    if model.sink is not None:
        sink = jnp.full((*logits.shape[:-1], 1), model.sink)
        logits = jnp.concatenate([logits, sink], axis=-1)
    attention = jax.nn.softmax(logits, axis=-1)[..., : x.shape[1]].astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", attention, v), maxima


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_batch_reaches_the_threshold_again_and_not_more(name, dtype):
    model, x = MODELS[name], X.astype(dtype)
    params = weights(model, dtype)

    @jax.jit
    def run(params):
        return forward(model, params, x)

    _, before = run(params)
    largest, second, *_ = sorted(np.asarray(before), reverse=True)
    threshold = float(0.8 * second)  # two heads, or more, are over it
    assert (before < threshold).any()
    assert largest > threshold
    new, info = apply_qk_clip(
        params, {"block/attention": before}, threshold=threshold, blocks=model.blocks
    )
    out, after = run(new)
    over = np.asarray(before > threshold)
    assert int(info.total_clipped) == over.sum()
    np.testing.assert_allclose(after[over], threshold, rtol=TOLERANCE[dtype])
    np.testing.assert_array_equal(after[~over], before[~over])
    assert jax.tree.map(lambda w: w.dtype, new) == jax.tree.map(lambda w: w.dtype, params)
    assert np.isfinite(np.asarray(out, np.float32)).all()
