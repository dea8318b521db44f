"""The attention layouts that are found by name, and the names of what stands beside q and k."""

from muonclip_jax.heads.layouts import AttentionLayout, Projection, separate
from muonclip_jax.heads.words import QUERY_KEY_VALUE

#: Names of a query and a key projection that stand side by side.
QUERY_KEY_NAMES: tuple[tuple[str, str], ...] = tuple(names[:2] for names in QUERY_KEY_VALUE)
#: What the value projection beside them is called.
VALUE_NAMES: tuple[str, ...] = tuple(value for *_, value in QUERY_KEY_VALUE)

_GEMMA_AXES = -2  # (heads, d_model, head_dim): einsum kernels keep the input in the middle


def _latent(query: str, down: str, up: str, name: str) -> AttentionLayout:
    """Latent attention; `up` makes keys and values together, or keys alone."""
    parts = ("key",) if up in ("wk_b", "k_b_proj") else ("key", "value")
    return AttentionLayout(
        (
            Projection(query, ("query", "query_alone"), interleaved=True),
            Projection(up, parts, interleaved=True),
        ),
        name,
        latent=(down, up),
    )


#: Tried in this order under every module; the first whose projections are all there is taken.
BUILTIN_LAYOUTS: tuple[AttentionLayout, ...] = (
    *(
        _latent(query, "wkv_a", up, name)  # MaxText
        for up in ("wkv_b", "wk_b")
        for query, name in (
            ("wq_b", "latent (low-rank query)"),
            ("query", "latent"),
            ("wq", "latent"),
        )
    ),
    *(
        _latent(query, "kv_a_proj_with_mqa", up, name)  # DeepSeek and Kimi of Hugging Face
        for up in ("kv_b_proj", "k_b_proj")
        for query, name in (("q_b_proj", "latent (low-rank query)"), ("q_proj", "latent"))
    ),
    AttentionLayout(
        (
            Projection("q_nope", ("query",)),
            Projection("q_rope", ("query_alone",)),
            Projection("k_nope", ("key",)),
        ),
        "latent (separate parts)",
    ),
    AttentionLayout(
        (
            Projection("q_nope_proj", ("query",)),
            Projection("q_rope_proj", ("query_alone",)),
            Projection("k_nope_proj", ("key",)),
        ),
        "latent (separate parts)",
    ),
    *(separate(query, key) for query, key in QUERY_KEY_NAMES),
    # Gemma in its own library and in the NNX examples.
    AttentionLayout(
        (
            Projection("q_einsum", ("query",), input_axis=_GEMMA_AXES),
            Projection("kv_einsum", ("key", "value"), input_axis=_GEMMA_AXES),
        ),
        "separate q, fused k v",
    ),
    AttentionLayout(
        (Projection("qkv_einsum", ("query", "key", "value"), input_axis=_GEMMA_AXES),),
        "fused q k v",
    ),
    # GPT-2: Hugging Face Flax keeps (features, inputs), others (inputs, features).
    AttentionLayout(
        (Projection("c_attn", ("query", "key", "value"), input_axis=(0, -1)),), "fused q k v"
    ),
    AttentionLayout((Projection("qkv_proj", ("query", "key", "value")),), "fused q k v"),
    AttentionLayout((Projection("qkv", ("query", "key", "value")),), "fused q k v"),
    # BLOOM and GPT-NeoX head by head; Falcon group by group.
    AttentionLayout(
        (Projection("query_key_value", ("query", "key", "value"), interleaved=True),),
        "fused q k v, interleaved",
    ),
    *(
        AttentionLayout(
            (Projection(query, ("query",)), Projection(key_value, ("key", "value"))),
            "separate q, fused k v",
        )
        for query, key_value in (("q_proj", "kv_proj"), ("to_q", "to_kv"), ("q", "kv"))
    ),
)

#: Normalisations of queries and keys, as they are called beside the projections.
NORM_NAMES: tuple[tuple[str, str], ...] = (
    ("query_ln", "key_ln"),
    ("query_norm", "key_norm"),
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("q_ln", "k_ln"),
    ("_query_norm", "_key_norm"),
    ("norm_q", "norm_k"),
    ("query_layer_norm", "key_layer_norm"),
)

#: A leaf's name under its projection -> its kernel's input axis. "" is the projection itself.
KERNEL_NAMES: dict[str, int] = {"kernel": 0, "w": 0, "weight": -1, "": 0}
BIAS_NAMES = ("bias", "b")
#: Low-rank adapters: the kernel is W + A B, so B goes with W and A stays.
ADAPTER_NAMES: dict[str, bool] = {
    "lora_b": True,
    "lora/lora_b": True,
    "lora_a": False,
    "lora/lora_a": False,
}
GAIN_NAMES = ("scale", "weight", "gain", "gamma", "")
SHIFT_NAMES = ("bias", "beta", "offset")
