"""The table that says, by name and rank, which leaves are matrices and which AdamW trains.

The first row that fits a leaf decides. A row's names are regular expressions that must match a
whole name in the one spelling of `names.py` ("MoeBlock_0" is "moe_block").

A layout writes one letter an axis: `i` is summed over (the kernel's input), `o` is produced (its
output), `b` is a batch axis, a matrix for each of its entries. A query kernel
`(d_model, heads, head_dim)` is "ioo". A star repeats the letter before it as often as the rank
asks. One axis more than the letters is the axis of stacked layers.

What belongs to Muon follows Jordan et al. 2024 (kellerjordan.github.io/posts/muon) and Moonlight
(arXiv 2502.16982): matrices that act on hidden states. Embedding tables, output heads, router
kernels, biases, gains and norms stay with AdamW, and so do three more kinds:

1. LoRA factors: what acts is their product, and the polar factor of one factor is no steepest
   descent on the product.
2. Depthwise filters: they mix no channels, so there is no matrix in them. They are told by name;
   other convolutions are matrices from (window, input channels) to output channels, the first one
   of a model included.
3. Learned tokens, queries and tables: they are inputs, whatever their rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from muonclip_jax.routing import words


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        why: The reason, as `describe_labels` prints it.
        layout: A letter an axis; None is AdamW at any rank of two or more.
        leaf: What the last name must be; None here and below is any.
        role: What the most telling name must be.
        scope: What some name before the role must be.
        without: What no name before the role may be.
        parent: What the name right before the role must be.
        rank: The fewest and most axes of the leaf.
        stacked: Whether the path shows stacked layers. If it must, a star leaves them an axis.
        shape: A name in `SHAPES`, asked of the shape without the axis of layers.
        parts: Into how many equal parts the last output axis falls.
        open: The row is a question to the user.
    """

    why: str
    layout: str | None = None
    leaf: str | None = None
    role: str | None = None
    scope: str | None = None
    without: str | None = None
    parent: str | None = None
    rank: tuple[int, int] = (2, 99)
    stacked: bool | None = None
    shape: str | None = None
    parts: int = 1
    open: bool = False


