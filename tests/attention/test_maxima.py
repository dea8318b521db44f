"""Recorded maxima against dense float64 logits, and how several become one."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from muonclip_jax.attention import attention_max_logits, merge_max_logits, reduce_max_logits
from tests.attention.cases import CASES
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_maxima_are_those_of_dense_float64_logits(name):
    query, key, _, keywords = CASES[name].make()
    expected = dense_attention(query, key, **keywords).max_logits
    actual = jax.jit(lambda q, k: attention_max_logits(q, k, **keywords))(query, key)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_accumulates_in_float32(dtype):
    query, key, _, _ = CASES["grouped"].make(dtype)
    expected = dense_attention(query, key).max_logits
    actual = attention_max_logits(query, key)
    assert actual.dtype == jnp.float32
    # The inputs are rounded before both; the products and their sum are not.
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE["float32"])


def test_without_a_batch_axis():
    query, key, _, _ = CASES["grouped"].make()
    expected = dense_attention(query[:1], key[:1], is_causal=True).max_logits
    actual = attention_max_logits(query[0], key[0], is_causal=True)
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE["float32"])


def test_signature_is_that_of_jax_nn():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(attention_max_logits).parameters
    left_out = {"value", "return_residual"}
    assert list(ours) == [name for name in theirs if name not in left_out]
    assert [ours[n].kind for n in ours] == [theirs[n].kind for n in ours]
    assert [ours[n].default for n in ours] == [theirs[n].default for n in ours]


def test_no_gradient_flows():
    query, key, _, _ = CASES["grouped"].make()
    gradients = jax.grad(lambda q, k: attention_max_logits(q, k).sum(), argnums=(0, 1))(query, key)
    assert all(not np.any(gradient) for gradient in gradients)


def test_a_nan_logit_is_recorded_as_one_or_left_out():
    query, key, _, _ = CASES["plain"].make()
    expected = np.asarray(attention_max_logits(query, key))
    maxima = np.asarray(attention_max_logits(query.at[1, 2, 3].set(jnp.nan), key))
    np.testing.assert_array_equal(maxima[:3], expected[:3])
    rest = dense_attention(query.at[1, 2, 3].set(0.0), key).max_logits
    assert np.isnan(maxima[3]) or np.isclose(maxima[3], rest[3])


@pytest.mark.parametrize("is_causal", [False, True])
def test_memory_grows_with_the_sequence_and_not_with_its_square(is_causal):
    def peak(length):
        array = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        compiled = (
            jax.jit(lambda q, k: attention_max_logits(q, k, is_causal=is_causal))
            .lower(array, array)
            .compile()
        )
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    short, long = peak(4096), peak(8192)
    assert long < 2.5 * short
    # One head's dense logits alone would take 256 MB.
    assert long < 64 * 2**20


def test_merging_takes_the_largest_finite_maximum():
    nan, inf = np.nan, np.inf
    first = {"a": {"max_logits": (jnp.array([1.0, nan, nan, inf, -inf, nan, 3.0, inf]),)}}
    second = {"a": {"max_logits": (jnp.array([2.0, 5.0, -inf, 7.0, -inf, inf, nan, -inf]),)}}
    for trees in ((first, second), (second, first)):
        merged = merge_max_logits(*trees)["a"]["max_logits"][0]
        np.testing.assert_array_equal(merged, [2.0, 5.0, nan, 7.0, -inf, nan, 3.0, inf])


def test_merging_micro_batches_gives_the_maxima_of_the_whole_batch():
    query, key, _, _ = CASES["causal"].make()
    pieces = [attention_max_logits(query[i], key[i], is_causal=True) for i in range(2)]
    whole = attention_max_logits(query, key, is_causal=True)
    np.testing.assert_array_equal(merge_max_logits(*pieces), whole)
    np.testing.assert_array_equal(merge_max_logits(whole), whole)


def test_merging_says_what_differs():
    tree = {"a": {"max_logits": jnp.ones(4)}}
    with pytest.raises(ValueError, match="at least one tree"):
        merge_max_logits()
    with pytest.raises(ValueError, match=r"trees 1 and 2 differ in \['a/max_logits', 'b/max_log"):
        merge_max_logits(tree, {"b": {"max_logits": jnp.ones(4)}})
    with pytest.raises(ValueError, match=r"'a/max_logits' have shape \(4,\) in tree 1 and \(2,\)"):
        merge_max_logits(tree, {"a": {"max_logits": jnp.ones(2)}})


def test_reduction_over_a_mesh_is_one_collective():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    rng = np.random.default_rng(0)
    tree = {
        "a": {"max_logits": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)},
        "b": {"max_logits": (jnp.asarray(rng.standard_normal((4, 2, 5)), jnp.bfloat16),)},
    }
    tree["a"]["max_logits"] = tree["a"]["max_logits"].at[0, 0].set(np.nan).at[:, 1].set(np.inf)
    spec = PartitionSpec(("x", "y"))
    reduce = jax.jit(
        jax.shard_map(
            lambda t: reduce_max_logits(t, ("x", "y")), mesh=mesh, in_specs=spec, out_specs=spec
        )
    )
    reduced = reduce(tree)
    rows = [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(4)]
    expected = merge_max_logits(*rows)
    for i in range(4):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), reduced, expected)
    assert jax.tree.map(lambda x: x.dtype, reduced) == jax.tree.map(lambda x: x.dtype, tree)
    program = reduce.lower(tree).compile().as_text() or ""
    assert program.count(" all-reduce(") == 1


def test_reduction_of_an_empty_tree_is_empty():
    assert reduce_max_logits({}, "nowhere") == {}
