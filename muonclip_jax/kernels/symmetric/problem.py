"""What an implementation is asked to compute, as far as shapes and dtypes say it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

#: Dtypes of two bytes, which matrix units multiply at full rate.
NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class Problem:
    """A stack of symmetric products `alpha x y^H + beta addend`.

    Attributes:
        batch: How many products.
        rows: Rows and columns of each result, `m`.
        depth: What is summed over, `n`.
        dtype: Name of the operands' dtype.
        addend_dtype: Name of the addend's dtype, or None where there is none.
        out_dtype: Name of the result's dtype.
        columns: Columns of each result where it is not symmetric, `alpha x y + beta addend`.
    """

    batch: int
    rows: int
    depth: int
    dtype: str
    addend_dtype: str | None
    out_dtype: str
    columns: int | None = None


#: A kernel: from `x` and `y` `(B, m, n)`, an addend `(B, m, m)` or None, `alpha` and `beta` as one
#: float32 array and the name of the result's dtype to the result `(B, m, m)`.
Kernel: TypeAlias = Callable[..., jax.Array]


def problem_of(
    x: Inexact[Array, "*batch m n"],
    addend: Inexact[Array, "*batch m k"] | None,
    out_dtype: str,
    columns: int | None = None,
) -> Problem:
    """Returns the problem that operands pose."""
    return Problem(
        math.prod(x.shape[:-2]),
        *x.shape[-2:],
        dtype=jnp.dtype(x.dtype).name,
        addend_dtype=None if addend is None else jnp.dtype(addend.dtype).name,
        out_dtype=out_dtype,
        columns=columns,
    )


def result_type(x: jax.Array, columns: int, out_dtype: str) -> jax.ShapeDtypeStruct:
    """Returns what a kernel declares as its result, varying over the mesh axes that `x` does."""
    batch, rows, _ = x.shape
    # What shard_map calls it differs between JAX versions that are older than ours and newer.
    varying = getattr(jax.typeof(x), "manual_axis_type", None)
    known = {} if varying is None else {"manual_axis_type": varying}
    return jax.ShapeDtypeStruct((batch, rows, columns), jnp.dtype(out_dtype), **known)


def dtype_refusal(problem: Problem, allowed: tuple[str, ...]) -> str | None:
    """Returns why dtypes are refused, if they are."""
    names = (problem.dtype, problem.out_dtype, problem.addend_dtype)
    other = [name for name in names if name is not None and name not in (*allowed, "float32")]
    if problem.dtype not in allowed or other:
        return (
            f"it multiplies {' or '.join(allowed)}, adds and returns those or float32, and was "
            f"given {', '.join(name for name in names if name is not None)}"
        )
    if 0 in (problem.batch, problem.rows, problem.depth, problem.columns):
        return "there is nothing to compute"
    return None
