"""Which dtype and which form a computation takes, by platform, and what keeps it from diverging."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax.newton_schulz.generators import Rows, with_safety_factor
from muonclip_jax.newton_schulz.gram import gram_flops
from muonclip_jax.newton_schulz.newton_schulz import plain_flops
from muonclip_jax.newton_schulz.restarts import choose_restarts, is_gram_safe

#: The names that `ns_dtype` allows, with how far rounding may push a singular value outwards in
#: one step, relatively.
GROWTH = {"float64": 0.0, "float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
NS_DTYPES = tuple(GROWTH)
#: The names that `ns_method` allows.
NS_METHODS = ("auto", "standard", "gram", "svd")

# What a platform computes in when `ns_dtype` is None, for real input of at most 32 bits. Distance
# from the same polynomial in float64, relative Frobenius norm, measured by
# benchmarks/polar_quality.py; first on Gaussian matrices, then the worst over condition numbers up
# to 1e3, power laws and low rank with 1 % noise, five-step sets (minimax4 and cans in brackets):
#   float32   plain 2e-6, 2e-5         Gram 5e-6, .001 (.005)
#   float16   plain .003, .03 (.07)    Gram .004, .05 (minimax4 .07; cans diverges: not safe)
#   bfloat16  plain .02, .2 (.2)       Gram never
# GPUs multiply both 16-bit types at one rate, and normalised matrices fit float16's range, so its
# three more bits are free there. Entries of a matrix of norm one are about (m n)^-1/2, 1.5e-4 at
# 4096 x 11008; below the smallest normal number, 6.1e-5, rounding errs by at most 2^-25 an entry,
# over the whole matrix by sqrt(m n) 2^-25 of its norm: less than 2^-11 up to m n = 2^28. TPUs
# multiply bfloat16 natively and float32 in six passes.
_DEFAULT_DTYPE = {
    ("gpu", "standard"): "float16",
    ("gpu", "gram"): "float16",
    ("tpu", "standard"): "bfloat16",
}
# What a product in float32 costs in those of 16 bits: passes of a TPU's bfloat16 unit at
# Precision.HIGHEST; the peak rates of an H100 (989 and 67 TFLOP/s).
_FLOAT32_COST = {"tpu": 6, "gpu": 15}

# An iterate past this is on its way out.
_DIVERGED = 1.6


@functools.lru_cache(maxsize=256)
def guarded_rows(rows: Rows, dtype: str, method: str = "standard") -> Rows:
    """Shrinks the arguments of rows that rounding in `dtype` could make diverge.

    A set that rises steeply right of 1 turns a singular value of 1 + 1e-5 into anything. Following
    [0, 1] through the steps, with every value pushed outwards by the rounding of `dtype` each time,
    tells whether that can happen; if so, the rows get the safety factor of the Polar Express paper,
    as large as that rounding asks.

    Args:
        rows: Coefficients, one `(a, b, c)` a step.
        dtype: What the iteration computes in.
        method: "standard" or "gram". Between two products with `X` the Gram form rounds twice, `Q`
            and `Q X`, and values are pushed outwards twice as far.

    Returns:
        The rows, untouched where they are safe (every set in float64).
    """
    growth = GROWTH[dtype] * (2 if method == "gram" else 1)
    x = np.concatenate([np.linspace(0, 0.99, 2000), np.linspace(0.99, 1.0, 2000)])

    def largest(candidate: Rows) -> float:
        y = x
        with np.errstate(all="ignore"):
            for row in candidate:
                y = y * (1 + growth)
                y = y * (row[0] + y * y * (row[1] + y * y * row[2]))
            size = np.nan_to_num(np.abs(y), nan=np.inf)
        return float(size.max())

    # Rows that diverge even in exact arithmetic are left unchanged.
    if growth == 0 or largest(rows) <= _DIVERGED:
        return rows
    guarded = with_safety_factor(rows, 1 + growth)
    return guarded if largest(guarded) < largest(rows) else rows


def choose_dtype(rows: Rows, x_dtype: Any, ns_dtype: str | None, method: str, platform: str) -> str:
    """Chooses what to compute in, as the name of a real dtype.

    Args:
        rows: Coefficients, one `(a, b, c)` a step.
        x_dtype: The input's dtype.
        ns_dtype: What the caller asked for, or None.
        method: "standard", "gram" or "svd".
        platform: "cpu", "gpu" or "tpu"; any other one computes in float32.

    Returns:
        A name of `NS_DTYPES`.

    Raises:
        ValueError: If complex input is to be computed in 16 bits, or float64 is switched off.
    """
    x_dtype = jnp.dtype(x_dtype)
    wide = x_dtype in (jnp.dtype("float64"), jnp.dtype("complex128"))
    if ns_dtype is None:
        if wide:
            return "float64"
        if method == "svd" or jnp.issubdtype(x_dtype, jnp.complexfloating):
            return "float32"
        chosen = _DEFAULT_DTYPE.get((platform, method), "float32")
        return chosen if method != "gram" or is_gram_stable(rows, chosen) else "float32"
    narrow = jnp.dtype(ns_dtype).itemsize < 4
    if narrow and (method == "svd" or jnp.issubdtype(x_dtype, jnp.complexfloating)):
        what = 'ns_method="svd"' if method == "svd" else f"input of dtype {x_dtype}"
        raise ValueError(
            f"ns_dtype={ns_dtype!r} is not possible for {what}: it computes in float32 or "
            "float64. Pass ns_dtype=None or 'float32'."
        )
    if ns_dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != jnp.float64:
        raise ValueError(
            "ns_dtype='float64' needs 64-bit types, which JAX has switched off. Set "
            "jax.config.update('jax_enable_x64', True), or pass ns_dtype='float32'."
        )
    return ns_dtype


def is_gram_stable(rows: Rows, dtype: str) -> bool:
    """Whether the Gram form is safe in a dtype, with the rows that run in it."""
    return is_gram_safe(guarded_rows(rows, dtype, "gram"), dtype)


def choose_method(
    rows: Rows, method: str, x_dtype: Any, ns_dtype: str | None, platform: str, m: int, n: int
) -> str:
    """Resolves "auto": the Gram form where it is safe and needs less time, else the plain one.

    The Gram form amplifies rounding, so "auto" never takes it in bfloat16, nor with rows that no
    restart makes safe.

    Args:
        rows: Coefficients, one `(a, b, c)` a step.
        method: A name of `NS_METHODS`.
        x_dtype: The input's dtype.
        ns_dtype: What the caller asked to compute in, or None.
        platform: "cpu", "gpu", "tpu" or another one.
        m: Rows of the matrix.
        n: Columns of the matrix.

    Returns:
        "standard", "gram" or "svd".
    """
    if method != "auto":
        return method
    dtypes = {
        form: choose_dtype(rows, x_dtype, ns_dtype, form, platform) for form in ("standard", "gram")
    }
    if not is_gram_stable(rows, dtypes["gram"]):
        return "standard"
    restarts = choose_restarts(guarded_rows(rows, dtypes["gram"], "gram"), dtypes["gram"])
    cost = {"standard": plain_flops(rows, m, n), "gram": gram_flops(rows, m, n, restarts)}
    if dtypes["standard"] != dtypes["gram"]:
        cost["gram"] *= _FLOAT32_COST[platform]
    return min(cost, key=lambda form: cost[form])
