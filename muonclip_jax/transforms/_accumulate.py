"""Gradient accumulation with one update per step and the maxima of all micro-batches.

Each call updates the mean gradient and the maxima; the last call of a batch also runs the inner
transformation, inside `lax.cond`. Nothing is reset afterwards: the first micro-batch overwrites the
previous mean, so a reset costs no memory traffic, and the state still has the mean of the last
step.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from muonclip_jax._arguments import check_number, names_known, value_at
from muonclip_jax._tree import (
    MAX_LOGITS,
    ScalarOrSchedule,
    Shaped,
    Tree,
    flatten_with_paths,
    tree_from,
)
from muonclip_jax.attention.maxima import merge_max_logits
from muonclip_jax.transforms._states import (
    check_inner,
    differences,
    mesh_shardings,
    place_state,
    transformation,
)

#: As in `optax.MultiSteps`: maps gradients, step count and parameters to whether to skip this
#: micro-batch, and a pytree for the state.
ShouldSkip = Callable[[Tree, jax.Array, Tree], tuple[jax.Array, Tree]]


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
        mini_step: Micro-batches in the current mean, int32, `()`; zero after a step.
        gradient_step: Steps so far, int32, `()`.
        gradients: Mean over the micro-batches of this step, or of the previous step if `mini_step`
            is zero; the parameters' pytree in float32 or wider.
        max_logits: Maxima over the same micro-batches, path -> array; zeros before the first
            micro-batch, empty without `max_logits`.
        inner_state: State of the inner transformation; changes only at a step.
        skip_state: Second value of the last `should_skip_update_fn` call; zeros before the first.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    gradients: Tree
    max_logits: dict[str, jax.Array]
    inner_state: Tree
    skip_state: Tree


@names_known
def accumulate(
    tx: optax.GradientTransformation,
    every: ScalarOrSchedule,
    *,
    max_logits: Tree = None,
    should_skip_update_fn: ShouldSkip | None = None,
    param_shardings: Tree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates gradients and maxima over micro-batches and runs `tx` once for all of them.

    With gradients `G_i` and maxima `S_i` of `k` micro-batches, the last call runs `tx` with

    .. math:: G = \frac1k \sum_i G_i, \qquad S_h = \max_i S_{i,h}

    and the other calls return zeros. Differences from `optax.MultiSteps`:

    1. `tx` runs only in the last call, inside `lax.cond`; MultiSteps runs it in every call.
    2. `tx` gets the maxima over all micro-batches that were not skipped, merged as by
       `merge_max_logits`; MultiSteps passes those of the last micro-batch.

    Other extra arguments, and leaves of `max_logits` that are not maxima, are passed to `tx` from
    the last micro-batch. `tx` gets the mean in the dtype of the gradients. Under `jax.vmap` over
    states the branch becomes a select, and Newton-Schulz runs in every call. Inside `jax.shard_map`
    or `jax.pmap` all devices must take the same branch, so gradients must be reduced before
    `should_skip_update_fn` uses them.

    Args:
        tx: The transformation to run once per step, `muonclip(...)` for example.
        every: Micro-batches per step, at least 1; may be traced, or a schedule of the step count.
        max_logits: Structure of the maxima that `update` receives: a pytree of arrays or
            `jax.ShapeDtypeStruct`, as from `jax.eval_shape` of the forward pass, or a function from
            parameters to one (`optax.tree.map_params` needs the pytree). None if `update` receives
            none.
        should_skip_update_fn: As for `optax.MultiSteps`, `optax.skip_not_finite` for example. A
            skipped micro-batch changes neither the mean nor the maxima.
        param_shardings: As for `scale_by_muon`. Without it the compiler chooses how the state is
            sharded on a mesh with Auto axes, in `update` or in a jitted `init`. Static.

    Returns:
        A transformation with state `AccumulateState`.

    Raises:
        TypeError: If `tx` is not a gradient transformation.
        ValueError: If `every` or `max_logits` is invalid; from `update`, if maxima are missing,
            unexpected or have the wrong shape.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"attn": {n: {"kernel": jnp.ones((6, 2, 4))} for n in ("query", "key")}}
        >>> maxima = [{"attn": jnp.asarray([400.0, 9.0])}, {"attn": jnp.asarray([50.0, 20.0])}]
        >>> from muonclip_jax import qk_clip
        >>> tx = accumulate(optax.chain(optax.sgd(1.0), qk_clip()), 2, max_logits=maxima[0])
        >>> state = tx.init(params)
        >>> for scale, max_logits in zip([-2.0, -4.0], maxima):
        ...     gradients = optax.tree.scale(scale, params)
        ...     updates, state = tx.update(gradients, state, params, max_logits=max_logits)
        ...     print(updates["attn"]["key"]["kernel"][0, :, 0])
        [0. 0.]
        [1. 3.]

    References:
        Kimi Team, Kimi K2, arXiv 2507.20534, Algorithm 1: a head's maximum is over the batch.
    """
    inner = check_inner("accumulate", tx)
    hint = "It is the number of micro-batches of a step, or a schedule."
    check_number("every", every, "an integer from 1", hint, schedule=True)
    if not callable(max_logits):
        _forms(max_logits)  # refuses a bad example now

    def init(params: Tree) -> AccumulateState:
        forms = _forms(tree_from(max_logits, params, lambda x: isinstance(x, Shaped)))
        count, skip_forms = jax.ShapeDtypeStruct((), jnp.int32), ()
        if should_skip_update_fn is not None:
            _, skip_forms = jax.eval_shape(should_skip_update_fn, params, count, params)
        mean = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params)
        state = (count, count, mean, forms, skip_forms)
        state = place_state(state, params, mesh_shardings(params, param_shardings))
        mini_step, step, mean, maxima, skip_state = state
        return AccumulateState(mini_step, step, mean, maxima, inner.init(params), skip_state)

    def update(
        updates: Tree, state: Tree, params: Tree = None, *, max_logits: Tree = None, **extra: object
    ) -> tuple[Tree, AccumulateState]:
        skip, skip_state = None, state.skip_state
        if should_skip_update_fn is not None:
            skip, skip_state = should_skip_update_fn(updates, state.gradient_step, params)
            skip_state = _like(skip_state, state.skip_state)
        shardings = mesh_shardings(updates, param_shardings)
        recorded = place_state(_recorded(max_logits, state.max_logits), updates, shardings)
        averages = _averages(updates, recorded, skip, state)
        mean, maxima, mini_step = place_state(averages, updates, shardings)
        complete = mini_step >= value_at(every, state.gradient_step)

        def act(inner_state: Tree, mean: Tree, maxima: Tree, params: Tree) -> tuple[Tree, Tree]:
            given = dict(extra)
            if max_logits is not None:
                leaves, structure = flatten_with_paths(max_logits)
                leaves = [maxima.get(path, leaf) for path, leaf in leaves]
                given["max_logits"] = jax.tree.unflatten(structure, leaves)
            new, after = inner.update(_like(mean, updates), inner_state, params, **given)
            return new, _like(after, inner_state)

        # Both branches must look alike, down to the sharding, and what the inner transformation
        # returns is only known by tracing it; jit keeps the trace for the branch.
        traced = jax.jit(act)

        def wait(inner_state: Tree, *others: Tree) -> tuple[Tree, Tree]:
            new, _ = jax.eval_shape(traced, inner_state, *others)
            return optax.tree.zeros_like(new), inner_state

        if isinstance(complete, Tracer):
            branch = functools.partial(jax.lax.cond, complete, traced, wait)
        else:  # Here a cond would be compiled anew on every call.
            branch = act if complete else wait
        updates, inner_state = branch(state.inner_state, mean, maxima, params)
        mini_step = jnp.where(complete, 0, mini_step)
        step = jnp.where(complete, optax.safe_increment(state.gradient_step), state.gradient_step)
        return updates, AccumulateState(mini_step, step, mean, maxima, inner_state, skip_state)

    return transformation("accumulate", init, update, one_tree=True)


