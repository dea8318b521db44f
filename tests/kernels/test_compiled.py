"""The kernels through the real TPU and GPU compilers, where their packages are installed."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.compilers import h200_devices, tpu_devices
from muonclip_jax.kernels import max_logits_tpu, symmetric_gpu, symmetric_tpu

pytestmark = pytest.mark.slow


def _compile(platform: str, device: Any, run: Any, *shapes: tuple[int, ...], dtype: str) -> Any:
    sharding = NamedSharding(Mesh([device], ("device",)), PartitionSpec())
    x = [jax.ShapeDtypeStruct(each, jnp.dtype(dtype), sharding=sharding) for each in shapes]
    return jax.jit(run).trace(*x).lower(lowering_platforms=(platform,)).compile()


def _product(kernel: Any) -> Any:
    return lambda x, addend: kernel.symmetric_product(x, x, addend, jnp.array([2.0, -1.0]))


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 2048, 4096), "bfloat16"), ((2, 1000, 2040), "float32")]
)
def test_the_tpu_compiler_takes_the_product_and_counts_a_triangle(topology, shape, dtype):
    pytest.importorskip("libtpu")
    batch, rows, depth = shape
    run, device = _product(symmetric_tpu), tpu_devices(topology)[0]
    compiled = _compile("tpu", device, run, shape, (batch, rows, rows), dtype=dtype)
    assert compiled.memory_analysis().temp_size_in_bytes == 0
    assert compiled.cost_analysis()["flops"] < 0.8 * 2 * batch * rows**2 * depth


@pytest.mark.parametrize("shape", [(1, 2048, 4096), (8, 4096, 1024), (2, 1000, 2040)])
def test_the_gpu_compiler_takes_the_product(shape):
    pytest.importorskip("jax_cuda13_plugin")
    batch, rows, _ = shape
    run, device = _product(symmetric_gpu), h200_devices(1)[0]
    compiled = _compile("cuda", device, run, shape, (batch, rows, rows), dtype="bfloat16")
    if rows % 128 == 0:
        # Nothing between the operands and the result: the sum is in the kernel.
        assert compiled.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize("length", [1024, 4096])
def test_memory_of_the_maxima_grows_with_the_sequence_and_not_with_its_square(length):
    pytest.importorskip("libtpu")

    def run(query: Any, key: Any) -> Any:
        limits = jnp.array([[length, length]], jnp.int32)
        return max_logits_tpu.max_logits(query, key, (), limits, window=(None, 0))

    shapes = (1, length, 8, 64), (1, length, 2, 64)
    compiled = _compile("tpu", tpu_devices("v5e:2x2")[0], run, *shapes, dtype="bfloat16")
    # At most the arrays in the kernel's layout, heads of 64 filled up to 128.
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * length * 10 * 64 * 2
