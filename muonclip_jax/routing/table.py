"""The table that says, by name, which leaves are matrices and which AdamW trains.

The first row that fits a leaf decides. A row's names are regular expressions that must match a
whole name in the one spelling of `_names.py` ("MoeBlock_0" is "moe_block").

A layout writes one letter an axis: `i` is summed over (the kernel's input), `o` is produced (its
output), `b` is a batch axis, a matrix for each of its entries. A query kernel
`(d_model, heads, head_dim)` is "ioo". A star repeats the letter before it as often as the rank
asks. Axes of stacked layers are no part of a layout: `stacks.py` takes them off first. Kernels are
written with the input first; `orientation.py` turns those of libraries that have it last.

What belongs to Muon follows Jordan et al. 2024 (kellerjordan.github.io/posts/muon) and Moonlight
(arXiv 2502.16982): matrices that act on hidden states. Embedding tables, output heads, router
kernels, biases, gains and norms stay with AdamW, and so do three more kinds:

1. LoRA factors: what acts is their product, and the polar factor of one factor is no steepest
   descent on the product.
2. Depthwise filters: they mix no channels, so there is no matrix in them. Other convolutions are
   matrices from (window, input channels) to output channels, the first one of a model included.
3. Learned tokens, queries and tables: they are inputs, whatever their rank.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from muonclip_jax.heads.names import LeafName
from muonclip_jax.routing import words
from muonclip_jax.routing.words import word


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        why: The reason, as `describe_labels` prints it.
        layouts: A letter an axis, one layout or several of different rank; "" is AdamW.
        role: What the most telling name must be; None here and below is any.
        leaf: What the last name must be.
        scope: What some name before the role must be.
        without: What no name before the role may be.
        parent: What the name right before the role must be.
        stacked: Whether the path must show stacked layers.
        shape: A name in `SHAPES`, asked of the shape without stacked layers.
        ranks: The fewest and most axes without stacked layers.
        parts: Into how many equal parts the last output axis falls.
        decays: Whether weight decay applies where AdamW trains.
        weak: Whether the name says nothing, and only the rank does.
    """

    why: str
    layouts: str = ""
    role: str | None = None
    leaf: str | None = None
    scope: str | None = None
    without: str | None = None
    parent: str | None = None
    stacked: bool | None = None
    shape: str | None = None
    ranks: tuple[int, int] = (2, 99)
    parts: int = 1
    decays: bool = True
    weak: bool = False


#: What a row may ask of a shape `s`, without the axes of stacked layers.
SHAPES: Mapping[str, Callable[[tuple[int, ...]], bool]] = MappingProxyType(
    {
        "tall": lambda s: s[-2] > s[-1],
        "wide": lambda s: s[-1] >= s[-2],
        "wide by three": lambda s: s[-1] == 3 * s[-2],
        "tall by three": lambda s: s[-2] == 3 * s[-1],
        "even": lambda s: s[-1] % 2 == 0,
        "half as wide": lambda s: 2 * s[-1] <= s[-2],
        "one input channel": lambda s: s[-2] == 1,
        "two in the middle": lambda s: s[1] == 2,
        "three in the middle": lambda s: s[1] == 3,
        "three in front": lambda s: s[0] == 3,
    }
)

_MOE: Any = {"scope": words.MOE, "without": words.ONE_EXPERT}
_QKV = rf"{words.LINEN_QKV}|{words.OTHER_QKV}"
_VECTOR: Any = {"decays": False}

