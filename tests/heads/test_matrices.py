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


LATENT = kernels(wq_b=(7, 4, 5), wkv_a=(12, 7), wkv_b=(5, 4, 7), out=(4, 4, 12))
MERGED = kernels(q_proj=(12, 16), k_proj=(12, 8), v_proj=(12, 8), o_proj=(16, 12))


def test_arguments_are_checked_and_hashable():
    assert mc.MatrixRules() == mc.MatrixRules(attention="merged")
    for error, message, given in (
        (ValueError, "one of 'merged', 'split', 'per_head', got 'he", {"attention": "heads"}),
        (ValueError, "head_dim= determines how .* are split", {"head_dim": 4}),
        (ValueError, "blocks= determines how .* are split", {"blocks": "attn"}),
        (TypeError, "head_dim must be an in", {"attention": "per_head", "head_dim": 4.0}),
        (TypeError, "blocks= got 3", {"attention": "per_head", "blocks": 3}),
    ):
        with pytest.raises(error, match=message):
            mc.MatrixRules(**given)
    layout = mc.AttentionLayout((mc.Projection("ask", ("query",)),), head_dim=4)
    rules = mc.MatrixRules(attention="split", blocks=[("attn", layout)])
    assert hash(rules) == hash(mc.MatrixRules(attention="split", blocks=("attn", layout)))


def test_the_table_says_what_was_cut():
    text = mc.describe_labels({"attn": LATENT}, mc.MatrixRules(attention="split"))
    lines = [line.removeprefix("attn/") for line in text.splitlines()]
    assert lines[1:5] == [
        "out/kernel    (4, 4, 12)  muon   (16, 12)           attention output, heads merged",
        "wkv_a/kernel  (12, 7)     muon   (12, 5) + (12, 2)  attention: latent, shared rotary key",
        "wkv_b/kernel  (5, 4, 7)   muon   (5, 12) + (5, 16)  attention: key, value",
        "wq_b/kernel   (7, 4, 5)   muon   (7, 12) + (7, 8)   attention: query, rotary query",
    ]
    text = mc.describe_labels({"attn": LATENT}, mc.MatrixRules(attention="per_head"))
    assert "4 x (7, 3) + 4 x (7, 2)  attention: query, rotary query, by head" in text


def test_where_shapes_show_no_heads_the_size_must_be_said():
    rules = mc.MatrixRules(attention="per_head")
    with pytest.raises(ValueError, match=r"'attn'.*allow 2, 4, 8, 16 heads.*head_dim=64.*blocks="):
        rules.labels({"attn": MERGED})
    # Split needs no head count here: queries and keys are apart already.
    assert mc.MatrixRules(attention="split").labels({"attn": MERGED}) == mc.label_params(
        {"attn": MERGED}
    )
    sized = mc.MatrixRules(attention="per_head", head_dim=4)
    spec = sized.dimension_numbers({"attn": MERGED})["attn"]["k_proj"]["kernel"]
    assert spec == mc.MatrixSpec((0, 1), mc.Split(1, (4, 4)))


def test_rules_for_a_kernel_come_before_layouts():
    rules = mc.MatrixRules([("wkv_b", mc.MatrixSpec((0, (1, 2))))], attention="per_head")
    dims = rules.dimension_numbers({"attn": LATENT})["attn"]
    assert dims["wkv_b"]["kernel"] == Dims(0, (1, 2))
    assert dims["wq_b"]["kernel"] == mc.MatrixSpec((0, 2), mc.Split(2, (3, 2)))


def test_an_embedding_and_an_optimizer_rule_stay_with_adamw():
    rules = mc.MatrixRules([("key", None)], attention="per_head")
    tree = {"attn": kernels(query=(12, 4, 3), key=(12, 4, 3)), "embed": leaf(50, 12)}
    labels = rules.labels(tree)
    assert labels["attn"]["key"]["kernel"] == labels["embed"] == "adamw"


def test_a_masked_sibling_is_an_error_that_says_how_the_whole_tree_gets_there():
    params = {"attn": jax.tree.map(lambda x: jnp.ones(x.shape), LATENT)}
    masked = {"attn": {**params["attn"], "wkv_b": {"kernel": optax.MaskedNode()}}}
    rules = mc.MatrixRules(attention="split")
    with pytest.raises(ValueError, match=r"'attn/wkv_b/kernel' is masked here.*infer_dimension_nu"):
        rules.dimension_numbers(masked)
    # What the message says works: the specs of the whole tree, on the masked one.
    specs = mc.infer_dimension_numbers(params, rules)
    tx = mc.scale_by_muon(weight_dimension_numbers=specs)
    updates, _ = tx.update(masked, tx.init(masked))
    assert jax.tree.structure(updates) == jax.tree.structure(masked)


