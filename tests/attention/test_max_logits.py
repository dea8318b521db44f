"""The operation "per-head maxima": its blocks find what the dense logits hold, in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.attention.max_logits import max_logits
from muonclip_jax.attention.pairs import Geometry, PairArrays, allowed_pairs, bias_permits
from tests.attention.dense import dense_attention


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("queries", "keys", "geometry"),
    [
        (5, 3, Geometry()),
        (600, 700, Geometry()),
        (700, 600, Geometry(is_causal=True)),
        (600, 700, Geometry(is_causal=True, local_window_size=(20, 0))),
        (700, 600, Geometry(local_window_size=(3, 9))),
    ],
)
def test_maximum_over_many_blocks_is_that_of_the_dense_logits(queries, keys, geometry):
    # 600 and 700 are no multiples of a block: the last block is moved back.
    query, key = _draw(1, queries, 4, 8), _draw(1, keys, 2, 8, seed=1)
    expected = dense_attention(
        query,
        key,
        scale=0.5,
        is_causal=geometry.is_causal,
        local_window_size=geometry.local_window_size,
    ).max_logits
    actual = max_logits(
        jnp.asarray(query).reshape(1, queries, 2, 2, 8),
        jnp.asarray(key),
        scale=0.5,
        geometry=geometry,
        arrays=PairArrays(),
        implementation="xla",
    )
    np.testing.assert_allclose(actual.reshape(-1), expected, rtol=1e-6)


@pytest.mark.parametrize("place", [(0, 0), (0, 699), (599, 0), (599, 699), (511, 512), (300, 650)])
def test_the_largest_logit_is_found_wherever_it_is(place):
    query, key = 0.1 * _draw(1, 600, 1, 1, 8), 0.1 * _draw(1, 700, 1, 8, seed=1)
    query[0, place[0]], key[0, place[1]] = 3.0, 4.0
    found = max_logits(
        jnp.asarray(query),
        jnp.asarray(key),
        scale=1.0,
        geometry=Geometry(),
        arrays=PairArrays(),
    )
    assert found.tolist() == [[96.0]]


def test_blocks_that_geometry_rules_out_are_never_computed():
    query, key = jnp.ones((1, 2048, 8, 1, 8)), jnp.ones((1, 2048, 8, 8))

    def trips(geometry):
        jaxpr = jax.make_jaxpr(
            lambda q, k: max_logits(q, k, scale=1.0, geometry=geometry, arrays=PairArrays())
        )(query, key)
        return next(
            equation.params["length"]
            for equation in jaxpr.jaxpr.eqns
            if equation.primitive.name == "scan"
        )

    everything = trips(Geometry())
    assert trips(Geometry(is_causal=True)) < 0.65 * everything
    assert trips(Geometry(local_window_size=(8, 8))) < 0.5 * everything


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_an_empty_sequence_has_no_maximum(sizes):
    found = max_logits(
        jnp.ones((1, sizes[0], 2, 1, 4)),
        jnp.ones((1, sizes[1], 2, 4)),
        scale=1.0,
        geometry=Geometry(),
        arrays=PairArrays(),
    )
    assert found.tolist() == [[-np.inf], [-np.inf]]


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(True, (3, 1)), Geometry(False, (2, 5))])
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (5, 9), (20, 24)])
def test_key_range_holds_every_key_that_is_seen(geometry, start, stop):
    low, high = geometry.key_range(start, stop, 16)
    block = allowed_pairs(geometry, PairArrays(), start, stop - start, 0, 16)
    seen = np.ones((stop - start, 16), bool) if block is None else np.asarray(block)[0, 0, 0]
    assert not seen[:, :low].any()
    assert not seen[:, high:].any()
    assert seen[:, low:high].any() or low == high


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("float32", [0.0, -1e8, -1e9, -3e38, -np.inf, np.nan], [1, 1, 0, 0, 0, 1]),
        ("bfloat16", [0.0, -1e8, -1e10, -3e38, -np.inf, np.nan], [1, 1, 0, 0, 0, 1]),
        ("float16", [0.0, -3e4, -4e4, -6e4, -np.inf, np.nan], [1, 1, 0, 0, 0, 1]),
        ("int32", [0, -5, -(10**9)], [1, 1, 0]),
    ],
)
def test_a_bias_forbids_where_it_is_a_mask_in_truth(dtype, values, expected):
    assert bias_permits(jnp.asarray(values, dtype)).tolist() == [bool(x) for x in expected]
