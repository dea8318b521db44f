"""Wrapper that records the maxima of a custom attention function.

An attention function has Flax's arguments: query, key and value, then bias, mask and others by
name. The framework passes in how to record maxima and how to cast inputs to a common dtype.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from muonclip_jax.attention.dot_product import attention_max_logits

F = TypeVar("F", bound=Callable[..., object])
#: Arguments that determine which pairs take part, and the factor of their products.
_MEANT = (
    *("bias", "mask", "is_causal", "query_seq_lengths", "key_value_seq_lengths"),
    *("local_window_size", "scale"),
)


def with_arguments_of(theirs: Callable[..., object]) -> Callable[[F], F]:
    """Declares that a function takes the arguments of another one, and its own keywords."""

    def declare(function: F) -> F:
        signature, own = inspect.signature(theirs), inspect.signature(function).parameters.values()
        both = [*signature.parameters.values(), *(p for p in own if p.kind is p.KEYWORD_ONLY)]
        vars(function)["__signature__"] = signature.replace(parameters=both)
        return function

    return declare


def arguments_of(
    function: Callable[..., object], *given: object, **keywords: object
) -> dict[str, Any]:
    """Returns the arguments of a call by name, defaults too."""
    call = inspect.signature(function).bind_partial(*given, **keywords)
    call.apply_defaults()
    return call.arguments


def as_bool(mask: jax.Array | None) -> jax.Array | None:
    """Converts a mask to bool as Flax does: zero means masked."""
    return None if mask is None else jnp.asarray(mask).astype(bool)


def records(attention_fn: Callable[..., object], ours: Callable[..., object]) -> bool:
    """Whether a function, without `functools.partial` around it, records maxima."""
    while isinstance(attention_fn, functools.partial):
        attention_fn = attention_fn.func
    return isinstance(attention_fn, RecordingBeside) or (
        inspect.unwrap(attention_fn) is inspect.unwrap(ours)
    )


@dataclasses.dataclass(frozen=True)
class RecordingBeside:
    """Calls an attention function, and computes and records its maxima separately.

    Arguments with the names of masking arguments of `jax.nn.dot_product_attention`, and `scale`,
    are used, whether passed, bound by `functools.partial` or defaults. Scaling or masking inside
    the function is not visible: without a `scale` its logits are `q . k / sqrt(head_dim)`.
    """

    attention_fn: Callable[..., jax.Array]  # of (query, key, value, ...)
    to_one_dtype: Callable[..., Sequence[jax.Array]]  # casts query and key, given dtype=
    record: Callable[[jax.Array], None]  # takes the maxima (heads,)

    @property
    def __wrapped__(self) -> Callable[..., jax.Array]:
        """Used by `inspect.signature`."""
        return self.attention_fn

    def __call__(self, query: Any, key: Any, value: Any, *arguments: Any, **keywords: Any) -> Any:
        """Records the maxima and returns the function's result."""
        function, passed = self.attention_fn, (query, key, value, *arguments)
        given = arguments_of(function, *passed, **keywords) | keywords
        while isinstance(function, functools.partial):
            # Its keywords that the function takes as **keywords are not in the signature.
            given, function = function.keywords | given, function.func
        query_, key_ = self.to_one_dtype(query, key, dtype=given.get("dtype"))
        meant = {name: given[name] for name in _MEANT if given.get(name) is not None}
        meant["mask"] = as_bool(meant.get("mask"))
        self.record(attention_max_logits(query_, key_, **meant))
        return self.attention_fn(*passed, **keywords)
