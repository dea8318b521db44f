"""Attention that records: output, gradients and maxima are those of dense float64."""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from benchmarks.hlo import tally
from muonclip_jax import attention_max_logits, dot_product_attention
from muonclip_jax.attention import blocks
from muonclip_jax.attention.dot_product import bound_from_log_sum_exp
from muonclip_jax.attention.inputs import bias_permits
from tests.attention.cases import CASES, make
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE


def assert_close(found, expected, tolerance=TOLERANCE["float32"]):
    np.testing.assert_allclose(found, expected, tolerance, tolerance)


def same_maxima(found, expected):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE["float32"])


@pytest.fixture
def many_blocks(monkeypatch):
    """Cuts even short sequences into blocks."""
    monkeypatch.setitem(blocks.SIZES, "cpu", blocks.Sizes(1, 1, 32))
    monkeypatch.setattr(blocks, "_MAXIMA_BLOCK", 1)


IN_ONE_BLOCK = ("causal window", "empty rows, causal", "bias of -inf")


@pytest.mark.parametrize(
    ("name", "block"), [*((name, "many") for name in CASES), *((n, "one") for n in IN_ONE_BLOCK)]
)
def test_output_gradients_and_maxima_are_those_of_dense_float64(name, block, request):
    if block == "many":
        request.getfixturevalue("many_blocks")
    query, key, value, keywords = make(name)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(query.shape), jnp.float32)

    @jax.jit
    def step(query, key, value):
        def loss(query, key, value):
            out, max_logits = dot_product_attention(query, key, value, **keywords)
            maxima = max_logits, attention_max_logits(query, key, **keywords)
            # A gradient through the maxima would be seen.
            seen = sum(1e3 * jnp.where(each > 0, each, 0).sum() for each in maxima)
            return jnp.vdot(out, cotangent) + seen, (out, maxima)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)

    gradients, (out, maxima) = step(query, key, value)
    dense = dense_attention(query, key, value, cotangent=cotangent, **keywords)
    for found in maxima:
        same_maxima(found, dense.max_logits)
    assert_close(out, dense.out, 2e-5)
    for actual, expected in zip(gradients, dense.gradients, strict=True):
        assert_close(actual, expected, 5e-5)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_accumulates_in_float32(dtype):
    query, key, value, keywords = make("causal", dtype, value_dim=5)
    out, max_logits = jax.jit(lambda *a: dot_product_attention(*a, **keywords))(query, key, value)
    dense = dense_attention(query, key, value, **keywords)
    assert out.dtype == dtype
    assert_close(out.astype("float32"), dense.out, 2e-2)
    # The inputs are rounded before both; the products and their sum are not.
    for found in (max_logits, attention_max_logits(query, key, **keywords)):
        same_maxima(found, dense.max_logits)


@pytest.mark.parametrize("axes", [(), (1, 2), (2, 1, 1)])
def test_any_number_of_batch_axes(axes):
    query, key, value, keywords = make("mask")
    query, key, value, mask = (x[: math.prod(axes)] for x in (query, key, value, keywords["mask"]))
    dense = dense_attention(query, key, value, mask=mask)
    batched = [x.reshape(*axes, *x.shape[1:]) for x in (query, key, value, mask)]
    lengths = {"key_value_seq_lengths": jnp.full(axes or (1,), 40)}
    out, max_logits = dot_product_attention(*batched[:3], mask=batched[3], **lengths)
    assert out.shape == batched[0].shape
    assert_close(out.reshape(query.shape), dense.out, 2e-5)
    same_maxima(max_logits, dense.max_logits)


@pytest.mark.usefixtures("many_blocks")
def test_forward_mode_second_derivatives_and_vmap():
    query, key, value, keywords = make("causal")

    def curvature(attend):
        gradient = jax.grad(lambda q: jnp.sum(attend(q) ** 2))
        return jax.jit(lambda q: jax.jvp(gradient, (q,), (jnp.ones_like(q),))[1])(query)

    ours = curvature(lambda q: dot_product_attention(q, key, value, **keywords)[0])
    theirs = curvature(lambda q: jax.nn.dot_product_attention(q, key, value, **keywords))
    assert_close(ours, theirs, 1e-3)  # differences of products of a few hundred
    _, max_logits = jax.vmap(lambda *a: dot_product_attention(*a, **keywords))(query, key, value)
    for i in range(2):
        dense = dense_attention(query[i : i + 1], key[i : i + 1], **keywords)
        same_maxima(max_logits[i], dense.max_logits)


