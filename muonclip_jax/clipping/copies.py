"""Clipping every copy of the weights that an optimizer state keeps.

Some optimizers keep weights beside the parameters: schedule-free its `z`, lookahead its slow
weights, an average, master weights in float32. A clip of the parameters alone is undone by the
next blend with such a copy. Momenta look alike, a tree like the parameters', and must not be
clipped. So copies are told by the name of the field that holds them. One field's name misleads:
`optax.ema` averages updates, and calls the average as others call that of the weights.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey

from muonclip_jax._paths import nothing_matched, path_names
from muonclip_jax._typing import ScalarLike, Tree
from muonclip_jax.clipping.blocks import named_leaves, plan_clip
from muonclip_jax.clipping.clip import clip_leaves
from muonclip_jax.clipping.gamma import check_clip_settings
from muonclip_jax.heads.finding import Blocks, block_rules, strip_outer

#: Fields and dict keys that hold weights, and who uses them.
COPY_NAMES = (
    "z",  # optax.contrib.schedule_free
    "fast",  # optax.lookahead: LookaheadParams(fast, slow)
    "slow",
    "ema_params",
    "params_ema",
    "ema",
    "averaged_params",
    "master_params",
    "params_master",
    "master_weights",
)


def apply_qk_clip_to_copies(
    state: Tree,
    params: Tree,
    max_logits: Tree,
    *,
    threshold: ScalarLike = 100.0,
    alpha: ScalarLike = 0.5,
    shared_keys: str = "query",
    blocks: Blocks = None,
    copies: Sequence[str] = COPY_NAMES,
) -> Tree:
    """Clips every copy of the weights in an optimizer state as `apply_qk_clip` clips them.

    Each copy is multiplied by the very factors that the parameters are multiplied by, so what
    blends them (`x = (1 - b) z + b y`) stays the same blend of clipped weights:

        state = apply_qk_clip_to_copies(state, params, max_logits)
        params, info = apply_qk_clip(params, max_logits)

    Args:
        state: Any tree that holds copies of the parameters: an optimizer state,
            `optax.LookaheadParams`, a dict of averages.
        params: The parameters; only their paths and shapes are looked at.
        max_logits: As for `apply_qk_clip`.
        threshold: As for `apply_qk_clip`.
        alpha: As for `apply_qk_clip`.
        shared_keys: As for `apply_qk_clip`.
        blocks: As for `apply_qk_clip`.
        copies: Names of the fields (of a NamedTuple, a dataclass or a dict) that hold copies.
            Momenta, which live in other fields, are left alone, and so is an `optax.EmaState`,
            which averages updates; where yours averages weights, pass `{"ema": state.ema}`.

    Returns:
        The state with clipped copies.

    Raises:
        ValueError: If the state holds no copy under any of these names, or as `apply_qk_clip`.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((6, 2, 4))
        >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
        >>> state = {"ema_params": params, "mu": params}
        >>> state = apply_qk_clip_to_copies(state, params, {"attn": jnp.asarray([400.0, 9.0])})
        >>> state["ema_params"]["attn"]["query"]["kernel"][0, :, 0].tolist()
        [0.5, 1.0]
        >>> state["mu"]["attn"]["query"]["kernel"][0, :, 0].tolist()
        [1.0, 1.0]

    References:
        Kimi Team, Kimi K2, arXiv 2507.20534, Algorithm 1. Defazio et al. 2024, arXiv
        2405.15682 (schedule-free); Zhang et al. 2019, arXiv 1907.08610 (lookahead).
    """
    check_clip_settings(threshold, alpha, shared_keys)
    plans, recorded = plan_clip(named_leaves(params), max_logits, block_rules(blocks))
    wanted = {leaf.path: leaf.shape for plan in plans for leaf in plan.leaves}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=_averages_updates)
    places: dict[str, dict[str, int]] = {}
    for index, (key_path, leaf) in enumerate(leaves):
        for depth, key in enumerate(key_path):
            if _key(key) not in copies:
                continue
            rest = path_names(key_path[depth + 1 :])
            path = strip_outer("/".join(rest))
            if wanted.get(path) == tuple(getattr(leaf, "shape", ())):
                copy = jax.tree_util.keystr(key_path[: depth + 1])
                places.setdefault(copy, {})[path] = index
    if wanted and not places:
        raise nothing_matched(
            "A copy of the parameters under one of the names",
            ", ".join(copies),
            [jax.tree_util.keystr(key_path) for key_path, _ in leaves],
        )
    new = [leaf for _, leaf in leaves]
    for copy, indices in places.items():
        missing = [path for path in wanted if path not in indices]
        if missing:
            raise ValueError(
                f"The copy of the weights at {copy!r} lacks {missing[0]!r}, which QK-Clip scales. "
                "A copy must hold queries and keys, kernels and biases, to stay consistent."
            )
        clipped, _ = clip_leaves(
            {path: new[index] for path, index in indices.items()},
            recorded,
            threshold,
            alpha,
            plans=plans,
            shared_keys=shared_keys,
        )
        for path, leaf in clipped.items():
            new[indices[path]] = leaf
    return jax.tree.unflatten(treedef, new)


def _averages_updates(node: Any) -> bool:
    return isinstance(node, optax.EmaState)


def _key(key: Any) -> str:
    if isinstance(key, GetAttrKey):
        return key.name
    return str(getattr(key, "key", key))
