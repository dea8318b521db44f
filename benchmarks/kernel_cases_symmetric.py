"""The symmetric kernels at the sizes that matter, for the compilers and for timing."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax.kernels.symmetric import gram, matmul_add, symmetric_product

#: What a step of Newton-Schulz looks like: `b R + c R R`.
ALPHA, BETA = 2.0315, -4.775
#: What its end adds of the iterate: `a X + B X`.
UPDATE = 3.4445
#: Rows of square matrices.
SQUARE = (768, 1024, 1536, 2048, 3072, 4096, 8192)
#: Stacks of square matrices `(batch, rows)`.
STACKS = ((48, 768), (24, 2048), (8, 4096))
#: Stacks of wide matrices `(batch, rows, columns)` of named models, as `x x^T` sees them.
WIDE = {
    "GPT-2 small mlp": (24, 768, 3072),
    "GPT-2 XL mlp": (4, 1600, 6400),
    "Qwen3 0.6B mlp": (4, 1024, 3072),
    "Llama-3 8B mlp": (1, 4096, 14336),
    "Llama-2 7B mlp": (1, 4096, 11008),
    "DeepSeek-V3 expert": (8, 2048, 7168),
    "ragged": (2, 1000, 2040),
}


@dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
        name: What a table calls it.
        batch: How many matrices.
        rows: Their rows.
        columns: Their columns, or None for the product of two square ones.
        dtype: Their dtype.
        is_update: Whether it is the end of a step, `a X + B X` of a wide `X` and a square `B`.
    """

    name: str
    batch: int
    rows: int
    columns: int | None
    dtype: str
    is_update: bool = False

    @property
    def flops(self) -> int:
        """Operations of the full product."""
        return 2 * self.batch * self.rows**2 * (self.columns or self.rows)

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the operands."""
        square = (self.batch, self.rows, self.rows)
        if self.columns is None:
            return [square]
        wide = (self.batch, self.rows, self.columns)
        return [wide, square] if self.is_update else [wide]

    def function(self, implementation: str | None) -> Callable[..., jax.Array]:
        """Returns the product, as a function of the operands."""
        if self.is_update:
            return functools.partial(update, implementation=implementation)
        if self.columns is not None:
            return functools.partial(gram, implementation=implementation)

        def quintic(r: jax.Array) -> jax.Array:
            return symmetric_product(r, r, r, alpha=ALPHA, beta=BETA, implementation=implementation)

        return quintic


def cases(dtypes: tuple[str, ...], *, wide: bool = True) -> list[Case]:
    """Lists the cases, the largest and the stacks in the first dtype only."""
    found = []
    for number, dtype in enumerate(dtypes):
        for rows in SQUARE if number == 0 else (768, 2048):
            found.append(Case(f"b R + c R R, {rows}", 1, rows, None, dtype))
        if number == 0:
            for batch, rows in STACKS:
                found.append(Case(f"b R + c R R, {batch} x {rows}", batch, rows, None, dtype))
        if wide and number == 0:
            for name, (batch, rows, columns) in WIDE.items():
                found.append(
                    Case(f"{name}, {batch} x ({rows}, {columns})", batch, rows, columns, dtype)
                )
    return found


def update(x: jax.Array, r: jax.Array, implementation: str | None = None) -> jax.Array:
    """Computes the end of a step, `a X + (b A + c A^2) X`, from the matrix in brackets."""
    return matmul_add(r, x, x, beta=UPDATE, implementation=implementation)


def update_cases(dtype: str) -> list[Case]:
    """Lists the ends of steps."""
    return [
        Case(f"a X + B X, {name}, {batch} x ({rows}, {columns})", batch, rows, columns, dtype, True)
        for name, (batch, rows, columns) in WIDE.items()
    ]


def compiler_cases() -> dict[str, list[tuple[str, Callable[..., Any], tuple[Any, ...]]]]:
    """Lists `(name, function, arguments)` for each platform's compiler."""
    updates = [
        (
            f"mosaic_gpu, {case.dtype}: {case.name}",
            case.function("mosaic_gpu"),
            tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype)) for shape in case.shapes()),
        )
        for case in update_cases("bfloat16")
    ]
    kernels = {
        "tpu": {"mosaic_tpu": ("bfloat16", "float32")},
        "cuda": {"mosaic_gpu": ("bfloat16", "float16"), "triton": ("bfloat16", "float16")},
    }
    symmetric = {
        platform: [
            (
                f"{kernel}, {case.dtype}: {case.name}",
                case.function(kernel),
                tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in case.shapes()),
            )
            for kernel, dtypes in named.items()
            for dtype in dtypes
            for case in cases(dtypes)
            if case.dtype == dtype
        ]
        for platform, named in kernels.items()
    }
    return {**symmetric, "cuda": symmetric["cuda"] + updates}
