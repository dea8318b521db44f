"""Fail closed: what was asked for and cannot be done is an error with a path.

The refusals are traps too: in other implementations each of these passed in silence.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muonclip_jax.clipping import apply_qk_clip, describe_attention, qk_clip_info
from muonclip_jax.heads.layouts import OUT_NAMES, AttentionLayout, Projection
from tests.clipping.models import attention, normal


def test_a_block_without_a_maximum_is_an_error():
    params = {"a": attention(), "b": attention()}
    with pytest.raises(ValueError, match=r"block 'b' .* has no maximum. Maxima are there for: 'a'"):
        apply_qk_clip(params, {"a": jnp.ones(4)})


def test_a_maximum_without_a_block_is_an_error():
    with pytest.raises(ValueError, match=r"recorded for 'layer_0/attn'.*Blocks are: 'attn'"):
        apply_qk_clip({"attn": attention()}, {"attn": jnp.ones(4), "layer_0/attn": jnp.ones(4)})


def test_no_attention_block_at_all_is_an_error():
    with pytest.raises(ValueError, match="No attention block was found in parameters 'dense/kern"):
        apply_qk_clip({"dense": {"kernel": jnp.ones((3, 3))}}, {"attn": jnp.ones(4)})


def test_a_wrong_head_count_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"'attn/query/kernel' of shape \(6, 4, 8\).*maxima of shape \(3,\).*do not fit",
    ):
        apply_qk_clip({"attn": attention()}, {"attn": jnp.ones(3)})


OUT = {"out": {"kernel": normal(4, 8, 6)}}


@pytest.mark.parametrize(
    ("given", "params"),
    [
        ((3,), attention()),
        ((8,), attention(kv_heads=2)),
        ((3, 5), attention(stack=(3,))),
        ((3,), {n: {"kernel": normal(6, 4, 8)} for n in ("query", "key")}),
        ((5,), {n: {"kernel": normal(6, 32)} for n in ("query", "key")} | OUT),
    ],
)
def test_a_wrong_head_count_says_both_counts(given, params):
    with pytest.raises(ValueError, match=f"the kernel has 4 heads, {given[-1]} maxima were given"):
        apply_qk_clip({"attn": params}, {"attn": jnp.ones(given)})


@pytest.mark.parametrize(
    ("shape", "stack", "axes"),
    [
        ((2, 4, 16, 16), (), r"\(0, 2, 3\)"),  # (batch, heads, queries, keys)
        ((4, 16, 12), (), r"\(1, 2\)"),
        ((3, 2, 4, 16, 16), (3,), r"\(1, 3, 4\)"),
    ],
)
def test_whole_logits_say_over_which_axes_to_take_the_maximum(shape, stack, axes):
    params = {"attn": attention(stack=stack)}
    logits = {"attn": normal(*shape)}
    message = rf"whole logits .*take the maximum first: .*s\.max\(axis={axes}\)"
    with pytest.raises(ValueError, match=message):
        apply_qk_clip(params, logits)


def test_three_forms_of_maxima_mean_the_same():
    params = {"layer": {"attn": attention()}}
    maxima = jnp.asarray([150.0, 90.0, 40.0, 300.0])
    forms = (
        {"intermediates": {"layer": {"attn": {"max_logits": (maxima,)}}}},
        {"layer": {"attn": maxima}},
        {"layer/attn": maxima},
    )
    first, *others = (apply_qk_clip(params, form) for form in forms)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)


@pytest.mark.parametrize("tree", [{"weights": (jnp.ones(4),)}, {"weights": jnp.ones(4)}])
def test_what_is_neither_named_nor_at_a_block_is_no_maximum(tree):
    with pytest.raises(ValueError, match=r"recorded for 'attn/weights.*no attention block has"):
        apply_qk_clip({"attn": attention()}, {"attn": tree})


def test_one_number_for_all_heads_is_an_error():
    with pytest.raises(ValueError, match=r"maxima of shape \(\) do not fit.*\(query heads,\)"):
        apply_qk_clip({"attn": attention()}, {"attn": jnp.asarray(7.0)})


def test_heads_alone_on_a_stacked_kernel_are_an_error():
    with pytest.raises(
        ValueError, match=r"\(3, 6, 4, 8\).*Expected maxima \(query heads,\), or \("
    ):
        apply_qk_clip({"attn": attention(stack=(3,))}, {"attn": jnp.ones(4)})


@pytest.mark.parametrize(
    "norms",
    [("query_ln", "key_ln"), ("q_norm", "k_norm"), ("query_norm", "key_norm")],
)
@pytest.mark.parametrize("scale", [8, None])
def test_normalised_queries_and_keys_are_refused(norms, scale):
    attn = attention()
    for norm in norms:
        attn[norm] = {"scale": jnp.ones(scale)} if scale else {"bias": jnp.ones(8)}
    with pytest.raises(ValueError, match=f"cannot clip.*'attn'.*normalised .'{norms[0]}'.*blocks="):
        apply_qk_clip({"attn": attn}, {"attn": jnp.ones(4)})


def test_a_shift_for_every_head_is_no_gain():
    attn = attention() | {name: {"bias": jnp.ones((4, 8))} for name in ("query_ln", "key_ln")}
    with pytest.raises(ValueError, match="share or do not have"):
        apply_qk_clip({"attn": attn}, {"attn": jnp.ones(4)})


def test_a_low_rank_query_norm_of_latent_attention_is_no_query_norm():
    attn = {
        "wq_b": {"kernel": normal(3, 2, 6)},
        "q_norm": {"scale": jnp.ones(3)},
        "wkv_a": {"kernel": normal(5, 4 + 2)},
        "wkv_b": {"kernel": normal(4, 2, 4 + 3)},
    }
    _, info = apply_qk_clip({"attn": attn}, {"attn": jnp.asarray([200.0, 1.0])})
    assert int(info.total_clipped) == 1


def test_an_unknown_leaf_of_a_projection_is_refused():
    attn = attention()
    attn["query"]["mystery"] = jnp.ones(3)
    with pytest.raises(ValueError, match=r"'attn/query/mystery'.*Known names are kernel"):
        apply_qk_clip({"attn": attn}, {"attn": jnp.ones(4)})


def adapter(kernel, *names):
    """A projection with an adapter of rank 2, without the leaves of these names."""
    leaves = {"base_module": {"kernel": kernel}, "lora_a": normal(6, 2), "lora_b": normal(2, 32)}
    return {name: leaf for name, leaf in leaves.items() if name not in names}


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        ("base_module", "'q_proj' has a low-rank adapter here, and the kernel .* not in this tree"),
        ("lora_b", "'attn/q_proj/lora_a' belongs .* an adapter needs both halves"),
    ],
)
def test_an_adapter_without_what_it_adapts_is_refused(missing, why):
    """Scaling one of them alone scales no head's sum."""
    modules = {name: adapter(normal(6, 32), missing) for name in ("q_proj", "k_proj")}
    params = {"attn": modules | {"o_proj": {"kernel": normal(32, 6)}}}
    with pytest.raises(ValueError, match=f"cannot clip attention block 'attn': {why}"):
        apply_qk_clip(params, {"attn": jnp.full(4, 400.0)})
    assert "attn: separate q and k, cannot be clipped: " in describe_attention(params)


