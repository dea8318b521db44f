"""The kernel for per-head maxima on TPUs, interpreted, against dense float64 logits."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from muonclip_jax.attention import attention_max_logits, inputs
from muonclip_jax.kernels import max_logits_tpu
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE, described_mesh, lowered

P = PartitionSpec
by_kernel = functools.partial(attention_max_logits, implementation="mosaic_tpu")


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


def arrays(queries: int, keys: int, kv: int = 2, head_dim: int = 64, dtype: Any = "float32") -> Any:
    """Draws a query and a key, always the same ones."""
    rng = np.random.default_rng(0)
    shapes = ((2, queries, 4, head_dim), (2, keys, kv, head_dim))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def mask(*shape: int) -> dict[str, Any]:
    """A mask under which the first queries see nothing."""
    drawn = np.random.default_rng(1).random(shape) < 0.3
    drawn[:, :, : shape[2] // 3] = False
    return {"mask": jnp.asarray(drawn)}


def lengths(query: tuple[int, int], key: tuple[int, int]) -> dict[str, Any]:
    return {"query_seq_lengths": jnp.array(query), "key_value_seq_lengths": jnp.array(key)}


CAUSAL = {"is_causal": True}
BIAS = {"bias": jnp.where(np.random.default_rng(2).random((1, 4, 1, 300)) < 0.5, -jnp.inf, 7.0)}
#: Several blocks of queries and keys each, the last ones not full.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (arrays(300, 200), {}),
    "causal, one key head": (arrays(150, 333, 1, 128), CAUSAL),
    "causal window": (
        arrays(300, 300, dtype="bfloat16"),
        {"local_window_size": (40, 0), **CAUSAL},
    ),
    "window": (arrays(333, 200, 4, 8), {"local_window_size": (3, 90)}),
    "mask": (arrays(200, 300), mask(2, 4, 200, 300)),
    "mask for all heads, causal": (arrays(300, 300), mask(1, 1, 300, 300) | CAUSAL),
    "mask of keys, and a bias": (arrays(200, 300), mask(2, 1, 1, 300) | BIAS),
    "mask of queries": (arrays(200, 300), mask(1, 4, 200, 1) | lengths((200, 150), (7, 300))),
    "ragged": (arrays(300, 300), lengths((300, 9), (180, 0)) | CAUSAL),
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", CASES)
def test_maxima_are_those_of_dense_float64_logits(name):
    (query, key), keywords = CASES[name]
    expected = dense_attention(query, key, **keywords).max_logits
    actual = jax.jit(lambda q, k: by_kernel(q, k, **keywords))(query, key)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE["float32"])


@pytest.mark.usefixtures("interpreted")
def test_what_fills_blocks_up_is_no_logit():
    # Every logit is negative: a zero from beyond the end of a sequence or a head would win.
    query, key = jnp.ones((2, 150, 2, 24)), -jnp.ones((2, 140, 1, 24))
    assert jax.jit(lambda q, k: by_kernel(q, k, scale=1.0))(query, key).tolist() == [-24.0, -24.0]
    ragged = jax.jit(lambda q, k: by_kernel(q, k, scale=1.0, **lengths((150, 3), (9, 0))))
    assert ragged(query, key).tolist() == [-24.0, -24.0]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("left", "right"), [(999, 999), (999, 0), (150, 20)])
def test_the_largest_logit_is_found_wherever_it_is(left, right):
    # The first and last query and key of blocks and arrays: every block counts. The last block of
    # queries has one, which alone sees the last key under causality.
    small = [np.full((2, n, 1, 8), 0.1, np.float32) for n in (257, 333)]
    sides: dict[str, Any] = {"local_window_size": (left, right)} if right else {"is_causal": True}
    find = jax.jit(lambda q, k: by_kernel(q, k, scale=1.0, **sides))
    for t, s in itertools.product((0, 127, 255, 256), (0, 128, 255, 256, 299, 332)):
        q, k = (x.copy() for x in small)
        q[1, t], k[1, s] = 3.0, 4.0
        assert bool(find(q, k) == 96.0) == (t - left <= s <= t + right), (t, s)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale_of_any_sign(scale):
    query, key = arrays(20, 30)
    mask = jnp.ones((4, 1, 1), bool).at[1].set(False)
    expected = dense_attention(query, key, mask=mask, scale=scale).max_logits
    # Traced, as a learned temperature is.
    maxima = jax.jit(lambda q, k, s: by_kernel(q, k, scale=s, mask=mask))(query, key, scale)
    np.testing.assert_allclose(maxima, expected, rtol=TOLERANCE["float32"])
    assert np.isneginf(maxima[1])


@pytest.mark.usefixtures("interpreted")
def test_no_gradient_flows_and_vmap_keeps_calls_apart():
    query, key = arrays(20, 30)

    @jax.checkpoint
    def loss(query):
        return jnp.sum(query**2) + by_kernel(query, key).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(query), 2 * query)
    lengths = jnp.asarray([30, 7])
    mapped = jax.vmap(lambda q, n: by_kernel(q[None], key[:1], key_value_seq_lengths=n[None]))
    for i, found in enumerate(mapped(query, lengths)):
        expected = dense_attention(
            query[i : i + 1], key[:1], key_value_seq_lengths=lengths[i : i + 1]
        ).max_logits
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE["float32"])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("spec", [P("data", None, "heads"), P(None, None, "heads")], ids=str)
def test_every_device_works_on_its_own_share_along_explicit_axes(spec):
    query, key = arrays(40, 50)
    query, key = (jnp.concatenate([x, 2 * x, x, x]) for x in (query, key))
    lengths = jnp.asarray([50, 3, 9, 40, 1, 0, 50, 7])
    expected = dense_attention(query, key, key_value_seq_lengths=lengths).max_logits
    axis_types = (AxisType.Explicit,) * 2
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "heads"), axis_types=axis_types)
    with jax.set_mesh(mesh):
        q, k = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key))
        n = jax.device_put(lengths, NamedSharding(mesh, P(spec[0])))
        actual = jax.jit(lambda q, k, n: by_kernel(q, k, key_value_seq_lengths=n))(q, k, n)
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE["float32"])


def test_lowered_inside_shard_map_it_knows_what_varies_and_under_auto_axes_it_is_refused():
    mesh = described_mesh("tpu", (2, 2), ("data", "heads"))
    spec = P("data", None, "heads")
    array = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)

    def local(query, key, lengths):
        maxima = by_kernel(query, key, key_value_seq_lengths=lengths)
        return jax.lax.pmax(maxima, "data")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, P("data")), out_specs=P("heads"), check_vma=True
    )
    assert "max_logits" in lowered("tpu", mapped, array, array, lengths, mesh=mesh)

    sharded = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))
    with pytest.raises(NotImplementedError, match="wrap the call in a shard_map"):
        lowered("tpu", by_kernel, sharded, sharded, mesh=mesh)


@pytest.mark.parametrize("case", [(arrays(2048, 2048), mask(2, 1, 2048, 2048)), *CASES.values()])
def test_it_lowers_for_a_tpu_without_the_logits(case, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(inputs, "plan_platform", lambda *_: "tpu")
    (query, key), keywords = case
    text = lowered("tpu", functools.partial(by_kernel, **keywords), query, key)
    assert f"{query.shape[1]}x{key.shape[1]}xf32" not in text


def test_none_is_xla_and_what_the_kernel_does_not_take_is_refused(monkeypatch):
    query, key = arrays(20, 30)

    def program(implementation):
        find = functools.partial(attention_max_logits, implementation=implementation)
        return str(jax.make_jaxpr(find)(query, key))

    assert "pallas_call" in program("mosaic_tpu")
    assert program(None) == program("xla")
    assert by_kernel(query[:, :0], key).tolist() == [-np.inf] * 4
    with pytest.raises(NotImplementedError, match=r"takes bfloat16 and float32 .* Pass 'xla'"):
        by_kernel(query.astype("float16"), key.astype("float16"))
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="runs on a TPU, and this computation is for"):
        by_kernel(query, key)