ROWS: tuple[Row, ...] = (
    Row(
        "no trained parameter",
        scope="batch_stats|cache|intermediates|running_stats|buffers|rngs|non_trainable",
        **_VECTOR,
    ),
    Row("LoRA factor: only the product acts", role=word(words.LORA)),
    Row("LoRA factor: only the product acts", leaf=word(words.LORA)),
    Row(
        "LoRA factor: only the product acts",
        role=rf"(?!{words.LORA_BASE}$).*",
        scope=word(words.LORA),
        without=words.LORA_BASE,
    ),
    # Vectors, which heads and stacked layers give more axes.
    Row("bias", leaf=word("bias|biases|offset"), **_VECTOR),
    Row("bias", leaf=r"b\d+|b_(?:in|out|up|down|gate|[qkvo]|[ih][a-z]?)|b[qkvo]", **_VECTOR),
    Row(
        "bias",
        leaf="b",
        parent=rf"{word(words.DENSE)}|{words.CONV}|{words.LINEN_QKV}|{words.ATTENTION}",
        **_VECTOR,
    ),
    Row("bias", leaf="b", stacked=True, **_VECTOR),
    Row("gain or scale", leaf="g", stacked=True, **_VECTOR),
    Row(
        "gain or scale",
        leaf=r"(?:.*_)?(?:scales?|gains?|gamma|beta|temperature|slope|multiplier|sinks?)|ls\d*",
        **_VECTOR,
    ),
    Row(
        "running statistic",
        leaf="mean|var|variance|running_.*|moving_.*|sigma|ema_.*|count",
        **_VECTOR,
    ),
    Row("norm", role=rf"(?!ada|.*modulation){words.NORM}", leaf="(?!kernel$).*", **_VECTOR),
    Row("norm", role=rf"(?!ada|.*modulation|{word(words.DENSE)}$){words.NORM}", **_VECTOR),
    Row("state-space vector", role=words.STATE_VECTOR, **_VECTOR),
    Row(
        "state-space vector",
        role="d|a|lambda|nu|theta|nu_log|theta_log",
        scope=words.STATE_SPACE,
        **_VECTOR,
    ),
    # Tables that are looked up, and learned inputs.
    Row("relative position table", role=words.RELATIVE, leaf="(?!kernel$).*"),
    Row("relative position table", leaf="embedding|embeddings", parent=words.RELATIVE),
    Row("learned input", role=words.TOKENS, leaf="(?!kernel$).*"),
    Row("embedding table", leaf="embeddings?|embedding_table|table|.*_embeddings?"),
    Row(
        "patches as a convolution",
        "i*o",
        leaf="kernel|w|weight",
        role=rf"{words.PATCH}|{word(words.EMBEDDING)}",
        ranks=(4, 5),
    ),
    Row(
        "patches as a convolution",
        "i*o",
        leaf="kernel|w|weight",
        scope=rf".*{words.PATCH}",
        ranks=(4, 5),
    ),
    Row(
        "dense layer on embeddings",
        "io",
        role=rf"(?={word(words.EMBEDDING)}$)(?={word(words.DENSE)}$).*",
        leaf="kernel|weight|w",
    ),
    Row("dense layer on patches", "io", role=words.PATCH, leaf="kernel|weight|w"),
    Row("embedding table", role=word(words.EMBEDDING)),
    # Routers. A gate is one where mixture-of-experts modules say so; gate_proj never is.
    Row("router", role=word("router|routers|routing")),
    Row("router", scope=word("router|routers|routing")),
    Row("router", role=r".*experts?_gat(?:e|ing)|gating_network|gate_(?:logits?|network|fn)"),
    Row("gate of one expert", "io", role=words.GATE, parent=words.ONE_EXPERT),
    Row("expert stack", "bio", role=words.GATE, parent="experts"),
    Row("router", role=words.GATE, leaf="kernel|weight|w", **_MOE),
    Row("router", role=words.GATE, ranks=(2, 2), **_MOE),
    Row("expert stack", "bio", role=words.GATE, **_MOE),
    Row("narrow gate: a router", role="gate|gating|wg", ranks=(2, 2), shape="half as wide"),
    # Attention projections.
    Row("attention, fused", "iboo", role=words.QKV, shape="three in the middle", ranks=(4, 4)),
    Row("attention, fused", "booi", role=words.QKV, shape="three in front", ranks=(4, 4)),
    Row("attention, fused", "iboo", role=words.KV, shape="two in the middle", ranks=(4, 4)),
    Row("attention, heads first", "oio", role="[qkv]_einsum"),
    Row("attention, fused, heads first", "boio", role="qkv_einsum|kv_einsum"),
    Row("attention output", "iio", role="attn_vec_einsum"),
    # haliax counts query heads on two axes, and keeps kernels as "weight".
    Row("attention, heads merged", "iooo", role=_QKV, leaf="weight"),
    Row("attention, heads merged", "ioo", role=_QKV),
    Row("attention projection", "io", role=_QKV),
    Row("attention output, heads merged", "iio", role="out"),
    Row("attention output", "io", role="out", scope=words.ATTENTION),
    Row("attention output, heads merged", "iio", role=words.OTHER_OUT, scope=words.ATTENTION),
    Row("attention output, heads merged", "iio", role=words.CLEAR_OUT),
    Row("attention output", "io", role=words.OTHER_OUT, scope=words.ATTENTION),
    Row("attention output", "io", role=words.CLEAR_OUT),
    # Convolutions.
    Row(
        "depthwise filters: no channels are mixed",
        role=rf"{words.DEPTHWISE}",
        shape="one input channel",
    ),
    Row(
        "depthwise filters: no channels are mixed",
        role=words.CONV,
        scope=words.DEPTHWISE,
        shape="one input channel",
    ),
    Row("depthwise filters: no channels are mixed", role=words.DEPTHWISE, ranks=(2, 2)),
    Row("convolution, one kernel a position", "b*io", role=r"(?:.*_)?conv_?local.*", ranks=(3, 5)),
    Row("convolution", "i*o", leaf=rf"kernel|w|weight|{words.CONV}", role=words.CONV, ranks=(3, 5)),
    Row("convolution", "i*o", leaf="kernel", role="[ih]h", scope=".*conv.*", ranks=(3, 5)),
    # Fused kernels whose parts can be told.
    Row("fused query, key, value", "io", role=words.QKV, shape="wide by three", parts=3),
    Row("fused query, key, value", "oi", role=words.QKV, shape="tall by three", parts=3),
    Row("fused query, key, value", "ibo", role=words.QKV, shape="three in the middle"),
    Row("fused query, key, value", "bio", role=words.QKV, shape="three in front"),
    # Gemma keeps it as (2, in, out) or (2, out, in): the hidden layer is the wider one.
    Row("gate and up on one axis", "bio bbio", role="gating_einsum", shape="wide"),
    Row("gate and up on one axis", "boi bboi", role="gating_einsum", shape="tall"),
    # Stacks of experts.
    Row(
        "expert stack, gate and up fused", "bio", role=words.GATE_UP, shape="even", parts=2, **_MOE
    ),
    Row("expert stack", "bio", role=words.MLP, **_MOE),
    Row("expert stack", "bio", scope=words.EXPERTS, without=words.ONE_EXPERT),
    Row("expert stack", "bio", role=words.EXPERTS),
    Row("fused gate and up", "io", role=words.GATE_UP, shape="even", parts=2),
    Row("gate and up on axis 1", "ibo", role="wi", shape="two in the middle"),
    # Output heads.
    Row("output head", role=words.HEAD),
    Row("output head", role="decoder", scope=rf"cls|predictions|{words.HEAD}"),
    Row(
        "inside an output head",
        parent=words.HEAD,
        role=rf"{words.MATRIX}|{words.OTHER_OUT}|layers|out|output",
    ),
    # GPT-2 in Hugging Face Flax keeps kernels as (out, in): the longer axis tells.
    Row("dense layer", "oi", role="c_fc", shape="tall"),
    Row("dense layer", "oi", role="c_proj", scope="mlp", shape="wide"),
    # Plain matrices.
    Row("fused projection, kept whole: a rule may split it", "io", role=words.FUSED),
    Row("matrix", "io", role=rf"{words.MATRIX}"),
    Row("matrix", "io", role=word(words.DENSE), stacked=True),
    Row("matrix", "io", weak=True),
)

