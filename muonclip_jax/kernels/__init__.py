"""Pallas kernels, each one a second implementation of an operation that XLA computes too.

Nothing here is imported before a kernel is named. Pallas is experimental: where a version of JAX
does not have what a kernel is written in, naming it is refused and everything else works.
"""

import functools
import importlib
from types import ModuleType

import jax
import numpy as np

#: For each operation the names of its kernels, and what they run on.
SYMMETRIC = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}
MAX_LOGITS = {"mosaic_tpu": "tpu"}

# Rows of tiles in a band of `triangle`.
_BAND = 8


def load_kernel(operation: str, name: str, platform: str) -> ModuleType:
    """Imports a kernel's module.

    Args:
        operation: "symmetric" or "max_logits".
        name: A key of `SYMMETRIC` or `MAX_LOGITS`.
        platform: What the computation will run on.

    Returns:
        The module.

    Raises:
        NotImplementedError: If the kernel is for another platform, or cannot be imported.
    """
    wanted = {"symmetric": SYMMETRIC, "max_logits": MAX_LOGITS}[operation][name]
    if platform != wanted:
        raise NotImplementedError(
            f"The kernel {name!r} runs on a {wanted.upper()}, and this computation is for "
            f"{platform!r}. Pass 'xla'."
        )
    try:
        return importlib.import_module(f"muonclip_jax.kernels.{operation}_{wanted}")
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(
            f"The kernel {name!r} needs a part of Pallas that JAX {jax.__version__} does not have: "
            f"{error}. Pass 'xla'."
        ) from error


@functools.lru_cache(maxsize=64)
def triangle(tiles: int) -> np.ndarray:
    """Lists the square tiles on or above the diagonal of `tiles x tiles`: rows, then columns.

    They come in bands of a few rows, so that programs that run at once read the same operands.

    Example:
        >>> triangle(2).tolist()
        [[0, 0, 1], [0, 1, 1]]
    """
    found = sorted(
        (row // _BAND, column, row) for column in range(tiles) for row in range(column + 1)
    )
    table = np.asarray([(row, column) for _, column, row in found], np.int32).T.copy()
    table.setflags(write=False)
    return table
