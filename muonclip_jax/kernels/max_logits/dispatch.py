"""Who computes per-head maxima: the table of implementations, and the choice among them."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax._typing import ScalarLike
from muonclip_jax.kernels.max_logits.pallas import max_logits_pallas, refuse_pallas
from muonclip_jax.kernels.max_logits.xla import max_logits_xla
from muonclip_jax.kernels.pairs import Geometry, PairArrays


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operation.

    Attributes:
        compute: Returns the maxima `[K, G]`, without regard for gradients.
        refusal: Says why it cannot serve a call on any platform, or None where it can.
    """

    compute: Callable[..., Float[Array, "K G"]]
    refusal: Callable[..., str | None]


def _never(*arguments: object) -> str | None:
    del arguments
    return None


#: Every implementation of the operation, the meaning first.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(max_logits_xla, _never),
    "pallas": Implementation(max_logits_pallas, refuse_pallas),
}


def max_logits(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    *,
    scale: ScalarLike,
    geometry: Geometry,
    arrays: PairArrays,
    implementation: str | None = None,
) -> Float[Array, "K G"]:
    """Returns the largest `scale q . k` of every head over the pairs attended to.

    Args:
        query: Queries `[B, T, K, G, H]`, their heads grouped by key head.
        key: Keys `[B, S, K, H]`.
        scale: What the dot products are multiplied by.
        geometry: Causality and window.
        arrays: Mask, bias and lengths. The bias is not added; it only hides pairs.
        implementation: The name of an implementation; None is "xla", which serves every call.

    Returns:
        The maxima `[K, G]` in float32, -inf for a head with no pair at all. No gradient flows.

    Raises:
        ValueError: If there is no implementation of that name.
        NotImplementedError: If the named implementation cannot serve the call; says why. What
            depends on the platform is said when the program is lowered for one.

    Example:
        >>> import jax.numpy as jnp
        >>> query = jnp.array([3.0, -1.0]).reshape(1, 2, 1, 1, 1)
        >>> key = jnp.array([1.0, -2.0]).reshape(1, 2, 1, 1)
        >>> max_logits(query, key, scale=1.0, geometry=Geometry(), arrays=PairArrays()).tolist()
        [[3.0]]
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is none of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}, and not None, which is XLA's and serves "
            "every call."
        )
    query, key, scale, arrays = lax.stop_gradient((query, key, jnp.asarray(scale), arrays))
    chosen = IMPLEMENTATIONS[implementation or "xla"]
    reason = chosen.refusal(query, key, scale, arrays)
    if reason is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot be used: {reason}; use 'xla'."
        )
    with jax.named_scope("max_logits"):
        return chosen.compute(query, key, scale, geometry, arrays)
