"""How several maxima become one, and maxima recorded beside an attention of the user's own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from muonclip_jax import attention_max_logits, merge_max_logits, reduce_max_logits
from muonclip_jax.attention.recording import RecordingBeside
from tests.attention.cases import make
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE


def test_merging_takes_the_largest_finite_maximum():
    nan, inf = np.nan, np.inf
    first = {"a": {"max_logits": (jnp.array([1.0, nan, nan, inf, -inf, nan, 3.0, inf]),)}}
    second = {"a": {"max_logits": (jnp.array([2.0, 5.0, -inf, 7.0, -inf, inf, nan, -inf]),)}}
    for trees in ((first, second), (second, first), (first, second, first)):
        merged = merge_max_logits(*trees)["a"]["max_logits"][0]
        np.testing.assert_array_equal(merged, [2.0, 5.0, nan, 7.0, -inf, nan, 3.0, inf])
    # Micro-batches give the maxima of the whole batch.
    query, key, _, _ = make("causal")
    pieces = [attention_max_logits(query[i], key[i], is_causal=True) for i in range(2)]
    whole = attention_max_logits(query, key, is_causal=True)
    np.testing.assert_array_equal(merge_max_logits(*pieces), whole)
    tree = {"a": {"max_logits": jnp.ones(4)}}
    for given, message in (
        ((), "at least one tree"),
        ((tree, {"b": tree["a"]}), r"at 'a/max_logits' tree 1 has \(4,\) and tree 2 nothing"),
        ((tree, {"a": {"max_logits": jnp.ones(2)}}), r"tree 1 has \(4,\) and tree 2 \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_max_logits(*given)


def test_reduction_over_a_mesh_is_one_collective():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)
    tree = {
        "a": {"max_logits": first.at[0, 0].set(np.nan).at[:, 1].set(np.inf)},
        "b": {"max_logits": (jnp.asarray(rng.standard_normal((4, 2, 5)), jnp.bfloat16),)},
    }
    spec = PartitionSpec(("x", "y"))
    reduce = jax.jit(
        jax.shard_map(
            lambda t: reduce_max_logits(t, ("x", "y")), mesh=mesh, in_specs=spec, out_specs=spec
        )
    )
    reduced = reduce(tree)
    expected = merge_max_logits(*(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(4)))
    for i in range(4):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), reduced, expected)
    assert jax.tree.map(lambda x: x.dtype, reduced) == jax.tree.map(lambda x: x.dtype, tree)
    program = reduce.lower(tree).compile().as_text() or ""
    assert program.count(" all-reduce(") == 1


def _recorded(attention_fn: Any, *arguments: Any, **keywords: Any) -> tuple[Any, jax.Array]:
    seen: list[jax.Array] = []
    attend = RecordingBeside(attention_fn, lambda q, k, dtype: (q, k), seen.append)
    out = attend(*arguments, **keywords)
    (max_logits,) = seen
    return out, max_logits


MASK = jnp.asarray(np.random.default_rng(3).random((2, 4, 40, 40)) < 0.4)
LENGTHS = {"query_seq_lengths": jnp.array([7, 40]), "key_value_seq_lengths": jnp.array([30, 3])}
HIDING = jnp.where(MASK, 1.0, -jnp.inf)


def _any_keywords(query, key, value, **keywords):
    return jax.nn.dot_product_attention(query, key, value, **keywords)


@pytest.mark.parametrize(
    ("function", "bound", "keywords"),
    [
        (jax.nn.dot_product_attention, True, {"is_causal": True, "scale": 0.3}),
        (jax.nn.dot_product_attention, False, {"mask": MASK}),
        (_any_keywords, True, {"bias": HIDING, "local_window_size": (5, 1)}),
        (jax.nn.dot_product_attention, False, LENGTHS),
    ],
)
def test_what_says_which_pairs_is_understood_wherever_it_stands(function, bound, keywords):
    query, key, value, _ = make("plain")
    dense = dense_attention(query, key, value, **keywords)
    if bound:
        function, keywords = functools.partial(function, **keywords), {}
    out, max_logits = _recorded(function, query, key, value, **keywords)
    np.testing.assert_allclose(max_logits, dense.max_logits, rtol=TOLERANCE["float32"])
    np.testing.assert_array_equal(out, function(query, key, value, **keywords))


def test_defaults_count_and_what_is_passed_comes_before_them():
    query, key, value, _ = make("plain")

    def causal(query, key, value, mask=None, is_causal=True):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)

    bound = functools.partial(causal, is_causal=True)
    for function, passed in ((causal, {}), (causal, {"is_causal": False}),
                             (bound, {"is_causal": False})):  # fmt: skip
        _, max_logits = _recorded(function, query, key, value, **passed)
        expected = dense_attention(query, key, is_causal=not passed).max_logits
        np.testing.assert_allclose(max_logits, expected, rtol=TOLERANCE["float32"])
    assert (expected > dense_attention(query, key, is_causal=True).max_logits).any()