def test_a_nan_logit_is_recorded_as_one_or_left_out():
    query, key, _, _ = make("plain")
    expected = np.asarray(attention_max_logits(query, key))
    maxima = np.asarray(attention_max_logits(query.at[1, 2, 3].set(jnp.nan), key))
    np.testing.assert_array_equal(maxima[:3], expected[:3])
    rest = dense_attention(query.at[1, 2, 3].set(0.0), key).max_logits
    assert np.isnan(maxima[3]) or np.isclose(maxima[3], rest[3])


def test_the_largest_logit_is_found_wherever_it_is():
    # 600 and 700 are no multiples of a block: the last block is moved back.
    find = jax.jit(lambda query, key: attention_max_logits(query, key, scale=1.0))
    rng = np.random.default_rng(0)
    small = [0.1 * rng.standard_normal((1, n, 1, 8)).astype("float32") for n in (600, 700)]
    for t, s in ((0, 0), (0, 699), (599, 699), (511, 512), (300, 650)):
        query, key = (x.copy() for x in small)
        query[0, t], key[0, s] = 3.0, 4.0
        assert find(query, key).tolist() == [96.0]
    for sizes in ((0, 3), (3, 0)):
        query, key = (jnp.ones((1, size, 2, 4)) for size in sizes)
        assert attention_max_logits(query, key).tolist() == [-np.inf, -np.inf]


def _training_step(query, key, value):
    def loss(*arrays):
        out, max_logits = dot_product_attention(*arrays, is_causal=True)
        return out.sum(), max_logits

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)


@pytest.mark.parametrize("function", [_training_step, lambda q, k, v: attention_max_logits(q, k)])
def test_memory_grows_with_the_sequence_and_not_with_its_square(function):
    def peak(length):
        arrays = [jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)] * 3
        analysis: Any = jax.jit(function).lower(*arrays).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    short, long = peak(4096), peak(8192)
    assert long < 2.5 * short
    # The four heads' dense logits alone would take 1 GB.
    assert long < 256 * 2**20


@pytest.mark.parametrize(
    ("function", "arrays"), [(dot_product_attention, 3), (attention_max_logits, 2)]
)
def test_blocks_that_geometry_rules_out_are_never_computed(function, arrays):
    def flops(**keywords):
        x = [jax.ShapeDtypeStruct((1, 4096, 8, 8), jnp.float32)] * arrays
        program = jax.jit(lambda *x: function(*x, **keywords)).lower(*x).compile()
        return tally(program.as_text()).flops

    assert flops(is_causal=True) <= 5 / 8 * flops()
    assert flops(local_window_size=(8, 8)) <= 1 / 8 * flops()


@pytest.mark.parametrize("function", [dot_product_attention, attention_max_logits])
def test_signatures_are_that_of_jax_nn(function):
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(function).parameters
    left_out = {"return_residual", *({"value"} - set(ours))}
    assert list(ours) == [name for name in theirs if name not in left_out]
    assert [ours[n].kind for n in ours] == [theirs[n].kind for n in ours]
    assert [ours[n].default for n in ours] == [theirs[n].default for n in ours]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("both lengths, causal", "bfloat16"), ("empty rows, causal", "float32")],
)
def test_log_sum_exp_bounds_the_maximum_within_the_logarithm_of_the_keys(name, dtype):
    query, key, value, keywords = make(name, dtype)
    # The reference computes the residual that cuDNN returns, in the same dtype.
    _, residual = jax.nn.dot_product_attention(
        query, key, value, implementation="xla", return_residual=True, **keywords
    )
    bound = bound_from_log_sum_exp(residual, keywords.get("query_seq_lengths"))
    maxima = np.asarray(attention_max_logits(query, key, **keywords))
    assert np.isneginf(bound).tolist() == np.isneginf(maxima).tolist()
    bound, maxima = (np.asarray(x)[np.isfinite(maxima)] for x in (bound, maxima))
    highest = maxima + math.log(key.shape[1])
    assert np.all((bound >= maxima) & (bound <= highest + 2 * jnp.finfo(dtype).eps * abs(highest)))


@pytest.mark.parametrize(
    ("name", "dtype", "platform", "message"),
    [
        ("bias of -inf", "bfloat16", "cpu", "additive bias, which a clip cannot change"),
        ("plain", "float32", "gpu", "takes bfloat16 and float16, not float32"),
        ("plain", "bfloat16", "cpu", "NVIDIA GPUs, not on 'cpu'; use 'xla'"),
        # On a GPU without a cuDNN, or with heads of a size that it does not support.
        ("plain", "bfloat16", "gpu", r"cannot be used: cuDNN says: .*; use 'xla'"),
    ],
)
def test_cudnn_says_why_not(name, dtype, platform, message, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    *arrays, keywords = make(name, dtype)
    keywords["implementation"] = "cudnn"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda *x: dot_product_attention(*x, **keywords), *arrays)