def test_adapters_of_queries_alone_say_what_is_missing():
    params = {"attn": {"q_proj": adapter(normal(6, 32), "base_module")}}
    with pytest.raises(ValueError, match=r"No attention block.*qk_clip_threshold=None.*low-rank"):
        apply_qk_clip(params, {"attn": jnp.ones(4)})


@pytest.mark.parametrize("shared_keys", ["query", "group", "balanced"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_keys_that_are_values_stay(shared_keys, heads):
    keys = {"k_einsum": {"w": normal(heads, 6, 8)}}
    params = {"attn": {"q_einsum": {"w": normal(4, 6, 8)}} | keys}
    new, _ = apply_qk_clip(params, {"attn": jnp.full(4, 400.0)}, shared_keys=shared_keys)
    np.testing.assert_array_equal(new["attn"]["k_einsum"]["w"], keys["k_einsum"]["w"])
    expected = params["attn"]["q_einsum"]["w"] / 4
    np.testing.assert_allclose(new["attn"]["q_einsum"]["w"], expected, rtol=1e-6)


def test_a_gate_that_hides_in_the_query_kernel_is_refused():
    attn = {
        "q_proj": {"kernel": normal(6, 2 * 4 * 8)},
        "k_proj": {"kernel": normal(6, 4 * 8)},
        "o_proj": {"kernel": normal(4 * 8, 6)},
    }
    with pytest.raises(ValueError, match=r"as if half of them were a gate.*'gate'"):
        apply_qk_clip({"attn": attn}, {"attn": jnp.ones(4)})


@pytest.mark.parametrize("name", [*OUT_NAMES, "Wo", "W_o"])
def test_a_gate_shows_under_every_name_of_the_output(name):
    attn = {
        "q_proj": {"kernel": normal(6, 2 * 4 * 8)},
        "k_proj": {"kernel": normal(6, 2 * 8)},
        name: {"kernel": normal(4 * 8, 6)},
    }
    with pytest.raises(ValueError, match=r"as if half of them were a gate"):
        apply_qk_clip({"attn": attn}, {"attn": jnp.ones(4)})


def test_a_gate_beside_an_output_of_an_unknown_name():
    """Refused where merged kernels leave its place open, read where an axis for heads shows it."""
    attn = {
        "q_proj": {"kernel": normal(6, 2 * 4 * 8)},
        "k_proj": {"kernel": normal(6, 2 * 8)},
        "v_proj": {"kernel": normal(6, 2 * 8)},
        "mixing": {"kernel": normal(4 * 8, 6)},
    }
    with pytest.raises(ValueError, match=r"as if half of them were a gate.*'gate'"):
        apply_qk_clip({"attn": attn}, {"attn": jnp.ones(4)})
    attn = {
        "query": {"kernel": normal(6, 4, 16)},
        "key": {"kernel": normal(6, 2, 8)},
        "mixing": {"kernel": normal(4, 8, 6)},
    }
    maxima = {"attn": jnp.asarray([400.0, 1.0, 1.0, 1.0])}
    new, _ = apply_qk_clip({"attn": attn}, maxima)
    ratio = np.asarray(new["attn"]["query"]["kernel"] / attn["query"]["kernel"])
    np.testing.assert_allclose(ratio[:, 0, :8], 0.25, rtol=1e-6)
    assert (ratio[:, 0, 8:] == 1).all()
    assert (ratio[:, 1:] == 1).all()


def test_an_output_of_an_unknown_name_that_takes_all_queries_is_no_gate():
    attn = {
        "q_proj": {"kernel": normal(32, 4 * 16)},
        "k_proj": {"kernel": normal(32, 2 * 16)},
        "mixing": {"kernel": normal(4 * 16, 32)},
        "outer_gate": {"kernel": normal(32, 4 * 16)},  # takes half as many, by chance
    }
    _, info = apply_qk_clip({"attn": attn}, {"attn": jnp.asarray([400.0, 1.0, 1.0, 1.0])})
    assert int(info.total_clipped) == 1


def test_a_gate_that_values_reveal_still_needs_its_place():
    attn = {
        "q_proj": {"kernel": normal(6, 2 * 4 * 8)},
        "k_proj": {"kernel": normal(6, 2 * 8)},
        "v_proj": {"kernel": normal(6, 2 * 8)},
        "o_proj": {"kernel": normal(4 * 8, 6)},
    }
    with pytest.raises(
        ValueError, match=r"a gate\. Say where .*head by head .*interleaved='group'"
    ):
        apply_qk_clip({"attn": attn}, {"attn": jnp.ones(4)})
    # The layout that the message names.
    query = Projection("q_proj", ("query", "gate"), interleaved=True)
    layout = AttentionLayout((query, Projection("k_proj", ("key",))))
    maxima = {"attn": jnp.asarray([400.0, 1.0, 1.0, 1.0])}
    new, _ = apply_qk_clip({"attn": attn}, maxima, blocks=layout)
    ratio = np.asarray(new["attn"]["q_proj"]["kernel"] / attn["q_proj"]["kernel"])
    np.testing.assert_allclose(ratio[:, :8], 0.25, rtol=1e-6)
    assert (ratio[:, 8:] == 1).all()


def test_values_half_as_large_as_queries_are_no_gate():
    attn = {
        "q_proj": {"kernel": normal(6, 4 * 8)},
        "k_proj": {"kernel": normal(6, 2 * 8)},
        "v_proj": {"kernel": normal(6, 2 * 4)},
        "o_proj": {"kernel": normal(4 * 4, 6)},
    }
    maxima = {"attn": jnp.asarray([400.0, 1.0, 1.0, 1.0])}
    new, _ = apply_qk_clip({"attn": attn}, maxima)
    ratio = np.asarray(new["attn"]["q_proj"]["kernel"] / attn["q_proj"]["kernel"])
    np.testing.assert_allclose(ratio[:, :8], 0.25, rtol=1e-6)
    assert (ratio[:, 8:] == 1).all()


MAXTEXT = {
    "wq_a": {"kernel": normal(5, 3, 2)},
    "wq_b": {"kernel": normal(2, 3, 2, 6)},
    "wkv_a": {"kernel": normal(5, 3, 4)},
    "wkv_b": {"kernel": normal(2, 3, 2, 7)},
}


def test_maxima_with_a_batch_between_layers_and_heads_say_what_to_write():
    """What MaxText records under its scan: `(layers, batch, heads)`."""
    params = {"decoder": {"layers": {"self_attention": MAXTEXT}}}
    maxima = jnp.asarray(normal(3, 4, 2)).at[1, 2, 0].set(400.0)
    path = "decoder/layers/self_attention"
    message = r"do not fit.*\(stacked layers, batch, query heads\).*lambda s: s.max\(axis=1\)"
    with pytest.raises(ValueError, match=message):
        apply_qk_clip(params, {path: maxima})
    new, info = apply_qk_clip(params, jax.tree.map(lambda s: s.max(axis=1), {path: maxima}))
    assert info.gamma[path].tolist() == [[1.0, 1.0], [0.25, 1.0], [1.0, 1.0]]
    kernel = new["decoder"]["layers"]["self_attention"]["wq_b"]["kernel"]
    np.testing.assert_array_equal(kernel[:, ::2], MAXTEXT["wq_b"]["kernel"][:, ::2])
    with pytest.raises(ValueError, match=r"s\.max\(axis=\(1, 2\)\)"):
        apply_qk_clip(params, {path: maxima[:, None]})


def test_a_fused_kernel_without_the_size_of_a_head_is_refused_and_can_be_told():
    params = {"attn": {"qkv": {"kernel": normal(6, 48)}}}
    maxima = {"attn": jnp.asarray([200.0, 1.0, 1.0, 1.0])}
    with pytest.raises(ValueError, match=r"how large a head is; .*head_dim=.* or kv_heads="):
        apply_qk_clip(params, maxima)
    layout = AttentionLayout((Projection("qkv", ("query", "key", "value")),), kv_heads=1)
    new, _ = apply_qk_clip(params, maxima, blocks=layout)
    old = params["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(new["attn"]["qkv"]["kernel"][:, :8], old[:, :8] / 2, rtol=1e-6)
    np.testing.assert_array_equal(new["attn"]["qkv"]["kernel"][:, 8:], old[:, 8:])


def test_a_masked_norm_is_not_overlooked():
    attn = attention() | {"query_ln": {"scale": optax.MaskedNode()}}
    with pytest.raises(ValueError, match="'attn/query_ln/scale' is hidden"):
        apply_qk_clip({"attn": attn}, {"attn": jnp.ones(4)})


def test_masked_trees_say_where_the_clip_belongs():
    attn = attention()
    kernels_only = {
        name: {leaf: x if leaf == "kernel" else optax.MaskedNode() for leaf, x in module.items()}
        for name, module in attn.items()
    }
    with pytest.raises(ValueError, match=r"only partly visible: .*'attn/query/bias'.*outer chain"):
        apply_qk_clip({"attn": kernels_only}, {"attn": jnp.ones(4)})
    hidden = jax.tree.map(lambda _: optax.MaskedNode(), attn)
    other = {"dense": {"kernel": jnp.ones((3, 3))}}
    with pytest.raises(ValueError, match=r"No attention block .*multi_transform"):
        apply_qk_clip({"attn": hidden, **other}, {"attn": jnp.ones(4)})


def test_settings_are_checked():
    params, maxima = {"attn": attention()}, {"attn": jnp.ones(4)}
    with pytest.raises(ValueError, match="threshold must be positive"):
        apply_qk_clip(params, maxima, threshold=0.0)
    with pytest.raises(ValueError, match="alpha must lie"):
        qk_clip_info(params, maxima, alpha=1.1)
