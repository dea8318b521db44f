"""Gradient accumulation with one update a step and the maxima of all micro-batches.

Each call adds to a mean and to maxima, and a branch that only the last call of a batch takes runs
the inner transformation, with Newton-Schulz in it. Nothing is reset after that: the first
micro-batch of a batch overwrites what the last one left, so a reset costs no pass over memory, and
after a step the state still shows what it was made of.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import (
    MAX_LOGITS,
    ScalarOrSchedule,
    Shaped,
    Tree,
    flatten_with_paths,
    tree_from,
)
from muonclip_jax.attention.maxima import merge_max_logits
from muonclip_jax.transforms._checks import check_every, transformation, value_at
from muonclip_jax.transforms._placing import mesh_shardings, place_tree, replicate

#: As in `optax.MultiSteps`: of the gradients, the number of steps so far and the parameters,
#: whether to skip this micro-batch, and a tree for the state.
ShouldSkip = Callable[[Tree, jax.Array, Tree], tuple[jax.Array, Tree]]


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
        mini_step: Micro-batches in the present mean, int32, `()`; zero after a step.
        gradient_step: Steps so far, int32, `()`.
        gradients: Mean over the micro-batches of this step, or of the last one where `mini_step`
            is zero; tree of the parameters in float32 or wider.
        max_logits: Maxima over the same micro-batches, path -> array, zeros before the first;
            empty where none are taken.
        inner_state: State of the inner transformation; only a step changes it.
        skip_state: The second value of the last `should_skip_update_fn`; zeros before.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    gradients: Tree
    max_logits: dict[str, jax.Array]
    inner_state: Any
    skip_state: Any


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

    With gradients `G_i` and maxima `S_i` of `k` micro-batches, the last call updates with

    .. math:: G = \frac1k \sum_i G_i, \qquad S_h = \max_i S_{i,h}

    and the others return zeros. It differs from `optax.MultiSteps` in this:

    1. `tx` runs on the last call only, inside `lax.cond`; under MultiSteps it runs on every call.
    2. `tx` gets the maxima of all micro-batches, by the rule of `merge_max_logits` (finite ones
       first); under MultiSteps it gets those of the last. A skipped micro-batch is not in them.

    Other extra arguments reach `tx` as the last micro-batch gave them, and so do leaves of
    `max_logits` that are not maxima. `tx` sees the mean in the dtype of the gradients. Under
    `jax.vmap` over states the branch becomes a selection, and Newton-Schulz runs on every call.
    Inside `jax.shard_map` or `jax.pmap` all devices must agree on the branch, so
    `should_skip_update_fn` must look at gradients that are reduced by then.

    Args:
        tx: The transformation to run once a step, `muonclip(...)` for example.
        every: Micro-batches of a step, an integer from 1; may be traced, or a schedule of the
            number of steps so far.
        max_logits: What the maxima that `update` gets look like: a tree of arrays or
            `jax.ShapeDtypeStruct`, as from `jax.eval_shape` of the forward pass, or a function
            from the parameters to one (`optax.tree.map_params` needs the tree). None: `update` gets
            none.
        should_skip_update_fn: As for `optax.MultiSteps`, `optax.skip_not_finite` for example. A
            skipped micro-batch changes neither the mean nor the maxima.
        param_shardings: As for `scale_by_muon`. Needed where the mesh has Auto axes and `init` runs
            inside `jit` or there are maxima. Static.

    Returns:
        A transformation with state `AccumulateState`.

    Raises:
        TypeError: If `tx` is no gradient transformation.
        ValueError: If `every` or `max_logits` is not what it can be; from `update`, if maxima are
            missing, unannounced or of another shape.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"attn": {n: {"kernel": jnp.ones((6, 2, 4))} for n in ("query", "key")}}
        >>> maxima = [{"attn": jnp.asarray([400.0, 9.0])}, {"attn": jnp.asarray([50.0, 20.0])}]
        >>> from muonclip_jax.transforms import qk_clip
        >>> tx = accumulate(optax.chain(optax.sgd(1.0), qk_clip()), 2, max_logits=maxima[0])
        >>> state = tx.init(params)
        >>> for scale, max_logits in zip([-2.0, -4.0], maxima):
        ...     gradients = optax.tree.scale(scale, params)
        ...     updates, state = tx.update(gradients, state, params, max_logits=max_logits)
        ...     print(updates["attn"]["key"]["kernel"][0, :, 0])
        [0. 0.]
        [1. 3.]

    References:
        Kimi Team, Kimi K2, arXiv 2507.20534, Algorithm 1: a head's maximum is taken over the batch.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"accumulate takes a gradient transformation such as muonclip_jax.muonclip(1e-3), got "
            f"{type(tx).__name__}. Of an optax.MultiSteps, give the transformation inside."
        )
    check_every(every, "the number of micro-batches of a step, or a schedule", schedule=True)
    inner = optax.with_extra_args_support(tx)
    if max_logits is not None and not callable(max_logits):
        _forms(max_logits)  # refuses a bad example now

    def init_fn(params: optax.Params) -> AccumulateState:
        forms = _forms(tree_from(max_logits, params, lambda x: isinstance(x, Shaped)))
        count, skip_state = jnp.zeros([], jnp.int32), ()
        if should_skip_update_fn is not None:
            zeros = optax.tree.zeros_like(params)
            _, skip_forms = jax.eval_shape(should_skip_update_fn, zeros, count, params)
            # Without the mesh of `params`, whose devices a traced shape does not know.
            skip_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), skip_forms)
        shardings = mesh_shardings(params, param_shardings)
        mean = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params)
        # Two counts, because a state whose leaves share memory cannot be donated.
        small = (count, jnp.copy(count), jax.tree.map(jnp.zeros_like, forms), skip_state)
        mini_step, gradient_step, maxima, skip_state = replicate(small, shardings)
        mean = place_tree(mean, shardings)
        inner_state = inner.init(params)
        return AccumulateState(mini_step, gradient_step, mean, maxima, inner_state, skip_state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        max_logits: Tree = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        shardings = mesh_shardings(updates, param_shardings)
        first = state.mini_step == 0
        recorded, rebuild = _recorded(max_logits, state.max_logits)
        recorded = _in_dtypes_of(state.max_logits, replicate(recorded, shardings))
        merged = merge_max_logits(state.max_logits, recorded)
        maxima = jax.tree.map(lambda new, old: jnp.where(first, new, old), recorded, merged)
        mean = jax.tree.map(
            lambda g, m: _mean(g, m, first, state.mini_step), updates, state.gradients
        )
        mini_step, skip_state = state.mini_step + 1, state.skip_state
        if should_skip_update_fn is not None:
            skip, skip_state = should_skip_update_fn(updates, state.gradient_step, params)
            skip, skip_state = _boolean(skip), _in_dtypes_of(state.skip_state, skip_state)
            mean, maxima, mini_step = jax.tree.map(
                lambda new, old: jnp.where(skip, old, new),
                (mean, maxima, mini_step),
                (state.gradients, state.max_logits, state.mini_step),
            )
        mean = place_tree(mean, shardings)
        maxima, mini_step = replicate((maxima, mini_step), shardings)
        complete = mini_step >= value_at(every, state.gradient_step)

        def act(mean: Tree, maxima: Tree, inner_state: Any, params: Tree) -> tuple[Tree, Any]:
            gradients = jax.tree.map(lambda m, g: m.astype(g.dtype), mean, updates)
            known = {} if max_logits is None else {"max_logits": rebuild(maxima)}
            new, new_state = inner.update(gradients, inner_state, params, **known, **extra_args)
            return new, _in_dtypes_of(inner_state, new_state)

        # A step taken and a step not taken must look alike, down to the sharding, and what `tx`
        # returns is only known by tracing it; jit keeps the trace for the branch.
        traced = jax.jit(act)

        def wait(mean: Tree, maxima: Tree, inner_state: Any, params: Tree) -> tuple[Tree, Any]:
            new, _ = jax.eval_shape(traced, mean, maxima, inner_state, params)
            return jax.tree.map(jnp.zeros_like, new), inner_state

        operands = (mean, maxima, state.inner_state, params)
        if isinstance(complete, Tracer):
            updates, inner_state = jax.lax.cond(complete, traced, wait, *operands)
        else:  # outside of jit, a cond would be compiled anew on every call
            updates, inner_state = (act if complete else wait)(*operands)
        steps = optax.safe_increment(state.gradient_step)
        return updates, AccumulateState(
            mini_step=jnp.where(complete, 0, mini_step),
            gradient_step=jnp.where(complete, steps, state.gradient_step),
            gradients=mean,
            max_logits=maxima,
            inner_state=inner_state,
            skip_state=skip_state,
        )

    return transformation("accumulate", init_fn, update_fn, one_tree=True)


def _wide(x: jax.Array) -> jax.typing.DTypeLike:
    return jnp.promote_types(x.dtype, jnp.float32)


def _mean(g: jax.Array, mean: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    """Welford's mean of `count` values and one more; before the first, `mean` is not used."""
    g = g.astype(mean.dtype)
    return jnp.where(first, g, mean + (g - mean) / (count + 1).astype(mean.dtype))


