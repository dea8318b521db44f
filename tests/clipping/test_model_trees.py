"""Trees of known libraries and models, with their names and the shapes' order: what is found there.

Shapes are small; the expected lines are written from the models' own code, not from what is found.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from muonclip_jax.clipping import apply_qk_clip, describe_attention
from muonclip_jax.routing import MatrixRules, label_params


def nested(leaves: dict[str, tuple[int, ...]]) -> Any:
    tree: dict[str, Any] = {}
    for path, shape in leaves.items():
        *modules, leaf = path.split("/")
        inner = tree
        for module in modules:
            inner = inner.setdefault(module, {})
        inner[leaf] = jnp.ones(shape)
    return tree


# name -> (leaves, path of the block, shape of its maxima, what is found, leaf -> what scales it)
MODELS: dict[str, tuple[dict[str, tuple[int, ...]], str, tuple[int, ...], str, dict[str, str]]] = {
    "Linen": (
        {
            "params/block_0/attn/query/kernel": (12, 4, 3),
            "params/block_0/attn/query/bias": (4, 3),
            "params/block_0/attn/key/kernel": (12, 4, 3),
            "params/block_0/attn/key/bias": (4, 3),
            "params/block_0/attn/value/kernel": (12, 4, 3),
            "params/block_0/attn/out/kernel": (4, 3, 12),
        },
        "block_0/attn",
        (4,),
        "separate q and k, 4 heads of 3",
        {"query": "gamma^alpha", "key": "gamma^(1-alpha)"},
    ),
    "NNX with shared keys": (
        {
            "layers/0/attention/query/kernel": (12, 4, 3),
            "layers/0/attention/key/kernel": (12, 2, 3),
            "layers/0/attention/value/kernel": (12, 2, 3),
            "layers/0/attention/out/kernel": (4, 3, 12),
        },
        "layers/0/attention",
        (4,),
        "separate q and k, 4 query heads on 2 key heads of 3",
        {"query": "gamma"},
    ),
    "Llama and Gemma, Hugging Face": (
        {
            "model/layers/0/self_attn/q_proj/kernel": (10, 12),
            "model/layers/0/self_attn/k_proj/kernel": (10, 6),
            "model/layers/0/self_attn/v_proj/kernel": (10, 6),
            "model/layers/0/self_attn/o_proj/kernel": (12, 10),
        },
        "model/layers/0/self_attn",
        (4,),
        "separate q and k, 4 query heads on 2 key heads of 3",
        {"q_proj": "gamma"},
    ),
    "Qwen 2, Hugging Face": (
        {
            "model/layers/0/self_attn/q_proj/kernel": (10, 12),
            "model/layers/0/self_attn/q_proj/bias": (12,),
            "model/layers/0/self_attn/k_proj/kernel": (10, 12),
            "model/layers/0/self_attn/k_proj/bias": (12,),
            "model/layers/0/self_attn/v_proj/kernel": (10, 12),
            "model/layers/0/self_attn/o_proj/kernel": (12, 10),
        },
        "model/layers/0/self_attn",
        (4,),
        "separate q and k, 4 heads of 3",
        {"q_proj": "gamma^alpha", "k_proj": "gamma^(1-alpha)"},
    ),
    "GPT-2, Hugging Face": (
        {
            "transformer/h/0/attn/c_attn/kernel": (36, 12),
            "transformer/h/0/attn/c_attn/bias": (36,),
            "transformer/h/0/attn/c_proj/kernel": (12, 12),
        },
        "transformer/h/0/attn",
        (4,),
        "fused q k v, 4 heads of 3",
        {"c_attn": "gamma^alpha"},
    ),
    "DeepSeek, Hugging Face": (
        {
            "model/layers/0/self_attn/q_a_proj/kernel": (10, 7),
            "model/layers/0/self_attn/q_a_layernorm/weight": (7,),
            "model/layers/0/self_attn/q_b_proj/kernel": (7, 4 * (3 + 2)),
            "model/layers/0/self_attn/kv_a_proj_with_mqa/kernel": (10, 5 + 2),
            "model/layers/0/self_attn/kv_a_layernorm/weight": (5,),
            "model/layers/0/self_attn/kv_b_proj/kernel": (5, 4 * (3 + 6)),
            "model/layers/0/self_attn/o_proj/kernel": (24, 10),
        },
        "model/layers/0/self_attn",
        (4,),
        "latent (low-rank query), 4 heads of 3",
        {"q_b_proj": "query (2 a head) by gamma", "kv_b_proj": "value (6 a head) untouched"},
    ),
    "BERT, Hugging Face": (
        {
            "encoder/layer/0/attention/self/query/kernel": (12, 12),
            "encoder/layer/0/attention/self/key/kernel": (12, 12),
            "encoder/layer/0/attention/self/value/kernel": (12, 12),
        },
        "encoder/layer/0/attention/self",
        (4,),
        "separate q and k, 4 heads of 3",
        {"query": "gamma^alpha", "key": "gamma^(1-alpha)"},
    ),
    "T5, Hugging Face": (
        {
            "encoder/block/0/layer/0/SelfAttention/q/kernel": (12, 12),
            "encoder/block/0/layer/0/SelfAttention/k/kernel": (12, 12),
            "encoder/block/0/layer/0/SelfAttention/v/kernel": (12, 12),
            "encoder/block/0/layer/0/SelfAttention/o/kernel": (12, 12),
        },
        "encoder/block/0/layer/0/SelfAttention",
        (4,),
        "separate q and k, 4 heads of 3",
        {"q": "gamma^alpha", "k": "gamma^(1-alpha)"},
    ),
    "Gemma's own library": (
        {
            "transformer/layer_0/attn/q_einsum/w": (4, 10, 3),
            "transformer/layer_0/attn/kv_einsum/w": (2, 1, 10, 3),
            "transformer/layer_0/attn/attn_vec_einsum/w": (4, 3, 10),
        },
        "transformer/layer_0/attn",
        (4,),
        "separate q, fused k v, 4 query heads on 1 key head of 3",
        {"q_einsum": "gamma"},
    ),
    "MaxText": (
        {
            "params/decoder/layers/self_attention/query/kernel": (10, 3, 4, 6),
            "params/decoder/layers/self_attention/key/kernel": (10, 3, 2, 6),
            "params/decoder/layers/self_attention/value/kernel": (10, 3, 2, 6),
            "params/decoder/layers/self_attention/out/kernel": (4, 3, 6, 10),
        },
        "decoder/layers/self_attention",
        (3, 4),
        "separate q and k, 4 query heads on 2 key heads of 6, stacked (3,)",
        {"query": "gamma"},
    ),
    "MaxText, latent": (
        {
            "params/decoder/moe_layers/self_attention/wq_a/kernel": (10, 3, 7),
            "params/decoder/moe_layers/self_attention/q_norm/scale": (7, 3),
            "params/decoder/moe_layers/self_attention/wq_b/kernel": (7, 3, 4, 5),
            "params/decoder/moe_layers/self_attention/wkv_a/kernel": (10, 3, 8),
            "params/decoder/moe_layers/self_attention/kv_norm/scale": (6, 3),
            "params/decoder/moe_layers/self_attention/wkv_b/kernel": (6, 3, 4, 9),
            "params/decoder/moe_layers/self_attention/out/kernel": (4, 3, 6, 10),
        },
        "decoder/moe_layers/self_attention",
        (3, 4),
        "latent (low-rank query), 4 heads of 3, stacked (3,)",
        {"wq_b": "query (2 a head) by gamma"},
    ),
    "ViT of timm, ported": (
        {
            "blocks/0/attn/qkv/kernel": (12, 36),
            "blocks/0/attn/qkv/bias": (36,),
            "blocks/0/attn/proj/kernel": (12, 12),
            "blocks/0/attn/proj/bias": (12,),
        },
        "blocks/0/attn",
        (4,),
        "fused q k v, 4 heads of 3",
        {"qkv": "gamma^alpha"},
    ),
    "Names of one's own that the router knows": (
        {
            "layers/0/attention/q_dense/kernel": (10, 12),
            "layers/0/attention/k_dense/kernel": (10, 6),
            "layers/0/attention/v_dense/kernel": (10, 6),
            "layers/0/attention/attn_out/kernel": (12, 10),
        },
        "layers/0/attention",
        (4,),
        "separate q and k, 4 query heads on 2 key heads of 3",
        {"q_dense": "gamma"},
    ),
    "Qwen3-Next's gate, MaxText": (
        {
            "params/decoder/layers_3/attention/attention/query/kernel": (10, 4, 6),
            "params/decoder/layers_3/attention/attention/key/kernel": (10, 2, 3),
            "params/decoder/layers_3/attention/attention/value/kernel": (10, 2, 3),
            "params/decoder/layers_3/attention/attention/out/kernel": (4, 3, 10),
        },
        "decoder/layers_3/attention/attention",
        (4,),
        "separate q and k, gate beside q, 4 query heads on 2 key heads of 3",
        {"query": "query (3 a head) by gamma, gate (3 a head) untouched"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found(name):
    leaves, path, shape, found, scaled = MODELS[name]
    maxima = {path: jax.ShapeDtypeStruct(shape, jnp.float32)}
    title, *lines = describe_attention(nested(leaves), maxima).splitlines()
    assert title == f"{path}: {found}"
    for module, factor in scaled.items():
        of_module = [line for line in lines if f"/{module}/" in line]
        assert of_module, module
        assert all(factor in line for line in of_module)
    touched = {line.split("/")[-2] for line in lines}
    assert touched == set(scaled) | (touched & {"kv_b_proj", "wkv_b"})


@pytest.mark.parametrize("name", MODELS)
def test_it_clips_and_every_leaf_has_an_optimizer(name):
    leaves, path, shape, _, _ = MODELS[name]
    params = nested(leaves)
    new, info = apply_qk_clip(params, {path: jnp.full(shape, 400.0)})
    assert int(info.total_clipped) == jnp.zeros(shape).size
    assert jax.tree.structure(new) == jax.tree.structure(params)
    scan_axis = 1 if name.startswith("MaxText") else 0
    for attention in ("merged", "split"):
        rules = MatrixRules(scan_axis=scan_axis, attention=attention)
        labels = jax.tree.leaves(label_params(params, rules))
        assert set(labels) <= {"muon", "adamw"}


@pytest.mark.parametrize(
    "norm", [("q_norm", "k_norm"), ("query_norm", "key_norm"), ("_query_norm", "_key_norm")]
)
def test_models_with_a_gain_that_heads_share_are_refused(norm):
    """Qwen 3, Gemma 3 and OLMoE's descendants: one gain of `(head_dim,)`."""
    leaves = MODELS["Llama and Gemma, Hugging Face"][0]
    gains = {f"model/layers/0/self_attn/{name}/scale": (3,) for name in norm}
    with pytest.raises(ValueError, match=rf"normalised \('{norm[0]}' and '{norm[1]}'\)"):
        apply_qk_clip(nested(leaves | gains), {"model/layers/0/self_attn": jnp.ones(4)})
