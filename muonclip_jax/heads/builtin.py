"""The attention layouts that are found by name, and the names of what stands beside q and k."""

from muonclip_jax.heads.layouts import AttentionLayout, Projection, separate
from muonclip_jax.heads.words import QUERY_KEY_VALUE

#: Names of a query and a key projection that stand side by side.
QUERY_KEY_NAMES: tuple[tuple[str, str], ...] = tuple(names[:2] for names in QUERY_KEY_VALUE)
#: What the value projection beside them is called.
VALUE_NAMES: tuple[str, ...] = tuple(value for *_, value in QUERY_KEY_VALUE)

_FUSED = ("query", "key", "value")


def _latent(query: str, down: str, up: str) -> AttentionLayout:
    """Latent attention; `up` makes keys and values together, or keys alone."""
    low_rank = " (low-rank query)" if query in ("wq_b", "q_b_proj") else ""
    parts = ("key",) if up in ("wk_b", "k_b_proj") else ("key", "value")
    return AttentionLayout(
        (
            Projection(query, ("query", "query_alone"), interleaved=True),
            Projection(up, parts, interleaved=True),
        ),
        "latent" + low_rank,
        latent=(down, up),
    )


def _fused(path: str, axis: int | tuple[int, ...] | None = None) -> AttentionLayout:
    return AttentionLayout((Projection(path, _FUSED, input_axis=axis),), "fused q k v")


def _einsum(query: str, key: str, parts: tuple[str, ...], name: str) -> AttentionLayout:
    """Kernels of Gemma, in its own library, tunix and NNX's examples: (heads, d_model, size)."""
    return AttentionLayout(
        (Projection("q_einsum", (query,), input_axis=-2), Projection(key, parts, input_axis=-2)),
        name,
    )


#: Tried in this order under every module; the first whose projections are all there is taken.
BUILTIN_LAYOUTS: tuple[AttentionLayout, ...] = (
    *(
        _latent(query, "wkv_a", up)  # MaxText
        for up in ("wkv_b", "wk_b")
        for query in ("wq_b", "query", "wq")
    ),
    *(
        _latent(query, "kv_a_proj_with_mqa", up)  # DeepSeek and Kimi of Hugging Face
        for up in ("kv_b_proj", "k_b_proj")
        for query in ("q_b_proj", "q_proj")
    ),
    *(
        AttentionLayout(
            (
                Projection("q_nope" + end, ("query",)),
                Projection("q_rope" + end, ("query_alone",)),
                Projection("k_nope" + end, ("key",)),
            ),
            "latent (separate parts)",
        )
        for end in ("", "_proj")
    ),
    *(separate(query, key) for query, key in QUERY_KEY_NAMES),
    _einsum("query", "kv_einsum", ("key", "value"), "separate q, fused k v"),
    # Gemma 4: the keys are the values too, so that only queries can be scaled.
    _einsum("query_alone", "k_einsum", ("value",), "separate q, keys that are values"),
    _fused("qkv_einsum", -2),
    # GPT-2: Hugging Face Flax keeps (features, inputs), others (inputs, features).
    _fused("c_attn", (0, -1)),
    _fused("qkv_proj"),
    _fused("qkv"),
    # BLOOM and GPT-NeoX head by head; Falcon group by group.
    AttentionLayout(
        (Projection("query_key_value", _FUSED, interleaved=True),), "fused q k v, interleaved"
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
    *(
        ("query" + end, "key" + end)
        for end in ("_ln", "_norm", "_layer_norm")  # query_ln: Flax
    ),
    *(("q" + end, "k" + end) for end in ("_norm", "_layernorm", "_ln")),
    ("_query_norm", "_key_norm"),
    ("norm_q", "norm_k"),
)
GAIN_NAMES = ("scale", "weight", "w", "gain", "gamma", "")
SHIFT_NAMES = ("bias", "beta", "offset")
