"""`add_weight_decay`: cautious decay, and decay in proportion to 1 / width."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._arguments import check_flag, names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree
from muonclip_jax.routing import MatrixRules
from muonclip_jax.transforms._checks import check_mask, check_non_negative, check_positive
from muonclip_jax.transforms._matrix_axes import matrix_axes
from muonclip_jax.transforms._orthogonalize_updates import WeightDimNumOrFn


@names_known
def add_weight_decay(
    weight_decay: ScalarOrSchedule,
    mask: Tree | Callable[[optax.Params], Tree] | None = None,
    *,
    cautious: bool = False,
    base_width: ScalarLike | None = None,
    rules: MatrixRules | None = None,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds weight decay, optionally cautious or proportional to 1 / width.

    With the direction `U` that a later `optax.scale_by_learning_rate` subtracts,

        U <- U + weight_decay W                            as `optax.add_decayed_weights`
        U <- U + weight_decay W [U W >= 0]                 cautious
        U <- U + weight_decay (base_width / fan_in) W      with base_width

    Cautious decay applies only to entries that the update shrinks too.

    Args:
        weight_decay: The decay; a number or a schedule.
        mask: As in `optax.add_decayed_weights`.
        cautious: Whether to decay only entries in which update and weight have the same sign or one
            of them is zero. Static.
        base_width: Fan-in at which the decay equals `weight_decay`; a matrix with twice that fan-in
            decays half as fast. With None, decay does not depend on width. May be traced.
        rules: As in `scale_by_muon`; used only with `base_width`.
        weight_dimension_numbers: As in `scale_by_muon`; used only with `base_width`.

    Returns:
        A transformation with the state of `optax.add_decayed_weights`. Its `update` needs the
        parameters.

    Raises:
        ValueError: At construction for an invalid hyperparameter; from `update` without parameters.
        TypeError: At construction for a mask that is neither a tree nor a function.

    Example:
        >>> import jax.numpy as jnp
        >>> params, updates = {"w": jnp.array([[2.0, 2.0]])}, {"w": jnp.array([[1.0, -1.0]])}
        >>> tx = add_weight_decay(0.1, cautious=True)
        >>> print(tx.update(updates, tx.init(params), params)[0]["w"])
        [[ 1.2 -1. ]]

    References:
        Cautious weight decay: arXiv 2510.12402. Decay and width: arXiv 2512.05620.
    """
    check_non_negative("weight_decay", weight_decay, schedule=True)
    check_mask("mask", mask)
    check_flag("cautious", cautious)
    if base_width is not None:
        check_positive("base_width", base_width, " Write the fan-in at which weight_decay holds.")
    decay = optax.add_decayed_weights(weight_decay, mask)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if params is None:
            raise ValueError(
                "add_weight_decay needs the parameters: tx.update(grads, state, params)."
            )
        decayed = params
        if base_width is not None:
            decayed = jax.tree.map(
                lambda p, a: (p * (base_width / a.size(p.shape, "inputs"))).astype(p.dtype),
                decayed,
                matrix_axes(params, rules, weight_dimension_numbers=weight_dimension_numbers),
            )
        if cautious:
            decayed = jax.tree.map(
                lambda u, p: jnp.where(_agree(u, p), p, jnp.zeros_like(p)), updates, decayed
            )
        return decay.update(updates, state, decayed)

    return optax.GradientTransformationExtraArgs(decay.init, update_fn)


def _agree(u: jax.Array, p: jax.Array) -> jax.Array:
    # Of signs: the product of two small numbers underflows.
    return jnp.real(jnp.conj(jnp.sign(u)) * jnp.sign(p)) >= 0