#: What a row may ask of a shape `s`, without the axis of stacked layers.
SHAPES: Mapping[str, Callable[[tuple[int, ...]], bool]] = MappingProxyType(
    {
        "wide": lambda s: s[-1] >= s[-2],
        "tall": lambda s: s[-2] > s[-1],
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


ROWS: tuple[Row, ...] = (
    Row(
        "no trained parameter",
        scope="batch_stats|cache|intermediates|running_stats|buffers|rngs|non_trainable",
    ),
    Row("LoRA factor: only the product acts", role=words.word("lora|lokr|loha|dora")),
    Row("LoRA factor: only the product acts", scope=words.word("lora|lokr|loha|dora")),
    # Vectors, which heads and stacked layers give more axes.
    Row("bias", leaf=words.word("bias|biases|offset")),
    Row("bias", leaf=r"b\d+|b_(?:in|out|up|down|gate|[qkvo]|[ih][a-z]?)|b[qkvo]"),
    Row(
        "bias",
        leaf="b",
        parent=rf"{words.word(words.DENSE)}|{words.CONV}|{words.LINEN_QKV}|{words.ATTENTION}",
    ),
    Row("bias", leaf="b", stacked=True),
    Row("gain or scale", leaf="g", stacked=True),
    Row(
        "gain or scale",
        leaf=r"(?:.*_)?(?:scales?|gains?|gamma|beta|temperature|slope|multiplier|sinks?)|ls\d*",
    ),
    Row("running statistic", leaf="mean|var|variance|running_.*|moving_.*|sigma|ema_.*|count"),
    Row("norm", role=rf"(?!ada|.*modulation){words.NORM}", leaf="(?!kernel$).*"),
    Row("norm", role=rf"(?!ada|.*modulation|{words.word(words.DENSE)}$){words.NORM}"),
    Row("state-space vector", role=words.STATE_VECTOR),
    Row("state-space vector", role="d|a|lambda|nu|theta|nu_log|theta_log", scope=words.STATE_SPACE),
    # Tables that are looked up, and learned inputs.
    Row("relative position table", role=words.RELATIVE, leaf="(?!kernel$).*"),
    Row("relative position table", leaf="embedding|embeddings", parent=words.RELATIVE),
    Row("learned input", role=words.TOKENS, leaf="(?!kernel$).*"),
    Row("embedding table", leaf="embeddings?|embedding_table|table|.*_embeddings?"),
    Row(
        "patches as a convolution",
        "i*o",
        leaf="kernel|w",
        role=rf"{words.PATCH}|{words.word(words.EMBEDDING)}",
        rank=(4, 5),
    ),
    Row(
        "patches as a convolution",
        "i*o",
        leaf="kernel|w",
        scope=rf".*{words.PATCH}",
        rank=(4, 5),
    ),
    Row(
        "dense layer on embeddings",
        "io",
        role=rf"(?={words.word(words.EMBEDDING)}$)(?={words.word(words.DENSE)}$).*",
        leaf="kernel|weight|w",
    ),
    Row(
        "dense layer on patches",
        "io",
        role=words.PATCH,
        leaf="kernel|weight|w",
        rank=(2, 2),
    ),
    Row("embedding table", role=words.word(words.EMBEDDING)),
    # Routers. A gate is one where mixture-of-experts modules say so; gate_proj never is.
    Row("router", role=words.word("router|routers|routing")),
    Row("router", scope=words.word("router|routers|routing")),
    Row("router", role=r".*experts?_gat(?:e|ing)|gating_network|gate_(?:logits?|network|fn)"),
    Row("gate of one expert", "io", role=words.GATE, parent=words.ONE_EXPERT),
    Row("expert stack", "bio", role=words.GATE, parent="experts", rank=(3, 4)),
    Row(
        "router", role=words.GATE, leaf="kernel|weight|w", scope=words.MOE, without=words.ONE_EXPERT
    ),
    Row("router", role=words.GATE, scope=words.MOE, without=words.ONE_EXPERT, rank=(2, 2)),
    Row(
        "expert stack",
        "bio",
        role=words.GATE,
        scope=words.MOE,
        without=words.ONE_EXPERT,
        rank=(3, 3),
        stacked=False,
    ),
    Row(
        "expert stack",
        "bio",
        role=words.GATE,
        scope=words.MOE,
        without=words.ONE_EXPERT,
        rank=(4, 4),
    ),
    Row(
        "a gate that may be a stacked router or a stack of experts",
        role=words.GATE,
        scope=words.MOE,
        without=words.ONE_EXPERT,
        open=True,
    ),
    Row("narrow gate: a router", role="gate|gating|wg", rank=(2, 2), shape="half as wide"),
    # Attention projections with the heads on axes of their own.
    Row("attention, fused", "iboo", role=words.QKV, rank=(4, 5), shape="three in the middle"),
    Row(
        "attention, fused", "iboo", role="kv|kv_proj|to_kv", rank=(4, 5), shape="two in the middle"
    ),
    Row("attention, heads first", "oio", role="[qkv]_einsum", rank=(3, 4)),
    Row("attention, fused, heads first", "boio", role="qkv_einsum|kv_einsum", rank=(4, 5)),
    Row("attention output", "iio", role="attn_vec_einsum", rank=(3, 4)),
    Row(
        "a stack without an axis of layers, or heads without an axis of their own",
        role=rf"{words.LINEN_QKV}|out",
        rank=(3, 3),
        stacked=True,
        open=True,
    ),
    Row("attention, heads merged", "ioo", role=words.LINEN_QKV, rank=(3, 5)),
    Row("attention output, heads merged", "iio", role="out", rank=(3, 3)),
    Row("attention output, heads merged", "iio", role="out", scope=words.ATTENTION, rank=(4, 5)),
    Row("attention output, heads merged", "iio", role="out", stacked=True, rank=(4, 5)),
    Row("attention, stacked layers", "io", role=words.OTHER_QKV, rank=(3, 3), stacked=True),
    Row("attention, heads merged", "ioo", role=words.OTHER_QKV, rank=(3, 5)),
    Row(
        "attention output, stacked layers",
        "io",
        role=words.OTHER_OUT,
        scope=words.ATTENTION,
        rank=(3, 3),
        stacked=True,
    ),
    Row("attention output, stacked layers", "io", role=words.CLEAR_OUT, rank=(3, 3), stacked=True),
    Row(
        "attention output, heads merged",
        "iio",
        role=words.OTHER_OUT,
        scope=words.ATTENTION,
        rank=(3, 5),
    ),
    Row("attention output, heads merged", "iio", role=words.CLEAR_OUT, rank=(3, 5)),
    # Convolutions.
    Row(
        "depthwise filters: no channels are mixed", role=words.DEPTHWISE, shape="one input channel"
    ),
    Row("depthwise filters: no channels are mixed", role=words.DEPTHWISE, rank=(2, 2)),
    Row("convolution, one kernel a position", "b*io", role=r"(?:.*_)?conv_?local.*", rank=(3, 5)),
    Row(
        "a convolution without a window, or no axis of layers",
        role=words.CONV,
        rank=(3, 3),
        stacked=True,
        open=True,
    ),
    Row(
        "convolution, stacked layers",
        "i*o",
        leaf=rf"kernel|w|{words.CONV}",
        role=words.CONV,
        rank=(4, 7),
        stacked=True,
    ),
    Row("convolution", "i*o", leaf=rf"kernel|w|{words.CONV}", role=words.CONV, rank=(3, 6)),
    Row("convolution", "i*o", leaf="kernel", role="[ih]h", scope=".*conv.*", rank=(3, 6)),
    # Fused kernels whose parts can be told.
    Row("fused query, key, value", "io", role=words.QKV, shape="wide by three", parts=3),
    Row(
        "fused query, key, value, transposed",
        "oi",
        role="c_attn",
        shape="tall by three",
        parts=3,
    ),
    Row("fused query, key, value", "ibo", role=words.QKV, rank=(3, 3), shape="three in the middle"),
    Row("fused query, key, value", "bio", role=words.QKV, rank=(3, 3), shape="three in front"),
    # Gemma keeps it as (2, in, out) or (2, out, in): the hidden layer is the wider one.
    Row("gate and up on axis 0", "bio", role="gating_einsum", shape="wide"),
    Row("gate and up on axis 0, transposed", "boi", role="gating_einsum", shape="tall"),
    # Stacks of experts.
    Row(
        "expert stack, gate and up fused",
        "bio",
        role=words.GATE_UP,
        scope=words.MOE,
        without=words.ONE_EXPERT,
        rank=(3, 4),
        shape="even",
        parts=2,
    ),
    Row(
        "expert stack",
        "bio",
        role=words.MLP,
        scope=words.MOE,
        without=words.ONE_EXPERT,
        rank=(3, 4),
    ),
    Row("expert stack", "bio", scope=words.EXPERTS, without=words.ONE_EXPERT, rank=(3, 4)),
    Row("expert stack", "bio", role=words.EXPERTS, rank=(3, 4)),
    Row("fused gate and up", "io", role=words.GATE_UP, shape="even", parts=2),
    Row("gate and up on axis 1", "ibo", role="wi", rank=(3, 4), shape="two in the middle"),
    # Output heads.
    Row("output head", role=words.HEAD),
    Row("output head", role="decoder", scope=rf"cls|predictions|{words.HEAD}"),
    Row(
        "attention projection",
        "io",
        role=rf"{words.LINEN_QKV}|{words.OTHER_QKV}|out",
        rank=(2, 2),
    ),
    Row(
        "inside an output head",
        parent=words.HEAD,
        role=rf"{words.MATRIX}|{words.OTHER_OUT}|layers|out|output",
    ),
    # Kernels that GPT-2 in Hugging Face Flax keeps as (out, in): the longer axis tells.
    Row("dense layer", "io", role="c_fc", shape="wide"),
    Row("dense layer, transposed", "oi", role="c_fc", shape="tall"),
    Row("dense layer, transposed", "oi", role="c_proj", scope="mlp", shape="wide"),
    # Plain matrices.
    Row("fused projection, kept whole: a rule may split it", "io", role=words.FUSED, rank=(2, 2)),
    Row("matrix", "io", rank=(2, 2)),
    Row(
        "a kernel that may read or produce several axes",
        role=".*(?:dense|linear)_general",
        open=True,
    ),
    Row("stacked matrices", "io", role=words.MATRIX, rank=(3, 5)),
    Row("stacked matrices", "io", role=words.word(words.DENSE), rank=(3, 5), stacked=True),
)
