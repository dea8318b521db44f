"""Names of the projections of attention that stand side by side."""

#: A query, a key and a value projection that stand side by side, and who calls them so.
QUERY_KEY_VALUE: tuple[tuple[str, str, str], ...] = (
    ("query", "key", "value"),  # Linen and NNX attention, MaxText, BERT and ViT of Hugging Face
    ("q", "k", "v"),  # T5
    ("c_q", "c_k", "c_v"),  # nanochat
    *(
        (start + "q" + end, start + "k" + end, start + "v" + end)
        # q_proj: Llama, Qwen, GPT-J, BART, CLIP; to_q: diffusion models; q_lin: DistilBERT
        for start, end in (
            *(("", end) for end in ("_proj", "_lin", "_linear", "_dense")),
            *((start, "") for start in ("w", "w_", "W", "W_", "to_", "linear_")),
        )
    ),
    *(
        ("query" + end, "key" + end, "value" + end)  # query_proj: Equinox
        for end in ("_proj", "_projection", "_linear", "_dense")
    ),
)

#: Output projections, whose input features are all the heads' values, in one spelling.
OUT_NAMES: tuple[str, ...] = (
    *("out", "o_proj", "out_proj", "output_proj", "wo", "w_o", "to_out"),
    "c_proj",  # GPT-2
    "o",  # T5
    "to_out_0",  # diffusion models
    "out_lin",  # DistilBERT
    *("attn_out", "attention_out", "o_dense", "out_dense", "output_dense"),
    *("out_linear", "output_linear", "out_projection", "output_projection"),
    "dense",  # BLOOM, GPT-NeoX, Falcon
    "attn_vec_einsum",  # Gemma in its own library
    "proj",  # ViT of timm
)
