"""What was asked for and cannot be done is an error with a path.

The refusals are traps too: in other implementations each of these passed in silence.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muonclip_jax.clipping import apply_qk_clip, describe_attention, qk_clip_info
from muonclip_jax.heads.layouts import OUT_NAMES, AttentionLayout, Projection
from tests.clipping.cases import attention, normal

ONES = jnp.ones(4)
HIDDEN = optax.MaskedNode()


def kernels(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: {"kernel": normal(*shape)} for name, shape in shapes.items()}


def norms(query: str, key: str, leaf: str = "scale", shape: tuple[int, ...] = (8,)) -> Any:
    return attention() | {name: {leaf: jnp.ones(shape)} for name in (query, key)}


def adapters(*missing: str) -> dict[str, Any]:
    """Projections with an adapter of rank 2, without the leaves of these names."""
    leaves = {"base_module": {"kernel": normal(6, 32)}, "lora_a": normal(6, 2)}
    leaves |= {"lora_b": normal(2, 32)}
    module = {name: leaf for name, leaf in leaves.items() if name not in missing}
    return {"q_proj": module, "k_proj": module} | kernels(o_proj=(32, 6))


ODD = {"query": {"kernel": normal(6, 4, 8), "mystery": jnp.ones(3)}}
BIASES_HIDDEN = jax.tree.map(lambda x: x if x.ndim > 2 else HIDDEN, attention())
GATED = kernels(q_proj=(6, 64), k_proj=(6, 16), v_proj=(6, 16), mixing=(32, 6))
GATE = "as if half of them were a gate"
#: What the error says of a block "attn" whose four maxima are given.
BLOCKS: dict[str, Any] = {
    "normalised .'query_ln'.*blocks=": norms("query_ln", "key_ln"),
    "'attn'.*normalised .'_query_norm'": norms("_query_norm", "_key_norm"),
    "normalised .'query_norm'": norms("query_norm", "key_norm", "bias"),
    "share or do not have": norms("query_ln", "key_ln", "bias", (4, 8)),
    "'attn/query/mystery'.*Known names are kernel": attention() | ODD,
    "'attn': 'q_proj' has a low-rank adapter here, and the kernel .* not in this tree": (
        adapters("base_module")
    ),
    "'attn': 'attn/q_proj/lora_a' belongs .* an adapter needs both halves": adapters("lora_b"),
    "No attention block.*qk_clip_threshold=None.*low-rank": {
        "q_proj": adapters("base_module")["q_proj"]
    },
    "'attn': neither .* gives the head size; .*head_dim=.* or kv_heads=": kernels(qkv=(6, 48)),
    "'attn/query_ln/scale' is hidden": attention() | {"query_ln": {"scale": HIDDEN}},
    "only partly visible: .*'attn/query/bias'.*outer chain": BIASES_HIDDEN,
    "No attention block .*multi_transform": jax.tree.map(lambda _: HIDDEN, attention()),
    f"{GATE}.*'gate'": GATED,
}
FOUR = "the kernel has 4 heads, {} maxima were given"
LOGITS = r"whole logits, .*take the maximum first: .*s\.max\(axis={}\)"
WITHOUT_OUTPUT = kernels(query=(6, 4, 8), key=(6, 4, 8))
MERGED = kernels(query=(6, 32), key=(6, 32), out=(4, 8, 6))
EQUINOX = {name: {"weight": normal(16, 16)} for name in ("query_proj", "key_proj", "output_proj")}
SCANNED = jax.tree.map(lambda x: jnp.stack([x] * 3), EQUINOX)
SEVERAL = r"several ways.*of attention_max_logits, here \({}\)\..*max\(axis={}\).*max\(axis={}\)"
#: What the block "attn" holds, the maxima given for it, and what the error says.
MAXIMA: list[tuple[Any, Any, str]] = [
    (attention(), jnp.ones(3), FOUR.format(3) + "|maxima of shape"),
    (attention(kv_heads=2), jnp.ones(8), FOUR.format(8)),
    (attention(stack=(3,)), jnp.ones((3, 5)), FOUR.format(5)),
    (WITHOUT_OUTPUT, jnp.ones(3), FOUR.format(3)),
    (MERGED, jnp.ones(5), FOUR.format(5)),
    (attention(), normal(2, 4, 16, 16), LOGITS.format(r"\(0, 2, 3\)")),
    (attention(), normal(4, 16, 12), LOGITS.format(r"\(1, 2\)")),
    (attention(stack=(3,)), normal(3, 2, 4, 16, 16), LOGITS.format(r"\(1, 3, 4\)")),
    # What MaxText records under its scan.
    (attention(stack=(3,)), normal(3, 2, 4), r"layers, batch, query heads\).*s\.max\(axis=1\)"),
    (attention(stack=(3,)), normal(3, 1, 2, 4), r"s\.max\(axis=\(1, 2\)\)"),
    # Heads of one feature, and axes that fit in two ways.
    (EQUINOX, normal(4, 16, 16), LOGITS.format(r"\(1, 2\)") + ".*heads of one feature"),
    (EQUINOX, normal(16), "heads of one feature"),
    (EQUINOX, normal(4, 8, 8), SEVERAL.format("8,", r"\(0, 1\)", r"\(1, 2\)")),
    (EQUINOX, normal(4, 4), SEVERAL.format("4,", 0, 1)),
    (SCANNED, normal(3, 3, 4), SEVERAL.format("3, 4", 1, 0)),
    (attention(), normal(4, 16, 4), SEVERAL.format("4,", r"\(0, 1\)", r"\(1, 2\)")),
    (attention(), {"max_logits": (ONES, jnp.ones((5, 3)))}, r"\(5, 3\), .* must end in \(4,\)"),
    (attention(), {"weights": (ONES,)}, "recorded for 'attn/weights"),
    (attention(), jnp.asarray(7.0), r"shape \(\) do not match.*\(query heads,\)"),
    (attention(stack=(3,)), ONES, r"\(3, 6, 4, 8\).*Expected maxima \(query heads,\), or \("),
    *((block, ONES, message) for message, block in BLOCKS.items()),
    *(
        (kernels(q_proj=(6, 64), k_proj=(6, 16), **{name: (32, 6)}), ONES, GATE)
        for name in (*OUT_NAMES, "Wo", "W_o")
    ),
]


@pytest.mark.parametrize(("block", "maxima", "message"), MAXIMA)
def test_it_is_refused(block, maxima, message):
    with pytest.raises(ValueError, match=message):
        apply_qk_clip({"attn": block, "dense": kernels(up=(3, 3))}, {"attn": maxima})


ATTN = {"attn": attention()}
FROZEN = jax.tree.map(lambda _: None, attention())
PARTLY = attention() | {"key": FROZEN["key"]}


@pytest.mark.parametrize(
    ("params", "maxima", "settings", "message"),
    [
        ({**ATTN, "b": attention()}, ["attn"], {}, r"'b' .* has no maximum. Maxima .* for: 'attn'"),
        (ATTN, ["attn", "a/attn"], {}, r"recorded for 'a/attn'.*max_logits=\{'attn': \(heads,\)"),
        ({**ATTN, "b": FROZEN}, ["attn", "b"], {}, "recorded for 'b'.* None .*qk_clip_blocks="),
        ({**ATTN, "b": PARTLY}, ["attn", "b"], {"blocks": "attn"}, "'b', where no .* block is"),
        (kernels(dense=(3, 3)), ["attn"], {}, "No attention block was found in parameters 'dense/"),
        (ATTN, ["attn"], {"threshold": 0.0, "alpha": 1.1}, "threshold must be positive"),
    ],
)
def test_blocks_and_maxima_belong_together(params, maxima, settings, message):
    for function in (apply_qk_clip, qk_clip_info):
        with pytest.raises(ValueError, match=message):
            function(params, dict.fromkeys(maxima, ONES), **settings)
    text = describe_attention({"attn": adapters("base_module")})
    assert "attn: separate q and k, cannot be clipped: " in text


# What looks like a trap and is none: one head of four is over the threshold four times.

OVER = jnp.asarray([400.0, 1.0, 1.0, 1.0])
FUSED = AttentionLayout((Projection("qkv", ("query", "key", "value")),), kv_heads=1)
#: The block, `blocks=`, the query kernel, and the size of a head.
READ: dict[str, tuple[Any, Any, str, int]] = {
    "a gate that an axis for heads shows": (
        *(kernels(query=(6, 4, 16), key=(6, 2, 8), mixing=(4, 8, 6)), None, "query", 8),
    ),
    "values half as large as queries": (
        kernels(q_proj=(6, 32), k_proj=(6, 16), v_proj=(6, 8), o_proj=(16, 6)),
        *(None, "q_proj", 8),
    ),
    "an unknown output that takes all queries": (
        kernels(q_proj=(32, 64), k_proj=(32, 32), mixing=(64, 32), outer_gate=(32, 64)),
        *(None, "q_proj", 16),
    ),
    "a fused kernel that was told": (kernels(qkv=(6, 48)), FUSED, "qkv", 8),
}


@pytest.mark.parametrize("name", READ)
def test_it_is_read_and_other_heads_stay(name):
    block, blocks, query, size = READ[name]
    new, _ = apply_qk_clip({"attn": block}, {"attn": OVER}, blocks=blocks)
    ratio = np.asarray(new["attn"][query]["kernel"] / block[query]["kernel"])
    ratio = ratio[:, 0] if ratio.ndim == 3 else ratio
    np.testing.assert_allclose(ratio[:, :size], 0.25, rtol=1e-6)
    assert (ratio[:, size:] == 1).all()
    for other in set(block) - {query}:
        jax.tree.map(np.testing.assert_array_equal, new["attn"][other], block[other])


@pytest.mark.parametrize(("shared_keys", "heads"), [("query", 4), ("group", 1), ("balanced", 4)])
def test_keys_that_are_values_stay(shared_keys, heads):
    keys = {"k_einsum": {"w": normal(heads, 6, 8)}}
    params = {"attn": {"q_einsum": {"w": normal(4, 6, 8)}} | keys}
    new, _ = apply_qk_clip(params, {"attn": jnp.full(4, 400.0)}, shared_keys=shared_keys)
    np.testing.assert_array_equal(new["attn"]["k_einsum"]["w"], keys["k_einsum"]["w"])
    expected = params["attn"]["q_einsum"]["w"] / 4
    np.testing.assert_allclose(new["attn"]["q_einsum"]["w"], expected, rtol=1e-6)


def test_the_rest_of_the_tree_shows_the_stacked_layers():
    """As of Equinox: `(3, 12, 12)` alone may be three heads of 12, or three layers."""
    kernel = {"weight": normal(3, 12, 12)}
    block = dict.fromkeys(("wq", "wk", "wv", "wo"), kernel)
    up, down = {"weight": normal(3, 24, 12)}, {"weight": normal(3, 12, 24)}
    params = {"attn": block, "norm": {"weight": jnp.ones((3, 12))}, "up": up, "down": down}
    said = describe_attention(params, max_logits={"attn": jnp.ones((3, 3))})
    assert "3 heads of 4, stacked (3,)" in said
    for transposed in ((4, 3), (2, 3), (3,)):
        with pytest.raises(ValueError, match=r"stacked on axes \(0,\)|do not match"):
            apply_qk_clip(params, {"attn": jnp.ones(transposed)})
