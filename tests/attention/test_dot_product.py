"""Attention that records: its output and gradients are jax.nn's, its maxima the dense ones."""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import export

from muonclip_jax.attention import IMPLEMENTATIONS, attention_max_logits, dot_product_attention, xla
from muonclip_jax.attention.arguments import read_arguments
from muonclip_jax.attention.log_sum_exp import bound_from_log_sum_exp
from tests.attention.cases import BLOCKS, CASES, quick_first
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE


def _cut(monkeypatch, blocks):
    """Makes the XLA implementation cut even short sequences, or none."""
    monkeypatch.setattr(xla, "_DENSE_ELEMENTS", {"cpu": BLOCKS[blocks]})
    monkeypatch.setattr(xla, "_BLOCK_ELEMENTS", {"cpu": 1})


@pytest.fixture(params=BLOCKS)
def blocks(request, monkeypatch):
    """Runs a test with one block and with many."""
    _cut(monkeypatch, request.param)
    return request.param


def _with_gradients(attend, keywords, cotangent):
    """Compiles output, maxima and the gradients of `sum(out * cotangent)`."""

    def loss(query, key, value):
        out, max_logits = attend(query, key, value, **keywords)
        # A gradient through the maxima would be seen.
        seen = 1e3 * jnp.where(max_logits > 0, max_logits, 0).sum()
        return jnp.vdot(out, cotangent) + seen, (out, max_logits)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def _jax_nn(*arguments, **keywords):
    return jax.nn.dot_product_attention(*arguments, **keywords), jnp.zeros(1)


@pytest.mark.parametrize("name", quick_first())
def test_output_gradients_and_maxima_of_many_blocks(name, monkeypatch):
    _cut(monkeypatch, "many blocks")
    query, key, value, keywords = CASES[name].make()
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(query.shape), jnp.float32)
    gradients, (out, max_logits) = _with_gradients(dot_product_attention, keywords, cotangent)(
        query, key, value
    )
    dense = dense_attention(query, key, value, cotangent=cotangent, **keywords)
    np.testing.assert_allclose(max_logits, dense.max_logits, rtol=TOLERANCE["float32"])
    assert max_logits.dtype == jnp.float32
    np.testing.assert_allclose(out, dense.out, rtol=2e-5, atol=2e-5)
    for actual, expected in zip(gradients, dense.gradients, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize(
    "name",
    [
        "grouped",
        "empty rows, causal",
        pytest.param("both lengths, causal", marks=pytest.mark.slow),
        pytest.param("bias, causal", marks=pytest.mark.slow),
    ],
)
def test_output_and_gradients_are_those_of_jax_nn(name, blocks):
    query, key, value, keywords = CASES[name].make()
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(query.shape), jnp.float32)
    gradients, (out, _) = _with_gradients(dot_product_attention, keywords, cotangent)(
        query, key, value
    )
    expected_gradients, (expected_out, _) = _with_gradients(_jax_nn, keywords, cotangent)(
        query, key, value
    )
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", quick_first())
def test_output_and_maxima_of_one_block(name):
    query, key, value, keywords = CASES[name].make()
    out, max_logits = jax.jit(lambda *a: dot_product_attention(*a, **keywords))(query, key, value)
    dense = dense_attention(query, key, value, **keywords)
    np.testing.assert_allclose(max_logits, dense.max_logits, rtol=TOLERANCE["float32"])
    np.testing.assert_allclose(out, dense.out, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["causal"])
def test_bfloat16(name, blocks):
    query, key, value, keywords = CASES[name].make(jnp.bfloat16)
    attend = jax.jit(lambda *a: dot_product_attention(*a, **keywords))
    out, max_logits = attend(query, key, value)
    expected = jax.nn.dot_product_attention(query, key, value, **keywords)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2e-2, atol=2e-2
    )
    maxima = dense_attention(query, key, **keywords).max_logits
    np.testing.assert_allclose(max_logits, maxima, rtol=TOLERANCE["float32"])


def test_value_may_have_its_own_width(blocks):
    query, key, value, keywords = CASES["causal"].make(value_dim=5)
    out, _ = jax.jit(lambda *a: dot_product_attention(*a, **keywords))(query, key, value)
    expected = dense_attention(query, key, value, **keywords).out
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


