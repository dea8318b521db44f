"""The kernels for symmetric products, interpreted, against float64; symmetric to the bit."""

import functools
import inspect
import threading
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from muonclip_jax.kernels import symmetric_gpu, symmetric_tpu, triangle
from tests.helpers import TOLERANCE, lowered

tpu = functools.partial(symmetric_tpu.symmetric_product, interpret=True)
FACTORS = jnp.array([2.0, -3.0])


def _operands(dtype: str, batch: int, rows: int, depth: int) -> list[Any]:
    """Draws `x`, `y = x x^T x`, for which `x y^T` is symmetric, and a symmetric addend."""
    x, z = np.random.default_rng(0).standard_normal((2, batch, rows, depth)) / np.sqrt(depth)
    return [jnp.asarray(each, dtype) for each in (x, x @ x.mT @ x, z @ z.mT)]


def _check(run: Any, x: Any, y: Any, addend: Any) -> None:
    below = jnp.tril(jnp.full(x.shape[1:2] * 2, jnp.nan, x.dtype), -1)  # is never read
    actual = run(x, y, None if addend is None else addend + below, FACTORS)
    assert actual.dtype == x.dtype
    expected = 2 * np.asarray(x, np.float64) @ np.asarray(y, np.float64).mT
    expected -= 0 if addend is None else 3 * np.asarray(addend, np.float64)
    # The upper triangle decides: rounded factors do not commute exactly.
    expected, found = np.triu(expected) + np.triu(expected, 1).mT, np.asarray(actual, np.float64)
    tolerance = TOLERANCE[x.dtype.name] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(found, found.mT)


@pytest.mark.parametrize(
    ("dtype", "batch", "rows", "depth", "with_addend"),
    # Less than one tile; several, the last one not full; several blocks of depth, the same.
    [
        ("float32", 1, 5, 7, False),
        ("bfloat16", 2, 300, 1100, True),
        ("float32", 1, 530, 530, False),
        ("float32", 1, 530, 530, True),
    ],
)
def test_tpu_kernel_is_what_float64_says(dtype, batch, rows, depth, with_addend):
    x, y, addend = _operands(dtype, batch, rows, depth)
    _check(jax.jit(tpu), x, y, addend if with_addend else None)


def test_tpu_vmap_is_a_longer_stack():
    x, y, addend = (each.reshape(3, 2, 10, -1) for each in _operands("float32", 6, 10, 12))
    mapped = jax.vmap(lambda x, y, factors: tpu(x, y, addend[:, 0], factors), (1, 1, 0))
    actual = mapped(x, y, jnp.stack([FACTORS, FACTORS]))
    for i in range(2):
        _check(lambda *_, i=i: actual[i], x[:, i], y[:, i], addend[:, 0])


def interpret_hopper(monkeypatch: pytest.MonkeyPatch, programs: int) -> Any:
    """Teaches JAX's interpreter of Mosaic GPU transposed views and layouts, which it lacks.

    For so many multiprocessors; returns what is passed as `interpret`.
    """
    module = "jax._src.pallas.mosaic_gpu.interpret"
    callbacks: Any = pytest.importorskip(f"{module}.gpu_callbacks")
    params: Any = pytest.importorskip(f"{module}.params")
    swap, wgmma, local = callbacks._swap, callbacks.wgmma, threading.local()

    def without_transpose(transforms: Any) -> tuple[tuple[Any, ...], bool]:
        kept = tuple(each for each in transforms if not hasattr(each, "permutation"))
        return kept, len(kept) < len(transforms)

    def swap_transposed(*arguments: Any, **keywords: Any) -> Any:
        given = inspect.signature(swap).bind(*arguments, **keywords).arguments
        given["transforms"], is_transposed = without_transpose(given["transforms"])
        if not is_transposed:
            return swap(**given)
        given["val"] = np.asarray(given["val"]).T
        token, old = swap(**given)
        return token, old.T

    def wgmma_transposed(*, b_transforms: Any, **keywords: Any) -> Any:
        kept, local.is_transposed = without_transpose(b_transforms)
        return wgmma(b_transforms=kept, **keywords)

    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
        return a.astype(dtype) @ (b.T if local.is_transposed else b).astype(dtype)

    def iota(dtype: Any, shape: Any, axis: int, *, layout: Any) -> Any:
        del layout
        return lax.broadcasted_iota(dtype, shape, axis)

    monkeypatch.setattr(callbacks, "_swap", swap_transposed)
    monkeypatch.setattr(callbacks, "wgmma", wgmma_transposed)
    monkeypatch.setattr(callbacks, "np", SimpleNamespace(**{**vars(np), "matmul": matmul}))
    monkeypatch.setattr(symmetric_gpu.plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(symmetric_gpu.plgpu, "broadcasted_iota", iota)
    monkeypatch.setattr(symmetric_gpu, "_PROGRAMS", programs)
    return params.InterpretGPUParams()


@pytest.mark.parametrize("with_addend", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_hopper_kernel_is_what_float64_says(monkeypatch, with_addend):
    # More tiles than programs, more steps than the ring has stages, a last tile that is not full.
    x, y, addend = _operands("float16", *((2, 200, 300) if with_addend else (1, 130, 60)))
    interpret = interpret_hopper(monkeypatch, 2)
    run = functools.partial(symmetric_gpu.symmetric_product, interpret=interpret)
    _check(run, x, y, addend if with_addend else None)


@pytest.mark.parametrize(
    ("platform", "kernel", "dtype", "shape", "with_addend"),
    [
        ("tpu", symmetric_tpu, "bfloat16", (2, 1000, 2000), False),
        ("tpu", symmetric_tpu, "float32", (1, 768, 768), True),
        ("cuda", symmetric_gpu, "bfloat16", (2, 1024, 2048), True),
        ("cuda", symmetric_gpu, "float16", (1, 1000, 2000), False),
    ],
)
def test_kernels_lower_for_platforms_that_are_not_here(platform, kernel, dtype, shape, with_addend):
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    addend = jax.ShapeDtypeStruct((*shape[:2], shape[1]), x.dtype) if with_addend else None
    factors = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert "symmetric_product" in lowered(platform, kernel.symmetric_product, x, x, addend, factors)


def test_tiles_are_the_upper_triangle_each_once_in_bands():
    for tiles in (1, 2, 9, 32):
        table = triangle(tiles)
        assert sorted(zip(*table, strict=True)) == sorted(zip(*np.triu_indices(tiles), strict=True))
        assert (np.diff(table[0] // 8) >= 0).all()
