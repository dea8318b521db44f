"""A Linen train state whose `apply_gradients` forwards the maxima."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import struct
from flax.training import train_state

from muonclip_jax._tree import Tree


class TrainState(train_state.TrainState):
    """Flax's train state with an `apply_gradients` that passes extra arguments to the optimizer.

    Flax's own passes only gradients, state and parameters to `tx.update`, without `max_logits`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.ones((2, 2))}
        >>> state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0))
        >>> state = state.apply_gradients(grads=params, max_logits={})
        >>> state.params["kernel"].tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """

    # Flax's field again: it declares parameters a FrozenDict, which they need not be.
    step: int | jax.Array
    apply_fn: Callable = struct.field(pytree_node=False)
    params: Tree = struct.field(pytree_node=True)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    opt_state: Tree = struct.field(pytree_node=True)

    def apply_gradients(self, *, grads: Tree, **kwargs: Any) -> "TrainState":
        """Updates step, parameters and optimizer state.

        Args:
            grads: Gradients, in the tree of the parameters.
            **kwargs: Fields of this dataclass are replaced. All others, such as `max_logits=`, are
                passed to `tx.update`, if it takes extra arguments.

        Returns:
            The new train state.
        """
        names = {field.name for field in dataclasses.fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in names}
        extra = {name: value for name, value in kwargs.items() if name not in names}
        # `optax.MultiSteps` takes extra arguments, and its type does not declare them.
        parameters = inspect.signature(self.tx.update).parameters.values()
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        tx = self.tx if takes_any else optax.with_extra_args_support(self.tx)

        def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
            return tx.update(updates, state, params, **extra)

        forwarding = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = super(TrainState, forwarding).apply_gradients(grads=grads, **replaced)
        return stepped.replace(tx=replaced.get("tx", self.tx))
