"""What the kernel for per-head maxima is compiled for: heads, masks and lengths of real models.

Every case is a name, a function and the shapes of its arguments, for each platform with a kernel.
The function asks for the kernel by name, so a platform that cannot serve a case refuses it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax.attention import attention_max_logits

Case = tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]


def _case(
    name: str,
    queries: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    *,
    batch: int = 2,
    keys: int | None = None,
    dtype: Any = jnp.bfloat16,
    mask: tuple[int, ...] | None = None,
    has_lengths: bool = False,
    **keywords: Any,
) -> Case:
    keys = queries if keys is None else keys
    arguments = [
        jax.ShapeDtypeStruct((batch, queries, heads, head_dim), dtype),
        jax.ShapeDtypeStruct((batch, keys, key_heads, head_dim), dtype),
    ]
    names = []
    if mask is not None:
        arguments.append(jax.ShapeDtypeStruct(mask, jnp.bool_))
        names.append("mask")
    if has_lengths:
        arguments += [jax.ShapeDtypeStruct((batch,), jnp.int32)] * 2
        names += ["query_seq_lengths", "key_value_seq_lengths"]
    attend = functools.partial(attention_max_logits, implementation="pallas", **keywords)

    def maxima(query: jax.Array, key: jax.Array, *arrays: jax.Array) -> jax.Array:
        return attend(query, key, **dict(zip(names, arrays, strict=True)))

    return f"max_logits: {name}", maxima, tuple(arguments)


_SHARED: list[Case] = [
    _case("GPT-2, causal", 2048, 12, 12, 64, is_causal=True),
    _case("Llama, grouped keys, causal", 2048, 32, 8, 128, is_causal=True),
    _case("one key head, causal", 2048, 16, 1, 128, is_causal=True),
    _case("float32, causal", 2048, 8, 8, 128, dtype=jnp.float32, is_causal=True),
    _case("window of 4096", 16384, 8, 2, 128, is_causal=True, local_window_size=(4096, 0)),
    _case("128 k keys, causal", 131072, 2, 1, 128, batch=1, is_causal=True),
    _case("MLA, head of 192", 2048, 16, 16, 192, is_causal=True),
    _case("MLA absorbed, head of 576", 2048, 16, 1, 576, is_causal=True),
    _case("head of 80, odd lengths", 1000, 8, 2, 80, keys=777),
    _case("padding mask", 1024, 12, 12, 64, mask=(2, 1, 1, 1024)),
    _case("mask of pairs", 1000, 8, 8, 64, mask=(1, 1, 1000, 1000)),
    _case("lengths, causal", 1000, 8, 8, 64, has_lengths=True, is_causal=True),
]

#: The cases of each platform.
CASES: dict[str, list[Case]] = {
    "tpu": _SHARED,
    "cuda": [
        *_SHARED,
        _case("float16, causal", 2048, 8, 8, 64, dtype=jnp.float16, is_causal=True),
    ],
}
