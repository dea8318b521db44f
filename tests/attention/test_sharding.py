"""Attention and its maxima on many devices: heads, sequences and positions divided."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from muonclip_jax import attention_max_logits, dot_product_attention
from muonclip_jax.attention import blocks
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE, equations

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# name -> kind of the axes, where query, key and value lie, and query heads on key heads
PLACES: dict[str, tuple[AxisType, P, int, int]] = {
    "sequences and heads": (AUTO, P("data", None, "model"), 4, 2),
    "positions": (EXPLICIT, P(None, "model"), 4, 2),
    "sequences and positions, auto": (AUTO, P("data", "model"), 4, 4),
    "six heads on three key heads": (EXPLICIT, P("data", None, "model"), 6, 3),
    "more devices than key heads": (AUTO, P("model", None, "data"), 8, 2),
}


@pytest.mark.parametrize("name", PLACES)
def test_output_gradients_and_maxima_equal_one_device(name, monkeypatch):
    # Even these short sequences are cut into blocks.
    monkeypatch.setitem(blocks.SIZES, "cpu", blocks.Sizes(1, 1, 32))
    monkeypatch.setattr(blocks, "_MAXIMA_BLOCK", 1)
    kind, spec, heads, key_heads = PLACES[name]
    rng = np.random.default_rng(0)
    shapes = [(4, 80, heads, 8), (4, 96, key_heads, 8), (4, 96, key_heads, 8), (4, 80, heads, 8)]
    arrays = [jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for shape in shapes]
    query, key, value, cotangent = arrays
    mask = jnp.asarray(rng.random((4, 1, 80, 96)) < 0.7)
    lengths = jnp.asarray([80, 3, 50, 0])
    dense = dense_attention(query, key, value, mask=mask, is_causal=True, cotangent=cotangent)
    alone = dense_attention(query, key, query_seq_lengths=lengths, scale=0.3).max_logits

    def loss(query, key, value, cotangent, mask, lengths):
        out, max_logits = dot_product_attention(query, key, value, mask=mask, is_causal=True)
        found = attention_max_logits(query, key, query_seq_lengths=lengths, scale=0.3)
        return jnp.sum(out * cotangent), (out, max_logits, found)

    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(kind, kind))

    def placed(spec: P, x: jax.Array) -> jax.Array:
        # Key heads that are too few are not divided: they are on every device.
        entries = [
            entry if entry is None or n % mesh.shape[entry] == 0 else None
            for entry, n in zip(spec, x.shape, strict=False)
        ]
        return jax.device_put(x, NamedSharding(mesh, P(*entries)))

    mask_at = P(*spec[:1], None, *spec[1:2]) if len(spec) < 3 else P(spec[0])
    arguments = [*(placed(spec, x) for x in arrays), placed(mask_at, mask)]
    arguments.append(placed(P(spec[0]), lengths))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        gradients, (out, *maxima) = step(*arguments)
    checks = [(out, dense.out, 2e-5)]
    checks += [(x, y, 5e-5) for x, y in zip(gradients, dense.gradients, strict=True)]
    if kind == EXPLICIT:  # positions that came divided go back divided
        assert out.sharding.is_equivalent_to(arguments[0].sharding, 4)
        # Without jit and without a mesh that is set.
        eager = dot_product_attention(*arguments[:3], mask=arguments[4], is_causal=True)
        checks.append((eager[0], dense.out, 2e-5))
        np.testing.assert_allclose(eager[1], dense.max_logits, rtol=TOLERANCE["float32"])
    for found, expected, tolerance in checks:
        np.testing.assert_allclose(found, expected, tolerance, tolerance)
    for found, expected in zip(maxima, (dense.max_logits, alone), strict=True):
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE["float32"])


def _trips(function: Any, x: jax.ShapeDtypeStruct) -> list[int]:
    """Returns the lengths of the loops in a program, those inside of others too."""
    found = equations(jax.make_jaxpr(function)(x))
    return [each.params["length"] for each in found if each.primitive.name == "scan"]


@pytest.mark.parametrize(
    ("function", "on_tpu"),
    [(lambda x: dot_product_attention(x, x, x), 16), (lambda x: attention_max_logits(x, x), 256)],
    ids=["attention", "maxima"],
)
def test_blocks_are_cut_from_what_one_device_has(function, on_tpu, monkeypatch):
    """Eight devices with an eighth of the batch each make as many blocks as one with an eighth."""
    # On an accelerator a large batch leaves blocks of 256 queries: under Auto axes nobody knows how
    # many devices share it.
    x = jax.ShapeDtypeStruct((512, 4096, 16, 64), jnp.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        assert _trips(function, x) == [on_tpu]
    monkeypatch.setitem(blocks.SIZES, "cpu", blocks.Sizes(1, 1 << 17, 32))
    monkeypatch.setattr(blocks, "_MAXIMA_BLOCK", 1 << 17)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(EXPLICIT,))
    own = _trips(function, jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32))
    whole = jax.ShapeDtypeStruct((8, 512, 2, 8), jnp.float32)
    assert math.prod(own) < math.prod(_trips(function, whole))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data"))
        shared = jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding)
        assert _trips(function, shared) == own
