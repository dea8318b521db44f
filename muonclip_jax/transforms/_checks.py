"""Checks: hyperparameters at construction; gradients and states when `update` gets them."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import DTypeLike

from muonclip_jax._arguments import check_number, is_concrete
from muonclip_jax._tree import ScalarOrSchedule, Tree, array_leaves, flatten_with_paths

#: Dtypes of moments, the real ones first.
_MOMENTS = ("float32", "bfloat16", "float16", "float64", "complex64", "complex128")
#: Errors that a state of another structure leads to, somewhere inside Optax or here.
_FOREIGN = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def value_at(value: Any, count: Any) -> Any:
    """Returns a schedule's value after `count` updates, and anything else as it is."""
    return value(count) if callable(value) else value


def check_rates(
    rates: Sequence[ScalarOrSchedule], decays: Sequence[ScalarOrSchedule], mask: Tree
) -> None:
    """Checks rates and decays of Muon and Adam; warns if Adam's rate alone is constant."""
    for prefix, rate, decay in zip(("", "adam_"), rates, decays, strict=True):
        check_number(f"{prefix}learning_rate", rate, "positive and finite", schedule=True)
        check_number(f"{prefix}weight_decay", decay, "finite and not negative", schedule=True)
    check_mask("weight_decay_mask", mask)
    if callable(rates[0]) and not callable(rates[1]):
        warnings.warn(
            f"learning_rate is a schedule and adam_learning_rate={rates[1]} is not: Adam's rate "
            "stays the same while the other one warms up and decays. Write "
            "adam_learning_rate=lambda count: ratio * schedule(count), or "
            "optax.constant_schedule(...) if a constant is meant.",
            stacklevel=4,
        )


def check_mask(name: str, mask: Tree) -> None:
    """Raises if a mask is a single value and not a tree or a function."""
    if isinstance(mask, str | bool | int | float | np.generic | np.ndarray | jax.Array):
        raise TypeError(
            f"{name} must be a tree of bools like the parameters, or a function from them to one, "
            f"got {mask!r}. optax.inject_hyperparams takes functions for schedules: give it "
            f"static_args=({name!r},)."
        )


def check_decay(
    name: str, decay: ScalarOrSchedule, usual: float, mu_dtype: Tree = None, schedule: bool = False
) -> None:
    """Raises for a decay rate outside [0, 1), or a `mu_dtype` too coarse for a moment with it.

    A step changes a moment by `1 - decay` of its distance to the gradient, which is rounded to
    zero in integers, mostly in 8-bit floats, and in any float with a larger spacing.

    `optax.inject_hyperparams` casts numbers to the dtype of the parameters, and bfloat16 has no
    number between 0.996 and 1: a decay rate of 0.999 becomes 1, and Adam divides by zero. A
    concrete value raises an error; a traced 16-bit one, whose value is unknown, gives a warning.
    """
    held, hint = getattr(decay, "dtype", np.dtype(float)), f"A usual value is {usual}."
    if held.itemsize < 4:
        hint = (
            f"{name} is held in {held}, where 0.999 is {float(np.asarray(0.999, held)):.4g}; "
            "keep it in float32: optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)."
        )
        if isinstance(decay, Tracer):
            warnings.warn(hint, stacklevel=4)
        else:
            decay = float(np.asarray(decay))
    check_number(name, decay, "in [0, 1)", hint, schedule=schedule)
    if mu_dtype is None:
        return
    dtype = None
    with contextlib.suppress(TypeError):
        dtype = jnp.dtype(mu_dtype)
    if dtype is None or dtype.name not in _MOMENTS:
        raise ValueError(
            f"mu_dtype={mu_dtype!r} cannot hold a moving average. Pass one of "
            f"{', '.join(map(repr, _MOMENTS[:4]))}, or None for the parameter's dtype."
        )
    spacing = float(jnp.finfo(dtype).eps)
    if is_concrete(decay) and 1 - decay < spacing / 2:
        raise ValueError(
            f"mu_dtype={dtype.name!r} is too coarse for a moving average with {name}={decay}: a "
            f"step changes it by {1 - decay:.2g} of its distance to the gradient, and its numbers "
            f"are {spacing:.2g} apart. Pass mu_dtype='float32' or a smaller {name}."
        )


