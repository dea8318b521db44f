"""Attention that records its largest logits in the module that calls it, and their capture."""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from flax.core.scope import CollectionFilter, in_filter, union_filters
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax._tree import MAX_LOGITS, SEPARATOR, Tree
from muonclip_jax.attention.dot_product import dot_product_attention as attend
from muonclip_jax.attention.inputs import bias_permits, permitted_max
from muonclip_jax.attention.maxima import only_max_logits
from muonclip_jax.attention.recording import (
    RecordingBeside,
    arguments_of,
    as_bool,
    records,
    with_arguments_of,
)

_COLLECTION = "intermediates"

# Whether a capture is active: then failing to record is an error.
_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


# With one of these arguments attention is Flax's own: it sows its weights, or products are given.
_OF_FLAX = (
    *("module", "precision", "einsum_dot_general"),
    *("qk_attn_weights_einsum", "attn_weights_value_einsum"),
)


class _Probe(nn.Module):
    """An empty module, whose parent is the module that is being called."""


def _record(max_logits: Float[Array, " N"], module: nn.Module | None = None) -> None:
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
    if not module.sow(_COLLECTION, MAX_LOGITS, max_logits) and _capturing.get():
        raise ValueError(
            f"The maxima of {SEPARATOR.join(module.path)!r} are lost, because a transformation "
            f"around it does not return the collection {_COLLECTION!r}. Add it, for example "
            "nn.scan(..., variable_axes={'params': 0, 'intermediates': 0})."
        )


def _flax_attention(given: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Runs Flax's own attention, bit for bit, and takes the maxima from the logits it computes.

    Flax takes the product that computes the logits as an argument. This one wraps Flax's own.
    """
    dot_general = given.pop("einsum_dot_general") or lax.dot_general
    plain = functools.partial(
        jnp.einsum, precision=given.pop("precision"), _dot_general=dot_general
    )
    einsum, mask, bias = given["qk_attn_weights_einsum"] or plain, given["mask"], given["bias"]
    seen: list[jax.Array] = []

    def logits_einsum(subscripts: str, query: jax.Array, key: jax.Array) -> jax.Array:
        logits = einsum(subscripts, query, key)
        seen.append(lax.stop_gradient(logits))
        return logits

    given["qk_attn_weights_einsum"] = logits_einsum
    given["attn_weights_value_einsum"] = given["attn_weights_value_einsum"] or plain
    out = nn.dot_product_attention(**given)
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
        out, max_logits = _flax_attention(given)
    else:
        bias, mask = given["bias"], as_bool(given["mask"])
        out, max_logits = attend(query, key, value, bias, mask, implementation=implementation)
    _record(max_logits, record_in or given["module"])
    return out


@functools.wraps(nn.dot_product_attention)
def _flax_recording(*arguments: Any, **keywords: Any) -> jax.Array:
    """Flax's default attention, bit for bit, and the maxima of its own logits."""
    given = arguments_of(nn.dot_product_attention, *arguments, **keywords)
    out, max_logits = _flax_attention(given)
    _record(max_logits)
    return out


def _record_flax_attention(
    method: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Makes Flax's attention modules record while one of their calls runs."""
    module = context.module
    if not isinstance(module, nn.MultiHeadDotProductAttention) or context.method_name != "__call__":
        return method(*arguments, **keywords)
    attention_fn = recording = module.attention_fn
    if attention_fn is nn.dot_product_attention:
        recording = _flax_recording
    elif not records(attention_fn, dot_product_attention):
        recording = RecordingBeside(attention_fn, promote_dtype, _record)
    # A bound module is this call's own copy; its field is put back all the same.
    object.__setattr__(module, "attention_fn", recording)
    try:
        return method(*arguments, **keywords)
    finally:
        object.__setattr__(module, "attention_fn", attention_fn)


def capture_max_logits(apply_fn: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Makes `model.apply` also return the largest logit of every attention head.

    The model and its output do not change, bit for bit. Flax's attention modules and their
    subclasses record while the call runs: with Flax's default `attention_fn` the maxima are those
    of its logits; with another one they are computed separately, block by block, from its
    arguments, without any scaling or masking inside of it. Other entries sown as `max_logits` are
    returned too. Works under `jit`, `value_and_grad`, `nn.remat`, `nn.scan` and `nn.vmap`.

    Args:
        apply_fn: `model.apply`, or a function with the same first argument and `mutable=`.

    Returns:
        A function of the same arguments that returns the result of `apply_fn`, and the tree of
        maxima with the paths of the attention modules.

    Raises:
        TypeError: If `apply_fn` is a model, a jitted function or not a function.
        ValueError: From the returned function: if no attention module recorded a maximum, or if a
            transformation such as `nn.scan` does not return `intermediates`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = nn.Sequential([nn.Dense(8), nn.MultiHeadAttention(num_heads=2)])
        >>> x = jnp.ones((1, 3, 8))
        >>> params = model.init(jax.random.key(0), x)
        >>> out, max_logits = capture_max_logits(model.apply)(params, x)
        >>> jax.tree.map(jnp.shape, max_logits)
        {'layers_1': {'max_logits': (2,)}}
    """
    is_jitted = isinstance(apply_fn, jax.stages.Wrapped)
    if is_jitted or isinstance(apply_fn, nn.Module) or not callable(apply_fn):
        given = "a jitted function" if is_jitted else f"a {type(apply_fn).__name__}"
        raise TypeError(
            f"capture_max_logits takes model.apply, got {given}. Write out, max_logits = "
            "capture_max_logits(model.apply)(variables, inputs); if it is to be compiled, as a "
            "whole: jax.jit(capture_max_logits(model.apply))."
        )

    @functools.wraps(apply_fn)
    def captured(
        variables: Tree, *arguments: Any, mutable: CollectionFilter = False, **keywords: Any
    ) -> tuple[Any, dict[str, Any]]:
        if not isinstance(variables, Mapping):
            raise TypeError(
                "The first argument must be the variables, {'params': params}, got a "
                f"{type(variables).__name__}. Write capture_max_logits(model.apply)(variables, "
                "inputs); an NNX model goes to muonclip_jax.nnx.capture_max_logits(model)."
            )
        # Recordings of earlier calls are dropped.
        variables = {name: tree for name, tree in variables.items() if name != _COLLECTION}
        keywords["mutable"] = union_filters(mutable, [_COLLECTION])
        token = _capturing.set(True)
        try:
            with nn.intercept_methods(_record_flax_attention):
                out, state = apply_fn(variables, *arguments, **keywords)
        finally:
            _capturing.reset(token)
        max_logits = only_max_logits(state.get(_COLLECTION, {}))
        if not max_logits:
            raise ValueError(
                "No attention module recorded a maximum logit. Only "
                "nn.MultiHeadDotProductAttention and its subclasses, such as nn.SelfAttention and "
                "nn.MultiHeadAttention, do so automatically. In other attention modules call "
                "muonclip_jax.linen.dot_product_attention, or sow maxima "
                f"yourself: self.sow({_COLLECTION!r}, {MAX_LOGITS!r}, max_logits)."
            )
        if mutable is False:
            return out, max_logits
        if not in_filter(mutable, _COLLECTION):
            state = {name: tree for name, tree in state.items() if name != _COLLECTION}
        return (out, state), max_logits

    return captured
