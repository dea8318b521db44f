"""The words that libraries use for the same thing, as patterns for whole names.

The spelling is that of `names.py`. Each pattern must match a whole name; `word` makes one that asks
for a word of the name. `heads/layouts.py` names the projections of attention.
"""

from muonclip_jax.heads.layouts import OUT_NAMES, QUERY_KEY_VALUE
from muonclip_jax.heads.names import spelling

# Those that say so little, or lie so differently, that the table has rows of their own for them.
_OWN_ROWS = ("out", "dense", "attn_vec_einsum")


def word(words: str) -> str:
    """A name that has one of these words, between underscores, a number after it or not."""
    return rf"(?:.*_)?(?:{words})\d*(?:_.*)?"


DENSE = "dense|linear|lin|fc|ff|ffn|ffw|mlp|proj|projection|project|mapping|projector"
EMBEDDING = (
    "emb|embs|embed|embeds|embedding|embeddings|embedder|embedders|wte|wpe|wtt|posemb|posembed|"
    "tokemb|codebook|codebooks|vocab|vocabulary|vocabularies"
)
TOKENS = (
    r"(?:.*_)?(?:cls|class|mask|register|prompt|query|latent|learned|dist|sep|memory|soft)s?"
    r"_(?:tokens?|queries|prompts?)|cls|probe|latents|queries|prompts?|tokens?|memory_tokens"
)
RELATIVE = (
    r".*(?:rel_?pos|relative_(?:position|attention)|position_bias|pos_bias|pos_enc|rel_embedding|"
    r"freqs_ci?s|alibi).*"
)
MOE = r"(?!.*(?:layers|blocks)$)" + word("moe|experts?|mixture|mixtral|switch|sparse")
ONE_EXPERT = r"one_expert|.*shared.*"
EXPERTS = r"(?:.*_)?experts"
GATE = r"gate|gating|wg|w_gate|gate_(?:kernel|weights?|w)"
ATTENTION = word("attention|attn|attentions|mha|mla|msa|gqa|mqa|selfattn|crossattn")
NORM = word("ln|norm|layernorm|rmsnorm|batchnorm|groupnorm|bn|gn|rms|lnx|lnf")
STATE_VECTOR = (
    r"a_logs?|dt|dt_(?!proj).*|a_param|log_a|log_dt|time_(?:mix|decay|first|faaaa|maa)(?:_.*)?"
)
HEAD = (
    r"(?!(?:.*_)?(?:multi|single|attention|attn|self|cross|per|talking|kv|num|n)_head)"
    r"(?:.*_)?(?:lm)?head\d*|(?:.*_)?(?:logits?|logitdense|unembed|unembedder|unembedding)(?:_.*)?|"
    r"(?:.*_)?classifier|score|qa_outputs|readout|output_layer|to_logits"
)
# Kernels that Linen, NNX and MaxText build with the heads as an axis of their own ...
LINEN_QKV = r"query|key|value|w(?:q|kv|k|v)_b"
# ... and those that are a plain matrix in most libraries and have such an axis in some.
OTHER_QKV = (
    "|".join(dict.fromkeys(spelling(name) for names in QUERY_KEY_VALUE[1:] for name in names))
    + r"|(?:q|k|v|kv)_b_proj"
)
OTHER_OUT = "|".join(name for name in OUT_NAMES if name not in _OWN_ROWS)
CLEAR_OUT = r"o_proj|(?:attn|attention)_(?:out|output|o|proj|projection)"
QKV = r"qkv|qkv_proj|wqkv|w_qkv|to_qkv|c_attn|qkv_(?:dense|linear|projection)"
FUSED = rf"{QKV}|query_key_value|in_proj_\w+|kv|kv_proj|to_kv|wkv(?:_[ab])?|kv_[ab]_proj(?:_.*)?"
GATE_UP = r"(?:gate_up|up_gate)(?:_proj)?|gate_and_up(?:_proj)?|fused_gate_up(?:_proj)?"
MLP = (
    r"wi|wo|w[1-3]|wi_?\d|w_(?:in|out|up|down|gate|\d)|(?:up|down|gate)(?:_proj|_dense|_linear)?|"
    r"(?:fc|ff|ffn|ffw|linear|dense|mlp)\d*(?:_(?!general).*)?|c_fc|c_proj|intermediate"
)
RECURRENT = r"[ih][fgornz]|[ih]i|if_?|in|i|h"
# Matrices on hidden states in every library that uses the name: two axes, and layers before them.
MATRIX = (
    rf"{MLP}|{RECURRENT}|{GATE}|w(?:q|k|v|kv)_a|(?:q|k|v|kv)_a_proj(?:_.*)?|query_key_value|"
    rf"{QKV}|{GATE_UP}|kv|kv_proj|to_kv|wkv|in_proj(?:_.*)?"
)
CONV = (
    r"(?:.*_)?(?:dw|pw|causal|short|depth)?conv(?:s|olution|\d+d?|nd|transpose|net)?\d*(?:_.*)?|"
    r"depthwise(?:_.*)?|pointwise(?:_.*)?|dw|pw"
)
DEPTHWISE = r".*depthwise.*|dw|(?:.*_)?(?:dw|short|causal|depth)_?conv.*|(?:.*_)?conv_?1d.*"
PATCH = r"patch_?(?:embed|emb|ify)\w*|patchify\w*|(?:conv_)?stem\w*"
STATE_SPACE = word("mamba|mamba2|ssm|s4|s4d|s5|s6|lru|mixer|delta|gdn|kda|mlstm|rwkv")
LORA = "lora|lokr|loha|dora"
LORA_BASE = r"base(?:_(?:module|layer))?"
KV = "kv|kv_proj|to_kv"
# What reads the hidden state of a block, and what writes it.
READS = (
    rf"{LINEN_QKV.split('|w(')[0]}|{OTHER_QKV}|{QKV}|{KV}|{GATE_UP}|[qkv]_einsum|q?kv_einsum|"
    r"gating_einsum|wi|wi_?\d|w[13]|w_(?:in|up|gate)|(?:up|gate)(?:_proj|_dense|_linear)?|fc1|c_fc|"
    r"intermediate|in_proj(?:_.*)?|query_key_value|w(?:q|kv)_a|(?:q|kv)_a_proj(?:_.*)?"
)
WRITES = (
    rf"(?!proj$)(?:out|{OTHER_OUT}|{CLEAR_OUT}|attn_vec_einsum|w2|w_(?:out|down)|down(?:_proj|_dense|_linear)?|"
    r"fc2)"
)
# Names of axes, as haliax, Flax and MaxText give them.
STACK_AXIS = r"(?:.*_)?(?:layers?|stages?|repeats?|blocks?|periods?|scan)"
BATCH_AXIS = r"(?:.*_)?(?:experts?|exp)(?:_.*)?|(?:num_)?qkv|(?:num_)?kv_stack"
WIDTH_AXIS = r"(?:embed|emb|embedding|hidden|model|d_model|model_dim)(?:_(?!vocab).*)?"
TABLE_AXIS = r"(?:.*_)?(?:vocab|positions?)(?:_.*)?"
# Tables that are no tables of tokens.
NOT_TOKENS = word(
    "pos|position|positions|positional|posemb|posembed|wpe|type|types|segment|segments|time|layer|"
    "relative|rel|codebook|codebooks"
)
KEY_VALUE = r"(?:.*_)?(?:k|v|kv|key|value|wk|wv|wkv)(?:_.*)?"
