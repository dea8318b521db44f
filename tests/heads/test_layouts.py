"""Attention layouts as values, and finding them in trees."""

import re

import jax
import jax.numpy as jnp
import pytest

from muonclip_jax.heads.finding import block_rules, find_blocks
from muonclip_jax.heads.layouts import QUERY_KEY_VALUE, AttentionLayout, Projection, separate

KERNEL = jax.ShapeDtypeStruct((6, 2, 4), jnp.float32)
VECTOR = jax.ShapeDtypeStruct((3,), jnp.float32)
MINE = AttentionLayout(separate("ask", "answer").projections, "mine")


def kernels(block, *names):
    return {f"{block}/{name}/kernel": KERNEL for name in names}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Projection("Wqkv", ("q", "key")), r"'Wqkv' has the parts .*'query_alone'"),
        (lambda: Projection("Wq", ("query", "gate"), sizes=(4,)), "2 parts and 1 sizes"),
        (lambda: Projection("Wq", ("query",), interleaved="heads"), "one of False, True, 'group'"),
        (lambda: AttentionLayout((Projection("Wk", ("key",)),), "mine"), "'mine' has no query"),
    ],
)
def test_layouts_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


LOW_RANK = "latent (low-rank query)"
#: The modules of a block, and its layout.
NAMES = {
    **{f"{query} {key}": "separate q and k" for query, key, _ in QUERY_KEY_VALUE},
    "wq_a wq_b wkv_a wkv_b": LOW_RANK,
    "query wkv_a wkv_b": "latent",
    "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj": LOW_RANK,
    "wq_b wkv_a wk_b wv_b": LOW_RANK,
    "q_proj kv_a_proj_with_mqa k_b_proj v_b_proj": "latent",
    "q_nope q_rope k_nope k_rope": "latent (separate parts)",
    "c_attn c_proj": "fused q k v",
    "query_key_value dense": "fused q k v, interleaved",
    "combined_qkv post": "fused q k v",
    "to_q to_kv": "separate q, fused k v",
    # An indexer beside latent attention is no block.
    "wq_a wq_b wkv_a wkv_b indexer/wq_b indexer/wk": LOW_RANK,
}


@pytest.mark.parametrize("names", NAMES)
def test_model_names_are_found(names):
    (block,) = find_blocks(kernels("layers/0/attn", *names.split()), None)
    assert (block.path, block.layout.name) == ("layers/0/attn", NAMES[names])
    assert set(block.leaves) == {f"{name}/kernel" for name in names.split()}


def test_arrays_without_a_module_are_found_and_vectors_are_no_attention():
    assert [b.path for b in find_blocks({"attn/wq": KERNEL, "attn/wk": KERNEL}, None)] == ["attn"]
    assert not find_blocks({"a/query": VECTOR, "a/key": VECTOR, "b/query/kernel": KERNEL}, None)


ALL = ["encoder/0/attn", "encoder/1/attn", "decoder/0/attn", "decoder/1/attn"]
TREE = {path: x for block in ALL for path, x in kernels(block, "query", "key").items()}
OWN = TREE | kernels("decoder/2/attn", "ask", "answer")


@pytest.mark.parametrize(
    ("leaves", "blocks", "selected"),
    [
        (TREE, None, ALL),
        (TREE, "decoder", ALL[2:]),
        (TREE, [r"encoder/1/", "decoder/0"], ALL[1:3]),
        # The first rule that matches and whose layout is there.
        (OWN, [(r"decoder/\d+/attn", MINE), "decoder/0"], ["decoder/0/attn", "decoder/2/attn"]),
        (kernels("a", "core/wq", "core/wk"), ("a$", separate("core/wq", "core/wk")), ["a"]),
        ({"ask": KERNEL, "answer": KERNEL}, MINE, [""]),
    ],
)
def test_blocks_are_selected(leaves, blocks, selected):
    found = find_blocks(leaves, block_rules(blocks))
    assert [block.path for block in found if block.selected] == selected
    assert leaves is not TREE or len(found) == 4
    names = {block.path: block.layout.name for block in found}
    assert names.get("decoder/2/attn", "mine") == "mine"


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ("crossattn", ValueError, "'crossattn' matches no path.*'encoder/0/attn'"),
        (("decoder", MINE), ValueError, "layout 'mine' .* needs 'ask' and 'answer'"),
        ((), ValueError, re.escape("blocks=() selects no attention block")),
        ("attn(", ValueError, "not a regular expression"),
        *(
            (x, TypeError, "blocks= got .*a pair")
            for x in (3, [3], [("a", "b", "c")], [("a", None)])
        ),
    ],
)
def test_blocks_that_are_refused(blocks, error, message):
    with pytest.raises(error, match=message):
        find_blocks(TREE, block_rules(blocks))
