"""A printable table of the attention blocks that were found and of what a clip scales in each."""

import itertools
from collections.abc import Iterator

from muonclip_jax._tree import Tree
from muonclip_jax.clipping.gamma import check_clip_settings
from muonclip_jax.clipping.matching import find_in, match_maxima
from muonclip_jax.heads.clips import guess_block, read_block
from muonclip_jax.heads.finding import Blocks, FoundBlock, block_rules

_OWN_KEYS = {
    "query": "gamma^alpha",
    "query_alone": "gamma",
    "key": "gamma^(1-alpha)",
}
#: shared_keys -> role -> what scales it, where several query heads share a key.
_SHARED = {
    "query": {"query": "gamma", "query_alone": "gamma"},
    "group": {"query": "eta^alpha", "query_alone": "gamma", "key": "eta^(1-alpha)"},
    "balanced": {"query": "gamma/eta^(1-alpha)", "query_alone": "gamma", "key": "eta^(1-alpha)"},
}


def describe_attention(
    params: Tree,
    max_logits: Tree = None,
    *,
    shared_keys: str = "query",
    blocks: Blocks = None,
) -> str:
    """Describes the attention blocks of a pytree and what QK-Clip would scale in each.

    Args:
        params: The parameters, arrays or `jax.ShapeDtypeStruct`.
        max_logits: The maxima, arrays or shapes. Without it the number of heads is inferred where
            shapes determine it, as kernels `(d_model, heads, head_dim)` with an output projection
            `(heads, head_dim, d_model)` do.
        shared_keys: As for `apply_qk_clip`.
        blocks: As for `apply_qk_clip`.

    Returns:
        One paragraph per block: path, layout, heads, stacked axes, and the factors of every scaled
        leaf. `eta` is the smallest `gamma` of the heads that share a key. For a block that cannot
        be clipped it contains the reason.

    Raises:
        ValueError: If there is no attention block, or a pattern in `blocks` matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((6, 2, 4))
        >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
        >>> params["attn"]["out"] = {"kernel": jnp.ones((2, 4, 6))}
        >>> print(describe_attention(params))
        attn: separate q and k, 2 heads of 4
          attn/query/kernel (6, 2, 4): query by gamma^alpha
          attn/key/kernel (6, 2, 4): key by gamma^(1-alpha)
    """
    check_clip_settings(1.0, 0.5, shared_keys)
    rules = block_rules(blocks)
    found, frozen = find_in(params, rules)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    if max_logits is not None:
        _, shapes = match_maxima(found, max_logits, frozen, rules)
    described = (_describe_block(b, shapes.get(b.path, []), shared_keys) for b in found)
    return "\n".join(itertools.chain(*described))


def _describe_block(
    block: FoundBlock, shapes: list[tuple[int, ...]], shared_keys: str
) -> Iterator[str]:
    start = f"{block.path or '(the whole tree)'}: "
    if not block.selected:
        yield f"{start}{block.layout.name}, not selected by blocks="
        return
    try:
        plan = read_block(block, *shapes) if shapes else guess_block(block)
    except ValueError as error:
        yield f"{start}{block.layout.name}, cannot be clipped: {error}"
        return
    if plan is None:
        yield f"{start}{block.layout.name}, heads as many as the maxima say"
        return
    heads = f"{plan.heads} heads"
    if plan.kv_heads != plan.heads:
        keys = "1 key head" if plan.kv_heads == 1 else f"{plan.kv_heads} key heads"
        heads = f"{plan.heads} query heads on {keys}"
    stack = f", stacked {plan.stack}" if plan.stack else ""
    note = f", {plan.note}" if plan.note else ""
    yield f"{start}{plan.layout}, {heads} of {plan.head_dim}{stack}{note}"
    rule = _OWN_KEYS if plan.heads == plan.kv_heads else _SHARED[shared_keys]
    for leaf in plan.leaves:
        parts: list[str] = []
        for segment in leaf.segments:
            size = f" ({segment.size} a head)" if len(leaf.segments) > 1 else ""
            scaled = f"by {rule[segment.role]}" if segment.role in rule else "untouched"
            parts.append(f"{segment.role.removesuffix('_alone')}{size} {scaled}")
        if any(segment.role in rule for segment in leaf.segments):
            yield f"  {leaf.path} {leaf.shape}: {', '.join(parts)}"