X, HALF = jnp.ones((2, 4, 2, 8)), jnp.ones((2, 4, 2, 8), "bfloat16")
INTEGERS, FLASH = X.astype("int32"), {"implementation": "flash"}
#: Query and key, also a value where attention is asked, further arguments, and the error.
BAD: list[tuple[tuple[jax.Array, ...], dict[str, Any], str]] = [
    ((X[0, 0], X[0, 0]), {}, r"takes query .* They are float32 of shape \(2, 8\)"),
    ((X, X[:1]), {}, r"key \(\*batch, keys, K, H\) .* float32 of shape \(1, 4, 2, 8\)"),
    ((X, X[..., :6]), {}, r"float32 of shape \(2, 4, 2, 8\), float32 of shape \(2, 4, 2, 6\)"),
    ((jnp.ones((2, 4, 3, 8)), X), {}, r"N is a multiple of K: .*\(2, 4, 3, 8\)"),
    ((X, X, X[:, :3]), {}, r"value \(\*batch, keys, K, D\).*\(2, 3, 2, 8\)"),
    ((HALF, X), {}, "of one real floating dtype. They are bfloat16 of .*, float32"),
    ((INTEGERS, INTEGERS), {}, "of one real floating dtype. They are int32"),
    ((X, X), {"mask": jnp.ones((4, 4))}, r"must be boolean.*mask.astype\(bool\)"),
    ((X, X), {"mask": X[0, :3, :, 0] > 0}, r"mask has shape \(3, 2\).* \(2, 2, 4, 4\)"),
    ((X, X), {"bias": jnp.ones((1, 2, 2, 4, 4))}, r"bias has shape .* broadcast"),
    ((X, X), {"query_seq_lengths": jnp.ones((3,), "int32")}, r"one integer per .* shape \(2,\)"),
    ((X, X), FLASH, "'flash' is not known. Pass one of 'xla', 'mosaic_tpu'"),
    ((X, X, X), FLASH, "'flash' is not known. Pass one of 'xla', 'cudnn'"),
]


@pytest.mark.parametrize(("arrays", "keywords", "message"), BAD)
def test_bad_arguments_are_told_apart(arrays, keywords, message):
    function = attention_max_logits if len(arrays) == 2 else dot_product_attention
    # Without the type checker, which refuses wrong shapes before the function sees them.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(function)(*arrays, **keywords)


def test_a_bias_hides_a_pair_where_it_is_a_mask_in_truth():
    for dtype, values, expected in (
        ("float32", [0.0, -1e8, -1e9, -3e38, -np.inf, np.nan], [1, 1, 0, 0, 0, 1]),
        ("bfloat16", [0.0, -1e8, -1e10, -3e38, -np.inf, np.nan], [1, 1, 0, 0, 0, 1]),
        ("float16", [0.0, -3e4, -4e4, -6e4, -np.inf, np.nan], [1, 1, 0, 0, 0, 1]),
        ("int32", [0, -5, -(10**9)], [1, 1, 0]),
    ):
        assert bias_permits(jnp.asarray(values, dtype)).tolist() == [bool(x) for x in expected]


QUERY = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
FIRST_HIDDEN = jnp.ones((1, 1, 6, 6), bool).at[..., 1].set(False)


def _attend(query: jax.Array, mask: jax.Array) -> Any:
    biased = dot_product_attention(query, query, query, jnp.zeros(mask.shape), mask)
    hidden = dot_product_attention(query, query, query, jnp.where(mask, 0.0, -jnp.inf))
    causal = dot_product_attention(query, query, query, mask=mask, is_causal=True)
    return biased, hidden, causal, attention_max_logits(query, query, mask=mask, is_causal=True)


@pytest.mark.usefixtures("unchecked")  # symbolic sizes are no ints
def test_symbolic_shapes_are_exported():
    """As `jax.nn.dot_product_attention` can be; at one shape it is what is computed without."""
    scope = export.SymbolicScope()
    exported = export.export(jax.jit(_attend))(
        jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 4, 8", scope=scope), jnp.float32),
        jax.ShapeDtypeStruct(export.symbolic_shape("1, 1, t, t", scope=scope), jnp.bool_),
    )
    jax.tree.map(assert_close, exported.call(QUERY, FIRST_HIDDEN), _attend(QUERY, FIRST_HIDDEN))


def test_hidden_pairs_are_no_infinities_to_jax():
    with jax.debug_infs(True), jax.debug_nans(True):
        dot_product_attention(QUERY, QUERY, QUERY, jnp.zeros((1, 1, 6, 6)), FIRST_HIDDEN)
        attention_max_logits(QUERY, QUERY, mask=FIRST_HIDDEN)
