"""What `metrics` measures; of matrices from their Gram matrix, without an SVD.

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
from muonclip_jax.newton_schulz.iteration import gram, matmul
from muonclip_jax.routing import MatrixRules, resolve_specs

#: Steps of the power iteration. Whatever the spectrum, the relative error of the eigenvalue after
#: `k` steps from a random start is like `log(m) / k` in the mean (Kuczynski and Wozniakowski 1992,
#: SIAM J. Matrix Anal. Appl. 13), and that of its root half as large. A step costs two operations
#: an entry of `G`; making `G` costs `2 n`.
POWER_STEPS = 64
# A stack is copied and scaled in float32, so it is the unit of temporary memory: a share of the
# tree, which keeps the program short however deep the tree, and at least this many bytes.
_STACK_SHARE = 12
_STACK_BYTES = 64 * 2**20


class MetricsState(NamedTuple):
    """State of `metrics`.

    Attributes:
        count: Updates so far, int32, `()`.
        sample: Attribute of `MuonMetrics` -> its latest value, one array over all matrices or
            attention blocks of the model. `read_metrics` returns them by path.
        lowest: The lowest maximum of each attention block in its current run of clipped updates,
            float32, `(blocks,)`; 0 if the latest update did not clip it.
        inner_state: State of the inner transformation.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    sample: dict[str, jax.Array]
    lowest: jax.Array
    inner_state: Tree


class MuonMetrics(NamedTuple):
    """The measurements of `metrics` at one update. The structure depends only on shapes.

    Attributes:
        step: Index of the measured update, from 0; -1 if there is none yet.
        update_rms: Path of each leaf that Muon trains -> root mean square of the update, one number
            per matrix of the leaf, `(matrices,)`, float32.
        spectral_norm: Path -> largest singular value of each matrix of the update, by 64 steps of
            the power iteration.
        orthogonality_error: Path -> distance of each matrix of the update from a multiple of an
            orthogonal one: with singular values `s`, the standard deviation of `s^2 / mean(s^2)`;
            1 for the zero matrix.
        effective_rank: Path -> effective rank of each matrix of the momentum,
            `(sum s^2)^2 / sum s^4`; 0 if there is no momentum.
        max_logit: Attention block -> maximum logit over its heads and stacked layers, `()`; empty
            without a threshold.
        min_gamma: Block -> smallest factor of QK-Clip; 1 if nothing was clipped.
        clipped_heads: Block -> number of clipped heads, over all its layers.
        clips_without_effect: Block -> consecutive updates, up to the latest, in which it was
            clipped and its maximum did not decrease; more than a few tens mean that the clip has no
            effect.
    """

    step: jax.Array
    update_rms: dict[str, jax.Array]
    spectral_norm: dict[str, jax.Array]
    orthogonality_error: dict[str, jax.Array]
    effective_rank: dict[str, jax.Array]
    max_logit: dict[str, jax.Array]
    min_gamma: dict[str, jax.Array]
    clipped_heads: dict[str, jax.Array]
    clips_without_effect: dict[str, jax.Array]

    def scalars(self, prefix: str = "muon", *, leaves: bool = True) -> dict[str, jax.Array]:
        """Returns flat scalars for TensorBoard, Weights & Biases or a JSON line.

        Several matrices or blocks are combined by the root mean square (`update_rms`), the maximum
        (`spectral_norm`, `orthogonality_error`, `max_logit`, `clips_without_effect`), the mean
        (`effective_rank`), the minimum (`min_gamma`) or the sum (`clipped_heads`).

        Args:
            prefix: First part of every name.
            leaves: Whether to add the values of each leaf and each attention block.

        Returns:
            "prefix/update_rms" and so on for the whole model, and with `leaves`
            "prefix/update_rms/path/of/leaf". Metrics without entries are left out.

        Example:
            >>> none = {}
            >>> figures = MuonMetrics(jnp.asarray(7), {"w": jnp.ones(2)}, {"w": jnp.arange(2.0)},
            ...     none, none, none, none, none, none)
            >>> {name: float(value) for name, value in figures.scalars().items()}
            {'muon/update_rms': 1.0, 'muon/update_rms/w': 1.0, \
'muon/spectral_norm': 1.0, 'muon/spectral_norm/w': 1.0}
        """
        flat: dict[str, jax.Array] = {}
        for name in self._fields[1:]:
            reduce = _REDUCTIONS.get(name, jnp.max)
            arrays = {path: jnp.ravel(x) for path, x in getattr(self, name).items() if x.size}
            if not arrays:
                continue
            flat[f"{prefix}/{name}"] = reduce(jnp.concatenate(list(arrays.values())))
            for path, x in arrays.items() if leaves else ():
                flat[f"{prefix}/{name}/{path or 'root'}"] = reduce(x)
        return flat


#: What stands for several matrices or blocks, unless it is the maximum.
_REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "update_rms": lambda x: jnp.sqrt(jnp.mean(x**2)),
    "effective_rank": jnp.mean,
    "min_gamma": jnp.min,
    "clipped_heads": jnp.sum,
}
#: Figures of matrices; the others are of attention blocks.
OF_MATRICES = MuonMetrics._fields[1:5]


