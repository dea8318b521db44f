"""The printed table, the telemetry, and copies of the weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.clipping import QKClipInfo, apply_qk_clip, describe_attention
from muonclip_jax.clipping.gamma import SHARED_KEYS, role_factors


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def kernels(**shapes):
    return {name: {"kernel": leaf(*shape)} for name, shape in shapes.items()}


def norms(query, key, sizes=(8,), key_sizes=None):
    return {query: {"scale": leaf(*sizes)}, key: {"scale": leaf(*(key_sizes or sizes))}}


A = kernels(query=(6, 4, 8), key=(6, 2, 8), out=(4, 8, 6))
A["query"]["bias"] = leaf(4, 8)
B = kernels(wq_b=(3, 5, 2, 6), wkv_a=(3, 9, 6), wkv_b=(3, 4, 2, 7), out=(3, 2, 3, 9))
A_TEXT = """\
a: separate q and k, 4 query heads on 2 key heads of 8
  a/query/bias (4, 8): query by {query}
  a/query/kernel (6, 4, 8): query by {query}"""
B_TEXT = """\
b: latent (low-rank query), 2 heads of 4, stacked (3,)
  b/wq_b/kernel (3, 5, 2, 6): query (4 a head) by gamma^alpha, query (2 a head) by gamma
  b/wkv_b/kernel (3, 4, 2, 7): key (4 a head) by gamma^(1-alpha), value (3 a head) untouched"""


def test_the_table():
    params = {"a": A, "b": B}
    assert describe_attention(params) == f"{A_TEXT.format(query='gamma')}\n{B_TEXT}"
    text = describe_attention(params, shared_keys="balanced", blocks="a")
    key = "  a/key/kernel (6, 2, 8): key by eta^(1-alpha)"
    unselected = "b: latent (low-rank query), not selected by blocks="
    assert text == f"{A_TEXT.format(query='gamma/eta^(1-alpha)')}\n{key}\n{unselected}"
    for rule in SHARED_KEYS:  # the words name what each rule scales
        factors = role_factors(jnp.asarray([0.25, 1.0, 1.0, 0.5]), 0.5, rule, 2)
        text = describe_attention({"a": A}, shared_keys=rule)
        named = {line.split("/")[1] for line in text.splitlines()[1:]}
        assert named == set(factors) - {"query_alone"}
    with pytest.raises(ValueError, match="No attention block was found"):
        describe_attention(kernels(dense=(3, 3)))


SEPARATE = "separate q and k, "
OPEN = SEPARATE + "heads as many as the maxima say$"
SHARED = r"[a-z, ]+, cannot be clipped: its queries and keys are normalised"
#: What a block holds, and the beginning of its description without maxima.
TITLES = {
    "merged": (kernels(q_proj=(6, 32), k_proj=(6, 16)), OPEN),
    "four layers of merged heads, or heads of 64": (kernels(q=(4, 64, 64), k=(4, 64, 64)), OPEN),
    "of no known size": (kernels(qkv=(6, 48)), "fused q k v, cannot be clipped: neither .*pass"),
    "with an output": (kernels(q=(4, 64, 64), k=(4, 64, 64), o=(4, 64, 64)), OPEN),
    "heads on an axis, without an output": (kernels(q=(6, 2, 4), k=(6, 2, 4)), OPEN),
    "an axis of four in every place": (kernels(q=(4, 4, 4), k=(4, 4, 4), o=(4, 4, 4)), OPEN),
    "one reading": (
        kernels(q=(64, 8, 16), k=(64, 2, 16), o=(8, 16, 64)),
        SEPARATE + "8 query heads on 2 key heads of",
    ),
    "stacked behind": (
        kernels(q=(64, 3, 4, 16), k=(64, 3, 1, 16), o=(4, 3, 16, 64)),
        SEPARATE + "4 query heads on 1 key",
    ),
    "gains that heads share": (A | norms("query_ln", "key_ln"), SHARED + ".*'query_ln' and 'key_"),
    "of merged heads": (
        kernels(q_proj=(6, 32), k_proj=(6, 16)) | norms("q_norm", "k_norm"),
        SHARED,
    ),
    "of stacked layers": (
        kernels(query=(6, 3, 4, 8), key=(6, 3, 2, 8)) | norms("q_norm", "k_norm", sizes=(8, 3)),
        SHARED,
    ),
    "gains of every head": (
        A | norms("query_norm", "key_norm", sizes=(32,), key_sizes=(16,)),
        ".*on 2 key heads of 8, normalised: gains of 'query_norm' and 'key_norm'\n"
        r"  attn/query_norm/scale \(32,\): query by gamma$",
    ),
}


@pytest.mark.parametrize("name", TITLES)
def test_shapes_are_read_where_they_allow_one_reading_and_never_guessed(name):
    block, expected = TITLES[name]
    text = describe_attention({"attn": block})
    assert re.match(f"attn: {expected}", text), text
    if expected is OPEN and len(block) == 2 and "q" not in block:
        text = describe_attention({"attn": block}, {"attn": leaf(4)})
        assert text.startswith("attn: separate q and k, 4 query heads on 2 key heads of 8\n")


def test_flat_scalars():
    params = {name: {"query": jnp.ones((6, 2, 4)), "key": jnp.ones((6, 2, 4))} for name in "ab"}
    maxima = {"a": jnp.asarray([400.0, 9.0]), "b": jnp.asarray([50.0, 200.0])}
    info = apply_qk_clip(params, maxima)[1]
    with jax.transfer_guard("disallow"):  # inside `jit` they are tracers
        found = jax.jit(lambda info: info.scalars("clip"))(info)
    rows = {"": (400.0, 0.25, 2.0), "a/": (400.0, 0.25, 1.0), "b/": (200.0, 0.5, 1.0)}
    names = ("max_logit", "min_gamma", "clipped_heads")
    expected = {f"clip/{at}{n}": x for at, row in rows.items() for n, x in zip(names, row)}  # noqa: B905
    scalars = {name: float(x) for name, x in found.items()}
    assert scalars == expected | {"clip/clipped_fraction": 0.5}
    assert len(info.scalars(blocks=False)) == 4
    not_clipped = apply_qk_clip(params, maxima, threshold=1e9)[1]
    assert jax.tree.structure(info) == jax.tree.structure(not_clipped)
    assert (int(not_clipped.total_clipped), not_clipped.total_heads) == (0, 4)
    empty = QKClipInfo(max_logits={}, gamma={}, clipped_heads={}).scalars()
    assert float(empty["qk_clip/clipped_fraction"]) == 0.0
    assert float(empty["qk_clip/max_logit"]) == -np.inf
    for bad in (np.nan, np.inf, -np.inf):  # a head that is not finite hides no other
        maxima = {"a": jnp.asarray([bad, 9.0]), "b": jnp.asarray([bad, bad])}
        info = info._replace(max_logits=maxima)
        assert float(info.largest) == float(info.scalars()["qk_clip/a/max_logit"]) == 9.0
        np.testing.assert_array_equal(info.scalars()["qk_clip/b/max_logit"], bad)
