"""Attention that returns its maximum logits, the maxima alone, and their implementations."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax._arguments import check_choice
from muonclip_jax._tree import ScalarLike
from muonclip_jax.attention import blocks
from muonclip_jax.attention.inputs import AnyArray, Inputs, bias_permits, permitted_max, read_inputs
from muonclip_jax.kernels import MAX_LOGITS, load_kernel

#: Implementations of `dot_product_attention`; "xla", the default, is exact and supports every call.
IMPLEMENTATIONS = ("xla", "cudnn")
# A row's log-sum-exp at or below this had nothing to attend to.
_NOTHING = -0.35 * float(jnp.finfo(jnp.float32).max)


def dot_product_attention(
    query: Float[AnyArray, "*B T N H"],
    key: Float[AnyArray, "*B S K H"],
    value: Float[AnyArray, "*B S K D"],
    bias: AnyArray | None = None,
    mask: AnyArray | None = None,
    *,
    scale: ScalarLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: AnyArray | None = None,
    key_value_seq_lengths: AnyArray | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*B T N D"], Float[Array, " N"]]:
    r"""Computes attention, and the maximum logit of every head over the unmasked pairs.

    .. math::
        \mathrm{softmax}(\mathrm{scale}\, Q K^T + \mathrm{bias})\, V, \qquad
        S_h = \max_{b, t, s\ \mathrm{attended}} \mathrm{scale}\; q_{bth} \cdot k_{bsh}

    Arguments, output and gradients are those of `jax.nn.dot_product_attention`; the maxima are
    those of `attention_max_logits` and have no gradient.

    Implementations:
        - "xla", the default: all platforms, exact, with derivatives of any order and mode. Memory
          is linear in the sequence length; the maximum is the one that softmax subtracts.
        - "cudnn": NVIDIA GPUs, half precision. The maxima come from the kernel's log-sum-exp: an
          upper bound, at most `ln(keys)` plus one rounding unit of the output dtype too high. An
          additive bias is an error, because it is part of that sum.

    Args:
        query: Queries `(*B, T, N, H)`, with any number of batch axes.
        key: Keys `(*B, S, K, H)`; `N` must be a multiple of `K`.
        value: Values `(*B, S, K, D)`. `D` may differ from `H`.
        bias: Added to the logits; broadcasts to `(*B, N, T, S)`. Not part of the recorded maxima.
        mask: Boolean, False for masked pairs; broadcasts to `(*B, N, T, S)`.
        scale: Factor of the dot products, `1 / sqrt(H)` by default.
        is_causal: Whether query `t` attends only to keys up to `t`.
        query_seq_lengths: Valid queries of each sequence `(*B,)`; the output beyond is zero.
        key_value_seq_lengths: Valid keys of each sequence `(*B,)`.
        local_window_size: Query `t` attends to keys from `t - left` to `t + right`; one number is
            used for both.
        implementation: A name from the list above, or None for "xla".

    Returns:
        The output, with the shape of the query except for the value's last axis, and the maxima
        `(N,)` in float32; -inf for a head without any unmasked pair.

    Raises:
        ValueError: If shapes or dtypes do not match, or no implementation has that name.
        NotImplementedError: If the named implementation does not support the call, with the reason.

    Example:
        >>> query = jnp.array([[[1.0]], [[5.0]]])
        >>> out, max_logits = dot_product_attention(query, query, query, is_causal=True)
        >>> max_logits.tolist()
        [25.0]

    References:
        Kimi Team, `Kimi K2 <https://arxiv.org/abs/2507.20534>`_, Algorithm 1, 2025

        Rabe & Staats, `Self-attention Does Not Need O(n^2) Memory
        <https://arxiv.org/abs/2112.05682>`_, 2021
    """
    check_choice("implementation", implementation or "xla", IMPLEMENTATIONS)
    inputs = read_inputs(
        *(query, key, value, bias, mask, scale, is_causal, query_seq_lengths),
        *(key_value_seq_lengths, local_window_size),
    )
    with jax.named_scope("dot_product_attention"):
        if implementation == "cudnn":
            out, maxima = _attend_cudnn(inputs)
        else:
            out, maxima = blocks.on_each_device(blocks.attend, inputs)
    out = jnp.asarray(out).reshape(*jnp.shape(query)[:-1], jnp.shape(value)[-1])
    return out, lax.stop_gradient(maxima).reshape(-1)


def attention_max_logits(
    query: Float[AnyArray, "*B T N H"],
    key: Float[AnyArray, "*B S K H"],
    bias: AnyArray | None = None,
    mask: AnyArray | None = None,
    *,
    scale: ScalarLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: AnyArray | None = None,
    key_value_seq_lengths: AnyArray | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> Float[Array, " N"]:
    r"""Computes the maximum logit of every head over the unmasked pairs.

    .. math:: S_h = \max_{b, t, s\ \mathrm{attended}} \mathrm{scale}\; q_{bth} \cdot k_{bsh}

    Dot products accumulate in float32. They are computed block by block, so memory grows with
    `T + S` and not with `T S`. The result has no gradient.

    Implementations:
        - "xla", the default: all platforms.
        - "mosaic_tpu": on TPUs, a Pallas kernel that keeps the logits in on-chip memory; tested in
          Pallas's interpreter, not timed on a TPU. Float32 products use bfloat16 unless
          `jax.default_matmul_precision` is higher. On several devices it needs a `jax.shard_map`
          over all mesh axes, or Explicit axes; on Auto axes the partitioner cannot shard a kernel.

    Args:
        query: Queries `(*B, T, N, H)`, with any number of batch axes.
        key: Keys `(*B, S, K, H)`; `N` must be a multiple of `K`, and query head `n` uses key head
            `n // (N / K)`.
        bias: Broadcasts to `(*B, N, T, S)`. It is not part of the maximum, because scaling query
            and key does not change it. A pair is masked where the bias is at most
            `finfo(bias.dtype).min / 2`, including -inf, or at most -1e9.
        mask: Boolean, False for masked pairs; broadcasts to `(*B, N, T, S)`.
        scale: Factor of the dot products, `1 / sqrt(H)` by default.
        is_causal: Whether query `t` attends only to keys up to `t`.
        query_seq_lengths: Valid queries of each sequence `(*B,)`.
        key_value_seq_lengths: Valid keys of each sequence `(*B,)`.
        local_window_size: As for `dot_product_attention`.
        implementation: A name from the list above, or None for "xla".

    Returns:
        The maxima `(N,)` in float32; -inf for a head without any unmasked pair. Whether a NaN logit
        makes the maximum NaN or is ignored depends on XLA's maximum on the platform; output and
        gradients are NaN in either case.

    Raises:
        ValueError: If shapes or dtypes do not match, or no implementation has that name.
        NotImplementedError: If the named implementation does not support the call, with the reason.

    Example:
        >>> query = jnp.array([[[1.0]], [[5.0]]])
        >>> key = jnp.array([[[2.0]], [[3.0]]])
        >>> attention_max_logits(query, key).tolist()
        [15.0]

    References:
        Kimi Team, `Kimi K2 <https://arxiv.org/abs/2507.20534>`_, Algorithm 1, 2025
    """
    check_choice("implementation", implementation or "xla", ("xla", *MAX_LOGITS))
    inputs = read_inputs(
        *(query, key, None, bias, mask, scale, is_causal, query_seq_lengths),
        *(key_value_seq_lengths, local_window_size),
    )
    compute = blocks.max_logits
    if implementation in MAX_LOGITS:
        compute = functools.partial(_by_kernel, implementation)
    with jax.named_scope("max_logits"):
        _, maxima = blocks.on_each_device(
            lambda share: (None, compute(share)),
            lax.stop_gradient(inputs),
            # What varies between devices is lost where Pallas interprets a kernel.
            check_vma=implementation not in MAX_LOGITS,
        )
    return maxima.reshape(-1)


def _by_kernel(name: str, inputs: Inputs) -> Float[Array, "K G"]:
    kernel = load_kernel("max_logits", name, inputs.platform)
    query, key, scale = inputs.query, inputs.key, jnp.asarray(inputs.scale)
    batch, queries, key_heads, groups, head_dim = query.shape
    if query.dtype.name not in kernel.DTYPES or head_dim > kernel.LONGEST_HEAD:
        raise NotImplementedError(
            f"implementation={name!r} takes {' and '.join(kernel.DTYPES)} and heads of up to "
            f"{kernel.LONGEST_HEAD} features, got {query.dtype} and {head_dim}. Pass 'xla'."
        )
    if 0 in (batch, queries, key.shape[1]):
        return jnp.full((key_heads, groups), -jnp.inf, jnp.float32)
    masks = [inputs.mask, None if inputs.bias is None else bias_permits(inputs.bias)]
    ends = [
        jnp.full((batch,), length) if end is None else jnp.minimum(end, length)
        for end, length in (
            (inputs.query_seq_lengths, queries),
            (inputs.key_value_seq_lengths, key.shape[1]),
        )
    ]
    # The maximum of `scale x` is `|scale|` times that of `x` or of `-x`.
    maxima = kernel.max_logits(
        jnp.where(scale < 0, -query, query).reshape(batch, queries, -1, head_dim),
        key,
        [mask.reshape(mask.shape[0], -1, *mask.shape[3:]) for mask in masks if mask is not None],
        jnp.stack(ends, axis=1).astype(jnp.int32),
        window=inputs.window,
    )
    # Those of no pair stay -inf, also where the scale is zero.
    scaled = maxima * jnp.abs(scale).astype(jnp.float32)
    return permitted_max(scaled, ~jnp.isneginf(maxima), axes=(0,)).reshape(key_heads, groups)


def _attend_cudnn(inputs: Inputs) -> tuple[Float[Array, "B T N D"], Float[Array, " N"]]:
    """Returns cuDNN's attention and an upper bound of its maxima, or raises with the reason."""
    assert inputs.value is not None
    mask, (left, right), reason = inputs.mask, inputs.window, None
    query = inputs.query.reshape(*inputs.query.shape[:2], -1, inputs.query.shape[-1])
    attend = functools.partial(
        jax.nn.dot_product_attention,
        mask=None if mask is None else mask.reshape(mask.shape[0], -1, *mask.shape[3:]),
        scale=cast(float, inputs.scale),
        is_causal=right == 0,
        query_seq_lengths=inputs.query_seq_lengths,
        key_value_seq_lengths=inputs.key_value_seq_lengths,
        local_window_size=None if left is None else (left, right or 0),
        implementation="cudnn",
        return_residual=True,
    )
    if inputs.bias is not None:
        reason = (
            "its log-sum-exp includes the additive bias, which a clip cannot change; use 'xla', or "
            "pass a bias that only masks pairs as mask"
        )
    elif query.dtype not in (jnp.bfloat16, jnp.float16):
        reason = f"it takes bfloat16 and float16, not {query.dtype}; use 'xla'"
    elif inputs.platform != "gpu":
        reason = f"it runs on NVIDIA GPUs, not on {inputs.platform!r}; use 'xla'"
    else:
        try:
            jax.eval_shape(attend, query, inputs.key, inputs.value)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            reason = f"cuDNN says: {str(error).strip().rstrip('.')}; use 'xla'"
    if reason is not None:
        raise NotImplementedError(f"implementation='cudnn' cannot be used: {reason}.")
    out, log_sum_exp = attend(query, inputs.key, inputs.value)
    return out, bound_from_log_sum_exp(log_sum_exp, inputs.query_seq_lengths)


def bound_from_log_sum_exp(
    log_sum_exp: Float[Array, "B T N"], query_seq_lengths: jax.Array | None = None
) -> Float[Array, " N"]:
    """Returns an upper bound of every head's maximum logit, from every query's log-sum-exp.

        max_j s_j  <=  log sum_j exp(s_j)  <=  max_j s_j + ln(keys)

    A clip by this bound comes a little early, and never too late.
    """
    # JAX returns it in the dtype of the output, where rounding may fall below the maximum by half a
    # unit in the last place; one such unit is added.
    values = lax.stop_gradient(log_sum_exp).astype(jnp.float32)
    values = values + float(jnp.finfo(log_sum_exp.dtype).eps) * jnp.abs(values)
    found = ~(values <= _NOTHING)
    if query_seq_lengths is not None:
        found &= (jnp.arange(values.shape[1]) < query_seq_lengths[:, None])[:, :, None]
    return permitted_max(values, found, axes=(0, 1))
