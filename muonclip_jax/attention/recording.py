"""Wrapper that records the maxima of a custom attention function.

An attention function has Flax's arguments: query, key and value, then bias, mask and others by
name. The framework passes in how to record maxima and how to cast inputs to a common dtype.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax.attention.dot_product import attention_max_logits

#: Arguments that tell which pairs take part, and the factor of their products.
_MEANT = (
    *("bias", "mask", "is_causal", "query_seq_lengths", "key_value_seq_lengths"),
    *("local_window_size", "scale"),
)


def as_bool(mask: jax.Array | None) -> jax.Array | None:
    """Converts a mask to bool as Flax does: zero means masked."""
    return None if mask is None else jnp.asarray(mask).astype(bool)


def records(attention_fn: Callable[..., Any], *ours: Callable[..., Any]) -> bool:
    """Whether a function, without `functools.partial` around it, is one of `ours`.

    Example:
        >>> records(functools.partial(max, default=0), max), records(min, max)
        (True, False)
    """
    while isinstance(attention_fn, functools.partial):
        attention_fn = attention_fn.func
    known = [inspect.unwrap(own) for own in ours]
    return isinstance(attention_fn, RecordingBeside) or inspect.unwrap(attention_fn) in known


def _bound(attention_fn: Callable[..., Any]) -> dict[str, Any]:
    """Returns the keywords that `functools.partial` bound, the outermost last."""
    if not isinstance(attention_fn, functools.partial):
        return {}
    return _bound(attention_fn.func) | attention_fn.keywords


@dataclasses.dataclass(frozen=True)
class RecordingBeside:
    """Calls an attention function, and computes and records its maxima separately.

    The maxima are computed block by block. Arguments with the names of masking arguments of
    `jax.nn.dot_product_attention`, and `scale`, are used, whether passed, bound by
    `functools.partial` or defaults. Scaling or masking inside the function is not visible: without
    a `scale` its logits are assumed to be `q . k / sqrt(head_dim)`. The signature is preserved,
    because Flax's modules pass only the arguments in it.

    Instances with equal fields are equal, because `jit` compares the functions in a module.

    Attributes:
        attention_fn: A function of `(query, key, value, ...)`.
        to_one_dtype: Casts query and key to a common dtype, given the requested dtype.
        record: Takes the maxima `(heads,)`.

    Example:
        >>> x = jnp.full((1, 2, 1, 4), 3.0)
        >>> half = lambda query, key, value, mask=None: value / 2
        >>> attend = RecordingBeside(half, lambda q, k, dtype: (q, k), print)
        >>> float(attend(x, x, x)[0, 0, 0, 0])
        [18.]
        1.5
    """

    attention_fn: Callable[..., jax.Array]
    to_one_dtype: Callable[..., Sequence[jax.Array]]
    record: Callable[[jax.Array], None]

    @property
    def __wrapped__(self) -> Callable[..., jax.Array]:
        """Used by `inspect.signature`."""
        return self.attention_fn

    def __call__(self, query: Any, key: Any, value: Any, *arguments: Any, **keywords: Any) -> Any:
        """Records the maxima and returns the function's result."""
        call = inspect.signature(self.attention_fn).bind_partial(
            query, key, value, *arguments, **keywords
        )
        call.apply_defaults()
        # A partial's keywords that the function takes as **keywords are not in its signature.
        given = _bound(self.attention_fn) | call.arguments | keywords
        query_, key_ = self.to_one_dtype(query, key, dtype=given.get("dtype"))
        meant = {name: given[name] for name in _MEANT if given.get(name) is not None}
        meant["mask"] = as_bool(meant.get("mask"))
        self.record(attention_max_logits(query_, key_, **meant))
        return self.attention_fn(query, key, value, *arguments, **keywords)
