"""A sample: what is measured at one update, from plan and arrays."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muonclip_jax._tree import ScalarLike, Tree
from muonclip_jax.clipping.gamma import clip_gamma
from muonclip_jax.clipping.matching import match_maxima, trailing_shape
from muonclip_jax.heads.clips import read_block
from muonclip_jax.heads.finding import Rule
from muonclip_jax.transforms._metrics.figures import effective_rank, update_figures
from muonclip_jax.transforms._metrics.plan import MatrixPlan, blocks_of, measure_stacks


class MetricsSample(NamedTuple):
    """What `metrics` measured at one update. `read_metrics` gives the entries their names.

    Attributes:
        step: Number of the measured update, from 0, int32, `()`; -1 before the first.
        update_rms: Of each matrix of the update, the root of the mean of its squares, float32,
            `(matrices,)`.
        spectral_norm: Of each matrix of the update, its largest singular value (`UpdateFigures`).
        orthogonality_error: Of each matrix of the update, its distance from a multiple of an
            orthogonal one (`UpdateFigures`).
        effective_rank: Of each matrix of the momentum after the update, `effective_rank`; 0 where
            the inner state has no momentum `mu` of it.
        max_logit: Of each attention block, the largest logit of all its heads and stacked layers,
            float32, `(blocks,)`; no blocks where `metrics` got no threshold.
        min_gamma: Of each attention block, the smallest of QK-Clip's factors, float32.
        clipped_heads: Of each attention block, the number of heads that were clipped, int32.
    """

    step: Any
    update_rms: Any
    spectral_norm: Any
    orthogonality_error: Any
    effective_rank: Any
    max_logit: Any
    min_gamma: Any
    clipped_heads: Any


def no_sample(matrices: int, blocks: int) -> MetricsSample:
    """Returns what stands in the state before the first sample."""
    # Every array is made by itself: a state whose leaves share memory cannot be donated.
    return MetricsSample(
        step=jnp.full([], -1, jnp.int32),
        update_rms=jnp.zeros(matrices, jnp.float32),
        spectral_norm=jnp.zeros(matrices, jnp.float32),
        orthogonality_error=jnp.zeros(matrices, jnp.float32),
        effective_rank=jnp.zeros(matrices, jnp.float32),
        max_logit=jnp.zeros(blocks, jnp.float32),
        min_gamma=jnp.ones(blocks, jnp.float32),
        clipped_heads=jnp.zeros(blocks, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def measure_sample(
    plan: MatrixPlan,
    count: jax.Array,
    updates: Sequence[jax.Array],
    momentum: dict[int, jax.Array],
    maxima: Sequence[jax.Array],
    threshold: ScalarLike,
) -> MetricsSample:
    """Measures an update.

    Args:
        plan: The matrices.
        count: Number of the update.
        updates: The leaves of the plan.
        momentum: Momentum of those of them that have one, by their number.
        maxima: Maxima of each attention block, as from `track_clips`.
        threshold: QK-Clip's.

    Returns:
        The sample.
    """
    # An inner jit: a call outside of one compiles as a whole, and once.
    sample = no_sample(plan.total, len(maxima))
    rms, norms, errors = measure_stacks(update_figures, updates, plan.stacks, 3)
    ranks = sample.effective_rank
    if momentum:
        known = [momentum.get(i, jnp.zeros_like(x)) for i, x in enumerate(updates)]
        (ranks,) = measure_stacks(lambda x: (effective_rank(x),), known, plan.stacks, 1)
    for i, largest in enumerate(maxima):
        gamma = clip_gamma(largest, threshold)
        sample = sample._replace(
            max_logit=sample.max_logit.at[i].set(largest.max().astype(jnp.float32)),
            min_gamma=sample.min_gamma.at[i].set(gamma.min().astype(jnp.float32)),
            clipped_heads=sample.clipped_heads.at[i].set(jnp.sum(gamma < 1, dtype=jnp.int32)),
        )
    return sample._replace(
        step=count.astype(jnp.int32),
        update_rms=rms,
        spectral_norm=norms,
        orthogonality_error=errors,
        effective_rank=ranks,
    )


def recorded_in(
    tree: Tree, max_logits: Tree, rules: tuple[Rule, ...] | None, clips: bool
) -> list[tuple[str, tuple[int, ...], list[jax.Array]]]:
    """Returns every selected block, in their order in the tree, with what was recorded for it.

    Between path and recordings is the shape of the block's maxima, `(*stack, heads)`. It is read
    off the kernels where a clip counts heads by it; a model that is not clipped need not have
    kernels that can be.

    Raises:
        ValueError: If there are blocks and no maxima, or they do not fit together.
    """
    named, found = blocks_of(tree, rules)
    selected = [block for block in found if block.selected]
    if not selected:
        return []
    if max_logits is None:
        raise ValueError(
            "metrics got a qk_clip_threshold, and this update brings no maxima. Call tx.update("
            "grads, state, params, max_logits=max_logits), or leave qk_clip_threshold out of "
            "metrics(...)."
        )
    matched = match_maxima(found, max_logits, named.masked, rules)
    recorded = []
    for block in selected:
        arrays = matched[block.path]
        shape = trailing_shape(arrays)
        if clips:
            shape = read_block(block, shape).maxima_shape
        recorded.append((block.path, shape, arrays))
    return recorded
