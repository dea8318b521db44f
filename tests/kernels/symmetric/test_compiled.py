"""The kernels through the real TPU and GPU compilers, where their packages are installed."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.compilers import h200_devices, tpu_devices
from muonclip_jax.kernels.symmetric import gram

pytestmark = pytest.mark.slow


def _compile(platform, device, implementation, shape, dtype):
    sharding = NamedSharding(Mesh([device], ("device",)), PartitionSpec())
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
    addend = jax.ShapeDtypeStruct((*shape[:2], shape[1]), jnp.dtype(dtype), sharding=sharding)

    def run(x, addend):
        return gram(x, addend, alpha=2.0, beta=-1.0, implementation=implementation)

    compiled = jax.jit(run).trace(x, addend).lower(lowering_platforms=(platform,)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return compiled, memory.temp_size_in_bytes


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 2048, 4096), "bfloat16"), ((2, 1000, 2040), "float32")]
)
def test_the_tpu_compiler_takes_the_kernel_and_counts_a_triangle(topology, shape, dtype):
    pytest.importorskip("libtpu")
    compiled, temporary = _compile("tpu", tpu_devices(topology)[0], "mosaic_tpu", shape, dtype)
    assert temporary == 0
    batch, rows, depth = shape
    cost = compiled.cost_analysis()
    assert cost is not None
    assert cost["flops"] < 0.8 * 2 * batch * rows**2 * depth


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("shape", [(1, 2048, 4096), (8, 4096, 1024), (2, 1000, 2040)])
def test_the_gpu_compiler_takes_the_kernels(implementation, shape):
    pytest.importorskip("jax_cuda13_plugin")
    _, temporary = _compile("cuda", h200_devices(1)[0], implementation, shape, "bfloat16")
    if all(size % 64 == 0 for size in shape[1:]):
        # Nothing between the operands and the result: the epilogue is in the kernel.
        assert temporary == 0
