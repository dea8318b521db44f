"""How much each head is scaled: gamma from its largest logit, and its share for each role."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from muonclip_jax._arguments import check_scalar, is_concrete
from muonclip_jax._tree import ScalarLike

Factors = dict[str, jax.Array]


def at_least_float32(max_logits: Any) -> jax.Array:
    """Returns maxima in float32, or in float64 where they are that."""
    s = jnp.asarray(max_logits)
    return s.astype(jnp.promote_types(s.dtype, jnp.float32))


def is_over(max_logits: Float[Array, "..."], threshold: ScalarLike) -> Bool[Array, "..."]:
    """Returns for which heads `clip_gamma` is below 1."""
    s = at_least_float32(max_logits)
    tau = jnp.asarray(threshold, s.dtype)
    return jnp.isfinite(s) & (s > tau) & (tau > 0)


def clip_gamma(max_logits: Float[Array, "..."], threshold: ScalarLike) -> Float[Array, "..."]:
    """Computes by how much each head's logits must shrink to stay under the threshold.

        gamma = tau / S   where S is finite and S > tau > 0,   1 elsewhere

    A maximum or a threshold that is NaN, infinite, zero or negative never changes a weight. A
    threshold like that is refused where it is given, but a traced one or a schedule's may turn up.

    Example:
        >>> import jax.numpy as jnp
        >>> clip_gamma(jnp.asarray([150.0, 90.0, -jnp.inf]), 100.0).tolist()
        [0.6666666865348816, 1.0, 1.0]
    """
    s = at_least_float32(max_logits)
    tau = jnp.asarray(threshold, s.dtype)
    over = is_over(s, tau)
    return jnp.where(over, tau / jnp.where(over, s, 1.0), 1.0)


def _power(gamma: jax.Array, alpha: ScalarLike) -> jax.Array:
    """Returns gamma ** alpha, exact where it is gamma or 1: a root may be off by a bit there."""
    alpha = jnp.asarray(alpha, gamma.dtype)
    power = jnp.where(alpha == 1.0, gamma, gamma**alpha)
    return jnp.where((gamma == 1.0) | (alpha == 0.0), 1.0, power)


def _rest(gamma: jax.Array, taken: jax.Array) -> jax.Array:
    """Returns gamma / taken, what is left for the other side, so that both make gamma again."""
    return jnp.where(gamma == taken, 1.0, gamma / taken)


def _spread(per_key: jax.Array, heads: int) -> jax.Array:
    return jnp.repeat(per_key, heads // per_key.shape[-1], axis=-1)


def _query(gamma: jax.Array, eta: jax.Array, taken: jax.Array) -> Factors:
    return {"query": gamma}


def _group(gamma: jax.Array, eta: jax.Array, taken: jax.Array) -> Factors:
    return {"query": _spread(taken, gamma.shape[-1]), "key": _rest(eta, taken)}


def _balanced(gamma: jax.Array, eta: jax.Array, taken: jax.Array) -> Factors:
    key = _rest(eta, taken)
    return {"query": _rest(gamma, _spread(key, gamma.shape[-1])), "key": key}


#: Rules for keys that several query heads share, by name.
SHARED_KEYS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], Factors]] = {
    "query": _query,
    "group": _group,
    "balanced": _balanced,
}


def role_factors(
    gamma: Float[Array, "*stack heads"], alpha: ScalarLike, shared_keys: str, kv_heads: int
) -> Factors:
    """Splits gamma over the roles of an attention layout.

    With a key for every query head, queries take `gamma ** alpha` and keys the rest. Where heads
    share keys, with `eta` the least gamma in the group of a key:

    | shared_keys | queries | keys | maxima afterwards |
    |---|---|---|---|
    | "query" | gamma | as they are | the threshold where over it, else unchanged |
    | "group" | eta ** alpha | eta ** (1 - alpha) | eta times what they were |
    | "balanced" | gamma / eta ** (1 - alpha) | eta ** (1 - alpha) | as "query" |

    "query" never raises a weight and is what Kimi K2 does for the rotary key that heads share.
    "group" is Megatron's rule. "balanced" also shrinks keys, and makes up for it in the queries.

    Returns role -> factor `(*stack, heads)` or `(*stack, kv_heads)`; absent roles are not scaled.

    Example:
        >>> import jax.numpy as jnp
        >>> factors = role_factors(jnp.asarray([0.25, 1.0]), 0.5, "query", 2)
        >>> factors["query"].tolist(), factors["key"].tolist()
        ([0.5, 1.0], [0.5, 1.0])
    """
    if kv_heads == gamma.shape[-1]:
        taken = _power(gamma, alpha)
        factors: Factors = {"query": taken, "key": _rest(gamma, taken)}
    else:
        eta = gamma.reshape(*gamma.shape[:-1], kv_heads, -1).min(-1)
        factors = SHARED_KEYS[shared_keys](gamma, eta, _power(eta, alpha))
    return {**factors, "query_alone": gamma}


def check_clip_settings(
    threshold: Any, alpha: Any, shared_keys: Any, prefix: str = "", *, schedules: bool = False
) -> None:
    """Raises on settings that cannot be meant; traced values and schedules pass."""
    check_scalar(f"{prefix}threshold", threshold, "a positive number", schedule=schedules)
    check_scalar(f"{prefix}alpha", alpha, "a number in [0, 1]", schedule=schedules)
    if is_concrete(threshold) and not threshold > 0:
        raise ValueError(
            f"{prefix}threshold must be positive, got {threshold}. It is the largest pre-softmax "
            "logit that a head may have after the step; Kimi K2 uses 100."
        )
    if is_concrete(alpha) and not 0 <= alpha <= 1:
        raise ValueError(
            f"{prefix}alpha must lie in [0, 1], got {alpha}. It is the share of the clip that "
            "queries take; 0.5 divides it evenly, 1 leaves the keys alone."
        )
    if not isinstance(shared_keys, str) or shared_keys not in SHARED_KEYS:
        raise ValueError(
            f"{prefix}shared_keys must be one of {', '.join(map(repr, SHARED_KEYS))}, got "
            f"{shared_keys!r}."
        )
