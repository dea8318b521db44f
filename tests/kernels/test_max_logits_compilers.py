"""The Pallas kernels for per-head maxima, lowered everywhere, and by the real compilers if there.

The packages `libtpu` and the CUDA plugin of JAX bring the compilers; no device is needed.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.compilers import TPU_ENVIRONMENT, h200_devices, tpu_devices
from benchmarks.kernel_cases_max_logits import CASES
from muonclip_jax.attention import attention_max_logits, dot_product_attention
from tests.helpers import described_mesh, lowered

P = PartitionSpec
NAME = "muonclip_max_logits"
DEVICES: dict[str, Any] = {"tpu": lambda: tpu_devices("v5e:2x2"), "cuda": lambda: h200_devices(4)}
PACKAGES = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}


def _pallas(query: Any, key: Any, **keywords: Any) -> Any:
    return attention_max_logits(query, key, implementation="pallas", **keywords)


@pytest.mark.parametrize(
    ("platform", "name"), [(platform, case[0]) for platform in CASES for case in CASES[platform]]
)
def test_lowering(platform, name):
    function, arguments = next(case[1:] for case in CASES[platform] if case[0] == name)
    text = lowered(platform, function, *arguments)
    assert NAME in text
    queries, keys = arguments[0].shape[1], arguments[1].shape[1]
    assert f"{queries}x{keys}xf32" not in text


def test_what_one_platform_refuses_the_other_takes():
    query = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.float16)
    assert NAME in lowered("cuda", _pallas, query, query)
    with pytest.raises(NotImplementedError, match="takes bfloat16 and float32, not float16; use"):
        lowered("tpu", _pallas, query, query)


@pytest.mark.parametrize("platform", CASES)
def test_shard_map_knows_what_varies(platform):
    mesh = described_mesh(platform, (2, 2), ("data", "heads"))
    spec = P("data", None, "heads")

    def local(query, key, lengths):
        maxima = _pallas(query, key, key_value_seq_lengths=lengths)
        return jax.lax.pmax(maxima, "data")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, P("data")), out_specs=P("heads"), check_vma=True
    )
    array = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert NAME in lowered(platform, mapped, array, array, lengths, mesh=mesh)


@pytest.mark.parametrize("platform", CASES)
def test_beside_attention(platform):
    def loss(query):
        out, max_logits = dot_product_attention(
            query, query, query, is_causal=True, implementation="pallas"
        )
        return jnp.sum(out.astype(jnp.float32)), max_logits

    array = jax.ShapeDtypeStruct((1, 64, 4, 64), jnp.bfloat16)
    assert NAME in lowered(platform, jax.value_and_grad(loss, has_aux=True), array)


@pytest.fixture(params=CASES)
def described(request, monkeypatch) -> tuple[str, Any]:
    pytest.importorskip(PACKAGES[request.param])
    for name, value in TPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    return request.param, DEVICES[request.param]()


@pytest.mark.parametrize("length", [1024, 4096])
def test_compiled_memory_grows_with_the_sequence_and_not_with_its_square(described, length):
    _, devices = described
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("one",)), P())
    query: Any = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16, sharding=sharding)
    key: Any = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16, sharding=sharding)
    program: Any = jax.jit(lambda q, k: _pallas(q, k, is_causal=True)).lower(query, key).compile()
    assert NAME in program.as_text()
    # At most the arrays in the kernel's layout, heads of 64 filled up to 128.
    assert program.memory_analysis().temp_size_in_bytes <= 3 * length * 10 * 64 * 2


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_compiled_for_many_devices(described, axis_type):
    platform, devices = described
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "heads"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, P("data", None, "heads"))
    array: Any = jax.ShapeDtypeStruct((4, 1024, 4, 64), jnp.bfloat16, sharding=sharding)
    run = jax.jit(lambda q, k: _pallas(q, k, is_causal=True))
    if platform == "tpu" and axis_type == AxisType.Auto:
        with pytest.raises(NotImplementedError, match="wrap the call in a shard_map"):
            run.lower(array, array)
        return
    program: Any = run.lower(array, array).compile()
    assert NAME in program.as_text()
    assert " all-gather" not in program.as_text()
