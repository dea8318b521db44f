"""The kernel for per-head maxima on TPUs, interpreted, against dense float64 logits."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from muonclip_jax import attention_max_logits
from muonclip_jax.attention import inputs
from muonclip_jax.kernels import max_logits_tpu
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE, described_mesh, lowered

by_kernel = functools.partial(attention_max_logits, implementation="mosaic_tpu")
near = functools.partial(np.testing.assert_allclose, rtol=TOLERANCE["float32"])


@pytest.fixture(autouse=True)
def _on_a_tpu(monkeypatch):
    """Decides as on a TPU, with blocks so small that there are several."""
    monkeypatch.setattr(inputs, "plan_platform", lambda *_: "tpu")
    monkeypatch.setattr(max_logits_tpu, "_BLOCK", 256)
    monkeypatch.setattr(max_logits_tpu, "_CHUNK_BYTES", 128 * 1024)


@pytest.fixture
def interpreted(monkeypatch):
    interpret = functools.partial(max_logits_tpu.max_logits, interpret=True)
    monkeypatch.setattr(max_logits_tpu, "max_logits", interpret)


def case(
    queries, keys, key_heads=2, head_dim=64, dtype="float32", *, mask=None, bias=False, **keywords
):
    """Draws query, key and keywords of `attention_max_logits`, always the same ones."""
    rng = np.random.default_rng(0)
    query, key = (
        jnp.asarray(rng.standard_normal((2, length, heads, head_dim)), dtype)
        for length, heads in ((queries, 4), (keys, key_heads))
    )
    if mask is not None:
        hidden = rng.random(mask) < 0.3
        hidden[:, :, : mask[2] // 3] &= mask[2] == 1  # the first queries see nothing
        keywords["mask"] = jnp.asarray(hidden)
    if bias:
        keywords["bias"] = jnp.where(rng.random((1, 4, 1, keys)) < 0.5, -jnp.inf, 7.0)
    if "lengths" in keywords:
        ends = (jnp.asarray(each, jnp.int32) for each in keywords.pop("lengths"))
        keywords |= zip(("query_seq_lengths", "key_value_seq_lengths"), ends, strict=True)
    return query, key, keywords


#: Several blocks of queries and keys each, the last ones not full.
CASES: dict[str, Any] = {
    "plain": case(300, 200),
    "causal, one key head": case(150, 333, 1, 128, is_causal=True),
    "causal window": case(300, 300, dtype="bfloat16", is_causal=True, local_window_size=(40, 9)),
    "window": case(333, 200, 4, 8, local_window_size=(3, 90)),
    "mask": case(200, 300, mask=(2, 4, 200, 300)),
    "mask for all heads, causal": case(300, 300, mask=(1, 1, 300, 300), is_causal=True),
    "mask of keys, and a bias": case(200, 300, mask=(2, 1, 1, 300), bias=True),
    "mask of queries": case(200, 300, mask=(1, 4, 200, 1), lengths=((200, 150), (7, 300))),
    "ragged": case(300, 300, is_causal=True, lengths=((300, 9), (180, 0))),
}
SMALL = case(20, 30)[:2]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", CASES)
def test_maxima_are_those_of_dense_float64_logits(name):
    query, key, keywords = CASES[name]
    actual = jax.jit(lambda q, k: by_kernel(q, k, **keywords))(query, key)
    assert actual.dtype == jnp.float32
    near(actual, dense_attention(query, key, **keywords).max_logits)


@pytest.mark.usefixtures("interpreted")
def test_what_fills_blocks_up_is_no_logit():
    # Every logit is negative: a zero from beyond the end of a sequence or a head would win.
    query, key = jnp.ones((2, 150, 2, 24)), -jnp.ones((2, 140, 1, 24))
    ends = {"query_seq_lengths": jnp.array([150, 3]), "key_value_seq_lengths": jnp.array([9, 0])}
    for keywords in ({}, ends):
        find = jax.jit(functools.partial(by_kernel, scale=1.0, **keywords))
        assert find(query, key).tolist() == [-24.0, -24.0]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("left", "right"), [(999, 999), (999, 0), (128, 44)])
def test_the_largest_logit_is_found_wherever_it_is(left, right):
    # The first query and key of blocks, the last ones, and those of the array: every block counts.
    # The last block of queries has one, which alone sees the last key under causality.
    query, key = np.full((2, 257, 1, 8), 0.1), np.full((2, 333, 1, 8), 0.1)
    sides: Any = {"is_causal": True} if right == 0 else {"local_window_size": (left, right)}
    find = jax.jit(lambda q, k: by_kernel(q, k, scale=1.0, **sides))
    for t, s in itertools.product((0, 127, 255, 256), (0, 128, 255, 256, 299, 332)):
        q, k = query.copy(), key.copy()
        q[1, t], k[1, s] = 3.0, 4.0
        found = find(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32))
        assert bool(found == 96.0) == (t - left <= s <= t + right), (t, s)


@pytest.mark.usefixtures("interpreted")
def test_scale_of_any_sign_is_traced_no_gradient_flows_and_vmap_keeps_calls_apart():
    query, key = SMALL
    mask = jnp.ones((4, 1, 1), bool).at[1].set(False)
    scaled = jax.jit(lambda q, k, s: by_kernel(q, k, scale=s, mask=mask))
    for scale in (-0.7, 0.0):
        maxima = scaled(query, key, scale)
        near(maxima, dense_attention(query, key, mask=mask, scale=scale).max_logits)
        assert np.isneginf(maxima[1])
    loss = jax.checkpoint(lambda q: jnp.sum(q**2) + by_kernel(q, key).sum())
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(query), 2 * query)
    lengths = jnp.asarray([30, 7])
    mapped = jax.vmap(lambda q, n: by_kernel(q[None], key[:1], key_value_seq_lengths=n[None]))
    for i, found in enumerate(mapped(query, lengths)):
        one = dense_attention(query[i, None], key[:1], key_value_seq_lengths=lengths[i, None])
        near(found, one.max_logits)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("spec", [P("data", None, "heads"), P(None, None, "heads")], ids=str)
def test_every_device_works_on_its_own_share_along_explicit_axes(spec):
    query, key = (jnp.concatenate([x, 2 * x, x, x]) for x in SMALL)
    lengths = jnp.asarray([30, 3, 9, 20, 1, 0, 30, 7])
    expected = dense_attention(query, key, key_value_seq_lengths=lengths).max_logits
    kinds = (AxisType.Explicit,) * 2
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "heads"), axis_types=kinds)
    with jax.set_mesh(mesh):
        q, k = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key))
        n = jax.device_put(lengths, NamedSharding(mesh, P(spec[0])))
        near(jax.jit(lambda q, k, n: by_kernel(q, k, key_value_seq_lengths=n))(q, k, n), expected)


def test_lowered_inside_shard_map_it_knows_what_varies_and_under_auto_axes_it_is_refused():
    mesh, spec = described_mesh("tpu", (2, 2), ("data", "heads")), P("data", None, "heads")
    array = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)

    def local(query, key, lengths):
        return jax.lax.pmax(by_kernel(query, key, key_value_seq_lengths=lengths), "data")

    specs = {"in_specs": (spec, spec, P("data")), "out_specs": P("heads"), "check_vma": True}
    mapped, lengths = jax.shard_map(local, mesh=mesh, **specs), jax.ShapeDtypeStruct((2,), "int32")
    assert "max_logits" in lowered("tpu", mapped, array, array, lengths, mesh=mesh)
    sharded = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))
    with pytest.raises(NotImplementedError, match="wrap the call in a shard_map"):
        lowered("tpu", by_kernel, sharded, sharded, mesh=mesh)


@pytest.mark.parametrize("name", ["long", "causal window", "mask of queries", "ragged"])
def test_it_lowers_for_a_tpu_without_the_logits(name, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(inputs, "plan_platform", lambda *_: "tpu")
    long = case(2048, 2048, mask=(2, 1, 2048, 2048)) if name == "long" else None
    query, key, keywords = long or CASES[name]
    text = lowered("tpu", functools.partial(by_kernel, **keywords), query, key)
    assert f"{query.shape[1]}x{key.shape[1]}xf32" not in text


def test_none_is_xla_and_what_the_kernel_does_not_take_is_refused(monkeypatch):
    query, key = SMALL
    assert "pallas_call" in str(jax.make_jaxpr(by_kernel)(query, key))
    assert "pallas_call" not in str(jax.make_jaxpr(attention_max_logits)(query, key))
    assert by_kernel(query[:, :0], key).tolist() == [-np.inf] * 4
    with pytest.raises(NotImplementedError, match=r"takes bfloat16 and float32 .* Pass 'xla'"):
        by_kernel(query.astype("float16"), key.astype("float16"))
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="runs on a TPU, and this computation is for"):
        by_kernel(query, key)
