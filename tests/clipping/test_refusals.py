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
from tests.clipping.models import attention, normal

ONES = jnp.ones(4)
HIDDEN = optax.MaskedNode()


def kernels(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: {"kernel": normal(*shape)} for name, shape in shapes.items()}


def norms(query: str, key: str, leaf: str = "scale", shape: tuple[int, ...] = (8,)) -> Any:
    return attention() | {name: {leaf: jnp.ones(shape)} for name in (query, key)}


def adapter(*missing: str) -> dict[str, Any]:
    """A projection with an adapter of rank 2, without the leaves of these names."""
    kernel = {"kernel": normal(6, 32)}
    leaves = {"base_module": kernel, "lora_a": normal(6, 2), "lora_b": normal(2, 32)}
    return {name: leaf for name, leaf in leaves.items() if name not in missing}


def adapters(*missing: str) -> dict[str, Any]:
    return {name: adapter(*missing) for name in ("q_proj", "k_proj")} | kernels(o_proj=(32, 6))


KERNELS_ONLY = {
    name: {leaf: x if leaf == "kernel" else HIDDEN for leaf, x in module.items()}
    for name, module in attention().items()
}
FOUR = "the kernel has 4 heads, {} maxima were given"
LOGITS = r"whole logits .*take the maximum first: .*s\.max\(axis={}\)"
GATE = "as if half of them were a gate"
#: What the block "attn" holds, the maxima given for it, and what the error says.
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "wrong count": (attention(), jnp.ones(3), FOUR.format(3) + "|maxima of shape"),
    "wrong count, grouped": (attention(kv_heads=2), jnp.ones(8), FOUR.format(8)),
    "wrong count, stacked": (attention(stack=(3,)), jnp.ones((3, 5)), FOUR.format(5)),
    "wrong count, no output": (
        *(kernels(query=(6, 4, 8), key=(6, 4, 8)), jnp.ones(3)),
        FOUR.format(3),
    ),
    "wrong count, merged": (
        *(kernels(query=(6, 32), key=(6, 32), out=(4, 8, 6)), jnp.ones(5)),
        FOUR.format(5),
    ),
    "whole logits": (attention(), normal(2, 4, 16, 16), LOGITS.format(r"\(0, 2, 3\)")),
    "whole logits, one sequence": (attention(), normal(4, 16, 12), LOGITS.format(r"\(1, 2\)")),
    "whole logits, stacked": (
        *(attention(stack=(3,)), normal(3, 2, 4, 16, 16)),
        LOGITS.format(r"\(1, 3, 4\)"),
    ),
    "not a maximum": (
        attention(),
        {"weights": (ONES,)},
        "recorded for 'attn/weights",
    ),
    "one number": (attention(), jnp.asarray(7.0), r"shape \(\) do not fit.*\(query heads,\)"),
    "heads alone on a stack": (
        *(attention(stack=(3,)), ONES),
        r"\(3, 6, 4, 8\).*Expected maxima \(query heads,\), or \(",
    ),
    "Flax's norms": (norms("query_ln", "key_ln"), ONES, "normalised .'query_ln'.*blocks="),
    "Hugging Face's norms": (norms("q_norm", "k_norm"), ONES, "normalised .'q_norm'.*blocks="),
    "Gemma's norms": (
        *(norms("_query_norm", "_key_norm"), ONES),
        "cannot clip.*'attn'.*normalised .'_query_norm'",
    ),
    "norms with a shift": (
        norms("query_norm", "key_norm", "bias"),
        ONES,
        "normalised .'query_norm'",
    ),
    "a shift for every head": (
        *(norms("query_ln", "key_ln", "bias", (4, 8)), ONES),
        "share or do not have",
    ),
    "unknown leaf": (
        *(attention() | {"query": {"kernel": normal(6, 4, 8), "mystery": jnp.ones(3)}}, ONES),
        r"'attn/query/mystery'.*Known names are kernel",
    ),
    "adapters alone": (
        *(adapters("base_module"), ONES),
        "block 'attn': 'q_proj' has a low-rank adapter here, and the kernel .* not in this tree",
    ),
    "half an adapter": (
        *(adapters("lora_b"), ONES),
        "block 'attn': 'attn/q_proj/lora_a' belongs .* an adapter needs both halves",
    ),
    "adapters of queries alone": (
        *({"q_proj": adapter("base_module")}, ONES),
        r"No attention block.*qk_clip_threshold=None.*low-rank",
    ),
    "a hidden gate": (
        *(kernels(q_proj=(6, 64), k_proj=(6, 32), o_proj=(32, 6)), ONES),
        GATE + ".*'gate'",
    ),
    "a hidden gate, unknown output": (
        *(kernels(q_proj=(6, 64), k_proj=(6, 16), v_proj=(6, 16), mixing=(32, 6)), ONES),
        GATE + ".*'gate'",
    ),
    "fused, no size of a head": (
        *(kernels(qkv=(6, 48)), ONES),
        r"how large a head is; .*head_dim=.* or kv_heads=",
    ),
    "a masked norm": (
        *(attention() | {"query_ln": {"scale": HIDDEN}}, ONES),
        "'attn/query_ln/scale' is hidden",
    ),
    "masked biases": (KERNELS_ONLY, ONES, "only partly visible: .*'attn/query/bias'.*outer chain"),
    "masked altogether": (
        *(jax.tree.map(lambda _: HIDDEN, attention()), ONES),
        "No attention block .*multi_transform",
    ),
    **{
        f"a gate beside {name}": (
            *(kernels(q_proj=(6, 64), k_proj=(6, 16), **{name: (32, 6)}), ONES),
            GATE,
        )
        for name in (*OUT_NAMES, "Wo", "W_o")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name):
    block, maxima, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        apply_qk_clip({"attn": block, "dense": kernels(up=(3, 3))}, {"attn": maxima})


