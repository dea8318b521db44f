"""Teaches JAX's interpreter of Mosaic GPU transposed views and layouts, which it lacks."""

import inspect
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax import lax

from muonclip_jax.kernels import symmetric_gpu

callbacks: Any = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
params: Any = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


def _without_transpose(transforms: Any) -> tuple[tuple[Any, ...], bool]:
    """Splits a transposition off the transforms of a reference."""
    kept = tuple(each for each in transforms if not hasattr(each, "permutation"))
    return kept, len(kept) < len(transforms)


def interpret_hopper(monkeypatch: pytest.MonkeyPatch, programs: int) -> Any:
    """Patches it for so many multiprocessors; returns what is passed as `interpret`."""
    swap, wgmma, local = callbacks._swap, callbacks.wgmma, threading.local()

    def swap_transposed(*arguments: Any, **keywords: Any) -> Any:
        given = inspect.signature(swap).bind(*arguments, **keywords).arguments
        given["transforms"], is_transposed = _without_transpose(given["transforms"])
        if not is_transposed:
            return swap(**given)
        given["val"] = np.asarray(given["val"]).T
        token, old = swap(**given)
        return token, old.T

    def wgmma_transposed(*, b_transforms: Any, **keywords: Any) -> Any:
        kept, local.is_transposed = _without_transpose(b_transforms)
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
