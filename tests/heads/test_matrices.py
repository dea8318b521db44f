"""Which matrices attention kernels become: what decides, what is refused, what the table prints."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

import muonclip_jax as mc


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def kernels(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: {"kernel": leaf(*shape)} for name, shape in shapes.items()}


def rules(attention: str, *pairs: Any, **options: Any) -> mc.MatrixRules:
    return mc.MatrixRules(pairs, attention=attention, **options)


LATENT = kernels(wq_b=(7, 4, 5), wkv_a=(12, 7), wkv_b=(5, 4, 7), out=(4, 4, 12))
MERGED = kernels(q_proj=(12, 16), k_proj=(12, 8), v_proj=(12, 8), o_proj=(16, 12))
APART = kernels(query=(12, 4, 3), key=(12, 4, 3))
OWN = {"ask": leaf(12, 4, 3), "answer": leaf(12, 2, 3)}
TWO_AXES = {"ask": leaf(2, 3, 8, 48), "answer": leaf(2, 8, 48)}
ASK, ANSWER = mc.Projection("ask", ("query",)), mc.Projection("answer", ("key",))
MINE = {"blocks": mc.AttentionLayout((ASK, ANSWER))}
ENDS = (
    mc.Projection("ask", ("query",), input_axis=-1),
    mc.Projection("answer", ("key",), input_axis=-1),
)
LAST = mc.AttentionLayout(ENDS)
KERNEL_RULE = ("wkv_b", mc.MatrixSpec((0, (1, 2))))
PARTS = mc.MatrixSpec((0, 2), mc.Split(2, (3, 2)))
FOURS = mc.MatrixSpec((0, 1), mc.Split(1, (4, 4)))
THIRDS = mc.MatrixSpec((0, 1), mc.Split(1, (12, 12, 12)))
ALTERNATING = mc.MatrixSpec((0, 1), mc.Split(1, (4, 4, 4), (3, 12), 1))
LISTED = "params/layers/0/wq_b/kernel"
A, QKV = "attn/a/kernel", (mc.Projection("a", ("query", "key", "value")),)
OWN_QKV, SIZED = mc.AttentionLayout(QKV), mc.AttentionLayout(QKV, head_dim=4)
UNLIKE = mc.MatrixSpec((0, 1), mc.Split(1, (24, 8, 8)))
GROUPED, TEN = {"attn": kernels(a=(12, 40), b=(24, 12))}, {"attn": kernels(qkv=(16, 40))}
BLOOM = {"attn": kernels(query_key_value=(12, 36), dense=(12, 12))}
STACKED = {"layers": {"attn": jax.tree.map(lambda x: leaf(2, *x.shape), OWN)}}
ARRAYS = {"attn": jax.tree.map(lambda x: jnp.ones(x.shape), TWO_AXES)}
FOUR = {"attn": jnp.ones(4)}
SIZELESS, UNEVEN = {"attn": MERGED}, {"attn": kernels(qkv=(12, 32))}
TURNED = {name: {"weight": leaf(16, 16)} for name in "qkvo"}
DENSE = {"dense": {"kernel": leaf(4, 4)}}
TWO = {"encoder": APART, "decoder": APART}


@pytest.mark.parametrize(
    ("tree", "given", "expected"),
    [
        # Where shapes show no heads, their size may be said; split needs no head count.
        ({"attn": MERGED}, rules("per_head", head_dim=4), {"attn/k_proj/kernel": FOURS}),
        ({"attn": MERGED}, rules("split"), {"attn/k_proj/kernel": Dims(0, 1)}),
        # A user's rule for a kernel comes before layouts, for that kernel alone.
        (
            {"attn": LATENT},
            rules("per_head", KERNEL_RULE),
            {"attn/wkv_b/kernel": Dims(0, (1, 2)), "attn/wq_b/kernel": PARTS},
        ),
        ({"attn": APART, "embed": leaf(50, 12)}, rules("per_head"), {"embed": None}),
        ({"attn": APART}, rules("per_head", ("key", None)), {"attn/key/kernel": None}),
        # Blocks select.
        (
            TWO,
            rules("per_head", blocks="decoder"),
            {"encoder/key/kernel": Dims(0, (1, 2)), "decoder/key/kernel": Dims(0, 2)},
        ),
        # Layouts tell axes that names leave open, in a stack and with heads on two axes too.
        ({"attn": OWN}, rules("split", **MINE), {"attn/answer": Dims(0, (1, 2))}),
        ({"attn": OWN}, rules("per_head", **MINE), {"attn/answer": Dims(0, 2)}),
        (STACKED, rules("per_head", **MINE), {"layers/attn/ask": Dims(1, 3)}),
        ({"attn": TWO_AXES}, rules("split", blocks=LAST), {"attn/ask": Dims(3, (0, 1, 2))}),
        (
            {"attn": TWO_AXES},
            rules("per_head", blocks=LAST),
            {"attn/ask": Dims(3, 2), "attn/answer": Dims(2, 1)},
        ),
        # Outer levels and lists are seen through.
        ({"params": {"layers": [LATENT]}}, rules("per_head"), {LISTED: PARTS}),
        # A fused kernel that names cut needs no output projection.
        ({"attn": kernels(qkv=(12, 36))}, rules("split"), {"attn/qkv/kernel": THIRDS}),
        (BLOOM, rules("split", head_dim=4), {"attn/query_key_value/kernel": ALTERNATING}),
        # Of a layout of one's own too: three equal parts, or what an output of any name takes.
        ({"attn": kernels(a=(12, 36))}, rules("split", blocks=SIZED), {A: THIRDS}),
        (GROUPED, rules("split", blocks=OWN_QKV, head_dim=4), {A: UNLIKE}),
        # A tree without attention may be a part of one.
        (DENSE, rules("per_head"), {"dense/kernel": Dims(0, 1)}),
    ],
)
def test_what_a_kernel_becomes(tree: Any, given: mc.MatrixRules, expected: dict[str, Any]):
    for path, dims in expected.items():
        found = given.dimension_numbers(tree)
        for name in path.split("/"):
            found = found[int(name) if name.isdigit() else name]
        assert found == dims


def test_the_table_says_what_was_cut():
    text = mc.describe_labels({"attn": LATENT}, rules("split"))
    lines = [line.removeprefix("attn/") for line in text.splitlines()]
    assert lines[1:5] == [
        "out/kernel    (4, 4, 12)  muon   (16, 12)           attention output, heads merged",
        "wkv_a/kernel  (12, 7)     muon   (12, 5) + (12, 2)  attention: latent, shared rotary key",
        "wkv_b/kernel  (5, 4, 7)   muon   (5, 12) + (5, 16)  attention: key, value",
        "wq_b/kernel   (7, 4, 5)   muon   (7, 12) + (7, 8)   attention: query, rotary query",
    ]
    text = mc.describe_labels({"attn": LATENT}, rules("per_head"))
    assert "4 x (7, 3) + 4 x (7, 2)  attention: query, rotary query, by head" in text
    text = mc.describe_attention({"attn": TWO_AXES}, {"attn": leaf(6)}, blocks=LAST)
    assert text.splitlines()[0] == "attn: custom, 6 query heads on 2 key heads of 8"


def test_a_masked_sibling_is_an_error_that_says_how_the_whole_tree_gets_there():
    params = {"attn": jax.tree.map(lambda x: jnp.ones(x.shape), LATENT)}
    masked = {"attn": {**params["attn"], "wkv_b": {"kernel": optax.MaskedNode()}}}
    with pytest.raises(ValueError, match=r"'attn/wkv_b/kernel' is masked here.*infer_dimension_nu"):
        rules("split").dimension_numbers(masked)
    # What the message says works: the specs of the whole tree, on the masked one.
    specs = mc.infer_dimension_numbers(params, rules("split"))
    tx = mc.scale_by_muon(weight_dimension_numbers=specs)
    updates, _ = tx.update(masked, tx.init(masked))
    assert jax.tree.structure(updates) == jax.tree.structure(masked)


def test_masked_biases_do_not_matter_and_the_group_that_adamw_trains_is_not_asked():
    per_head, masked = rules("per_head"), optax.MaskedNode()
    query = {"kernel": leaf(7, 4, 5), "bias": masked}
    full = per_head.dimension_numbers({"attn": LATENT})["attn"]["wq_b"]["kernel"]
    dims = per_head.dimension_numbers({"attn": {**LATENT, "wq_b": query}})
    assert dims["attn"]["wq_b"]["kernel"] == full
    hidden: Any = {name: {"kernel": masked} for name in LATENT}
    hidden["wq_b"] = {"kernel": masked, "bias": leaf(4, 5)}
    assert per_head.dimension_numbers({"attn": hidden})["attn"]["wq_b"]["bias"] is None
    assert per_head.labels({}) == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rules("heads"), "one of 'merged', 'split', 'per_head', got 'he"),
        (lambda: mc.MatrixRules(head_dim=4), "head_dim= determines how .* are split"),
        (lambda: mc.MatrixRules(blocks="attn"), "blocks= determines how .* are split"),
        (lambda: rules("per_head", head_dim=4.0), "head_dim must be an in"),
        (lambda: rules("per_head", blocks=3), "blocks= got 3"),
        (lambda: rules("per_head").labels(SIZELESS), r"4 of 4, .* 2 heads MatrixRu.*head_dim=8"),
        (
            lambda: rules("per_head").labels({"attn": TURNED}),
            r'q/weight\$", MatrixSpec\(\(1, 0\)\)\)',
        ),
        (lambda: rules("per_head").labels(DENSE), "found no attention block among"),
        (lambda: rules("per_head", blocks="middle").labels(TWO), "'middle' matches no path"),
        (lambda: mc.label_params({"attn": OWN}), "cannot be identified by name"),
        (lambda: rules("split").labels(UNEVEN), "gives the head size"),
        (
            lambda: rules("split", head_dim=4).labels(TEN),
            "6 of 4, 8 of 4 .* key heads: .*kv_heads=2",
        ),
        (lambda: mc.apply_qk_clip(ARRAYS, FOUR, blocks=LAST), "has 6 heads, 4 maxima were given"),
    ],
)
def test_what_is_refused(call: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
