"""The table of parameter names: which leaves are matrices, and which AdamW trains.

The first row that fits a leaf decides. A row's names are regular expressions that must match a
whole normalised name (see `leaves.py`). A row has one layout or several of different rank: a letter
for each axis of one layer ("-" for AdamW), or "" for AdamW at any rank. Layouts do not contain the
axes of stacked layers, which `stacks.py` removes first, and have the input first; `inference.py`
reverses those of libraries that have it last.

As in Jordan et al. 2024 and Moonlight (arXiv 2502.16982), Muon trains matrices on hidden states.
AdamW trains embedding tables, output heads, routers, vectors, and three more kinds:

1. LoRA factors: the polar factor of one is not the steepest descent direction of their product.
2. Depthwise filters: they mix no channels, so they are not matrices. Other convolutions are
   matrices from (window, input channels) to output channels.
3. Learned tokens, queries and tables, of any rank: they are inputs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

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
    within: str | None = None  # the role or some name before it
    without: str | None = None  # neither the role nor a name before it
    parent: str | None = None  # the name right before the role
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
_EMBEDDING = "tok|" + word(
    "emb|embs|embed|embeds|embedding|embeddings|embedder|embedders|wte|wpe|wtt|posemb|posembed|"
    "tokemb|codebook|codebooks|vocab|vocabulary|vocabularies|table"
)
_INPUT = (
    r"(?:.*_)?(?:cls|class|mask|register|prompt|query|latent|learned|dist|sep|memory|soft)s?"
    r"_(?:tokens?|queries|prompts?)|cls|probe|latents|queries|prompts?|tokens?|pos|positions?|"
    r".*(?:rel_?pos|relative_(?:position|attention)|pos_enc|rel_embedding|freqs_ci?s|alibi).*"
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
# Kernels that have the heads as an axis of their own in Flax, and those that may have.
_LINEN_QKV = "query|key|value"
_OTHER_QKV = "|".join(dict.fromkeys(spelling(x) for names in QUERY_KEY_VALUE[1:] for x in names))
ALL_QKV = rf"{_LINEN_QKV}|{_OTHER_QKV}|w(?:q|kv|k|v)_b|(?:q|k|v|kv)_b_proj"
_OUT = "|".join(name for name in OUT_NAMES if name not in ("out", "dense", "attn_vec_einsum"))
_CLEAR_OUT = r"o_proj|(?:attn|attention)_(?:out|output|o|proj|projection)"
_QKV = r"qkv|qkv_proj|wqkv|w_qkv|to_qkv|c_attn|qkv_(?:dense|linear|projection)"
_KV = "kv|kv_proj|to_kv"
_GATE_UP = r"(?:gate_up|up_gate)(?:_proj)?|gate_and_up(?:_proj)?|fused_gate_up(?:_proj)?"
_MLP = (
    rf"{_GATE_UP}|wi|wo|w[1-3]|wi_?\d|w_(?:in|out|up|down|gate|\d)|"
    r"(?:up|down|gate)(?:_proj|_dense|_linear)?|"
    r"(?:fc|ff|ffn|ffw|linear|dense|mlp)\d*(?:_(?!general).*)?|c_fc|c_proj|intermediate"
)
# Matrices on hidden states in every library that uses the name: two axes, and layers before them.
_MATRIX = (
    rf"{_MLP}|{_GATE}|w(?:q|k|v|kv)_a|(?:q|k|v|kv)_a_proj(?:_.*)?|query_key_value|{_QKV}|"
    rf"{_KV}|wkv|in_proj(?:_.*)?|[ih][fgornz]|[ih]i|if_?|in|i|h"
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
_ROUTER = word("router|routers|routing") + (
    r"|.*experts?_gat(?:e|ing)|gating_network|gate_(?:logits?|network|fn)"
)
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
_many = partial(Row, without=_ONE_EXPERT)
_moe = partial(_many, within=MOE)

#: Vectors, which heads and stacked layers give more axes. Weight decay does not apply.
VECTORS = (
    Row("bias", leaf=_BIAS),
    Row("gain or scale", leaf=_GAIN),
    Row("norm", role=rf"(?!ada|.*modulation){_NORM}", leaf="(?!kernel$).*"),
    Row("bias or gain", leaf="b|g", parent=rf"{_NORM}|{DENSE}|{_CONV}|{_LINEN_QKV}"),
    Row("running statistic", leaf="(?:running_|moving_)?(?:mean|var|variance)", parent=_NORM),
    Row("state-space vector", role=_STATE_VECTOR),
    Row("state-space vector", role="d|a|lambda|(?:nu|theta)(?:_log)?", within=_STATE_SPACE),
)
ROWS = (
    Row(_LORA_FACTOR, role=_LORA),
    Row(_LORA_FACTOR, within=_LORA, without=_LORA_BASE),
    *VECTORS,
    Row("half of a complex matrix", role=r"[bc]\d?_(?:re|im|real|imag)"),
    Row("a complex matrix as pairs", "---", r"[bc]\d?", shape=lambda s: s[-1] == 2),
    Row("learned input or table of positions", role=_INPUT, leaf="(?!kernel$).*"),
    Row("patches as a convolution", "iiio iiiio", rf"{_PATCH}|{_EMBEDDING}", _KERNEL),
    Row("dense layer on embeddings", "io", rf"{_PATCH}|(?={DENSE}$)(?:{_EMBEDDING})", _KERNEL),
    Row(EMBEDDING_TABLE, role=_EMBEDDING),
    # Routers. A gate is one where mixture-of-experts modules say so; gate_proj never is.
    Row("router", within=_ROUTER),
    _moe("router", "", _GATE, _KERNEL),
    _moe("router", "--", _GATE),
    _many("narrow gate: a router", "--", "gate|gating|wg", shape=lambda s: 2 * s[-1] <= s[-2]),
    # Attention projections. Levanter has its fused kernel in either order.
    Row("attention, fused", "iboo", _QKV, shape=lambda s: s[1] == 3),
    Row("attention, fused", "iboo", _KV, shape=lambda s: s[1] == 2),
    Row("attention, fused", "booi", _QKV, shape=lambda s: s[0] == 3),
    Row("attention, heads first", "oio", "[qkv]_einsum"),
    Row("attention, fused, heads first", "boio", "qkv_einsum|kv_einsum"),
    Row("attention, heads merged", "ioo", "gating", within=_ATTENTION),
    Row("attention output, width first", "oii", "post", within=_ATTENTION),
    Row("attention, fused", "bioo", "combined_qkv"),
    # haliax counts query heads on two axes, and keeps kernels as "weight".
    Row("attention, heads merged", "iooo", ALL_QKV, "weight"),
    Row("attention, heads merged", "ioo io", ALL_QKV),
    Row("attention output, heads merged", "iio io", rf"out|{_OUT}", within=_ATTENTION),
    Row("attention output, heads merged", "iio io", rf"{_CLEAR_OUT}|attn_vec_einsum"),
    Row("attention output, heads merged", "iio", "out"),
    Row(_NO_CHANNELS, "", _CONV, within=_DEPTHWISE, shape=lambda s: s[-2] == 1),
    Row(_NO_CHANNELS, "--", _DEPTHWISE),
    Row("convolution, one kernel a position", "bio bbio bbbio", r"(?:.*_)?conv_?local.*"),
    Row("convolution", "iio iiio iiiio", _CONV, rf"{_KERNEL}|{_CONV}"),
    Row("fused query, key, value", "io", _QKV, shape=lambda s: s[-1] == 3 * s[-2], parts=3),
    Row("fused query, key, value", "oi", _QKV, shape=lambda s: s[-2] == 3 * s[-1], parts=3),
    # Gemma keeps it as (2, in, out) or (2, out, in): the hidden layer is the wider one.
    Row("gate and up on one axis", "bio bbio", "gating_einsum", shape=lambda s: s[-1] >= s[-2]),
    Row("gate and up on one axis", "boi bboi", "gating_einsum"),
    Row("gate and up on axis 1", "ibo", "wi", shape=lambda s: s[1] == 2),
    _moe(EXPERT_STACK, "bio", _MLP),
    _many(EXPERT_STACK, "bio", within=r"(?:.*_)?experts"),
    # Output heads; "cls/predictions/decoder" in BERT, "lm_head/decoder" in RoBERTa.
    Row(OUTPUT_HEAD, role=_HEAD),
    Row(OUTPUT_HEAD, role="decoder", within=rf"predictions|{_HEAD}"),
    Row("inside an output head", role=rf"{_MATRIX}|{_OUT}|layers|out|output", parent=_HEADS),
    Row("matrix", "io", _MATRIX),
    Row("matrix", "io"),
)

_compiled = lru_cache(maxsize=None)(re.compile)


def fits(pattern: str | None, *names: str) -> bool:
    """Whether a pattern matches one of the names as a whole; None fits everything."""
    return pattern is None or any(_compiled(pattern).fullmatch(name) for name in names)


@lru_cache(maxsize=8192)
def _rows_of(name: LeafName) -> tuple[Row, ...]:
    """The rows whose names fit, in their order."""
    names = (*name.scope, name.role)
    return tuple(
        row
        for row in ROWS
        if fits(row.role, name.role)
        and fits(row.leaf, name.leaf)
        and fits(row.within, *names)
        and fits(row.parent, *name.scope[-1:])
        and not (row.without is not None and fits(row.without, *names))
    )


@lru_cache(maxsize=65536)
def look_up(name: LeafName, shape: Shape) -> Entry:
    """The first row that fits a leaf without stacked layers, and its layout on that shape."""
    for row in _rows_of(name) if len(shape) > 1 else ():
        for layout in row.layouts.split() or [""]:
            if len(layout) in (0, len(shape)) and (row.shape is None or row.shape(shape)):
                parts = 2 if fits(_GATE_UP, name.role) else row.parts
                layout = layout.replace("-", "")
                return Entry(row.why, layout, parts, row not in VECTORS, row is not ROWS[-1])
    return Entry()


@lru_cache(maxsize=8192)
def direction(name: LeafName) -> str:
    """Whether the hidden state is a kernel's input ("i") or output ("o"), or unknown by name."""
    return "i" if fits(_READS, name.role) else "o" if fits(_WRITES, name.role) else ""
