"""QK-Clip's equation: gamma from a head's maximum logit, and its share for queries and keys.

Kimi K2 (arXiv 2507.20534), Algorithm 1, the step after the weight update. For a head with maximum
logit `S` of the forward pass and the threshold `tau`, where `S > tau`:

    gamma = tau / S,    W_q *= gamma ** alpha,    W_k *= gamma ** (1 - alpha)

with `alpha = 1/2` there. Query features whose key is shared by all heads (latent attention's rotary
part) are scaled by gamma.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from muonclip_jax._arguments import check_number
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule

#: Rules for keys that several query heads share; `role_factors` explains them.
SHARED_KEYS = ("query", "group", "balanced")


def at_least_float32(max_logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns maxima in float32, or in float64 if they already are."""
    s = jnp.asarray(max_logits)
    return s.astype(jnp.promote_types(s.dtype, jnp.float32))


def is_over(max_logits: Float[Array, "..."], threshold: ScalarLike) -> Bool[Array, "..."]:
    """Returns for which heads `clip_gamma` is below 1."""
    s = at_least_float32(max_logits)
    tau = jnp.asarray(threshold, s.dtype)
    return jnp.isfinite(s) & (s > tau) & (tau > 0)


def clip_gamma(max_logits: Float[Array, "..."], threshold: ScalarLike) -> Float[Array, "..."]:
    """Computes the factor that brings each head's maximum logit down to the threshold.

        gamma = tau / S   where S is finite and S > tau > 0,   1 elsewhere

    A maximum or a threshold that is NaN, infinite, zero or negative never changes a weight. (Such a
    number is an error as threshold, but a traced value or a schedule may produce one.)

    Example:
        >>> clip_gamma(jnp.asarray([150.0, 90.0, -jnp.inf]), 100.0).tolist()
        [0.6666666865348816, 1.0, 1.0]
    """
    s = at_least_float32(max_logits)
    tau = jnp.asarray(threshold, s.dtype)
    over = is_over(s, tau)
    return jnp.where(over, tau / jnp.where(over, s, 1.0), 1.0)


def _power(gamma: jax.Array, alpha: ScalarLike) -> jax.Array:
    """Returns `gamma ** alpha`, exactly gamma for `alpha = 1`, and exactly 1 for `alpha = 0`."""
    alpha = jnp.asarray(alpha, gamma.dtype)
    power = jnp.where(alpha == 1.0, gamma, gamma**alpha)
    return jnp.where((gamma == 1.0) | (alpha == 0.0), 1.0, power)


def _rest(gamma: jax.Array, taken: jax.Array) -> jax.Array:
    """Returns the remaining factor of gamma, exactly 1 where `taken` equals gamma."""
    return jnp.where(gamma == taken, 1.0, gamma / taken)


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

    Example:
        >>> factors = role_factors(jnp.asarray([0.25, 1.0]), 0.5, "query", 2)
        >>> factors["query"].tolist(), factors["key"].tolist()
        ([0.5, 1.0], [0.5, 1.0])
    """
    heads = gamma.shape[-1]
    if kv_heads == heads:
        query = _power(gamma, alpha)
        return {"query": query, "key": _rest(gamma, query), "query_alone": gamma}
    if shared_keys == "query":
        return {"query": gamma, "query_alone": gamma}
    eta = gamma.reshape(*gamma.shape[:-1], kv_heads, -1).min(-1)
    query = _power(eta, alpha)
    key = _rest(eta, query)
    if shared_keys == "group":
        query = jnp.repeat(query, heads // kv_heads, axis=-1)
    else:
        query = _rest(gamma, jnp.repeat(key, heads // kv_heads, axis=-1))
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
