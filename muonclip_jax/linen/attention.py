"""Flax's attention function that records its largest logits in the module that calls it."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.lax import PrecisionLike
from jaxtyping import Array, Float

from muonclip_jax._tree import MAX_LOGITS, SEPARATOR
from muonclip_jax.attention.dot_product import dot_product_attention as attend
from muonclip_jax.attention.inputs import bias_permits, permitted_max
from muonclip_jax.attention.recording import arguments_of, as_bool, with_arguments_of

COLLECTION = "intermediates"

# Whether a capture is active: then failing to record is an error.
capturing: ContextVar[bool] = ContextVar("capturing", default=False)


# With one of these arguments attention is Flax's own: it sows its weights, or products are given.
_OF_FLAX = (
    *("module", "precision", "einsum_dot_general"),
    *("qk_attn_weights_einsum", "attn_weights_value_einsum"),
)


class _Probe(nn.Module):
    """An empty module, whose parent is the module that is being called."""


def record(max_logits: Float[Array, " N"], module: nn.Module | None = None) -> None:
    """Sows maxima at the path of a module, if `intermediates` are collected.

    By default it is the module whose method is running; outside of any, nothing is recorded.
    """
    if module is None:
        try:
            parent = _Probe().parent
        except errors.AssignSubModuleError as error:
            raise ValueError(
                "The module that computes this attention is unknown in a method that is not "
                "@nn.compact. Pass it: dot_product_attention(..., record_in=self)."
            ) from error
        module = parent if isinstance(parent, nn.Module) else None
    if module is None or module.scope is None or module.is_initializing():
        return
    if not module.sow(COLLECTION, MAX_LOGITS, max_logits) and capturing.get():
        raise ValueError(
            f"The maxima of {SEPARATOR.join(module.path)!r} are lost, because a transformation "
            f"around it does not return the collection {COLLECTION!r}. Add it, for example "
            "nn.scan(..., variable_axes={'params': 0, 'intermediates': 0})."
        )


def flax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    precision: PrecisionLike = None,
    einsum_dot_general: Callable[..., jax.Array] | None = None,
    qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
    attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
    **keywords: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs Flax's own attention, bit for bit, and takes the maxima from the logits it computes.

    Flax takes the product that computes the logits as an argument. This one wraps Flax's own.
    """
    plain = functools.partial(
        jnp.einsum, precision=precision, _dot_general=einsum_dot_general or lax.dot_general
    )
    seen: list[jax.Array] = []

    def logits_einsum(subscripts: str, query: jax.Array, key: jax.Array) -> jax.Array:
        logits = (qk_attn_weights_einsum or plain)(subscripts, query, key)
        seen.append(lax.stop_gradient(logits))
        return logits

    out = nn.dot_product_attention(
        *(query, key, value, bias, mask),
        qk_attn_weights_einsum=logits_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum or plain,
        **keywords,
    )
    (logits,) = seen
    permitted = as_bool(mask)
    if bias is not None:
        permits = bias_permits(lax.stop_gradient(bias))
        permitted = permits if permitted is None else permitted & permits
    heads = logits.ndim - 3
    other_axes = tuple(axis for axis in range(logits.ndim) if axis != heads)
    return out, permitted_max(logits, permitted, axes=other_axes)


@with_arguments_of(nn.dot_product_attention)
def dot_product_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *arguments: object,
    implementation: str | None = None,
    record_in: nn.Module | None = None,
    **keywords: object,
) -> Float[Array, "*B T N D"]:
    """Computes Flax's attention and sows the largest logit of every head as `max_logits`.

    For use as `attention_fn` of Flax's modules. Without dropout, sown weights and custom products,
    attention is `muonclip_jax.dot_product_attention`: memory is linear in the sequence length, key
    heads may be shared, and logits and softmax are in float32 for every dtype. Otherwise it is
    Flax's own attention, and the maxima are taken from the logits that it computes.

    Args:
        query: Queries `(*B, T, N, H)`.
        key: Keys `(*B, S, K, H)`.
        value: Values `(*B, S, K, D)`.
        *arguments: The further arguments of `flax.linen.dot_product_attention`, in its order: bias,
            mask, ... The bias is not part of the maxima, but pairs that it masks are excluded; the
            mask is False or zero for masked pairs; maxima are before dropout.
        implementation: As in `muonclip_jax.dot_product_attention`. Set it with
            `functools.partial`.
        record_in: The module in which to record; by default the module that is being called, which
            Linen provides only in `@nn.compact` methods. Outside of a module nothing is recorded.
        **keywords: The same arguments by name.

    Returns:
        The output `(*B, T, N, D)`.

    Raises:
        ValueError: If the calling module cannot be determined, or during a capture if a
            transformation does not return the maxima.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = nn.MultiHeadDotProductAttention(2, attention_fn=dot_product_attention)
        >>> x = jnp.ones((1, 3, 8))
        >>> params = model.init(jax.random.key(0), x)
        >>> _, state = model.apply(params, x, mutable=["intermediates"])
        >>> state["intermediates"]["max_logits"][0].shape
        (2,)
    """
    given = arguments_of(nn.dot_product_attention, query, key, value, *arguments, **keywords)
    query, key, value = promote_dtype(query, key, value, dtype=given.pop("dtype"))
    given.update(query=query, key=key, value=value)
    drops = given["dropout_rate"] > 0.0 and not given["deterministic"]
    if drops or any(given[name] is not None for name in _OF_FLAX):
        out, max_logits = flax_attention(**given)
    else:
        bias, mask = given["bias"], as_bool(given["mask"])
        out, max_logits = attend(query, key, value, bias, mask, implementation=implementation)
    record(max_logits, record_in or given["module"])
    return out
