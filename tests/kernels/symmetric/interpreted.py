"""Runs the Hopper kernel on a CPU, in JAX's interpreter of Mosaic GPU.

The interpreter runs every warpgroup as a thread, with barriers and copies, but knows neither
register layouts nor transposed views. Both are given their meaning here.
"""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from muonclip_jax.kernels.symmetric import hopper, mosaic_gpu

callbacks: Any = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
params: Any = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
utils: Any = pytest.importorskip("jax._src.pallas.mosaic.interpret.utils")


def _store_transposed(ref: Any, x: Any) -> None:
    ref[...] = x.T


def _positions(axis: int) -> Any:
    return lax.broadcasted_iota(jnp.int32, (64, 64), axis)


def _matmul(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """Multiplies as `wgmma` does; a transposed operand is known by its shape."""
    a, b = a.astype(dtype), b.astype(dtype)
    return a @ (b if a.shape[1] == b.shape[0] else b.T)


def interpret_hopper(monkeypatch: pytest.MonkeyPatch, programs: int) -> Any:
    """Teaches the interpreter what it lacks, for a GPU of few multiprocessors.

    Returns:
        What `mosaic_gpu.run` takes as `interpret`.
    """
    to_range = utils.to_range

    def to_range_untransposed(transforms: Any) -> Any:
        return to_range([each for each in transforms if hasattr(each, "indices")])

    monkeypatch.setattr(utils, "to_range", to_range_untransposed)
    monkeypatch.setattr(
        callbacks, "np", SimpleNamespace(**{**vars(np), "matmul": _matmul}), raising=True
    )
    monkeypatch.setattr(hopper, "_store_transposed", _store_transposed)
    monkeypatch.setattr(hopper, "_positions", _positions)
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", programs)
    return params.InterpretGPUParams()
