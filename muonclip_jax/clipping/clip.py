"""QK-Clip as a pure function of parameters and maxima."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import ScalarLike, Tree
from muonclip_jax.attention.maxima import finite_max
from muonclip_jax.clipping.gamma import (
    check_clip_settings,
    clip_gamma,
    clip_leaf,
    leaf_factor,
    role_factors,
)
from muonclip_jax.clipping.matching import Recorded, merge_recordings, named_leaves, plan_clip
from muonclip_jax.heads.finding import Blocks, Rule, block_rules
from muonclip_jax.heads.plan import BlockPlan


class QKClipInfo(NamedTuple):
    """The maxima and factors of a clip. A pytree whose structure depends only on shapes.

    Attributes:
        max_logits: Block -> largest logit of each head, `(*stack, heads)`, float32 or
            wider.
        gamma: Block -> factor of each head's logits, 1 for heads that were not clipped.
        clipped_heads: Block -> number of heads with a factor below 1, over all its layers.
    """

    max_logits: dict[str, Float[Array, "..."]]
    gamma: dict[str, Float[Array, "..."]]
    clipped_heads: dict[str, Int[Array, ""]]

    @property
    def largest(self) -> Float[Array, ""]:
        """The largest finite logit of all heads; -inf for a model without attention.

        NaN and infinite maxima are ignored unless there are no others.
        """
        parts = [finite_max(x, range(x.ndim)) for x in self.max_logits.values()]
        return finite_max(jnp.stack(parts), (0,)) if parts else jnp.asarray(-jnp.inf, jnp.float32)

    @property
    def total_clipped(self) -> Int[Array, ""]:
        """Number of clipped heads in all blocks."""
        return sum(self.clipped_heads.values(), start=jnp.zeros((), jnp.int32))

    @property
    def total_heads(self) -> int:
        """Number of heads, clipped or not."""
        return sum(gamma.size for gamma in self.gamma.values())

    def scalars(self, prefix: str = "qk_clip", *, blocks: bool = True) -> dict[str, jax.Array]:
        """Returns flat scalars for TensorBoard, Weights & Biases or a JSON line, as arrays.

        Args:
            prefix: First part of every name.
            blocks: Whether to add the values of each block.

        Returns:
            "prefix/max_logit", "prefix/min_gamma", "prefix/clipped_heads",
            "prefix/clipped_fraction", and with `blocks` the first three for
            "prefix/path/of/block/...".

        Example:
            >>> import jax.numpy as jnp
            >>> info = QKClipInfo(
            ...     max_logits={"attn": jnp.asarray([150.0, 90.0])},
            ...     gamma={"attn": jnp.asarray([2 / 3, 1.0])},
            ...     clipped_heads={"attn": jnp.asarray(1)},
            ... )
            >>> sorted(info.scalars(blocks=False))[:2]
            ['qk_clip/clipped_fraction', 'qk_clip/clipped_heads']
        """
        clipped, smallest = self.total_clipped, [gamma.min() for gamma in self.gamma.values()]
        flat = {
            f"{prefix}/max_logit": self.largest,
            f"{prefix}/min_gamma": jnp.stack(smallest).min() if smallest else jnp.ones(()),
            f"{prefix}/clipped_heads": clipped,
            f"{prefix}/clipped_fraction": clipped / max(self.total_heads, 1),
        }
        for path in self.gamma if blocks else ():
            name = f"{prefix}/{path}" if path else prefix + "/block"
            largest = self.max_logits[path]
            flat[f"{name}/max_logit"] = finite_max(largest, range(largest.ndim))
            flat[f"{name}/min_gamma"] = self.gamma[path].min()
            flat[f"{name}/clipped_heads"] = self.clipped_heads[path]
        return flat


@functools.partial(jax.jit, static_argnames=("plans",))
def _info(recorded: Recorded, threshold: ScalarLike, *, plans: tuple[BlockPlan, ...]) -> QKClipInfo:
    maxima = {p.path: merge_recordings(recorded[p.path], p.maxima_shape) for p in plans}
    gamma = {path: clip_gamma(largest, threshold) for path, largest in maxima.items()}
    clipped = {path: jnp.sum(g < 1.0, dtype=jnp.int32) for path, g in gamma.items()}
    return QKClipInfo(max_logits=maxima, gamma=gamma, clipped_heads=clipped)


@functools.partial(jax.jit, static_argnames=("plans", "shared_keys"))
def _clip_leaves(
    params: dict[str, jax.Array],
    updates: dict[str, jax.Array],
    recorded: Recorded,
    threshold: ScalarLike,
    alpha: ScalarLike,
    *,
    plans: tuple[BlockPlan, ...],
    shared_keys: str,
) -> tuple[dict[str, jax.Array], QKClipInfo]:
    """Clips the planned leaves: of the updates if given, else of the parameters."""
    info = _info(recorded, threshold, plans=plans)
    clipped: dict[str, jax.Array] = {}
    for plan in plans:
        factors = role_factors(info.gamma[plan.path], alpha, shared_keys, plan.kv_heads)
        # Computed from the recordings, not from gamma: the partitioner may shard gamma like the
        # kernels that it scales, and would have to gather the result.
        over = (jnp.any(clip_gamma(x, threshold) < 1.0) for x in recorded[plan.path])
        needed = functools.reduce(jnp.logical_or, over)
        for leaf in plan.leaves:
            if any(segment.role in factors for segment in leaf.segments):
                p, u = params[leaf.path], updates.get(leaf.path)
                clipped[leaf.path] = clip_leaf(leaf.path, needed, p, u, leaf_factor(leaf, factors))
    return clipped, info


def clip_tree(
    params: Tree,
    updates: Tree | None,
    max_logits: Tree,
    threshold: ScalarLike,
    alpha: ScalarLike,
    *,
    shared_keys: str,
    rules: tuple[Rule, ...] | None,
) -> tuple[Tree, QKClipInfo]:
    """Returns the clipped parameters; given updates `u`, the tree of `clip(p + u) - p` instead."""
    plans, recorded = plan_clip(params, max_logits, rules)
    changed = params if updates is None else updates
    leaves = named_leaves(changed)
    weights, old = dict(named_leaves(params)), dict(leaves)
    paths = [leaf.path for plan in plans for leaf in plan.leaves]
    if missing := [path for path in paths if path not in old]:
        raise ValueError(
            f"qk_clip must change {missing[0]!r}, but the updates have no entry for it. Give it an "
            "update, such as zeros, or exclude its block with blocks=."
        )
    new, info = _clip_leaves(
        {path: weights[path] for path in paths},
        {} if updates is None else {path: old[path] for path in paths},
        *(recorded, threshold, alpha),
        plans=plans,
        shared_keys=shared_keys,
    )
    for path, x in new.items():
        # Called outside of `jit` on Auto axes, XLA may shard a result as the maxima are.
        concrete = isinstance(old[path], jax.Array) and not isinstance(x, Tracer)
        if concrete and not x.sharding.is_equivalent_to(old[path].sharding, x.ndim):
            new[path] = jax.device_put(x, old[path].sharding)
    clipped = [new.get(path, leaf) for path, leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(changed), clipped), info


@names_known
def apply_qk_clip(
    params: Tree,
    max_logits: Tree,
    *,
    threshold: ScalarLike = 100.0,
    alpha: ScalarLike = 0.5,
    shared_keys: str = "query",
    blocks: Blocks = None,
) -> tuple[Tree, QKClipInfo]:
    """Scales down the queries and keys of heads whose largest logit exceeds the threshold.

    With `S` a head's largest pre-softmax logit in the forward pass, and `gamma = threshold / S`
    where `S` exceeds the threshold, else 1:

        W_q[head] *= gamma ** alpha,    W_k[head] *= gamma ** (1 - alpha)

    Biases are scaled like their kernels. With the weights and batch of the forward pass, a clipped
    head's largest logit becomes the threshold, and other heads are unchanged. For heads that share
    their key (grouped-query attention) only the query is scaled; latent attention's rotary key and
    all values are not scaled. Call it after the weight update of any optimizer.

    If queries and keys are normalised, gains of each head are scaled instead of kernels, and shared
    gains are an error. Gains stored as `w` and applied as `1 + w`, and normalisation without
    parameters, cannot be detected; exclude such blocks with `blocks`, or clip a tree with `1 + w`.

    Args:
        params: The parameters: of Linen, of NNX, boxed or plain.
        max_logits: The maxima: Flax's `intermediates`, a tree of modules with an array at each
            attention block, or a flat dict with keys such as "decoder/block_0/attention". Arrays
            are `(heads,)`, or `(layers, heads)` for stacked layers; leading axes and several
            recordings are reduced by the maximum. If the model caps logits (`cap * tanh(s / cap)`),
            give the maxima before the cap.
        threshold: Heads whose maximum logit exceeds this are scaled down; positive, may be traced.
            Infinity switches the clip off, and so does a traced value that is not positive.
        alpha: Exponent of gamma for queries, in [0, 1]; may be traced.
        shared_keys: Rule for keys that several heads share: "query", "group" or "balanced" (see
            docs/qk-clip.md).
        blocks: None clips every attention block with a known layout. A pattern selects blocks by
            path; a pair `(pattern, AttentionLayout)` gives the layout at matching paths; in a
            sequence of these the first match is used. Blocks that are not selected are not clipped.

    Returns:
        `(params, info)`: parameters with the same structure, dtypes and shardings, equal bit for
        bit where no head exceeds the threshold, and a `QKClipInfo`.

    Raises:
        ValueError: If settings are out of range, a block has no maximum, a maximum has no block,
            shapes do not match, or queries and keys are normalised with gains that heads share.
        TypeError: If `blocks` has an unsupported type.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((6, 2, 4))  # (d_model, heads, head_dim)
        >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
        >>> clipped, info = apply_qk_clip(params, {"attn": jnp.asarray([400.0, 9.0])})
        >>> clipped["attn"]["query"]["kernel"][0, :, 0].tolist()
        [0.5, 1.0]
        >>> int(info.clipped_heads["attn"])
        1

    References:
        Kimi Team, Kimi K2, arXiv 2507.20534, Algorithm 1; Su, kexue.fm/11126.
    """
    check_clip_settings(threshold, alpha, shared_keys)
    rules = block_rules(blocks)
    return clip_tree(
        params, None, max_logits, threshold, alpha, shared_keys=shared_keys, rules=rules
    )


@names_known
def qk_clip_info(
    params: Tree,
    max_logits: Tree,
    *,
    threshold: ScalarLike = 100.0,
    alpha: ScalarLike = 0.5,
    shared_keys: str = "query",
    blocks: Blocks = None,
) -> QKClipInfo:
    """Returns the `QKClipInfo` of `apply_qk_clip` without changing weights.

    For loops that clip inside `muonclip(...)` or `qk_clip`.

    Args:
        params: The parameters; only paths and shapes are used.
        max_logits: As for `apply_qk_clip`.
        threshold: As for `apply_qk_clip`.
        alpha: As for `apply_qk_clip`.
        shared_keys: As for `apply_qk_clip`.
        blocks: As for `apply_qk_clip`.

    Returns:
        The `QKClipInfo`.

    Raises:
        ValueError: As `apply_qk_clip`.
        TypeError: As `apply_qk_clip`.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((6, 2, 4))
        >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
        >>> info = qk_clip_info(params, {"attn": jnp.asarray([400.0, 9.0])})
        >>> float(info.largest), int(info.total_clipped)
        (400.0, 1)

    References:
        Kimi Team, Kimi K2, arXiv 2507.20534, Algorithm 1.
    """
    check_clip_settings(threshold, alpha, shared_keys)
    plans, recorded = plan_clip(params, max_logits, block_rules(blocks))
    return _info(recorded, threshold, plans=plans)
