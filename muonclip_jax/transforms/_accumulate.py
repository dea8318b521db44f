"""Gradient accumulation that pays for one update a step, and for the right maxima.

A large batch is seen as micro-batches one after another. Three things must not depend on how it
was cut: the gradient is the mean over the pieces, a head's largest logit is the maximum over them,
and the expensive part, Newton-Schulz, belongs to the batch and not to the piece. So each call adds
to a mean and to maxima, and a branch that only the last call of a batch takes runs the inner
transformation.

Nothing is reset after that: the first micro-batch of a batch overwrites what the last one left.
So a reset costs no pass over memory, the branch carries the inner state alone, and after a step
the state still shows what it was made of.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import ScalarOrSchedule, Shaped, Tree, tree_from
from muonclip_jax.attention.maxima import merge_max_logits
from muonclip_jax.sharding import MeshShardings, place, read_shardings
from muonclip_jax.transforms._checks import check_every, value_at
from muonclip_jax.transforms._inputs import transformation
from muonclip_jax.transforms._placing import place_tree
from muonclip_jax.transforms._recorded import forms_of, read_recorded

#: What `optax.MultiSteps` takes by this name: of the gradients, the number of steps so far and the
#: parameters, whether to skip this micro-batch, and anything to show in the state.
ShouldSkip = Callable[[Any, Any, Any], tuple[Any, Any]]


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
        mini_step: Micro-batches that the present mean is made of, int32, `()`; zero after a step.
        gradient_step: Steps so far, int32, `()`.
        gradients: Mean over the micro-batches of this step, or of the last one where `mini_step`
            is zero; tree of the parameters in float32 or wider.
        max_logits: Maxima over the same micro-batches, path -> array, zeros before the first;
            empty where none are taken.
        inner_state: State of the inner transformation; only a step changes it.
        skip_state: The second value of the last `should_skip_update_fn`; zeros before.
    """

    mini_step: Any
    gradient_step: Any
    gradients: Any
    max_logits: Any
    inner_state: Any
    skip_state: Any