def check_moments(params: optax.Params, mu_dtype: DTypeLike | None) -> None:
    """Raises for leaves whose moment cannot be stored as `mu_dtype`, at `init`."""
    given = mu_dtype not in (None, float, complex)
    for path, leaf in array_leaves(params):
        dtype, where = jnp.dtype(leaf.dtype), path or "The leaf"
        if dtype.name not in _MOMENTS:
            raise TypeError(
                f"{where} has dtype {dtype.name}; an optimizer's moments need parameters of dtype "
                f"{', '.join(_MOMENTS)}. Convert it, or keep it out of the optimizer, for example "
                "by optax.masked."
            )
        stored = dtype if mu_dtype is None else jnp.dtype(mu_dtype)
        if (stored.kind == "c") != (dtype.kind == "c"):
            raise ValueError(
                f"{where} has dtype {dtype.name}, and mu_dtype={stored.name!r} is "
                f"{'complex' if stored.kind == 'c' else 'real'}. Pass mu_dtype=None, which keeps "
                "each leaf's own dtype."
            )
        if given and jax.dtypes.canonicalize_dtype(stored) != stored:
            raise ValueError(
                f"mu_dtype={stored.name!r} needs 64-bit types, which are disabled in JAX. Set "
                "jax.config.update('jax_enable_x64', True), or pass mu_dtype='float32'."
            )


def check_inner(name: str, tx: object) -> optax.GradientTransformationExtraArgs:
    """Returns what the transformation `name` wraps; raises if it is no transformation."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"{name} takes a gradient transformation such as muonclip_jax.muonclip(1e-3), got "
            f"{type(tx).__name__}. Of optax.MultiSteps, give the transformation inside it."
        )
    return optax.with_extra_args_support(tx)


def check_params(name: str, params: Tree, extra: str = "") -> None:
    """Raises if `update` of the transformation `name` was called without the parameters."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: tx.update(grads, state, params{extra}).")


def differences(
    given: dict[str, Any], expected: dict[str, Any], names: tuple[str, str], what: str = "shape"
) -> list[str]:
    """How two trees differ in paths and in `what` of their leaves, at most eight of a kind."""
    here, there = names
    kinds = [
        [f"{path!r} is only in {here}" for path in given if path not in expected],
        [f"{path!r} is only in {there}" for path in expected if path not in given],
    ]
    for name in what.split():
        x, y = (
            {path: getattr(leaf, name, ()) for path, leaf in tree.items()}
            for tree in (given, expected)
        )
        differ = [path for path in y if path in x and x[path] != y[path]]
        kinds.append([f"{p!r} has {name} {x[p]} in {here}, {y[p]} in {there}" for p in differ])
    found: list[str] = []
    for kind in kinds:
        found += kind[:8] + [f"{len(kind) - 8} more of this kind"] * (len(kind) > 8)
    return found


def transformation(
    name: str, init: Callable[..., Any], update: Callable[..., Any], *, one_tree: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation whose errors identify a state of another transformation.

    States are compared only after an error, so this does not slow down a step. With `one_tree`,
    gradients and parameters must have the same paths and shapes.
    """

    def update_fn(
        updates: Tree, state: Tree, params: Tree = None, **extra: object
    ) -> tuple[Tree, Tree]:
        if one_tree and params is not None:
            trees = dict(array_leaves(updates)), dict(array_leaves(params))
            if found := differences(*trees, ("the gradients", "the parameters")):
                raise ValueError(
                    f"The gradients do not match the parameters: {'; '.join(found)}. Differentiate "
                    "with respect to the parameters passed to update, with zeros for leaves "
                    "without a gradient; reduce a remaining mapped axis first, by jax.lax.pmean or "
                    "a mean."
                )
        try:
            return update(updates, state, params, **extra)
        except _FOREIGN as error:
            found = []
            # Where init fails too, the error is not the state's.
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new = jax.eval_shape(init, updates if params is None else params)
                given, own = (dict(flatten_with_paths(tree)[0]) for tree in (state, new))
                found = differences(given, own, ("this state", "a new one"))
                if not found and jax.tree.structure(state) != jax.tree.structure(new):
                    found = [f"it is a {type(state).__name__}, expected a {type(new).__name__}"]
            if not found:
                raise
            raise ValueError(
                f"The state is not one that {name}'s init creates for these parameters: "
                f"{'; '.join(found)}. It is from another transformation, other rules, other "
                "parameters, or with the clip switched on or off. Start from tx.init(params), or "
                "convert its moments: "
                "muonclip_jax.checkpoint.from_optax_state(state, tx, params)."
            ) from error

    return optax.GradientTransformationExtraArgs(init, update_fn)