def _like(new: Tree, old: Tree) -> Tree:
    """`new` in the dtypes of `old`."""
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(jnp.asarray(y).dtype), new, old)


def _wide(x: jax.Array) -> jax.typing.DTypeLike:
    return jnp.promote_types(x.dtype, jnp.float32)


def _averages(
    updates: Tree, recorded: Tree, skip: jax.Array | None, state: AccumulateState
) -> tuple[Tree, Tree, jax.Array]:
    """Mean gradient, maxima and number of micro-batches after one more, unless it is skipped."""
    first, count = state.mini_step == 0, state.mini_step + 1  # the first ignores the old values

    def mean(g: jax.Array, m: jax.Array) -> jax.Array:  # Welford's
        g = g.astype(m.dtype)
        return jnp.where(first, g, m + (g - m) / count.astype(m.dtype))

    merged = merge_max_logits(state.max_logits, recorded)
    maxima = jax.tree.map(lambda new, old: jnp.where(first, new, old), recorded, merged)
    new = (jax.tree.map(mean, updates, state.gradients), maxima, count)
    if skip is None:
        return new
    if jnp.result_type(skip) != jnp.bool_ or jnp.shape(skip) != ():
        raise ValueError(
            f"should_skip_update_fn returned {jnp.result_type(skip)} of shape {jnp.shape(skip)} as "
            "its first value; expected a boolean of shape (). Reduce it with jnp.any or jnp.all."
        )
    old = (state.gradients, state.max_logits, state.mini_step)
    return jax.tree.map(lambda old, new: jnp.where(skip, old, new), old, new)


def _maxima_in(tree: Tree) -> dict[str, Tree]:
    """Path -> maxima: the leaves named `max_logits`, or all leaves if there are none."""
    leaves = dict(flatten_with_paths(tree)[0])
    named = {path: x for path, x in leaves.items() if MAX_LOGITS in path.split("/")}
    return named or leaves


def _forms(example: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of each maximum, in float32 or wider."""
    for path, leaf in (maxima := _maxima_in(example)).items():
        if not isinstance(leaf, Shaped):
            raise ValueError(
                f"max_logits must show the shapes of the maxima; at {path!r} it has "
                f"{leaf!r}. Expected an array or jax.ShapeDtypeStruct((heads,), jnp.float32)."
            )
    return {path: jax.ShapeDtypeStruct(x.shape, _wide(x)) for path, x in maxima.items()}


def _recorded(max_logits: Tree, known: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The maxima of a micro-batch by path, which must be those of the state."""
    recorded = _maxima_in(max_logits)
    if found := differences(recorded, known, ("this update", "the example max_logits=")):
        forms = [
            f"{path!r}: jax.ShapeDtypeStruct({jnp.shape(x)}, jnp.float32)"
            for path, x in list(recorded.items())[:4]
        ]
        raise ValueError(
            f"accumulate got other maxima than expected: {'; '.join(found)}. Write accumulate(tx, "
            "every, max_logits=example) with a tree like those that update gets, of arrays or "
            "shapes, for example from jax.eval_shape of the forward pass: "
            f"{{{', '.join(forms)}}}; without maxima, leave max_logits out of it."
        )
    return _like(recorded, known)