@names_known
def accumulate(
    tx: optax.GradientTransformation,
    every: ScalarOrSchedule,
    *,
    max_logits: Any = None,
    should_skip_update_fn: ShouldSkip | None = None,
    param_shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates gradients and maxima over micro-batches and runs `tx` once for all of them.

    With gradients `G_i` and maxima `S_i` of `k` micro-batches, the last call updates with

    .. math:: G = \frac1k \sum_i G_i, \qquad S_h = \max_i S_{i,h}

    and the others return zeros. It means what `optax.MultiSteps` means, and differs in this:

    1. `tx` runs on the last call only, inside `lax.cond`; under MultiSteps it runs on every call.
    2. `tx` gets the maxima of all micro-batches, by the rule of `merge_max_logits` (finite ones
       first); under MultiSteps it gets those of the last.
    3. A skipped micro-batch leaves no trace in the maxima either.

    Other extra arguments reach `tx` as the last micro-batch gave them, and so do leaves of
    `max_logits` that are no maxima. `tx` sees the mean in the dtype of the gradients.

    Under `jax.vmap` over states every state has its own counter, and JAX turns the branch into a
    selection: results are right, but Newton-Schulz runs on every call. To keep the branch, train
    stacked models with one state, as one tree of stacked parameters. Inside `jax.shard_map` or
    `jax.pmap` all devices must agree on the branch where `tx` communicates, so let
    `should_skip_update_fn` look at gradients that are reduced by then.

    Args:
        tx: The transformation to run once a step, `muonclip(...)` for example.
        every: Micro-batches of a step, an integer from 1; may be traced, or a schedule of the
            number of steps so far.
        max_logits: What the maxima that `update` gets look like: a tree of arrays or
            `jax.ShapeDtypeStruct`, as from `jax.eval_shape` of the forward pass, or a function
            from the parameters to one (`optax.tree.map_params` needs the tree). The state has its
            final form from `init` on, so it has to be known then. None: `update` gets none.
        should_skip_update_fn: As for `optax.MultiSteps`, `optax.skip_not_finite` for example: of
            the micro-batch's gradients, the number of steps so far and the parameters, a boolean
            `()` and a tree for `skip_state`. Where it is True, it is as if there had been no such
            micro-batch.
        param_shardings: As for `scale_by_muon`: how the parameters and with them the mean lie on
            a mesh. Needed where the mesh has Auto axes and `init` runs inside `jit` or there are
            maxima. Static.

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
        >>> from muonclip_jax.transforms._qk_clip import qk_clip
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
    if should_skip_update_fn is not None and not callable(should_skip_update_fn):
        raise TypeError(
            "should_skip_update_fn must be a function such as optax.skip_not_finite, got "
            f"{should_skip_update_fn!r}."
        )
    inner = optax.with_extra_args_support(tx)
    if not callable(max_logits):
        forms_of(max_logits)  # An example that shows no maxima is an error here already.

    def init_fn(params: optax.Params) -> AccumulateState:
        count = jnp.zeros([], jnp.int32)
        forms = forms_of(tree_from(max_logits, params, lambda x: isinstance(x, Shaped)))
        skip_state: Any = ()
        if should_skip_update_fn is not None:
            zeros = optax.tree.zeros_like(params)
            _, forms_of_skip = jax.eval_shape(should_skip_update_fn, zeros, count, params)
            # Without the mesh of `params`, whose devices a traced shape does not know.
            skip_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), forms_of_skip)
        mean = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params)
        maxima = jax.tree.map(jnp.zeros_like, forms)
        shardings = _mesh_shardings(params, param_shardings)
        # Two arrays, for a state whose leaves share memory cannot be donated.
        counts = (count, jnp.copy(count))
        mean = place_tree(mean, shardings)
        maxima, counts, skip_state = _everywhere((maxima, counts, skip_state), shardings)
        return AccumulateState(
            mini_step=counts[0],
            gradient_step=counts[1],
            gradients=mean,
            max_logits=maxima,
            inner_state=inner.init(params),
            skip_state=skip_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        max_logits: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        shardings = _mesh_shardings(updates, param_shardings)
        recorded, rebuild = read_recorded(max_logits, state.max_logits)
        recorded = _everywhere(recorded, shardings)
        first = state.mini_step == 0
        mean = jax.tree.map(
            lambda g, m: _mean(g, m, first, state.mini_step), updates, state.gradients
        )
        recorded = _as_before(recorded, state.max_logits)
        maxima = jax.tree.map(
            lambda new, merged: jnp.where(first, new, merged),
            recorded,
            merge_max_logits(state.max_logits, recorded),
        )
        mini_step = state.mini_step + 1
        skip_state = state.skip_state
        if should_skip_update_fn is not None:
            skip, skip_state = should_skip_update_fn(updates, state.gradient_step, params)
            skip, skip_state = _boolean(skip), _as_before(skip_state, state.skip_state)
            mean, maxima, mini_step = jax.tree.map(
                lambda new, old: jnp.where(skip, old, new),
                (mean, maxima, mini_step),
                (state.gradients, state.max_logits, state.mini_step),
            )
        mean = place_tree(mean, shardings)
        maxima, mini_step = _everywhere((maxima, mini_step), shardings)
        complete = mini_step >= value_at(every, state.gradient_step)

        def act(mean: Any, maxima: Any, inner_state: Any, params: Any) -> tuple[Any, Any]:
            gradients = jax.tree.map(lambda m, g: m.astype(g.dtype), mean, updates)
            known = {} if max_logits is None else {"max_logits": rebuild(maxima)}
            new, new_state = inner.update(gradients, inner_state, params, **known, **extra_args)
            return new, _as_before(new_state, inner_state)

        # A step taken and a step not taken have to look alike, down to the sharding, and what
        # `tx` returns is only known by tracing it; jit keeps the trace for the branch.
        traced = jax.jit(act)

        def wait(mean: Any, maxima: Any, inner_state: Any, params: Any) -> tuple[Any, Any]:
            new, _ = jax.eval_shape(traced, mean, maxima, inner_state, params)
            return jax.tree.map(jnp.zeros_like, new), inner_state

        operands = (mean, maxima, state.inner_state, params)
        if isinstance(complete, Tracer):
            updates, inner_state = jax.lax.cond(complete, traced, wait, *operands)
        else:
            # Outside of jit, a cond would be compiled anew on every call.
            updates, inner_state = (act if complete else wait)(*operands)
        return updates, AccumulateState(
            mini_step=jnp.where(complete, 0, mini_step),
            gradient_step=jnp.where(
                complete, optax.safe_increment(state.gradient_step), state.gradient_step
            ),
            gradients=mean,
            max_logits=maxima,
            inner_state=inner_state,
            skip_state=skip_state,
        )

    return transformation("accumulate", init_fn, update_fn, one_tree=True)


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _mean(g: jax.Array, mean: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    """Welford's mean of `count` values and one more; what `mean` holds before the first is void."""
    g = g.astype(mean.dtype)
    return jnp.where(first, g, mean + (g - mean) / (count + 1).astype(mean.dtype))


def _as_before(new: Tree, old: Tree) -> Tree:
    """Returns `new` in the dtypes of `old`."""
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(jnp.asarray(y).dtype), new, old)


def _boolean(skip: Any) -> jax.Array:
    skip = jnp.asarray(skip)
    if skip.dtype != jnp.bool_ or skip.shape != ():
        raise ValueError(
            f"should_skip_update_fn returned {skip.dtype} of shape {skip.shape} as its first "
            "value; expected a boolean of shape (). Reduce it with jnp.any or jnp.all."
        )
    return skip


def _mesh_shardings(tree: Tree, param_shardings: Tree | None) -> MeshShardings | None:
    """Returns the shardings of `tree`, None inside of `shard_map`, where arrays are local."""
    shardings = read_shardings(tree, param_shardings, warn=False)
    return None if shardings is None or shardings.inside_manual else shardings


def _everywhere(tree: Tree, shardings: MeshShardings | None) -> Tree:
    """Returns small arrays replicated over the mesh."""
    if shardings is None:
        return tree
    everywhere = NamedSharding(shardings.mesh, PartitionSpec())
    return jax.tree.map(lambda x: place(x, everywhere), tree)