def _in_dtypes_of(old: Tree, new: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(jnp.asarray(y).dtype), new, old)


def _boolean(skip: jax.Array) -> jax.Array:
    skip = jnp.asarray(skip)
    if skip.dtype != jnp.bool_ or skip.shape != ():
        raise ValueError(
            f"should_skip_update_fn returned {skip.dtype} of shape {skip.shape} as its first "
            "value; expected a boolean of shape (). Reduce it with jnp.any or jnp.all."
        )
    return skip


def _positions(leaves: list[tuple[str, Any]]) -> list[int]:
    """Which leaves are maxima: those called `max_logits`, or all where none is."""
    named = [i for i, (path, _) in enumerate(leaves) if MAX_LOGITS in path.split("/")]
    return named or list(range(len(leaves)))


def _forms(example: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of each maximum, in float32 or wider."""
    leaves, _ = flatten_with_paths(example)
    forms: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in (leaves[i] for i in _positions(leaves)):
        if not isinstance(leaf, Shaped):
            raise ValueError(
                f"max_logits shows accumulate what the maxima look like; at {path!r} it has "
                f"{leaf!r}. Expected an array or jax.ShapeDtypeStruct((heads,), jnp.float32)."
            )
        forms[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
    return forms


def _recorded(
    max_logits: Tree, known: dict[str, jax.Array]
) -> tuple[dict[str, jax.Array], Callable[[dict[str, jax.Array]], Tree]]:
    """A micro-batch's maxima by path, and a function that puts others in their places."""
    leaves, structure = flatten_with_paths(max_logits)
    positions = _positions(leaves)
    recorded = {leaves[i][0]: leaves[i][1] for i in positions}
    found = {path: jnp.shape(x) for path, x in recorded.items()}
    expected = {path: jnp.shape(x) for path, x in known.items()}
    if found != expected:
        differing = {path: x for path, x in found.items() if expected.get(path) != x}
        forms = [
            f"{path!r}: jax.ShapeDtypeStruct({shape}, jnp.float32)"
            for path, shape in list(found.items())[:4]
        ]
        raise ValueError(
            f"accumulate was told to expect the maxima {expected or 'of no block'}, and this "
            f"update brings {differing or 'none'}. Its state has room for what max_logits= "
            "announced: write accumulate(tx, every, max_logits=example) with a tree like those "
            "that update gets, of arrays or shapes, for example from jax.eval_shape of the forward "
            f"pass{': {' + ', '.join(forms) + '}' if forms else ''}; without maxima, leave "
            "max_logits out of it."
        )

    def rebuild(maxima: dict[str, jax.Array]) -> Tree:
        rebuilt = [leaf for _, leaf in leaves]
        for i in positions:
            rebuilt[i] = maxima[leaves[i][0]]
        return jax.tree.unflatten(structure, rebuilt)

    return recorded, rebuild
