"""Oracles, case tables and tolerances that the tests share."""

from typing import Any

import numpy as np

#: Relative tolerance by dtype for one pass through the library; a looser one says why.
TOLERANCE = {
    "float64": 1e-12,
    "complex128": 1e-12,
    "float32": 1e-5,
    "complex64": 1e-5,
    "bfloat16": 2e-2,
    "float16": 4e-3,
}


def polynomial_of_singular_values(
    x: np.ndarray, rows: list[tuple[float, float, float]], scale: float = 1.0
) -> np.ndarray:
    """Applies the rows' odd quintics to the singular values of `x / scale`, in float64.

    Newton-Schulz in exact arithmetic is this function: it acts on singular values alone.
    """
    u, s, vh = np.linalg.svd(
        np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64), full_matrices=False
    )
    s = s / scale
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


def update(tx: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Calls `tx.update`; the trees that come back are looked into, so they are typed as Any."""
    return tx.update(*args, **kwargs)