def test_masked_biases_do_not_matter_and_the_group_that_adamw_trains_is_not_asked():
    rules, masked = mc.MatrixRules(attention="per_head"), optax.MaskedNode()
    query = {"kernel": leaf(7, 4, 5), "bias": masked}
    full = rules.dimension_numbers({"attn": LATENT})["attn"]["wq_b"]["kernel"]
    dims = rules.dimension_numbers({"attn": {**LATENT, "wq_b": query}})
    assert dims["attn"]["wq_b"]["kernel"] == full
    hidden: Any = {name: {"kernel": masked} for name in LATENT}
    hidden["wq_b"] = {"kernel": masked, "bias": leaf(4, 5)}
    assert rules.dimension_numbers({"attn": hidden})["attn"]["wq_b"]["bias"] is None


def test_a_tree_without_attention_is_an_error_only_when_it_is_whole():
    rules = mc.MatrixRules(attention="per_head")
    tree = {"dense": {"kernel": leaf(4, 4)}}
    with pytest.raises(ValueError, match="found no attention block among"):
        rules.labels(tree)
    assert rules.dimension_numbers(tree)["dense"]["kernel"] == Dims(0, 1)
    assert rules.labels({}) == {}


def test_blocks_select():
    tree = {name: kernels(query=(12, 4, 3), key=(12, 4, 3)) for name in ("encoder", "decoder")}
    dims = mc.MatrixRules(attention="per_head", blocks="decoder").dimension_numbers(tree)
    assert dims["encoder"]["query"]["kernel"] == Dims(0, (1, 2))
    assert dims["decoder"]["query"]["kernel"] == Dims(0, 2)
    with pytest.raises(ValueError, match="'middle' matches no path"):
        mc.MatrixRules(attention="per_head", blocks="middle").labels(tree)


def test_layouts_tell_axes_that_names_leave_open():
    tree = {"attn": {"ask": leaf(12, 4, 3), "answer": leaf(12, 2, 3)}}
    layout = mc.AttentionLayout(
        (mc.Projection("ask", ("query",)), mc.Projection("answer", ("key",)))
    )
    with pytest.raises(ValueError, match="cannot be told by name"):
        mc.label_params(tree)
    for attention, expected in (("split", Dims(0, (1, 2))), ("per_head", Dims(0, 2))):
        rules = mc.MatrixRules(attention=attention, blocks=layout)
        assert rules.dimension_numbers(tree)["attn"]["answer"] == expected
        assert rules.labels(tree)["attn"]["ask"] == "muon"
    stacked = {"layers": jax.tree.map(lambda x: leaf(2, *x.shape), tree)}
    rules = mc.MatrixRules(attention="per_head", blocks=layout)
    assert rules.dimension_numbers(stacked)["layers"]["attn"]["ask"] == Dims(1, 3)


def test_query_heads_on_two_axes():
    tree = {"attn": {"ask": {"w": leaf(2, 3, 8, 48)}, "answer": {"w": leaf(2, 8, 48)}}}
    layout = mc.AttentionLayout(
        (
            mc.Projection("ask", ("query",), input_axis=-1),
            mc.Projection("answer", ("key",), input_axis=-1),
        )
    )
    for attention, ask, answer in (
        ("split", Dims(3, (0, 1, 2)), Dims(2, (0, 1))),
        ("per_head", Dims(3, 2), Dims(2, 1)),
    ):
        rules = mc.MatrixRules(attention=attention, blocks=layout)
        dims = rules.dimension_numbers(tree)["attn"]
        assert (dims["ask"]["w"], dims["answer"]["w"]) == (ask, answer)
    text = mc.describe_attention(tree, {"attn": leaf(6)}, blocks=layout)
    assert text.splitlines()[0] == "attn: custom, 6 query heads on 2 key heads of 8"
    with pytest.raises(ValueError, match="the kernel has 6 heads, 4 maxima were given"):
        mc.apply_qk_clip(
            jax.tree.map(lambda x: jnp.ones(x.shape), tree), {"attn": jnp.ones(4)}, blocks=layout
        )


def test_nnx_outer_levels_and_lists_are_seen_through():
    tree = {"params": {"layers": [LATENT, LATENT]}}
    dims = mc.MatrixRules(attention="split").dimension_numbers(tree)
    assert dims["params"]["layers"][1]["wkv_a"]["kernel"] == mc.MatrixSpec(
        (0, 1), mc.Split(1, (5, 2))
    )


def test_a_fused_kernel_that_names_cut_needs_no_output_projection():
    rules = mc.MatrixRules(attention="split")
    dims = rules.dimension_numbers({"attn": kernels(qkv=(12, 36))})
    assert dims["attn"]["qkv"]["kernel"].splits == (mc.Split(1, (12, 12, 12)),)
    with pytest.raises(ValueError, match="gives the head size"):
        rules.dimension_numbers({"attn": kernels(qkv=(12, 32))})
