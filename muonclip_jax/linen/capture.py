"""Capturing the maxima of an unmodified Linen model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import CollectionFilter, in_filter, union_filters
from flax.linen.dtypes import promote_dtype

from muonclip_jax._tree import MAX_LOGITS, Tree
from muonclip_jax.attention.maxima import only_max_logits
from muonclip_jax.attention.recording import RecordingBeside, arguments_of, records
from muonclip_jax.linen.attention import (
    COLLECTION,
    capturing,
    dot_product_attention,
    flax_attention,
    record,
)


@functools.wraps(nn.dot_product_attention)
def _flax_recording(*arguments: Any, **keywords: Any) -> jax.Array:
    """Flax's default attention, bit for bit, and the maxima of its own logits."""
    given = arguments_of(nn.dot_product_attention, *arguments, **keywords)
    out, max_logits = flax_attention(**given)
    record(max_logits)
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
        recording = RecordingBeside(attention_fn, promote_dtype, record)
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
        variables = {name: tree for name, tree in variables.items() if name != COLLECTION}
        keywords["mutable"] = union_filters(mutable, [COLLECTION])
        token = capturing.set(True)
        try:
            with nn.intercept_methods(_record_flax_attention):
                out, state = apply_fn(variables, *arguments, **keywords)
        finally:
            capturing.reset(token)
        max_logits = only_max_logits(state.get(COLLECTION, {}))
        if not max_logits:
            raise ValueError(
                "No attention module recorded a maximum logit. Only "
                "nn.MultiHeadDotProductAttention and its subclasses, such as nn.SelfAttention and "
                "nn.MultiHeadAttention, do so automatically. In other attention modules call "
                "muonclip_jax.linen.dot_product_attention, or sow maxima "
                f"yourself: self.sow({COLLECTION!r}, {MAX_LOGITS!r}, max_logits)."
            )
        if mutable is False:
            return out, max_logits
        if not in_filter(mutable, COLLECTION):
            state = {name: tree for name, tree in state.items() if name != COLLECTION}
        return (out, state), max_logits

    return captured
