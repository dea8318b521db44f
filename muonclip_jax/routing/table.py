"""The table of parameter names: which leaves are matrices, and which AdamW trains.

The first row that fits a leaf decides. A row's names are regular expressions that must match a
whole normalised name (see `leaves.py`). A row has one layout or several of different rank: a letter
for each axis of one layer ("-" for AdamW), or "" for AdamW at any rank. Layouts do not contain the
axes of stacked layers, which `stacks.py` removes first, and have the input first; `inference.py`
reverses those of libraries that have it last.

As in Jordan et al. 2024 (kellerjordan.github.io/posts/muon) and Moonlight (arXiv 2502.16982), Muon
trains matrices that act on hidden states. AdamW trains embedding tables, output heads, router
kernels, biases, gains and norms, and three more kinds:

1. LoRA factors: only their product matters, and the polar factor of one factor is not the steepest
   descent direction of the product.
2. Depthwise filters: they mix no channels, so they are not matrices. Other convolutions, including
   the first one of a model, are matrices from (window, input channels) to output channels.
3. Learned tokens, queries and tables, of any rank: they are inputs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from muonclip_jax.heads.finding import Shape
from muonclip_jax.heads.layouts import OUT_NAMES, QUERY_KEY_VALUE, spelling
from muonclip_jax.routing.leaves import LeafName


@dataclass(frozen=True)
class Row:
    """One row of the table; a name of None is any."""

    why: str  # as `describe_labels` prints it
    layouts: str = ""
    role: str | None = None  # the most telling name
    leaf: str | None = None  # the last name
    scope: str | None = None  # some name before the role
    without: str | None = None  # no name before the role
    parent: str | None = None  # the name right before the role
    stacked: bool = False  # whether the path must show stacked layers
    shape: Callable[[Shape], bool] | None = None  # what must hold of one layer's shape
    parts: int = 1  # into how many equal parts the last output axis falls


class Entry(NamedTuple):
    """What the table has on a leaf."""

    why: str = ""
    layout: str | None = None  # "" is AdamW; None is unknown
    parts: int = 1
    decays: bool = True  # whether weight decay applies where AdamW trains
    sure: bool = False  # False if only the rank shows it


def word(words: str) -> str:
    """A name that contains one of these words between underscores, optionally with a number."""
    return rf"(?:.*_)?(?:{words})\d*(?:_.*)?"


DENSE = word("dense|linear|lin|fc|ff|ffn|ffw|mlp|proj|projection|project|mapping|projector")
_EMBEDDING = word(
    "emb|embs|embed|embeds|embedding|embeddings|embedder|embedders|wte|wpe|wtt|posemb|posembed|"
    "tokemb|codebook|codebooks|vocab|vocabulary|vocabularies"
)
_TOKENS = (
    r"(?:.*_)?(?:cls|class|mask|register|prompt|query|latent|learned|dist|sep|memory|soft)s?"
    r"_(?:tokens?|queries|prompts?)|cls|probe|latents|queries|prompts?|tokens?|memory_tokens"
)
_RELATIVE = (
    r".*(?:rel_?pos|relative_(?:position|attention)|position_bias|pos_bias|pos_enc|rel_embedding|"
    r"freqs_ci?s|alibi).*"
)
MOE = r"(?!.*(?:layers|blocks)$)" + word("moe|experts?|mixture|mixtral|switch|sparse")
_ONE_EXPERT = r"one_expert|.*shared.*"
_GATE = r"gate|gating|wg|w_gate|gate_(?:kernel|weights?|w)"
_ATTENTION = word("attention|attn|attentions|mha|mla|msa|gqa|mqa|selfattn|crossattn")
_NORM = word("ln|norm|layernorm|rmsnorm|batchnorm|groupnorm|bn|gn|rms|lnx|lnf")
_STATE_VECTOR = (
    r"a_logs?|dt|dt_(?!proj).*|a_param|log_a|log_dt|time_(?:mix|decay|first|faaaa|maa)(?:_.*)?"
)
_HEAD = (
    r"(?!(?:.*_)?(?:multi|single|attention|attn|self|cross|per|talking|kv|num|n)_head)"
    r"(?:.*_)?(?:lm)?head\d*|(?:.*_)?(?:logits?|logitdense|unembed|unembedder|unembedding)(?:_.*)?|"
    r"(?:.*_)?classifier|score|qa_outputs|readout|output_layer|to_logits"
)
_HEADS = rf"{_HEAD}|heads?_.*"
# Kernels that Linen, NNX and MaxText build with the heads as an axis of their own ...
_LINEN_QKV = "query|key|value"
# ... and those that are a plain matrix in most libraries and have such an axis in some.
_OTHER_QKV = "|".join(dict.fromkeys(spelling(x) for names in QUERY_KEY_VALUE[1:] for x in names))
_ALL_QKV = rf"{_LINEN_QKV}|{_OTHER_QKV}|w(?:q|kv|k|v)_b|(?:q|k|v|kv)_b_proj"
# Those that say so little, or lie so differently, have rows of their own.
_OUT = "|".join(name for name in OUT_NAMES if name not in ("out", "dense", "attn_vec_einsum"))
_CLEAR_OUT = r"o_proj|(?:attn|attention)_(?:out|output|o|proj|projection)"
_QKV = r"qkv|qkv_proj|wqkv|w_qkv|to_qkv|c_attn|qkv_(?:dense|linear|projection)"
_KV = "kv|kv_proj|to_kv"
_FUSED = rf"{_QKV}|{_KV}|query_key_value|in_proj_\w+|wkv(?:_[ab])?|kv_[ab]_proj(?:_.*)?"
_GATE_UP = r"(?:gate_up|up_gate)(?:_proj)?|gate_and_up(?:_proj)?|fused_gate_up(?:_proj)?"
_MLP = (
    r"wi|wo|w[1-3]|wi_?\d|w_(?:in|out|up|down|gate|\d)|(?:up|down|gate)(?:_proj|_dense|_linear)?|"
    r"(?:fc|ff|ffn|ffw|linear|dense|mlp)\d*(?:_(?!general).*)?|c_fc|c_proj|intermediate"
)
# Matrices on hidden states in every library that uses the name: two axes, and layers before them.
_MATRIX = (
    rf"{_MLP}|{_GATE}|w(?:q|k|v|kv)_a|(?:q|k|v|kv)_a_proj(?:_.*)?|query_key_value|{_QKV}|"
    rf"{_GATE_UP}|{_KV}|wkv|in_proj(?:_.*)?|[ih][fgornz]|[ih]i|if_?|in|i|h"
)
_CONV = (
    r"(?:.*_)?(?:dw|pw|causal|short|depth)?conv(?:s|olution|\d+d?|nd|transpose|net)?\d*(?:_.*)?|"
    r"depthwise(?:_.*)?|pointwise(?:_.*)?|dw|pw"
)
_DEPTHWISE = r".*depthwise.*|dw|(?:.*_)?(?:dw|short|causal|depth)_?conv.*|(?:.*_)?conv_?1d.*"
_PATCH = r"patch_?(?:embed|emb|ify)\w*|patchify\w*|(?:conv_)?stem\w*"
_STATE_SPACE = word("mamba|mamba2|ssm|s4|s4d|s5|s6|lru|mixer|delta|gdn|kda|mlstm|rwkv")
_LORA = word("lora|lokr|loha|dora")
_LORA_BASE = r"base(?:_(?:module|layer))?"
_ROUTING = word("router|routers|routing")
_ROUTER = rf"{_ROUTING}|.*experts?_gat(?:e|ing)|gating_network|gate_(?:logits?|network|fn)"
_NOT_TRAINED = "batch_stats|cache|intermediates|running_stats|buffers|rngs|non_trainable"
_BIAS = word("bias|biases|offset") + r"|b\d+|b_(?:in|out|up|down|gate|[qkvo]|[ih][a-z]?)|b[qkvo]"
_GAIN = r"(?:.*_)?(?:scales?|gains?|gamma|beta|temperature|slope|multiplier|sinks?)|ls\d*"
# What reads the hidden state of a block, and what writes it.
_READS = (
    rf"{_LINEN_QKV}|{_OTHER_QKV}|{_QKV}|{_KV}|{_GATE_UP}|[qkv]_einsum|q?kv_einsum|gating_einsum|"
    r"wi|wi_?\d|w[13]|w_(?:in|up|gate)|(?:up|gate)(?:_proj|_dense|_linear)?|fc1|c_fc|intermediate|"
    r"in_proj(?:_.*)?|query_key_value|w(?:q|kv)_a|(?:q|kv)_a_proj(?:_.*)?"
)
_WRITES = (
    rf"(?!proj$)(?:out|{_OUT}|{_CLEAR_OUT}|attn_vec_einsum|w2|w_(?:out|down)|"
    r"down(?:_proj|_dense|_linear)?|fc2)"
)


EXPERT_STACK = "expert stack"
EMBEDDING_TABLE = "embedding table"
OUTPUT_HEAD = "output head"
_LORA_FACTOR = "LoRA factor: only the product acts"
_NO_CHANNELS = "depthwise filters: no channels are mixed"
_KERNEL = "kernel|w|weight"
_MOE: Any = {"scope": MOE, "without": _ONE_EXPERT}

#: Vectors, which heads and stacked layers give more axes. Weight decay does not apply.
VECTORS = (
    Row("no trained parameter", scope=_NOT_TRAINED),
    Row("bias", leaf=_BIAS),
    Row("bias", leaf="b", parent=rf"{DENSE}|{_CONV}|{_LINEN_QKV}|{_ATTENTION}"),
    Row("bias or gain", leaf="b|g", stacked=True),
    Row("gain or scale", leaf=_GAIN),
    Row("running statistic", leaf="mean|var|variance|running_.*|moving_.*|sigma|ema_.*|count"),
    Row("norm", role=rf"(?!ada|.*modulation){_NORM}", leaf="(?!kernel$).*"),
    Row("norm", role=rf"(?!ada|.*modulation|{DENSE}$){_NORM}"),
    Row("state-space vector", role=_STATE_VECTOR),
    Row("state-space vector", "", "d|a|lambda|nu|theta|nu_log|theta_log", scope=_STATE_SPACE),
)
ROWS = (
    Row(_LORA_FACTOR, role=_LORA),
    Row(_LORA_FACTOR, role=rf"(?!{_LORA_BASE}$).*", scope=_LORA, without=_LORA_BASE),
    *VECTORS,
    Row("half of a complex matrix", role=r"[bc]\d?_(?:re|im|real|imag)"),
    Row("a complex matrix as pairs", "---", r"[bc]\d?", shape=lambda s: s[-1] == 2),
    # Tables that are looked up, and learned inputs.
    Row("relative position table", role=_RELATIVE, leaf="(?!kernel$).*"),
    Row("relative position table", leaf="embedding|embeddings", parent=_RELATIVE),
    Row("learned input", role=_TOKENS, leaf="(?!kernel$).*"),
    Row(EMBEDDING_TABLE, leaf="embeddings?|embedding_table|table|.*_embeddings?"),
    Row("patches as a convolution", "iiio iiiio", rf"{_PATCH}|{_EMBEDDING}", _KERNEL),
    Row("patches as a convolution", "iiio iiiio", None, _KERNEL, rf".*{_PATCH}"),
    Row("dense layer on embeddings", "io", rf"(?={_EMBEDDING}$)(?={DENSE}$).*", _KERNEL),
    Row("dense layer on patches", "io", _PATCH, _KERNEL),
    Row(EMBEDDING_TABLE, role=_EMBEDDING),
    # Routers. A gate is one where mixture-of-experts modules say so; gate_proj never is.
    Row("router", "", _ROUTER),
    Row("router", scope=_ROUTING),
    Row("gate of one expert", "io", _GATE, parent=_ONE_EXPERT),
    Row(EXPERT_STACK, "bio", _GATE, parent="experts"),
    Row("router", "", _GATE, _KERNEL, **_MOE),
    Row("router", "--", _GATE, **_MOE),
    Row(EXPERT_STACK, "bio", _GATE, **_MOE),
    Row("narrow gate: a router", "--", "gate|gating|wg", shape=lambda s: 2 * s[-1] <= s[-2]),
    # Attention projections.
    Row("attention, fused", "iboo", _QKV, shape=lambda s: s[1] == 3),
    Row("attention, fused", "booi", _QKV, shape=lambda s: s[0] == 3),
    Row("attention, fused", "iboo", _KV, shape=lambda s: s[1] == 2),
    Row("attention, heads first", "oio", "[qkv]_einsum"),
    Row("attention, fused, heads first", "boio", "qkv_einsum|kv_einsum"),
    Row("attention output", "iio", "attn_vec_einsum"),
    Row("attention, heads merged", "ioo", "gating", scope=_ATTENTION),
    Row("attention output, width first", "oii", "post", scope=_ATTENTION),
    Row("attention, fused", "bioo", "combined_qkv"),
    # haliax counts query heads on two axes, and keeps kernels as "weight".
    Row("attention, heads merged", "iooo", _ALL_QKV, "weight"),
    Row("attention, heads merged", "ioo", _ALL_QKV),
    Row("attention projection", "io", _ALL_QKV),
    Row("attention output, heads merged", "iio", "out"),
    Row("attention output, heads merged", "iio", _OUT, scope=_ATTENTION),
    Row("attention output, heads merged", "iio", _CLEAR_OUT),
    Row("attention output", "io", rf"out|{_OUT}", scope=_ATTENTION),
    Row("attention output", "io", _CLEAR_OUT),
    # Convolutions.
    Row(_NO_CHANNELS, "", _DEPTHWISE, shape=lambda s: s[-2] == 1),
    Row(_NO_CHANNELS, "", _CONV, scope=_DEPTHWISE, shape=lambda s: s[-2] == 1),
    Row(_NO_CHANNELS, "--", _DEPTHWISE),
    Row("convolution, one kernel a position", "bio bbio bbbio", r"(?:.*_)?conv_?local.*"),
    Row("convolution", "iio iiio iiiio", _CONV, rf"{_KERNEL}|{_CONV}"),
    Row("convolution", "iio iiio iiiio", "[ih]h", "kernel", ".*conv.*"),
    # Fused kernels whose parts can be told.
    Row("fused query, key, value", "io", _QKV, shape=lambda s: s[-1] == 3 * s[-2], parts=3),
    Row("fused query, key, value", "oi", _QKV, shape=lambda s: s[-2] == 3 * s[-1], parts=3),
    Row("fused query, key, value", "ibo", _QKV, shape=lambda s: s[1] == 3),
    Row("fused query, key, value", "bio", _QKV, shape=lambda s: s[0] == 3),
    # Gemma keeps it as (2, in, out) or (2, out, in): the hidden layer is the wider one.
    Row("gate and up on one axis", "bio bbio", "gating_einsum", shape=lambda s: s[-1] >= s[-2]),
    Row("gate and up on one axis", "boi bboi", "gating_einsum"),
    # Stacks of experts.
    Row("expert stack, gate and up fused", "bio", _GATE_UP, parts=2, **_MOE),
    Row(EXPERT_STACK, "bio", _MLP, **_MOE),
    Row(EXPERT_STACK, "bio", scope=r"(?:.*_)?experts", without=_ONE_EXPERT),
    Row(EXPERT_STACK, "bio", r"(?:.*_)?experts"),
    Row("fused gate and up", "io", _GATE_UP, parts=2),
    Row("gate and up on axis 1", "ibo", "wi", shape=lambda s: s[1] == 2),
    # Output heads.
    Row(OUTPUT_HEAD, role=_HEAD),
    Row(OUTPUT_HEAD, role="decoder", scope=rf"cls|predictions|{_HEAD}"),
    Row("inside an output head", role=rf"{_MATRIX}|{_OUT}|layers|out|output", parent=_HEADS),
    # GPT-2 in Hugging Face Flax keeps kernels as (out, in): the longer axis tells.
    Row("dense layer", "oi", "c_fc", shape=lambda s: s[-1] < s[-2]),
    Row("dense layer", "oi", "c_proj", scope="mlp", shape=lambda s: s[-1] >= s[-2]),
    # Plain matrices.
    Row("fused projection, kept whole: a rule may split it", "io", _FUSED),
    Row("matrix", "io", _MATRIX),
    Row("matrix", "io", DENSE, stacked=True),
    Row("matrix", "io"),
)

_compiled = lru_cache(maxsize=None)(re.compile)


def fits(pattern: str | None, *names: str) -> bool:
    """Whether a pattern matches one of the names as a whole; None fits everything."""
    return pattern is None or any(_compiled(pattern).fullmatch(name) for name in names)


@lru_cache(maxsize=8192)
def _rows_of(name: LeafName) -> tuple[Row, ...]:
    """The rows whose names fit, in their order."""
    scope = name.scope
    return tuple(
        row
        for row in ROWS
        if fits(row.role, name.role)
        and fits(row.leaf, name.leaf)
        and fits(row.scope, *scope)
        and fits(row.parent, *scope[-1:])
        and not (row.without is not None and fits(row.without, *scope))
        and (name.stacked or not row.stacked)
    )


@lru_cache(maxsize=65536)
def look_up(name: LeafName, shape: Shape) -> Entry:
    """The first row that fits a leaf without stacked layers, and its layout on that shape."""
    for row in _rows_of(name) if len(shape) > 1 else ():
        for layout in row.layouts.split() or [""]:
            if len(layout) in (0, len(shape)) and (row.shape is None or row.shape(shape)):
                layout = layout.replace("-", "")
                return Entry(row.why, layout, row.parts, row not in VECTORS, row is not ROWS[-1])
    return Entry()


@lru_cache(maxsize=8192)
def direction(name: LeafName) -> str:
    """Whether the hidden state is a kernel's input ("i") or output ("o"), or unknown by name."""
    return "i" if fits(_READS, name.role) else "o" if fits(_WRITES, name.role) else ""
