"""Metrics of matrices from their Gram matrix, without an SVD.

Let `G = X X^H` for a wide `X` of `m` rows, with eigenvalues `sigma_i^2`. Then
`tr G = sum sigma_i^2` and `||G||_F^2 = sum sigma_i^4`. The ratio `(tr G)^2 / ||G||_F^2` is an
effective rank: `k` if `k` singular values are equal and the others zero. Only the largest singular
value needs an iteration.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from muonclip_jax._tree import Tree
from muonclip_jax.matrices import StackPlan, map_parts, plan_leaf, plan_stacks
from muonclip_jax.newton_schulz.products import gram, matmul
from muonclip_jax.routing import MatrixRules, resolve_specs

#: Figures of matrices; the others are of attention blocks.
OF_MATRICES = ("update_rms", "spectral_norm", "orthogonality_error", "effective_rank")
#: Steps of the power iteration. Whatever the spectrum, the relative error of the eigenvalue after
#: `k` steps from a random start is like `log(m) / k` in the mean (Kuczynski and Wozniakowski 1992,
#: SIAM J. Matrix Anal. Appl. 13), and that of its root half as large. A step costs two operations
#: an entry of `G`; making `G` costs `2 n`.
POWER_STEPS = 64
# A stack is copied and scaled in float32, so it is the unit of temporary memory: a share of the
# tree, which keeps the program short however deep the tree, and at least this many bytes.
_STACK_SHARE = 12
_STACK_BYTES = 64 * 2**20


class Matrices(NamedTuple):
    """The matrices of a tree that Muon trains, in the order leaf, part, matrix."""

    #: Path and position among all leaves of each leaf with matrices.
    leaves: tuple[tuple[str, int], ...]
    stacks: StackPlan

    @property
    def counts(self) -> dict[str, int]:
        """Path -> number of matrices."""
        plans = zip(self.leaves, self.stacks.leaves, strict=True)
        return {path: sum(part.count for part in leaf.parts) for (path, _), leaf in plans}


def matrices_of(tree: Tree, rules: MatrixRules | None) -> Matrices:
    """Plans the measurement of a tree of parameters or updates."""
    specs = enumerate(resolve_specs(tree, rules=rules))
    found = [(path, i, x, plan_leaf(x.shape, spec)) for i, (path, x, spec) in specs if spec]
    share = sum(math.prod(x.shape) * x.dtype.itemsize for *_, x, _ in found) // _STACK_SHARE
    dtypes = [x.dtype.name for *_, x, _ in found]
    stacks = plan_stacks([plan for *_, plan in found], dtypes, max(_STACK_BYTES, share))
    return Matrices(tuple((path, i) for path, i, *_ in found), stacks)


def matrix_figures(
    matrices: Matrices, updates: Sequence[jax.Array], momentum: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Figure -> its value for every matrix, float32; of updates, and of their momentum by path."""
    figures = _measure(update_figures, 3, updates, matrices.stacks)
    ranks = jnp.zeros_like(figures[:1])
    if momentum:
        paths = zip(matrices.leaves, updates, strict=True)
        known = [momentum.get(path, jnp.zeros_like(x)) for (path, _), x in paths]
        ranks = _measure(effective_rank, 1, known, matrices.stacks)
    return dict(zip(OF_MATRICES, (*figures, *ranks), strict=True))


def _measure(
    function: Callable[[jax.Array], jax.Array],
    number: int,
    leaves: Sequence[jax.Array],
    plan: StackPlan,
) -> jax.Array:
    """`(number, matrices)`: the figures that `function` computes of every stack."""
    parts = [x for leaf in map_parts(lambda x: function(x)[:, None], leaves, plan) for x in leaf]
    # A part without entries comes back as it was.
    found = [x.reshape(-1, number) if x.size else jnp.zeros((len(x), number)) for x in parts]
    return jnp.concatenate(found or [jnp.zeros((0, number))]).astype(jnp.float32).T


def update_figures(x: Inexact[Array, "count m n"]) -> Float[Array, "count 3"]:
    """Returns RMS, spectral norm and orthogonality error of wide matrices (see `MuonMetrics`)."""
    size, y = _scaled(x)
    product, rows = gram(y), x.shape[-2]
    trace = _trace(product)
    # Not sqrt(m / rank - 1), in which all digits of a small distance cancel.
    mean = trace[:, None, None] / rows
    identity = jnp.broadcast_to(jnp.eye(rows, dtype=product.dtype), product.shape)
    difference = product / jnp.where(mean == 0, 1, mean) - identity
    error = jnp.sqrt(jnp.sum(jnp.abs(difference) ** 2, axis=(-2, -1)) / rows)
    rms = size * jnp.sqrt(trace / (rows * x.shape[-1]))
    return jnp.stack([rms, size * jnp.sqrt(_largest_eigenvalue(product)), error], axis=-1)


def effective_rank(x: Inexact[Array, "count m n"]) -> Float[Array, "count 1"]:
    r"""Returns `(sum sigma_i^2)^2 / sum sigma_i^4` of wide matrices, 0 for the zero matrix.

    At least the stable rank `||X||_F^2 / ||X||_2^2` and at most the rank: `R_0` of Bartlett, Long,
    Lugosi and Tsigler 2020, arXiv 1906.11300, Definition 3.
    """
    product = gram(_scaled(x)[1])
    squares = jnp.sum(jnp.abs(product) ** 2, axis=(-2, -1))
    return (_trace(product) ** 2 / jnp.where(squares == 0, 1, squares))[:, None]


def _trace(product: jax.Array) -> jax.Array:
    return jnp.trace(jnp.real(product), axis1=-2, axis2=-1)


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest entry of each matrix, and the matrix divided by it, in float32 or complex64.

    Squares and fourth powers then neither overflow nor underflow for any learning rate.
    """
    y = x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)
    size = jnp.max(jnp.abs(y), axis=(-2, -1))
    return size, y / jnp.where(size == 0, 1, size)[:, None, None].astype(y.dtype)


def _largest_eigenvalue(product: jax.Array) -> jax.Array:
    """The power iteration on positive semi-definite matrices."""
    # Random, so that no structure of a network is orthogonal to it.
    start = np.random.default_rng(0).standard_normal((product.shape[-1], 1))

    def step(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = matmul(product, vectors)
        length = jnp.sqrt(jnp.sum(jnp.abs(moved) ** 2, axis=(-2, -1), keepdims=True))
        return moved / jnp.where(length == 0, 1, length).astype(moved.dtype), length

    # The first step is outside of the loop: inside `shard_map` its result varies over devices as
    # the matrices do, which a constant does not.
    first = step(jnp.asarray(start / np.linalg.norm(start), product.dtype))
    _, length = jax.lax.fori_loop(1, POWER_STEPS, lambda _, carry: step(carry[0]), first)
    return length[:, 0, 0]
