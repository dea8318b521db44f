"""QK-Clip's equation: gamma from a head's maximum logit, and its share for queries and keys.

Kimi K2 (arXiv 2507.20534), Algorithm 1, the step after the weight update. For a head with maximum
logit `S` of the forward pass and the threshold `tau`, where `S > tau`:

    gamma = tau / S,    W_q *= gamma ** alpha,    W_k *= gamma ** (1 - alpha)

with `alpha = 1/2` there. Query features whose key is shared by all heads (latent attention's rotary
part) are scaled by gamma.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._arguments import check_number
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule

#: Rules for keys that several query heads share; `role_factors` explains them.
SHARED_KEYS = ("query", "group", "balanced")


def clip_gamma(max_logits: Float[Array, "..."], threshold: ScalarLike) -> Float[Array, "..."]:
    """Computes the factor that brings each head's maximum logit down to the threshold.

        gamma = tau / S   where S is finite and S > tau > 0,   1 elsewhere

    A maximum or a threshold that is NaN, infinite, zero or negative never changes a weight. (Such a
    number is an error as threshold, but a traced value or a schedule may produce one.) The result
    is in float32 or wider.
    """
    s = jnp.asarray(max_logits)
    s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    tau = jnp.asarray(threshold, s.dtype)
    over = jnp.isfinite(s) & (s > tau) & (tau > 0)
    return jnp.where(over, tau / jnp.where(over, s, 1.0), 1.0)


def role_factors(
    gamma: Float[Array, "*stack heads"], alpha: ScalarLike, shared_keys: str, kv_heads: int
) -> dict[str, jax.Array]:
    """Splits gamma over the roles of an attention layout.

    If every query head has its own key, queries are scaled by `gamma ** alpha` and keys by
    `gamma ** (1 - alpha)`. If heads share keys, with `eta` the smallest gamma of the heads of a
    key:

    | shared_keys | queries | keys | maxima afterwards |
    |---|---|---|---|
    | "query" | gamma | unchanged | the threshold if above it, else unchanged |
    | "group" | eta ** alpha | eta ** (1 - alpha) | multiplied by eta |
    | "balanced" | gamma / eta ** (1 - alpha) | eta ** (1 - alpha) | as "query" |

    "query" never enlarges a weight and is Kimi K2's rule for the shared rotary key. "group" is
    Megatron's rule. "balanced" also shrinks keys and compensates in the queries.

    Returns role -> factor `(*stack, heads)` or `(*stack, kv_heads)`; absent roles are not scaled.
    """
    group = gamma.shape[-1] // kv_heads
    if group > 1 and shared_keys == "query":
        return {"query": gamma, "query_alone": gamma}
    eta = gamma if group == 1 else gamma.reshape(*gamma.shape[:-1], kv_heads, group).min(-1)
    alpha = jnp.asarray(alpha, gamma.dtype)
    # gamma = 1 leaves every bit, and so do queries with alpha = 0 and keys with alpha = 1.
    query = jnp.where(alpha == 1.0, eta, eta**alpha)
    query = jnp.where((eta == 1.0) | (alpha == 0.0), 1.0, query)
    key = jnp.where(eta == query, 1.0, eta / query)
    if group > 1 and shared_keys == "group":
        query = jnp.repeat(query, group, axis=-1)
    elif group > 1:
        query = gamma / jnp.repeat(key, group, axis=-1)
    return {"query": query, "key": key, "query_alone": gamma}


def check_clip_settings(
    threshold: ScalarOrSchedule,
    alpha: ScalarOrSchedule,
    shared_keys: str,
    prefix: str = "",
    *,
    schedules: bool = False,
) -> None:
    """Raises on settings out of range; traced values and schedules pass."""
    hint = "It is the maximum pre-softmax logit of a head after the step; Kimi K2 uses 100."
    check_number(f"{prefix}threshold", threshold, "positive", hint, schedule=schedules)
    hint = "It is the exponent of gamma for queries; 0.5 scales queries and keys equally."
    check_number(f"{prefix}alpha", alpha, "in [0, 1]", hint, schedule=schedules)
    if not isinstance(shared_keys, str) or shared_keys not in SHARED_KEYS:
        raise ValueError(
            f"{prefix}shared_keys must be one of {', '.join(map(repr, SHARED_KEYS))}, got "
            f"{shared_keys!r}."
        )