def test_without_a_batch_axis_and_without_jit():
    query, key, value, keywords = CASES["causal"].make()
    out, max_logits = dot_product_attention(query[0], key[0], value[0], **keywords)
    dense = dense_attention(query[:1], key[:1], value[:1], **keywords)
    np.testing.assert_allclose(out, dense.out[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(max_logits, dense.max_logits, rtol=TOLERANCE["float32"])


def test_forward_mode_and_second_derivatives(blocks):
    query, key, value, keywords = CASES["causal"].make()
    direction = jnp.ones_like(query)

    def curvature(attend):
        gradient = jax.grad(lambda q: jnp.sum(attend(q) ** 2))
        return jax.jit(lambda q: jax.jvp(gradient, (q,), (direction,))[1])(query)

    np.testing.assert_allclose(
        curvature(lambda q: dot_product_attention(q, key, value, **keywords)[0]),
        curvature(lambda q: jax.nn.dot_product_attention(q, key, value, **keywords)),
        rtol=1e-3,
        atol=1e-3,  # differences of products of a few hundred
    )


def test_vmap_keeps_one_set_of_maxima_for_each_call():
    query, key, value, keywords = CASES["causal"].make()
    _, max_logits = jax.vmap(lambda *a: dot_product_attention(*a, **keywords))(query, key, value)
    for i in range(2):
        expected = dense_attention(query[i : i + 1], key[i : i + 1], **keywords).max_logits
        np.testing.assert_allclose(max_logits[i], expected, rtol=TOLERANCE["float32"])


@pytest.mark.parametrize("is_causal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_memory_of_a_training_step_grows_with_the_sequence_and_not_with_its_square(is_causal):
    def peak(length):
        array = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)

        def loss(query, key, value):
            out, max_logits = dot_product_attention(query, key, value, is_causal=is_causal)
            return out.sum(), max_logits

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        compiled = gradient.lower(array, array, array).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    short, long = peak(4096), peak(8192)
    assert long < 2.5 * short
    # The four heads' dense logits alone would take 1 GB.
    assert long < 256 * 2**20


def test_a_long_causal_sequence_computes_five_eighths_of_the_pairs():
    array = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)

    def visited(**keywords):
        arguments = []
        jax.eval_shape(
            lambda q: arguments.append(xla.plan_segments(_read(q, **keywords))) or q, array
        )
        return sum(s.blocks * s.length * s.keys for s in arguments[0]) / 4096**2

    assert visited() == 1
    assert visited(is_causal=True) == 5 / 8
    assert visited(is_causal=True, local_window_size=(256, 0)) < 0.1


def _read(query, **keywords):
    defaults = {
        "scale": None,
        "is_causal": False,
        "query_seq_lengths": None,
        "key_value_seq_lengths": None,
        "local_window_size": None,
    }
    return read_arguments(query, query, query, None, None, **(defaults | keywords))


def test_signature_is_that_of_jax_nn():
    theirs = dict(inspect.signature(jax.nn.dot_product_attention).parameters)
    del theirs["return_residual"]  # what it returns beside the output is the maxima here
    ours = inspect.signature(dot_product_attention).parameters
    assert list(ours) == list(theirs)
    assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize("name", ["grouped", "causal", "key lengths"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_sum_exp_bounds_the_maximum_within_the_logarithm_of_the_keys(name, dtype):
    query, key, value, keywords = CASES[name].make(dtype)
    # The reference computes the residual that cuDNN returns, in the same dtype.
    _, residual = jax.nn.dot_product_attention(
        query, key, value, implementation="xla", return_residual=True, **keywords
    )
    bound = bound_from_log_sum_exp(residual, keywords.get("query_seq_lengths"))
    maxima = np.asarray(attention_max_logits(query, key, **keywords))
    assert np.all(bound >= maxima)
    rounding = 2 * float(jnp.finfo(dtype).eps) * np.abs(maxima + math.log(key.shape[1]))
    assert np.all(bound <= maxima + math.log(key.shape[1]) + rounding)


def test_log_sum_exp_of_rows_with_nothing_counts_for_nothing():
    query, key, value, keywords = CASES["empty rows"].make()
    _, residual = jax.nn.dot_product_attention(
        query, key, value, implementation="xla", return_residual=True, **keywords
    )
    bound = bound_from_log_sum_exp(residual)
    assert np.isneginf(bound).tolist() == [False, True, False, False]


def test_unknown_implementation_lists_the_known_ones():
    query, key, value, _ = CASES["plain"].make()
    with pytest.raises(
        ValueError,
        match=r"'flash' is unknown; choose one of 'xla', 'cudnn', .*None for XLA's, which serves",
    ):
        dot_product_attention(query, key, value, implementation="flash")


@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n != "xla"])
def test_others_refuse_an_additive_bias(name):
    query, key, value, keywords = CASES["bias that adds"].make(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="additive bias, which no clip can change"):
        dot_product_attention(query, key, value, implementation=name, **keywords)


def test_cudnn_says_why_not():
    query, key, value, _ = CASES["plain"].make()
    with pytest.raises(NotImplementedError, match="takes bfloat16 and float16, not float32"):
        dot_product_attention(query, key, value, implementation="cudnn")
    query, key, value, _ = CASES["plain"].make(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs, not on 'cpu'; use 'xla'"):
        dot_product_attention(query, key, value, implementation="cudnn")


def test_what_cudnn_itself_objects_to_is_a_refusal(monkeypatch):
    """On a GPU without a cuDNN, or with heads of a size that it does not serve."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    query, key, value, _ = CASES["plain"].make(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"cannot be used: cuDNN says: .*; use 'xla'"):
        dot_product_attention(query, key, value, implementation="cudnn")


BAD = {
    "rank": ((1, 1, 4, 2, 8), (4, 2, 8), {}, "query has shape .*Merge further batch axes"),
    "batch axis": ((1, 4, 2, 8), (4, 2, 8), {}, "either all have a batch axis, or none"),
    "batch": ((2, 4, 2, 8), (3, 4, 2, 8), {}, "must agree in batch"),
    "head_dim": ((2, 4, 2, 8), (2, 4, 2, 6), {}, "must agree in head_dim"),
    "heads": ((2, 4, 3, 8), (2, 4, 2, 8), {}, "query has 3 heads and key 2: .* multiple"),
    "float mask": (
        (2, 4, 2, 8),
        (2, 4, 2, 8),
        {"mask": jnp.ones((4, 4))},
        r"mask is float32; it must be boolean.*mask.astype\(bool\)",
    ),
    "mask shape": (
        (2, 4, 2, 8),
        (2, 4, 2, 8),
        {"mask": jnp.ones((3, 4), bool)},
        r"mask has shape \(3, 4\); it must broadcast to .* = \(2, 2, 4, 4\)",
    ),
    "bias shape": (
        (2, 4, 2, 8),
        (2, 4, 2, 8),
        {"bias": jnp.ones((1, 2, 2, 4, 4))},
        r"bias has shape \(1, 2, 2, 4, 4\); it must broadcast",
    ),
    "lengths": (
        (2, 4, 2, 8),
        (2, 4, 2, 8),
        {"query_seq_lengths": jnp.ones((3,), jnp.int32)},
        r"query_seq_lengths must hold one integer a sequence, shape \(2,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told_apart(name):
    query, key, keywords, message = BAD[name]
    # Without the type checker, which refuses wrong shapes before the function sees them.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(attention_max_logits)(jnp.ones(query), jnp.ones(key), **keywords)


def test_dtypes_must_agree():
    with pytest.raises(ValueError, match="query is bfloat16 and key is float32; cast them"):
        attention_max_logits(jnp.ones((2, 1, 4), jnp.bfloat16), jnp.ones((2, 1, 4)))


def test_value_must_fit_the_key():
    x = jnp.ones((3, 2, 4))
    with pytest.raises(ValueError, match="key and value must agree in all but their last axis"):
        inspect.unwrap(dot_product_attention)(x, x, jnp.ones((5, 2, 4)))


@pytest.fixture
def _symbolic_sizes_are_no_ints() -> Iterator[None]:
    """Switches off the check of annotations that the tests add to every function."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_symbolic_sizes_are_no_ints")
@pytest.mark.parametrize(
    ("shape", "masks"),
    [("b, 6, 4, 8", "b, 1, 6, 6"), ("b, t, 4, 8", "1, 1, t, t"), ("2, t, 4, 8", "2, 1, t, t")],
)
def test_symbolic_shapes_are_exported(shape: str, masks: str):
    """As `jax.nn.dot_product_attention` can be; at one shape it is what is computed without."""

    def attend(query: jax.Array, mask: jax.Array) -> Any:
        output = dot_product_attention(query, query, query, mask=mask, is_causal=True)
        biased = dot_product_attention(query, query, query, jnp.where(mask, 0.0, -jnp.inf))
        return output, biased, attention_max_logits(query, query, mask=mask, is_causal=True)

    scope = export.SymbolicScope()
    exported = export.export(jax.jit(attend))(
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), jnp.float32),
        jax.ShapeDtypeStruct(export.symbolic_shape(masks, scope=scope), jnp.bool_),
    )
    query = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    mask = jnp.ones((2 if masks[0] != "1" else 1, 1, 6, 6), bool).at[..., 1].set(False)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        exported.call(query, mask),
        attend(query, mask),
    )


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_hidden_pairs_are_no_infinities_to_jax(jit: bool):
    """With a bias, with a mask and for the maxima alone."""
    query = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    mask = jnp.ones((1, 1, 6, 6), bool).at[..., 1].set(False)

    def attend(query: jax.Array) -> Any:
        biased = dot_product_attention(query, query, query, jnp.zeros((1, 1, 6, 6)), mask)
        return biased, attention_max_logits(query, query, mask=mask)

    with jax.debug_infs(True), jax.debug_nans(True):
        (jax.jit(attend) if jit else attend)(query)
