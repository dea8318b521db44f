"""Capturing the maxima of a Linen model that stays as it is."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import CollectionFilter, in_filter, union_filters
from flax.linen.dtypes import promote_dtype

from muonclip_jax._paths import MAX_LOGITS
from muonclip_jax._typing import Tree
from muonclip_jax.attention import only_max_logits, recording_beside, records
from muonclip_jax.linen.attention import (
    COLLECTION,
    calling_module,
    capturing,
    dot_product_attention,
    record_in_module,
)


def _recording(attention_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns an attention function that computes the same and records."""
    if records(attention_fn, dot_product_attention):
        return attention_fn
    if attention_fn is nn.dot_product_attention:
        return dot_product_attention
    return recording_beside(
        attention_fn,
        lambda query, key, dtype: promote_dtype(query, key, dtype=dtype),
        lambda max_logits: record_in_module(calling_module(), max_logits),
    )


def _record_flax_attention(
    method: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Lets Flax's attention modules record while one of their calls runs."""
    module = context.module
    if not isinstance(module, nn.MultiHeadDotProductAttention) or context.method_name != "__call__":
        return method(*arguments, **keywords)
    attention_fn = module.attention_fn
    # A bound module is this call's own copy; its field is put back all the same.
    object.__setattr__(module, "attention_fn", _recording(attention_fn))
    try:
        return method(*arguments, **keywords)
    finally:
        object.__setattr__(module, "attention_fn", attention_fn)


@contextmanager
def _capture() -> Iterator[None]:
    token = capturing.set(True)
    try:
        with nn.intercept_methods(_record_flax_attention):
            yield
    finally:
        capturing.reset(token)


def capture_max_logits(apply_fn: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Makes `model.apply` return the largest logit of every attention head beside its output.

    The model stays as it is. Flax's attention modules, and those derived from them, record while
    the call runs: with Flax's default `attention_fn` from the very logits that attention computes,
    with another one by computing them once more, block by block, from its arguments: what it scales
    or hides inside is not seen. Whatever else is sown as `max_logits` is returned too. Pure: it
    works under `jit`, `value_and_grad`, `nn.remat`, `nn.scan` and `nn.vmap`.

    Args:
        apply_fn: `model.apply`, or a function that takes variables first and `mutable=` as it does.

    Returns:
        A function of the same arguments. It returns what `apply_fn` returns, and the tree of
        maxima, which mirrors the paths of the attention modules.

    Raises:
        ValueError: From the returned function: if no attention recorded anything, or if a maximum
            cannot leave a transformation that does not carry `intermediates`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = nn.Sequential([nn.Dense(8), nn.MultiHeadAttention(num_heads=2)])
        >>> x = jnp.ones((1, 3, 8))
        >>> params = model.init(jax.random.key(0), x)
        >>> out, max_logits = capture_max_logits(model.apply)(params, x)
        >>> jax.tree.map(jnp.shape, max_logits)
        {'layers_1': {'max_logits': (2,)}}
    """

    @functools.wraps(apply_fn)
    def captured(
        variables: Tree, *arguments: Any, mutable: CollectionFilter = False, **keywords: Any
    ) -> tuple[Any, dict[str, Any]]:
        # What an earlier call recorded is not this one's.
        variables = {name: tree for name, tree in variables.items() if name != COLLECTION}
        with _capture():
            out, state = apply_fn(
                variables, *arguments, mutable=union_filters(mutable, [COLLECTION]), **keywords
            )
        max_logits = only_max_logits(state.get(COLLECTION, {}))
        if not max_logits:
            raise ValueError(
                "The capture caught no logit. It sees nn.MultiHeadDotProductAttention and modules "
                "derived from it, nn.SelfAttention and nn.MultiHeadAttention among them. In other "
                "attention modules call muonclip_jax.linen.dot_product_attention, or sow maxima "
                f"yourself: self.sow({COLLECTION!r}, {MAX_LOGITS!r}, max_logits)."
            )
        if mutable is False:
            return out, max_logits
        if not in_filter(mutable, COLLECTION):
            state = {name: tree for name, tree in state.items() if name != COLLECTION}
        return (out, state), max_logits

    return captured
