"""Names of the projections of attention that stand side by side."""

#: A query, a key and a value projection that stand side by side, and who calls them so.
QUERY_KEY_VALUE: tuple[tuple[str, str, str], ...] = (
    ("query", "key", "value"),  # Linen and NNX attention, MaxText, BERT and ViT of Hugging Face
    ("q_proj", "k_proj", "v_proj"),  # Llama, Gemma, Qwen, Mistral, GPT-J, OPT, BART, CLIP, Whisper
    ("query_proj", "key_proj", "value_proj"),  # Equinox
    ("query_projection", "key_projection", "value_projection"),
    ("wq", "wk", "wv"),
    ("w_q", "w_k", "w_v"),
    ("q", "k", "v"),  # T5
    ("to_q", "to_k", "to_v"),  # diffusion models
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("c_q", "c_k", "c_v"),  # nanochat
    ("Wq", "Wk", "Wv"),
    ("W_q", "W_k", "W_v"),
    ("q_linear", "k_linear", "v_linear"),
    ("query_linear", "key_linear", "value_linear"),
    ("linear_q", "linear_k", "linear_v"),
    ("q_dense", "k_dense", "v_dense"),
    ("query_dense", "key_dense", "value_dense"),
)

#: Output projections, whose input features are all the heads' values, in one spelling.
OUT_NAMES: tuple[str, ...] = (
    "out",  # Linen and NNX attention, MaxText
    "o_proj",
    "out_proj",
    "output_proj",
    "c_proj",  # GPT-2
    "wo",
    "w_o",
    "o",  # T5
    "to_out",
    "to_out_0",  # diffusion models
    "out_lin",  # DistilBERT
    "attn_out",
    "attention_out",
    "o_dense",
    "out_dense",
    "output_dense",
    "out_linear",
    "output_linear",
    "out_projection",
    "output_projection",
    "dense",  # BLOOM, GPT-NeoX, Falcon
    "attn_vec_einsum",  # Gemma in its own library
    "proj",  # ViT of timm
)
