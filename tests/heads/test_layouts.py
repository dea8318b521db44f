"""Attention layouts as values, and finding them in trees."""

import jax
import jax.numpy as jnp
import pytest

from muonclip_jax.heads.finding import block_rules, find_blocks
from muonclip_jax.heads.layouts import (
    BUILTIN_LAYOUTS,
    QUERY_KEY_VALUE,
    AttentionLayout,
    Projection,
    separate,
)


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


KERNEL = leaf(6, 2, 4)


def test_layouts_are_hashable_values():
    layout = separate("a", "b")
    projections = Projection("a", ("query",)), Projection("b", ("key",))
    same = AttentionLayout(projections, "separate q and k")
    assert layout == same
    assert hash(layout) == hash(same)
    assert len({*BUILTIN_LAYOUTS}) == len(BUILTIN_LAYOUTS)


def test_unknown_roles_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'Wqkv' has the parts \('q', 'key'\); .* 'query_alone'"):
        Projection("Wqkv", ("q", "key"))


def test_a_size_for_every_part():
    with pytest.raises(ValueError, match="2 parts and 1 sizes"):
        Projection("Wq", ("query", "gate"), sizes=(4,))


def test_unknown_orders_list_the_known_ones():
    with pytest.raises(ValueError, match="interleaved='heads'; it must be one of False, True, 'g"):
        Projection("Wq", ("query", "gate"), interleaved="heads")


def test_a_layout_needs_a_query():
    with pytest.raises(ValueError, match="'mine' has no query"):
        AttentionLayout((Projection("Wk", ("key",)),), "mine")


@pytest.mark.parametrize(("query", "key", "value"), QUERY_KEY_VALUE)
def test_plain_names_are_found(query, key, value):
    leaves = {f"enc/attn/{query}/kernel": KERNEL, f"enc/attn/{key}/kernel": KERNEL}
    (block,) = find_blocks(leaves, None)
    assert block.path == "enc/attn"
    assert block.layout == separate(query, key)
    assert set(block.leaves) == {f"{query}/kernel", f"{key}/kernel"}


def test_arrays_without_a_module_are_found():
    (block,) = find_blocks({"attn/wq": KERNEL, "attn/wk": KERNEL}, None)
    assert block.path == "attn"


def test_vectors_called_query_and_key_are_no_attention():
    assert not find_blocks({"a/query": leaf(3), "a/key": leaf(3), "b/query/kernel": KERNEL}, None)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (("wq_a", "wq_b", "wkv_a", "wkv_b"), "latent (low-rank query)"),
        (("query", "wkv_a", "wkv_b"), "latent"),
        (("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "latent (low-rank query)"),
        (("q_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "latent"),
        (("wq_b", "wkv_a", "wk_b", "wv_b"), "latent (low-rank query)"),
        (("q_proj", "kv_a_proj_with_mqa", "k_b_proj", "v_b_proj"), "latent"),
        (("q_nope", "q_rope", "k_nope", "k_rope"), "latent (separate parts)"),
        (("c_attn", "c_proj"), "fused q k v"),
        (("query_key_value", "dense"), "fused q k v, interleaved"),
        (("qkv_proj", "o_proj"), "fused q k v"),
        (("to_q", "to_kv"), "separate q, fused k v"),
    ],
)
def test_model_names_are_found(names, layout):
    (block,) = find_blocks({f"layers/0/self_attn/{n}/kernel": KERNEL for n in names}, None)
    assert (block.path, block.layout.name) == ("layers/0/self_attn", layout)


def test_an_indexer_beside_latent_attention_is_no_block():
    names = ("wq_a", "wq_b", "wkv_a", "wkv_b", "indexer/wq_b", "indexer/wk")
    blocks = find_blocks({f"attn/{name}/kernel": KERNEL for name in names}, None)
    assert [block.path for block in blocks] == ["attn"]


TREE = {
    f"{stack}/{i}/attn/{name}/kernel": KERNEL
    for stack in ("encoder", "decoder")
    for i in range(2)
    for name in ("query", "key")
}


@pytest.mark.parametrize(
    ("blocks", "selected"),
    [
        (None, ["encoder/0/attn", "encoder/1/attn", "decoder/0/attn", "decoder/1/attn"]),
        ("decoder", ["decoder/0/attn", "decoder/1/attn"]),
        ([r"encoder/1/", "decoder/0"], ["encoder/1/attn", "decoder/0/attn"]),
        ((r"encoder/1/", r"decoder/0"), ["encoder/1/attn", "decoder/0/attn"]),
        (".*", ["encoder/0/attn", "encoder/1/attn", "decoder/0/attn", "decoder/1/attn"]),
    ],
)
def test_patterns_select(blocks, selected):
    found = find_blocks(TREE, block_rules(blocks))
    assert len(found) == 4
    assert [block.path for block in found if block.selected] == selected


def test_the_first_rule_that_matches_wins():
    mine = AttentionLayout(separate("ask", "answer").projections, "mine")
    tree = TREE | {"decoder/2/attn/ask/w": KERNEL, "decoder/2/attn/answer/w": KERNEL}
    found = find_blocks(tree, block_rules([(r"decoder/\d+/attn", mine), "decoder/0"]))
    names = {block.path: block.layout.name for block in found if block.selected}
    assert names == {"decoder/0/attn": "separate q and k", "decoder/2/attn": "mine"}


def test_a_layout_alone_is_looked_for_everywhere():
    (block,) = find_blocks(
        {"ask": leaf(6, 8), "answer": leaf(6, 8)}, block_rules(separate("ask", "answer"))
    )
    assert block.path == ""


def test_a_projection_may_be_deeper():
    layout = separate("core/wq", "core/wk")
    found = find_blocks(
        {"attn/core/wq/w": KERNEL, "attn/core/wk/w": KERNEL}, block_rules(("attn$", layout))
    )
    assert [block.path for block in found if block.selected] == ["attn"]


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'crossattn' matches no path.*'encoder/0/attn'"):
        find_blocks(TREE, block_rules("crossattn"))


def test_a_layout_that_is_nowhere_is_an_error():
    with pytest.raises(ValueError, match=r"layout 'separate q and k' .* needs 'ask' and 'answer'"):
        find_blocks(TREE, block_rules(("decoder", separate("ask", "answer"))))


@pytest.mark.parametrize("blocks", [3, [3], [("a", "b", "c")], [("a", None)]])
def test_blocks_of_another_type_are_an_error(blocks):
    with pytest.raises(TypeError, match=r"blocks= got .*a pair \(pattern, AttentionLayout\)"):
        block_rules(blocks)


def test_no_entry_and_a_bad_pattern_are_errors():
    with pytest.raises(ValueError, match=r"blocks=\(\) selects no attention block"):
        block_rules(())
    with pytest.raises(ValueError, match="no regular expression"):
        block_rules("attn(")
