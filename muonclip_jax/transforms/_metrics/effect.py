"""Whether the clip lowers the maxima of the blocks that it clips.

Queries and keys that are normalised without gains, or cosine attention, do not change when their
kernels are scaled. No leaf of the tree shows that. The maxima do: after an effective clip the next
maximum is close to the threshold, after one without effect it is where it was, step after step,
while the kernels shrink.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muonclip_jax._tree import ScalarLike
from muonclip_jax.attention.maxima import finite_max
from muonclip_jax.clipping.gamma import is_over
from muonclip_jax.clipping.matching import merge_recordings

#: Maxima up to this multiple of the threshold do not count. An effective clip leaves a maximum at
#: the threshold, and one update raises it again by some percent.
NOTICEABLE = 1.1
#: A maximum falls where it is below this multiple of the lowest one since the block was clipped.
FALL = 0.99


class ClipEffect(NamedTuple):
    """What `metrics` remembers of each attention block from one update to the next.

    Attributes:
        lowest: Lowest maximum since the block has been clipped in every update, float32,
            `(blocks,)`; 0 where it was not clipped last.
        steps: Updates in a row in which the block was clipped and its maximum did not fall, int32.
    """

    lowest: Any
    steps: Any


def no_effect(blocks: int) -> ClipEffect:
    """Returns what stands in the state before the first update."""
    return ClipEffect(jnp.zeros(blocks, jnp.float32), jnp.zeros(blocks, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def track_clips(
    blocks: tuple[tuple[str, tuple[int, ...]], ...],
    recorded: Sequence[Sequence[jax.Array]],
    threshold: ScalarLike,
    before: ClipEffect,
) -> tuple[list[jax.Array], ClipEffect]:
    """Returns the maxima of every block, and how long its clip has been without effect.

    Args:
        blocks: Path of each attention block, and the shape of its maxima.
        recorded: What was recorded for each block.
        threshold: QK-Clip's.
        before: The state after the last update.

    Returns:
        Maxima of each block, `(*stack, heads)`, and the new state.
    """
    maxima = [
        merge_recordings(arrays, shape, path)
        for (path, shape), arrays in zip(blocks, recorded, strict=True)
    ]
    if not maxima:
        return maxima, before
    largest = jnp.stack([finite_max(x, range(x.ndim)).astype(jnp.float32) for x in maxima])
    clipped = is_over(largest, NOTICEABLE * jnp.asarray(threshold, jnp.float32))
    fell = (before.lowest == 0) | (largest < FALL * before.lowest)
    return maxima, ClipEffect(
        lowest=jnp.where(clipped, jnp.where(fell, largest, before.lowest), 0),
        steps=jnp.where(clipped & ~fell, before.steps + 1, 0),
    )