def test_blocks_and_maxima_belong_together():
    with pytest.raises(ValueError, match=r"block 'b' .* has no maximum. Maxima are there for: 'a'"):
        apply_qk_clip({"a": attention(), "b": attention()}, {"a": ONES})
    with pytest.raises(ValueError, match=r"recorded for 'layer_0/attn'.*Blocks are: 'attn'"):
        apply_qk_clip({"attn": attention()}, {"attn": ONES, "layer_0/attn": ONES})
    with pytest.raises(ValueError, match="No attention block was found in parameters 'dense/kern"):
        apply_qk_clip(kernels(dense=(3, 3)), {"attn": ONES})
    with pytest.raises(ValueError, match="threshold must be positive"):
        apply_qk_clip({"attn": attention()}, {"attn": ONES}, threshold=0.0)
    with pytest.raises(ValueError, match="alpha must lie"):
        qk_clip_info({"attn": attention()}, {"attn": ONES}, alpha=1.1)
    text = describe_attention({"attn": adapters("base_module")})
    assert "attn: separate q and k, cannot be clipped: " in text


# What looks like a trap and is none: one head of four is over the threshold four times.

OVER = jnp.asarray([400.0, 1.0, 1.0, 1.0])
GATED = kernels(q_proj=(6, 64), k_proj=(6, 16), v_proj=(6, 16), o_proj=(32, 6))
LAYOUT = AttentionLayout(
    (
        Projection("q_proj", ("query", "gate"), interleaved=True),
        Projection("k_proj", ("key",)),
    )
)
FUSED = AttentionLayout((Projection("qkv", ("query", "key", "value")),), kv_heads=1)
#: The block, `blocks=`, the query kernel, the features of its first head, and gamma there.
READ: dict[str, tuple[Any, Any, str, slice, float]] = {
    "the layout that the refusal names": (GATED, LAYOUT, "q_proj", slice(0, 8), 0.25),
    "a gate that an axis for heads shows": (
        *(kernels(query=(6, 4, 16), key=(6, 2, 8), mixing=(4, 8, 6)), None, "query"),
        *(slice(0, 8), 0.25),
    ),
    "values half as large as queries": (
        *(kernels(q_proj=(6, 32), k_proj=(6, 16), v_proj=(6, 8), o_proj=(16, 6)), None, "q_proj"),
        *(slice(0, 8), 0.25),
    ),
    "an unknown output that takes all queries": (
        kernels(q_proj=(32, 64), k_proj=(32, 32), mixing=(64, 32), outer_gate=(32, 64)),
        *(None, "q_proj", slice(0, 16), 0.25),
    ),
    "a fused kernel that was told": (kernels(qkv=(6, 48)), FUSED, "qkv", slice(0, 8), 0.25),
    "a norm of the latent query": (
        kernels(wq_b=(3, 4, 6), wkv_a=(5, 6), wkv_b=(4, 4, 7)) | {"q_norm": {"scale": jnp.ones(3)}},
        *(None, "wq_b", slice(0, 4), 0.5),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_it_is_read_and_other_heads_stay(name):
    block, blocks, query, features, gamma = READ[name]
    new, _ = apply_qk_clip({"attn": block}, {"attn": OVER}, blocks=blocks)
    ratio = np.asarray(new["attn"][query]["kernel"] / block[query]["kernel"])
    ratio = ratio[:, 0] if ratio.ndim == 3 else ratio
    np.testing.assert_allclose(ratio[:, features], gamma, rtol=1e-6)
    if name != "a norm of the latent query":  # whose rotary features take gamma whole
        assert (np.delete(ratio, np.r_[features], axis=1) == 1).all()
    for other in set(block) - {query}:
        if blocks is FUSED or "k_proj" in block or "key" in block:  # shared keys
            jax.tree.map(np.testing.assert_array_equal, new["attn"][other], block[other])


@pytest.mark.parametrize("shared_keys", ["query", "group", "balanced"])
@pytest.mark.parametrize("heads", [1, 4])
def test_keys_that_are_values_stay(shared_keys, heads):
    keys = {"k_einsum": {"w": normal(heads, 6, 8)}}
    params = {"attn": {"q_einsum": {"w": normal(4, 6, 8)}} | keys}
    new, _ = apply_qk_clip(params, {"attn": jnp.full(4, 400.0)}, shared_keys=shared_keys)
    np.testing.assert_array_equal(new["attn"]["k_einsum"]["w"], keys["k_einsum"]["w"])
    expected = params["attn"]["q_einsum"]["w"] / 4
    np.testing.assert_allclose(new["attn"]["q_einsum"]["w"], expected, rtol=1e-6)


def test_maxima_with_a_batch_between_layers_and_heads_say_what_to_write():
    """What MaxText records under its scan: `(layers, batch, heads)`."""
    latent = kernels(wq_a=(5, 3, 2), wq_b=(2, 3, 2, 6), wkv_a=(5, 3, 4), wkv_b=(2, 3, 2, 7))
    path = "decoder/layers/self_attention"
    params = {"decoder": {"layers": {"self_attention": latent}}}
    maxima = normal(3, 4, 2).at[1, 2, 0].set(400.0)
    message = r"do not fit.*\(stacked layers, batch, query heads\).*lambda s: s.max\(axis=1\)"
    with pytest.raises(ValueError, match=message):
        apply_qk_clip(params, {path: maxima})
    new, info = apply_qk_clip(params, jax.tree.map(lambda s: s.max(axis=1), {path: maxima}))
    assert info.gamma[path].tolist() == [[1.0, 1.0], [0.25, 1.0], [1.0, 1.0]]
    kernel = new["decoder"]["layers"]["self_attention"]["wq_b"]["kernel"]
    np.testing.assert_array_equal(kernel[:, ::2], latent["wq_b"]["kernel"][:, ::2])
    with pytest.raises(ValueError, match=r"s\.max\(axis=\(1, 2\)\)"):
        apply_qk_clip(params, {path: maxima[:, None]})
