"""Flax NNX: attention that records its largest logits, and their capture.

A model that uses `nnx.MultiHeadAttention` needs no change:

    logits, max_logits = muonclip_jax.nnx.capture_max_logits(model)(tokens)
    optimizer.update(model, grads, max_logits=max_logits)

A model may also record its own maxima, with `attention_fn=muonclip_jax.nnx.dot_product_attention`
on the module. It then sows `nnx.Intermediate` variables named `max_logits`, which
`nnx.capture(model, nnx.Intermediate)` collects at the path of the attention module. Outside of a
capture nothing is recorded.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import flax
import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from muonclip_jax._tree import MAX_LOGITS
from muonclip_jax.attention.dot_product import attention_max_logits, dot_product_attention as attend
from muonclip_jax.attention.maxima import only_max_logits
from muonclip_jax.attention.recording import (
    RecordingBeside,
    arguments_of,
    as_bool,
    records,
    with_arguments_of,
)

#: Whether this thread captures.
capturing: ContextVar[bool] = ContextVar("capturing", default=False)
_ONE_AT_A_TIME = threading.RLock()


def _record(max_logits: Float[Array, " N"], module: nnx.Module | None = None) -> None:
    """Sows maxima at a module's own path, inside a capture only.

    By default at that of the module which called the attention function. NNX does not pass it, but
    it is on the Python call stack during tracing.
    """
    frame = sys._getframe(1)
    while module is None and frame is not None:
        caller = frame.f_locals.get("self")
        module = caller if isinstance(caller, nnx.Module) else None
        frame = frame.f_back
    if module is not None and hasattr(module, "__captures__"):
        module.sow(nnx.Intermediate, MAX_LOGITS, max_logits)


@with_arguments_of(nnx.dot_product_attention)
def dot_product_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *arguments: object,
    implementation: str | None = None,
    record_in: nnx.Module | None = None,
    **keywords: object,
) -> Float[Array, "*B T N D"]:
    """Computes Flax's attention and sows the largest logit of every head as `max_logits`.

    For use as `attention_fn` of `nnx.MultiHeadAttention`. Without dropout and sown weights,
    attention is `muonclip_jax.dot_product_attention`. Otherwise it is Flax's own, and the maxima
    are computed separately, block by block.

    Args:
        query: Queries `(*B, T, N, H)`.
        key: Keys `(*B, S, K, H)`; `N` must be a multiple of `K`.
        value: Values `(*B, S, K, D)`.
        *arguments: The further arguments of `flax.nnx.dot_product_attention`, in its order: bias,
            mask, ... The bias is not part of the maxima, but pairs that it masks are excluded; the
            mask is False or zero for masked pairs; maxima are before dropout.
        implementation: As in `muonclip_jax.dot_product_attention`. Set it with
            `functools.partial`.
        record_in: The module in which to record; by default the calling one.
        **keywords: The same arguments by name.

    Returns:
        The output `(*B, T, N, D)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.MultiHeadAttention(
        ...     2, 8, attention_fn=dot_product_attention, decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> _, state = nnx.capture(model, nnx.Intermediate)(jnp.ones((1, 3, 8)))
        >>> state["max_logits"].get_value()[0].shape
        (2,)
    """
    given = arguments_of(nnx.dot_product_attention, query, key, value, *arguments, **keywords)
    promote, dtype = given.pop("promote_dtype"), given.pop("dtype")
    query, key, value = promote((query, key, value), dtype=dtype)
    pairs = {"bias": given["bias"], "mask": as_bool(given["mask"]), "is_causal": given["is_causal"]}
    if given["module"] is None and (given["deterministic"] or given["dropout_rate"] == 0.0):
        out, max_logits = attend(query, key, value, **pairs, implementation=implementation)
    else:
        max_logits = attention_max_logits(query, key, **pairs)
        given.update(query=query, key=key, value=value)
        out = nnx.dot_product_attention(**given)
    _record(max_logits, record_in or given["module"])
    return out


def _to_one_dtype(query: jax.Array, key: jax.Array, dtype: DTypeLike | None) -> Sequence[jax.Array]:
    return dtypes.promote_dtype((query, key), dtype=dtype)


def _record_captured(max_logits: Float[Array, " N"]) -> None:
    if capturing.get():
        _record(max_logits)


@contextmanager
def _recording_modules(model: nnx.Module) -> Iterator[None]:
    """Makes attention modules record inside; threads wait, because their attributes change."""
    changed = []
    _ONE_AT_A_TIME.acquire()
    token = capturing.set(True)
    try:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.MultiHeadAttention) and not records(
                module.attention_fn, dot_product_attention
            ):
                changed.append((module, module.attention_fn))
                module.attention_fn = RecordingBeside(
                    module.attention_fn, _to_one_dtype, _record_captured
                )
        yield
    finally:
        for module, attention_fn in changed:
            module.attention_fn = attention_fn
        capturing.reset(token)
        _ONE_AT_A_TIME.release()


def capture_max_logits(
    function: Callable[..., Any],
) -> Callable[..., tuple[Any, dict[Any, Any]]]:
    """Makes a call of a model also return the largest logit of every attention head.

    The model and its output do not change, bit for bit. `nnx.MultiHeadAttention` modules record
    while the call runs, by computing the logits separately, block by block, from the arguments of
    their `attention_fn`, without any scaling or masking inside of it. A module whose `attention_fn`
    is `muonclip_jax.nnx.dot_product_attention` needs no separate computation. Other
    `nnx.Intermediate` variables named `max_logits` are returned too. Works inside and around
    `nnx.jit` and `nnx.value_and_grad`, and with `nnx.remat`, `nnx.scan` and `nnx.vmap`, where
    maxima are stacked like kernels.

    Args:
        function: A model, one of its methods, or a function whose first argument is the model.

    Returns:
        A function of the same arguments that returns the result of `function`, and the tree of
        maxima with the paths of the attention modules.

    Raises:
        TypeError: If `function` is not callable; from the returned function, if its first argument
            is not a model.
        ValueError: From the returned function, if no attention module recorded a maximum.
        NotImplementedError: From the returned function, if Flax is older than 0.12.6.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Sequential(
        ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
        ...     nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(1)),
        ... )
        >>> out, max_logits = capture_max_logits(model)(jnp.ones((1, 3, 8)))
        >>> jax.tree.map(jnp.shape, max_logits)
        {'layers': {1: {'max_logits': (2,)}}}
    """
    if not callable(function):
        raise _no_model(f"got {function!r} of type {type(function).__name__}")
    owner = getattr(function, "__self__", None)
    bound = function if isinstance(function, nnx.Module) else owner

    def captured(*arguments: Any, **keywords: Any) -> tuple[Any, dict[Any, Any]]:
        model = bound if isinstance(bound, nnx.Module) else (arguments or (None,))[0]
        if not isinstance(model, nnx.Module):
            raise _no_model(f"the first argument is {type(model).__name__}")
        if not hasattr(nnx, "capture"):
            raise NotImplementedError(
                "capture_max_logits needs nnx.capture of Flax 0.12.6 or later, and Flax "
                f"{flax.__version__} is installed. Install a newer one, or return maxima from the "
                "model's own attention: muonclip_jax.attention_max_logits(query, key)."
            )
        with _recording_modules(model):
            out, state = nnx.capture(function, nnx.Intermediate)(*arguments, **keywords)
        max_logits = only_max_logits(nnx.to_pure_dict(state))
        if not max_logits:
            raise ValueError(
                "No attention module recorded a maximum logit. Only nnx.MultiHeadAttention "
                "modules do so automatically. In other attention modules call "
                "muonclip_jax.nnx.dot_product_attention, or sow maxima yourself: "
                f"self.sow(nnx.Intermediate, {MAX_LOGITS!r}, max_logits). What is sown inside "
                "jax.jit is lost: use nnx.jit, or jit the function that captures."
            )
        return out, max_logits

    return captured


def _no_model(given: str) -> TypeError:
    return TypeError(
        "muonclip_jax.nnx.capture_max_logits takes an nnx.Module, one of its methods, or a "
        f"function whose first argument is the model; {given}. Of a Linen model, "
        "muonclip_jax.linen.capture_max_logits takes model.apply."
    )
