"""Attention and its maxima on many devices: heads, sequences and positions divided."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from muonclip_jax.attention import (
    attention_max_logits,
    blocks as xla,
    dot_product_attention,
)
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE, equations

KINDS = [AxisType.Auto, AxisType.Explicit]
# name -> where query, key and value lie, and query heads on key heads
PLACES: dict[str, tuple[P, int, int]] = {
    "sequences and heads": (P("data", None, "model"), 4, 2),
    "positions": (P(None, "model"), 4, 2),
    "sequences and positions": (P("data", "model"), 4, 4),
    "heads on one key head": (P("data", None, "model"), 4, 1),
    "more devices than key heads": (P("model", None, "data"), 8, 2),
}


def _mesh(kind: AxisType) -> Mesh:
    devices = np.array(jax.devices()).reshape(4, 2)
    return Mesh(devices, ("data", "model"), axis_types=(kind, kind))


def _arrays(heads: int, key_heads: int) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = [(4, 80, heads, 8), (4, 96, key_heads, 8), (4, 96, key_heads, 8), (4, 80, heads, 8)]
    return [jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """Cuts even these short sequences into blocks."""
    monkeypatch.setitem(xla.SIZES, "cpu", xla.Sizes(1, 1, 32))
    monkeypatch.setattr(xla, "_MAXIMA_BLOCK", 1)


def _placed(mesh: Mesh, spec: P, x: jax.Array) -> jax.Array:
    # Key heads that are too few are not divided: they are on every device.
    entries = [
        entry if entry is None or n % mesh.shape[entry] == 0 else None
        for entry, n in zip(spec, x.shape, strict=False)
    ]
    return jax.device_put(x, NamedSharding(mesh, P(*entries)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLACES)
def test_output_gradients_and_maxima_equal_one_device(kind, name):
    spec, *heads = PLACES[name]
    query, key, value, cotangent = _arrays(*heads)
    mask = jnp.asarray(np.random.default_rng(1).random((4, 1, 80, 96)) < 0.7)
    dense = dense_attention(query, key, value, mask=mask, is_causal=True, cotangent=cotangent)

    lengths = jnp.asarray([80, 3, 50, 0])
    alone = dense_attention(query, key, query_seq_lengths=lengths, scale=0.3).max_logits

    def loss(query, key, value, cotangent, mask, lengths):
        out, max_logits = dot_product_attention(query, key, value, mask=mask, is_causal=True)
        found = attention_max_logits(query, key, query_seq_lengths=lengths, scale=0.3)
        return jnp.sum(out * cotangent), (out, max_logits, found)

    mesh = _mesh(kind)
    arguments = [_placed(mesh, spec, x) for x in (query, key, value, cotangent)]
    mask_at = P(*spec[:1], None, *spec[1:2]) if len(spec) < 3 else P(spec[0])
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        gradients, (out, max_logits, found) = step(
            *arguments, _placed(mesh, mask_at, mask), _placed(mesh, P(spec[0]), lengths)
        )
    np.testing.assert_allclose(found, alone, rtol=TOLERANCE["float32"])
    np.testing.assert_allclose(max_logits, dense.max_logits, rtol=TOLERANCE["float32"])
    np.testing.assert_allclose(out, dense.out, rtol=2e-5, atol=2e-5)
    for actual, expected in zip(gradients, dense.gradients, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=5e-5, atol=5e-5)
    if kind == AxisType.Explicit:  # positions that came divided go back divided
        assert out.sharding.is_equivalent_to(arguments[0].sharding, 4)


def test_without_jit_and_without_a_mesh_that_is_set():
    query, key, value, _ = _arrays(4, 2)
    mesh = _mesh(AxisType.Explicit)
    mask = jnp.asarray(np.random.default_rng(1).random((4, 1, 80, 96)) < 0.7)
    dense = dense_attention(query, key, value, mask=mask)
    placed = [_placed(mesh, P("data", None, "model"), x) for x in (query, key, value)]
    out, max_logits = dot_product_attention(*placed, mask=mask)
    np.testing.assert_allclose(max_logits, dense.max_logits, rtol=TOLERANCE["float32"])
    np.testing.assert_allclose(out, dense.out, rtol=2e-5, atol=2e-5)


def _trips(function, *arguments) -> list[int]:
    """Returns the lengths of the loops in a program, those inside of others too."""
    found = equations(jax.make_jaxpr(function)(*arguments))
    return [each.params["length"] for each in found if each.primitive.name == "scan"]


def test_blocks_are_cut_from_what_one_device_has(monkeypatch):
    """Eight devices with an eighth of the batch each make as many blocks as one with an eighth."""
    monkeypatch.setitem(xla.SIZES, "cpu", xla.Sizes(1, 1 << 17, 32))
    monkeypatch.setattr(xla, "_MAXIMA_BLOCK", 1 << 17)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    for function in (
        lambda x: dot_product_attention(x, x, x),
        lambda x: attention_max_logits(x, x),
    ):
        own = _trips(function, jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32))
        whole = _trips(function, jax.ShapeDtypeStruct((8, 512, 2, 8), jnp.float32))
        with jax.set_mesh(mesh):
            x = jax.ShapeDtypeStruct(
                (8, 512, 2, 8), jnp.float32, sharding=NamedSharding(mesh, P("data"))
            )
            assert _trips(function, x) == own
        assert math.prod(own) < math.prod(whole)


def test_on_an_accelerator_a_large_batch_leaves_blocks_of_256_queries(monkeypatch):
    """Under Auto axes nobody knows how many devices share the batch."""
    x = jax.ShapeDtypeStruct((512, 4096, 16, 64), jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert _trips(lambda x: dot_product_attention(x, x, x), x) == [16]
    assert _trips(lambda x: attention_max_logits(x, x), x) == [256]
