"""Wrapping an attention function of the user's own, so that its maxima are recorded beside it.

What a framework calls an attention function has Flax's arguments: query, key and value, then bias,
mask and the rest by name. Where the maxima go, and how inputs are brought to one dtype, is up to
the framework and passed in.
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
    """Returns a mask as Flax reads it: a pair takes part where it is not zero."""
    return None if mask is None else jnp.asarray(mask).astype(bool)


def records(attention_fn: Callable[..., Any], *ours: Callable[..., Any]) -> bool:
    """Whether a function, or what `functools.partial` made it from, is one of `ours`.

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
    """An attention function that computes the same as another one and records its maxima.

    They are computed once more, block by block. Every argument that `jax.nn.dot_product_attention`
    has for hiding pairs, and `scale`, is understood by its name, whether it is passed, bound by
    `functools.partial` or a default. What a function does inside is not seen: without a `scale` its
    logits are taken to be `q . k / sqrt(head_dim)`. The signature stays, because Flax's modules
    pass only the arguments that they find in it.

    Two of them are equal where their fields are: `jit` compares the functions that a module holds,
    and needs no cache that keeps them alive.

    Attributes:
        attention_fn: A function of `(query, key, value, ...)`.
        to_one_dtype: Brings query and key to one dtype, given the dtype asked for.
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
        """What `inspect.signature` looks at."""
        return self.attention_fn

    def __call__(self, query: Any, key: Any, value: Any, *arguments: Any, **keywords: Any) -> Any:
        """Records the maxima and returns what the function returns."""
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
