"""QK-Clip as the last transformation of a chain."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._arguments import check_number, names_known, value_at
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree
from muonclip_jax.clipping.clip import clip_tree
from muonclip_jax.clipping.gamma import check_clip_settings
from muonclip_jax.clipping.matching import find_in
from muonclip_jax.heads.finding import Blocks, block_rules
from muonclip_jax.transforms._states import transformation


class QKClipState(NamedTuple):
    """State of `qk_clip` with a schedule.

    Attributes:
        count: Updates so far, int32, `()`.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def clip_until(step: int, threshold: ScalarOrSchedule = 100.0) -> Callable[[ScalarLike], jax.Array]:
    """Returns a threshold schedule that switches QK-Clip off.

    Args:
        step: First update without the clip.
        threshold: The threshold before that, a number or a schedule.

    Returns:
        A schedule: the threshold while `count < step`, infinity from then on.

    Raises:
        ValueError: If `threshold` is a number that is not positive.

    Example:
        >>> schedule = clip_until(70_000)
        >>> float(schedule(69_999)), float(schedule(70_000))
        (100.0, inf)

    References:
        Kimi Team, Kimi K2, arXiv 2507.20534: no head was clipped after the first 70,000 steps.
    """
    check_number("step", step)
    check_clip_settings(threshold, 0.5, "query", schedules=True)

    def schedule(count: ScalarLike) -> jax.Array:
        tau = jnp.asarray(value_at(threshold, count), jnp.float32)
        return jnp.where(count < step, tau, jnp.inf)

    return schedule


@names_known
def qk_clip(
    threshold: ScalarOrSchedule = 100.0,
    alpha: ScalarOrSchedule = 0.5,
    *,
    shared_keys: str = "query",
    blocks: Blocks = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies QK-Clip to the updated weights, as the last transformation of a chain.

    The update `u` of a clipped head becomes `clip(p + u) - p`; all other updates are returned
    unchanged, bit for bit. See `apply_qk_clip` for the rule.

    Use it at the end of the outer chain, where its input is the final update of all query and key
    kernels and biases; inside one branch of `optax.multi_transform` it raises an error. Adding
    `clip(p + u) - p` to `p` rounds once more than `clip(p + u)`: about one float32 entry in a
    hundred of a clipped head differs in its last bit, and bfloat16 parameters lose accordingly
    more. To avoid this, call `apply_qk_clip` after `optax.apply_updates` instead.

    Args:
        threshold: Heads whose maximum logit exceeds this are scaled down; positive, may be traced,
            or a schedule of the update count. Infinity switches the clip off (see `clip_until`).
        alpha: Exponent of gamma for queries, in [0, 1]; may be traced, or a schedule.
        shared_keys: As for `apply_qk_clip`; static.
        blocks: As for `apply_qk_clip`; static.

    Returns:
        A transformation whose `update(updates, state, params, max_logits=)` needs the parameters
        and the maxima of the forward pass in which the gradients were computed.

    Raises:
        ValueError: If settings are out of range; from `update`, if `params` or `max_logits` is
            missing, or where `apply_qk_clip` would raise.
        TypeError: If `blocks` has an unsupported type.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> kernel = jnp.ones((6, 2, 4)) * 3
        >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
        >>> tx = optax.chain(optax.sgd(1.0), qk_clip(threshold=100.0))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(
        ...     optax.tree.ones_like(params),
        ...     state,
        ...     params,
        ...     max_logits={"attn": jnp.asarray([400.0, 9.0])},
        ... )
        >>> updates["attn"]["key"]["kernel"][0, :, 0].tolist()
        [-2.0, -1.0]

    References:
        Kimi Team, Kimi K2, arXiv 2507.20534, Algorithm 1.
    """
    check_clip_settings(threshold, alpha, shared_keys, schedules=True)
    rules = block_rules(blocks)
    counts = callable(threshold) or callable(alpha)

    def init(params: Tree) -> optax.OptState:
        if rules is not None:
            find_in(params, rules)
        return QKClipState(count=jnp.zeros((), jnp.int32)) if counts else optax.EmptyState()

    def update(
        updates: Tree, state: Tree, params: Tree = None, *, max_logits: Tree = None, **_: object
    ) -> tuple[Tree, Tree]:
        if params is None or (max_logits is None and jax.tree.leaves(params)):
            raise ValueError(
                "qk_clip needs the parameters and the largest attention logits of the forward "
                "pass: call tx.update(grads, state, params, max_logits=max_logits), with what Flax "
                "returned as intermediates or a dict {'path/of/attention': array of (heads,)}. "
                "muonclip_jax.dot_product_attention returns them, muonclip_jax.linen and "
                "muonclip_jax.nnx capture them. Flax's own TrainState.apply_gradients does not "
                "pass them on; muonclip_jax.linen.TrainState does. To train without the clip, "
                "leave qk_clip out (muonclip: qk_clip_threshold=None)."
            )
        count = state.count if counts else None
        settings = value_at(threshold, count), value_at(alpha, count)
        clipped, _info = clip_tree(
            params, updates, max_logits, *settings, shared_keys=shared_keys, rules=rules
        )
        if counts:
            state = QKClipState(jnp.asarray(optax.safe_increment(jnp.asarray(state.count))))
        return clipped, state

    return transformation("qk_clip", init, update)
