"""The Pallas kernels for per-head maxima, interpreted, against dense float64 logits."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from muonclip_jax.attention import attention_max_logits
from muonclip_jax.kernels.max_logits import max_logits
from muonclip_jax.kernels.max_logits.ranges import block_ranges
from muonclip_jax.kernels.pairs import Geometry, PairArrays
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE
from tests.kernels.pallas_cases import CASES, CAUSAL, PLATFORMS, QUICK, interpreted

__all__ = ["interpreted"]

P = PartitionSpec
CASE_NAMES = [
    pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,)) for name in CASES
]


def _pallas(query, key, **keywords):
    return attention_max_logits(query, key, implementation="pallas", **keywords)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_maxima_are_those_of_dense_float64_logits(name, interpreted):
    if name == "float16" and interpreted == "tpu":
        pytest.skip("refused, which another test asks for")
    query, key, keywords = CASES[name].arrays()
    expected = dense_attention(query, key, **keywords).max_logits
    actual = jax.jit(lambda q, k: _pallas(q, k, **keywords))(query, key)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE["float32"])


def test_what_fills_blocks_up_is_no_logit(interpreted):
    # Every logit is negative: a zero from beyond the end of a sequence or a head would win.
    query, key = jnp.ones((2, 150, 2, 24)), -jnp.ones((2, 140, 1, 24))
    lengths = {"query_seq_lengths": jnp.array([150, 3]), "key_value_seq_lengths": jnp.array([9, 0])}
    maxima = jax.jit(lambda q, k: _pallas(q, k, scale=1.0, **lengths))(query, key)
    assert maxima.tolist() == [-24.0, -24.0]


def test_the_largest_logit_is_found_wherever_it_is(interpreted):
    find = jax.jit(lambda q, k: _pallas(q, k, scale=1.0))
    for t, s in itertools.product((0, 127, 128, 299), (0, 128, 255, 256, 332)):
        query, key = np.full((1, 300, 1, 8), 0.1), np.full((1, 333, 1, 8), 0.1)
        query[0, t], key[0, s] = 3.0, 4.0
        assert find(jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32)) == 96.0


@pytest.mark.parametrize("scale", [-0.7, pytest.param(0.0, marks=pytest.mark.slow)])
def test_scale_of_any_sign(scale, interpreted):
    query, key, _ = CASES["plain"]._replace(queries=20, keys=30).arrays()
    mask = jnp.ones((4, 1, 1), bool).at[1].set(False)
    expected = dense_attention(query, key, mask=mask, scale=scale).max_logits
    # Traced, as a learned temperature is.
    maxima = jax.jit(lambda q, k, s: _pallas(q, k, scale=s, mask=mask))(query, key, scale)
    np.testing.assert_allclose(maxima, expected, rtol=TOLERANCE["float32"])
    assert np.isneginf(maxima[1])


def test_no_gradient_flows_and_none_is_in_the_way(interpreted):
    query, key, _ = CASES["plain"]._replace(queries=20, keys=30).arrays()

    @jax.checkpoint
    def loss(query):
        return jnp.sum(query**2) + _pallas(query, key).sum()

    gradient = jax.jit(jax.grad(loss))(query)
    np.testing.assert_array_equal(gradient, 2 * query)
    _, tangent = jax.jvp(loss, (query,), (query,))
    np.testing.assert_allclose(tangent, 2 * np.sum(np.asarray(query) ** 2), rtol=1e-5)


@pytest.mark.slow
def test_vmap_keeps_one_set_of_maxima_for_each_call(interpreted):
    query, key, keywords = CASES["ragged"]._replace(queries=40, keys=50).arrays()
    lengths = keywords["key_value_seq_lengths"]

    def one(query, key, length):
        return _pallas(query[None], key[None], is_causal=True, key_value_seq_lengths=length[None])

    shared = jax.jit(jax.vmap(one, (0, None, 0)))(query, key[0], lengths)
    twice = jax.jit(jax.vmap(jax.vmap(one, (0, None, None)), (None, 0, 0)))(query, key, lengths)
    for i in range(2):
        for j in range(2):
            expected = dense_attention(
                query[i : i + 1],
                key[j : j + 1],
                is_causal=True,
                key_value_seq_lengths=lengths[j : j + 1],
            ).max_logits
            np.testing.assert_allclose(twice[j, i], expected, rtol=TOLERANCE["float32"])
        expected = dense_attention(
            query[i : i + 1], key[:1], is_causal=True, key_value_seq_lengths=lengths[i : i + 1]
        ).max_logits
        np.testing.assert_allclose(shared[i], expected, rtol=TOLERANCE["float32"])


SPECS = [
    P("data", None, "heads"),
    pytest.param(P(("data", "heads")), marks=pytest.mark.slow),
    pytest.param(P(None, None, "heads"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_device_works_on_its_own_share(axis_type, spec, interpreted):
    query, key, keywords = CASES["mask of keys"]._replace(queries=40, keys=50).arrays()
    query, key = (jnp.concatenate([x, 2 * x, x, x]) for x in (query, key))
    mask = jnp.tile(keywords["mask"], (4, 1, 1, 1))
    lengths = jnp.asarray([50, 3, 9, 40, 1, 0, 50, 7])
    expected = dense_attention(query, key, mask=mask, key_value_seq_lengths=lengths).max_logits
    mesh = Mesh(
        np.array(jax.devices()).reshape(4, 2), ("data", "heads"), axis_types=(axis_type,) * 2
    )

    def place(x, *entries):
        return jax.device_put(x, NamedSharding(mesh, P(*entries)))

    arguments = [place(x, *spec) for x in (query, key)]
    arguments += [place(x, spec[0]) for x in (mask, lengths)]
    program = jax.jit(lambda q, k, m, n: _pallas(q, k, mask=m, key_value_seq_lengths=n))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(program(*arguments), expected, rtol=TOLERANCE["float32"])
        text = program.lower(*arguments).compile().as_text() or ""
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == (spec[0] is not None)
    assert not re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)


def test_inside_shard_map(interpreted):
    query, key, _ = CASES["plain"]._replace(queries=40, keys=50).arrays()
    expected = dense_attention(query, key, is_causal=True).max_logits
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "heads"))

    def local(query, key):
        return jax.lax.pmax(_pallas(query, key, is_causal=True), "data")

    spec = P("data", None, "heads")
    # What varies over the mesh is lost on Pallas's interpreter; lowered kernels know it.
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec), out_specs=P("heads"), check_vma=False
    )
    np.testing.assert_allclose(jax.jit(mapped)(query, key), expected, rtol=TOLERANCE["float32"])


def test_a_shard_map_over_some_axes_alone_is_refused_and_xla_takes_it(interpreted):
    query, key, _ = CASES["plain"]._replace(queries=20, keys=30).arrays()
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "heads"))

    def mapped(implementation):
        def local(query, key):
            maxima = attention_max_logits(query, key, implementation=implementation)
            return jax.lax.pmax(maxima, "data")

        return jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P(), axis_names={"data"})
        )

    with pytest.raises(NotImplementedError, match=r"leaves \['heads'\] to .*; map over all axes"):
        mapped("pallas")(query, key)
    expected = dense_attention(query, key).max_logits
    np.testing.assert_allclose(mapped(None)(query, key), expected, rtol=TOLERANCE["float32"])


def test_none_is_xla_and_the_kernel_is_taken_by_name(interpreted):
    query, key, _ = CASES["plain"].arrays()

    def program(implementation):
        find = functools.partial(attention_max_logits, implementation=implementation)
        return str(jax.make_jaxpr(find)(query, key))

    assert "pallas_call" in program("pallas")
    assert "pallas_call" not in program(None)
    assert program(None) == program("xla")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_unknown_dtype_and_an_empty_sequence_are_refused(platform):
    arrays = PairArrays()
    for query, reason in (
        (
            jnp.ones((1, 2, 1, 1, 8), "float8_e4m3fn"),
            f"on {platform}, .* not float8_e4m3fn.* 'xla'",
        ),
        (jnp.ones((1, 0, 1, 1, 8)), "there is no pair at all"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            max_logits(
                query,
                query[:, :, 0],
                scale=1.0,
                geometry=Geometry(),
                arrays=arrays,
                implementation="pallas",
            )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_platform_without_a_kernel_says_so(wrap):
    query, key, _ = CASES["plain"].arrays()
    with pytest.raises(
        NotImplementedError, match=r"kernels for cuda and tpu, .* use 'xla' or None"
    ):
        wrap(_pallas)(query, key)


GEOMETRIES = [
    Geometry(),
    CAUSAL,
    Geometry(True, (20, 0)),
    Geometry(False, (3, 30)),
    Geometry(False, (0, 0)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_block_ranges_hold_what_is_seen_and_full_ones_only_that(geometry):
    rows, block, keys = 16, 8, 70
    limits = [(64, 70), (50, 33), (1, 70), (0, 70), (64, 0)]
    ranges = jax.jit(
        lambda start, query_limit, key_limit: block_ranges(
            geometry, start, rows, query_limit, key_limit, block, rows_are_hidden_later=False
        )
    )
    for (query_limit, key_limit), start in itertools.product(limits, range(0, 64, rows)):
        t, s = np.arange(start, start + rows)[:, None], np.arange(80)[None, :]
        seen = (t < query_limit) & (s < min(key_limit, keys))
        if geometry.is_causal:
            seen &= s <= t
        if geometry.local_window_size is not None:
            left, right = geometry.local_window_size
            seen &= (t - left <= s) & (s <= t + right)
        some: Any = seen.reshape(rows, -1, block).any(axis=(0, 2))
        every: Any = seen.reshape(rows, -1, block).all(axis=(0, 2))
        low, full_low, full_high, high = map(int, ranges(start, query_limit, key_limit))
        assert low <= full_low <= full_high <= high
        assert not some[:low].any()
        assert not some[high:].any()
        assert every[full_low:full_high].all()
        # Nothing is visited for nothing, and nothing looked at closely that need not be.
        assert some[low:high].all() or high == low
        assert full_high - full_low == every.sum()
