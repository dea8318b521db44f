"""Attention by tokamax's fused kernels, which return the largest logit of every query.

The kernels carry the running maximum of their softmax and hand it out as a residual, so recording
is free and exact. tokamax's public function does not pass residuals on; its operations do, and
they are tried here in the order of preference that tokamax has itself.
"""

import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax.attention.arguments import AttentionArguments

# The fastest first; the last one runs everywhere.
_PREFERENCE = ("mosaic_gpu", "mosaic_tpu", "triton", "xla")
_PLATFORMS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu", "triton": "gpu"}
# A row's maximum at or below this had nothing to attend to.
_NOTHING = -0.35 * float(jnp.finfo(jnp.float32).max)


def refuse_tokamax(arguments: AttentionArguments) -> str | None:
    """Says why tokamax cannot serve a call, or returns None."""
    if arguments.arrays.bias is not None:
        return "its residuals include the additive bias, which no clip can change; use 'xla'"
    if importlib.util.find_spec("tokamax") is None:
        return "the package tokamax is not installed; pip install tokamax, or use 'xla'"
    return None


def _mask(arguments: AttentionArguments, base: Any) -> Any:
    """Says in tokamax's words which pairs take part."""
    geometry, arrays = arguments.geometry, arguments.arrays
    mask = arrays.mask
    if mask is not None:
        batch, key_heads, groups, queries, keys = mask.shape
        mask = mask.reshape(batch, key_heads * groups, queries, keys)
    ends = {
        "q_end": arrays.query_seq_lengths,
        "k_end": arrays.key_value_seq_lengths,
    }
    ends = {name: end[:, None, None] for name, end in ends.items() if end is not None}
    combined = base.Mask(mask, is_causal=geometry.is_causal, **ends)
    if geometry.local_window_size is not None:
        left, right = geometry.local_window_size
        queries = jnp.arange(arguments.query.shape[1])
        combined &= base.Mask(k_start=queries - left, k_end=queries + right + 1)
    return combined


def attend_tokamax(
    arguments: AttentionArguments,
) -> tuple[Float[Array, "B T N D"], Float[Array, " N"]]:
    """Returns attention and the exact maxima of its heads, by the first kernel that agrees.

    Raises:
        NotImplementedError: If no kernel serves the call; says what each one objected to.
    """
    operations = importlib.import_module("tokamax._src.ops.attention.api").IMPLEMENTATIONS
    base = importlib.import_module("tokamax._src.ops.attention.base")
    batch, queries, key_heads, groups, head_dim = arguments.query.shape
    query = arguments.query.reshape(batch, queries, key_heads * groups, head_dim)
    objections = []
    for name in _PREFERENCE:
        platform = _PLATFORMS.get(name, jax.default_backend())
        if name not in operations or platform != jax.default_backend():
            continue
        try:
            out, (maximum, _) = operations[name](
                query,
                arguments.key,
                arguments.value,
                mask=_mask(arguments, base),
                logits_scale=arguments.scale,
                return_residuals=True,
            )
        except NotImplementedError as error:
            objections.append(f"{name}: {error}")
            continue
        maximum = jax.lax.stop_gradient(maximum).astype(jnp.float32)
        maximum = jnp.where(maximum <= _NOTHING, -jnp.inf, maximum)
        lengths = arguments.arrays.query_seq_lengths
        if lengths is not None:
            inside = jnp.arange(queries) < lengths[:, None]
            out = out * inside[:, :, None, None].astype(out.dtype)
            maximum = jnp.where(inside[:, None, :], maximum, -jnp.inf)
        return out, jnp.max(maximum, axis=(0, 2), initial=-jnp.inf)
    raise NotImplementedError(
        f"implementation='tokamax' cannot be used: no kernel agreed ({'; '.join(objections)})."
    )
