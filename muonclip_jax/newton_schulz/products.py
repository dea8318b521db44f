"""The matrix products of Newton-Schulz, most of which have a Hermitian result.

`X X^H` is Hermitian, and so are products of polynomials of it, since they commute: `b A + c A A`,
`Q Z + a Q`. `symmetric` selects the implementation: "xla" computes them in full; "triangle" one
triangle of 2 x 2 blocks, where that is faster on a CPU; a name in `kernels.SYMMETRIC` that kernel.
"""

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._devices import all_gather
from muonclip_jax.kernels import SYMMETRIC, multiply_symmetric

#: From so many rows on "triangle" computes three of four blocks: a quarter of the work less, 10 to
#: 20 % of the time of a whole polar factor at 768 rows. More blocks save little more and compile
#: twice as long; small matrices lose.
SPLIT_FROM = 512


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns what products of `dtype` accumulate in: float32 or wider."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `x y`, accumulated and returned in `accumulator`."""
    return jnp.matmul(
        x,
        y,
        # TPUs and GPUs would otherwise round float32 operands to bfloat16 or TF32.
        precision=lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else lax.Precision.DEFAULT,
        preferred_element_type=accumulator(x.dtype),
    )


def gram(x: jax.Array, symmetric: str = "xla", wide: bool = False) -> jax.Array:
    """Computes `x x^H`, in the dtype of `x` or in `accumulator`."""
    out = accumulator(x.dtype) if wide else x.dtype
    with jax.named_scope("gram"):
        if symmetric in SYMMETRIC and out == x.dtype:
            return multiply_symmetric(symmetric, x, x)
        return _hermitian(x, x.mT.conj(), x, symmetric).astype(out)


def symmetric_product(
    x: jax.Array,
    y: jax.Array,
    addend: jax.Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    symmetric: str = "xla",
) -> jax.Array:
    """Computes `alpha x y + beta addend` of Hermitian matrices that commute, rounded once."""
    with jax.named_scope("symmetric_product"):
        if symmetric in SYMMETRIC:
            return multiply_symmetric(symmetric, x, y, addend, alpha, beta)
        result = alpha * _hermitian(x, y, y, symmetric)
        if addend is not None:
            result = result + beta * addend.astype(result.dtype)
        return result.astype(x.dtype)


def polynomial(
    A: jax.Array,
    b: float,
    c: float,
    square: jax.Array | None = None,
    *,
    symmetric: str = "xla",
    axes: tuple[str, ...] = (),
) -> jax.Array:
    """Computes `b A + c A A` of Hermitian `A`, rounded once; `square` is `A A`, where it is known.

    Devices along mapped `axes`, which all have `A`, compute some rows each and gather the result.
    """
    wide = accumulator(A.dtype)
    if not c or square is not None:
        result = b * A.astype(wide)
        if square is not None:
            result = result + c * square.astype(wide)
        return result.astype(A.dtype)
    if not axes:
        return symmetric_product(A, A, A, alpha=c, beta=b, symmetric=symmetric)
    m, axis = A.shape[-1], A.ndim - 2
    rows = -(-m // lax.axis_size(axes))
    padding = [(0, 0)] * axis + [(0, rows * lax.axis_size(axes) - m), (0, 0)]
    start = lax.axis_index(axes) * rows
    mine = lax.dynamic_slice_in_dim(jnp.pad(A, padding), start, rows, axis)
    result = c * matmul(mine, A) + b * mine.astype(wide)
    # Rounded before it is sent: half the bytes in 16 bits.
    gathered = all_gather(result.astype(A.dtype), axes, axis)
    return lax.slice_in_dim(gathered, 0, m, axis=axis)


def _hermitian(x: jax.Array, y: jax.Array, adjoint_of_y: jax.Array, symmetric: str) -> jax.Array:
    """Computes `x y`, known to be Hermitian, by XLA."""
    rows = x.shape[-2]
    if symmetric != "triangle" or rows < SPLIT_FROM or x.dtype.itemsize < 4:
        return matmul(x, y)
    half = rows // 2
    upper = matmul(x[..., :half, :], y)
    # Cut between rows, which lie together: a cut between columns is a slow copy.
    corner = matmul(x[..., half:, :], adjoint_of_y[..., half:, :].mT.conj())
    # Written into one array: XLA's CPU compiler would compile every concatenation by itself.
    square = jnp.pad(upper, [(0, 0)] * (x.ndim - 2) + [(0, rows - half), (0, 0)])
    square = square.at[..., half:, :half].set(upper[..., half:].mT.conj())
    return square.at[..., half:, half:].set(corner)
