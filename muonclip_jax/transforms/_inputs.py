"""What `update` is given: gradients beside parameters, and a state of the transformation's own."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax

from muonclip_jax._tree import Tree, array_leaves, flatten_with_paths

#: Errors that a state of another structure leads to, somewhere inside Optax or here.
_FOREIGN = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def check_gradients(updates: Tree, params: Tree) -> None:
    """Raises where gradients and parameters are not one tree of one shape, with the path."""
    if params is None or (
        jax.tree.structure(updates) == jax.tree.structure(params)
        and all(
            getattr(x, "shape", None) == getattr(y, "shape", None)
            for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)
        )
    ):
        return
    gradients, parameters = dict(array_leaves(updates)), dict(array_leaves(params))
    missing, unknown = parameters.keys() - gradients.keys(), gradients.keys() - parameters.keys()
    only = [f"no leaf {path!r}, which the parameters have" for path in sorted(missing)[:4]]
    only += [f"{path!r}, which the parameters do not have" for path in sorted(unknown)[:4]]
    if only:
        raise ValueError(
            f"The gradients have {'; '.join(only)}. Both must be one tree: differentiate with "
            "respect to the parameters that update gets, and give zeros where nothing flows."
        )
    for path, gradient in gradients.items():
        if gradient.shape != parameters[path].shape:
            raise ValueError(
                f"The gradient of {path!r} has shape {tuple(gradient.shape)}, the parameter has "
                f"{tuple(parameters[path].shape)}. They must be equal; a mapped axis that is "
                "still there has to be reduced first, by jax.lax.pmean or a mean."
            )


def transformation(
    name: str, init: Callable[..., Any], update: Callable[..., Any], *, one_tree: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation whose errors tell a state of another one from other mistakes.

    States are compared only where an error has occurred, so a step costs nothing more.

    Args:
        name: What users call it.
        init: Makes the state.
        update: Makes the updates.
        one_tree: Whether gradients and parameters must be one tree.
    """

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        if one_tree:
            check_gradients(updates, params)
        try:
            return update(updates, state, params, **extra)
        except _FOREIGN as error:
            found = _differences(init, updates if params is None else params, state)
            if not found:
                raise
            raise ValueError(
                f"The state is not one that {name}'s init makes for these parameters: {found}. It "
                "was made by another transformation, with other rules, for other parameters, or "
                "with the clip switched on or off. Start from tx.init(params), or carry its "
                "moments over: muonclip_jax.checkpoint.from_optax_state(state, tx, params)."
            ) from error

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _differences(init: Callable[..., Any], params: Tree, state: Tree) -> str:
    """Says how a state differs from the one that `init` makes; empty where it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = jax.eval_shape(init, params)
    except Exception:
        return ""  # The error at hand is not the state's.
    given, own = (dict(flatten_with_paths(tree)[0]) for tree in (state, expected))
    found = [f"it has no {path!r}" for path in own if path not in given][:3]
    found += [f"it has {path!r}" for path in given if path not in own][:3]
    shapes = [
        f"{path!r} has shape {jax.numpy.shape(given[path])} and not {own[path].shape}"
        for path in own
        if path in given and jax.numpy.shape(given[path]) != own[path].shape
    ]
    found += shapes[:3]
    if not found and jax.tree.structure(state) != jax.tree.structure(expected):
        found = [f"it is a {type(state).__name__}, expected a {type(expected).__name__}"]
    return "; ".join(found)
