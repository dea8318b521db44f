"""Attention that returns its largest logits beside its output, and who may compute it."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax._tree import ScalarLike
from muonclip_jax.attention.arguments import AnyArray, AttentionArguments, read_arguments
from muonclip_jax.attention.jax_nn import attend_cudnn, merge_groups, refuse_cudnn
from muonclip_jax.attention.xla import attend_xla


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention and its maxima.

    Attributes:
        attend: Returns the output `[B, T, N, D]` and the maxima `[N]`.
        refusal: Says why it cannot serve a call, or None where it can.
        is_exact: Whether its maxima are the maxima, or a bound above them.
    """

    attend: Callable[[AttentionArguments], tuple[jax.Array, jax.Array]]
    refusal: Callable[[AttentionArguments], str | None]
    is_exact: bool


def _attend_xla(arguments: AttentionArguments) -> tuple[jax.Array, jax.Array]:
    out, maxima = attend_xla(arguments)
    return merge_groups(out), maxima.reshape(-1)


def _never(arguments: AttentionArguments) -> str | None:
    del arguments
    return None


#: Every implementation by name. "xla" is exact and serves every call: it is what None means.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(_attend_xla, _never, is_exact=True),
    "cudnn": Implementation(attend_cudnn, refuse_cudnn, is_exact=False),
}


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
    r"""Returns attention, and the largest logit of every head over the pairs attended to.

    .. math::
        \mathrm{softmax}(\mathrm{scale}\, Q K^T + \mathrm{bias})\, V, \qquad
        S_h = \max_{b, t, s\ \mathrm{attended}} \mathrm{scale}\; q_{bth} \cdot k_{bsh}

    The output and its gradients are those of `jax.nn.dot_product_attention`, whose arguments these
    are; the maxima are those of `attention_max_logits` and carry no gradient.

    Implementations:
        - "xla": everywhere, exact. Memory is linear in the sequence; the maximum is the one that
          softmax subtracts, so recording costs next to nothing. It serves every call, in forward
          mode and any order of derivatives too.
        - "cudnn": NVIDIA GPUs, half precision. The maxima come from the kernel's log-sum-exp: an
          upper bound, at most `ln(keys)` and one unit of rounding in the dtype of the output too
          high. Refused with an additive bias, which is part of that sum.
        - None: "xla", on every platform.

    Args:
        query: Queries `(B, T, N, H)` or `(T, N, H)`.
        key: Keys `(B, S, K, H)` or `(S, K, H)`; `N` must be a multiple of `K`.
        value: Values `(B, S, K, D)` or `(S, K, D)`. `D` may differ from `H`.
        bias: Added to the logits; broadcasts to `(B, N, T, S)`. No part of the recorded maxima,
            see `attention_max_logits`.
        mask: Boolean, True where a pair takes part; broadcasts to `(B, N, T, S)`.
        scale: Factor of the dot products, `1 / sqrt(H)` by default.
        is_causal: Whether query `t` sees only keys up to `t`.
        query_seq_lengths: Valid queries of each sequence `(B,)`; the output beyond is zero.
        key_value_seq_lengths: Valid keys of each sequence `(B,)`.
        local_window_size: Query `t` sees keys from `t - left` to `t + right`; one number stands
            for both.
        implementation: A name from the list above, or None.

    Returns:
        The output, shaped like the query with the value's last axis, and the maxima `(N,)` in
        float32. A head without any pair has -inf.

    Raises:
        ValueError: If shapes or dtypes do not fit together, or no implementation has that name.
        NotImplementedError: If the named implementation cannot serve the call; says why.

    Example:
        >>> import jax.numpy as jnp
        >>> query = jnp.array([[[1.0]], [[5.0]]])
        >>> out, max_logits = dot_product_attention(query, query, query, is_causal=True)
        >>> max_logits.tolist()
        [25.0]

    References:
        Kimi Team, `Kimi K2 <https://arxiv.org/abs/2507.20534>`_, Algorithm 1, 2025

        Rabe & Staats, `Self-attention Does Not Need O(n^2) Memory
        <https://arxiv.org/abs/2112.05682>`_, 2021
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose one of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}, or None for XLA's, which serves every call."
        )
    arguments = read_arguments(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
    )
    chosen = IMPLEMENTATIONS[implementation or "xla"]
    reason = chosen.refusal(arguments)
    if reason is not None:
        raise NotImplementedError(f"implementation={implementation!r} cannot be used: {reason}.")
    with jax.named_scope("dot_product_attention"):
        out, maxima = chosen.attend(arguments)
    return out if arguments.batched else out[0], lax.stop_gradient(maxima)