_compiled = lru_cache(maxsize=None)(re.compile)


def _fits(pattern: str | None, text: str) -> bool:
    return pattern is None or _compiled(pattern).fullmatch(text) is not None


@lru_cache(maxsize=8192)
def rows_of(name: LeafName) -> tuple[Row, ...]:
    """The rows whose names fit, in their order."""
    scope = name.scope
    return tuple(
        row
        for row in ROWS
        if (row.stacked is None or row.stacked == name.stacked)
        and _fits(row.role, name.role)
        and _fits(row.leaf, name.leaf)
        and (row.scope is None or any(_fits(row.scope, outer) for outer in scope))
        and (row.without is None or not any(_fits(row.without, outer) for outer in scope))
        and (row.parent is None or (bool(scope) and _fits(row.parent, scope[-1])))
    )


@lru_cache(maxsize=65536)
def look_up(name: LeafName, shape: tuple[int, ...]) -> tuple[Row, str] | None:
    """The first row that fits a leaf without stacked layers, and its layout on that shape."""
    rank = len(shape)
    for row in rows_of(name):
        if not row.ranks[0] <= rank <= row.ranks[1]:
            continue
        if not row.layouts:
            if row.shape is None or SHAPES[row.shape](shape):
                return row, ""
            continue
        for layout in row.layouts.split():
            letters = _letters(layout, rank)
            if len(letters) == rank and (row.shape is None or SHAPES[row.shape](shape)):
                return row, letters
    return None


def _letters(layout: str, rank: int) -> str:
    """Spells the star out: "i*o" is "iiio" at rank 4."""
    if "*" not in layout:
        return layout
    before, after = layout.split("*")
    return before[:-1] + before[-1] * (rank - len(before) - len(after) + 1) + after