class Matrices(NamedTuple):
    """The matrices of a tree that Muon trains, in the order leaf, part, matrix."""

    #: Path and number of matrices of each leaf with matrices.
    paths: tuple[str, ...]
    counts: tuple[int, ...]
    stacks: StackPlan


def matrices_of(tree: Tree, rules: MatrixRules | None) -> tuple[Matrices, list[jax.Array]]:
    """Plans the measurement of a tree of parameters or updates; returns the leaves with it."""
    found = [(path, x, spec) for path, x, spec in resolve_specs(tree, rules=rules) if spec]
    plans = [plan_leaf(x.shape, spec) for _, x, spec in found]
    leaves = [x for _, x, _ in found]
    share = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) // _STACK_SHARE
    stacks = plan_stacks(plans, [x.dtype.name for x in leaves], max(_STACK_BYTES, share))
    counts = tuple(
        sum(part.count for part in plan.parts if part.fan_in * part.fan_out) for plan in plans
    )
    return Matrices(tuple(path for path, *_ in found), counts, stacks), leaves


def matrix_figures(
    matrices: Matrices, updates: Sequence[jax.Array], momentum: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Figure -> its value for every matrix, float32; of updates, and of their momentum by path."""
    figures = dict.fromkeys(OF_MATRICES, jnp.zeros(sum(matrices.counts), jnp.float32))

    def measure(function: Callable[..., jax.Array], xs: Sequence[jax.Array]) -> jax.Array:
        parts = map_parts(lambda x: function(x)[:, None], xs, matrices.stacks)
        # A part without entries comes back as it was, and has no figures.
        rows = [x.reshape(len(x), -1) for leaf in parts for x in leaf if x.size]
        return jnp.concatenate(rows).astype(jnp.float32).T

    if any(matrices.counts):
        figures |= zip(OF_MATRICES, measure(_update_figures, updates), strict=False)
    if any(matrices.counts) and momentum:
        pairs = zip(matrices.paths, updates, strict=True)
        known = [momentum.get(path, jnp.zeros_like(x)) for path, x in pairs]
        figures["effective_rank"] = measure(_effective_rank, known)[0]
    return figures


def _update_figures(x: Inexact[Array, "count m n"]) -> Float[Array, "count 3"]:
    """Returns RMS, spectral norm and orthogonality error of wide matrices (see `MuonMetrics`)."""
    size, product, trace = _scaled_gram(x)
    # Not sqrt(m / rank - 1), in which all digits of a small distance cancel.
    rows, columns = x.shape[1:]
    mean = trace[:, None, None] / rows
    identity = jnp.broadcast_to(jnp.eye(rows, dtype=product.dtype), product.shape)
    difference = product / jnp.where(mean == 0, 1, mean) - identity
    error = jnp.sqrt(jnp.sum(jnp.abs(difference) ** 2, axis=(1, 2)) / rows)
    rms = size * jnp.sqrt(trace / (rows * columns))
    return jnp.stack([rms, size * jnp.sqrt(_largest_eigenvalue(product)), error], axis=-1)


def _effective_rank(x: Inexact[Array, "count m n"]) -> Float[Array, "count 1"]:
    r"""Returns `(sum sigma_i^2)^2 / sum sigma_i^4` of wide matrices, 0 for the zero matrix.

    At least the stable rank `||X||_F^2 / ||X||_2^2` and at most the rank: `R_0` of Bartlett, Long,
    Lugosi and Tsigler 2020, arXiv 1906.11300, Definition 3.
    """
    _, product, trace = _scaled_gram(x)
    squares = jnp.sum(jnp.abs(product) ** 2, axis=(1, 2))
    return (trace**2 / jnp.where(squares == 0, 1, squares))[:, None]


def _scaled_gram(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest entry of each matrix; Gram matrix of the matrix divided by it, and its trace.

    In float32 or complex64. The division prevents overflow and underflow for any learning rate.
    """
    y = x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)
    size = jnp.max(jnp.abs(y), axis=(1, 2))
    product = gram(y / jnp.where(size == 0, 1, size)[:, None, None].astype(y.dtype))
    return size, product, jnp.trace(jnp.real(product), axis1=1, axis2=2)


def _largest_eigenvalue(product: jax.Array) -> jax.Array:
    """The power iteration on positive semi-definite matrices."""
    # Random, so that no structure of a network is orthogonal to it.
    start = np.random.default_rng(0).standard_normal((product.shape[-1], 1))

    def step(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = matmul(product, vectors)
        length = jnp.sqrt(jnp.sum(jnp.abs(moved) ** 2, axis=(1, 2), keepdims=True))
        return moved / jnp.where(length == 0, 1, length).astype(moved.dtype), length

    # The first step is outside of the loop: inside `shard_map` its result varies over devices as
    # the matrices do, which a constant does not.
    first = step(jnp.asarray(start / np.linalg.norm(start), product.dtype))
    _, length = jax.lax.fori_loop(1, POWER_STEPS, lambda _, carry: step(carry[0]), first)
    return length[:, 0, 0]
