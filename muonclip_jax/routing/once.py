"""Decisions are made once a call on the whole tree, and handed to parts that see some of it."""

from collections.abc import Callable
from typing import Any, TypeVar

import optax

Decided = TypeVar("Decided")


def route_once(
    decide: Callable[[optax.Params], Decided],
    build: Callable[[Decided], optax.GradientTransformationExtraArgs],
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation for the tree that it is given, whenever it is given one.

    `optax.multi_transform` masks what belongs to another part. A masked tree has no embeddings, no
    norms and no biases, so that less can be read from it than from the whole one.

    Args:
        decide: Makes the decisions of the whole tree.
        build: Builds the transformation with them. The state must not depend on them otherwise
            than by the tree.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = route_once(lambda params: len(params), optax.scale)
        >>> params = {"a": jnp.ones(()), "b": jnp.ones(())}
        >>> float(tx.update(params, tx.init(params), params)[0]["a"])
        2.0
    """

    def init_fn(params: optax.Params) -> Any:
        return build(decide(params)).init(params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        tx = optax.with_extra_args_support(build(decide(updates if params is None else params)))
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
