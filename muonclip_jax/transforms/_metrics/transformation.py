"""`metrics`: a transformation that measures the one inside it, every so many updates."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._arguments import is_concrete, names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree, flatten_with_paths
from muonclip_jax.clipping.gamma import check_clip_settings
from muonclip_jax.heads.finding import block_rules
from muonclip_jax.routing import MatrixRules
from muonclip_jax.sharding import place, read_shardings
from muonclip_jax.transforms._checks import check_every, value_at
from muonclip_jax.transforms._inputs import transformation
from muonclip_jax.transforms._metrics.effect import ClipEffect, no_effect, track_clips
from muonclip_jax.transforms._metrics.plan import MatrixPlan, blocks_of, plan_matrices
from muonclip_jax.transforms._metrics.sample import (
    MetricsSample,
    measure_sample,
    no_sample,
    recorded_in,
)


class MetricsState(NamedTuple):
    """State of `metrics`.

    Attributes:
        count: Updates so far, int32, `()`.
        sample: The latest sample.
        clip_effect: Whether the clip lowered the maxima so far; new after every update.
        inner_state: State of the inner transformation.
    """

    count: Any
    sample: MetricsSample
    clip_effect: ClipEffect
    inner_state: Any


@names_known
def metrics(
    inner: optax.GradientTransformation,
    every: ScalarLike = 100,
    *,
    rules: MatrixRules | None = None,
    qk_clip_threshold: ScalarOrSchedule | None = None,
    qk_clip_blocks: Any = None,
    param_shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures what a transformation does, and changes nothing of it.

    At the first update and every `every` updates from there, the state gets a new `MetricsSample`;
    in between it keeps the last one and no matrix is looked at (`lax.cond`). Nothing is sent to the
    host: `read_metrics` gives the sample its names whenever the loop wants to see it.

    With a threshold, every update also compares the maxima with those before and counts the updates
    in a row in which a block was clipped and its maximum did not fall: a clip without effect, as
    where queries and keys are normalised after the kernels that it scales.

    What is measured is the update as `inner` returns it. Around `muonclip(...)` that is the step of
    the weights, with rate, decay and clip in it; around `scale_by_muon()` alone it is what
    Newton-Schulz returned. The orthogonality error does not depend on scale, so that both can be
    compared. Put `metrics` inside of `accumulate` or `optax.MultiSteps`, where every call is a
    step. Under `jax.vmap` over states JAX turns the branch into a selection: every call measures.

    A sample costs two products `X X^H` of every matrix that Muon trains, in float32, and a power
    iteration on the first: fewer operations than one of the five steps of Newton-Schulz.

    Args:
        inner: The transformation to measure.
        every: Updates from one sample to the next, an integer from 1; may be traced.
        rules: Which leaves are Muon's, and as which matrices: `MatrixRules` as in `muonclip`.
            Static.
        qk_clip_threshold: What QK-Clip's threshold is, a number or a schedule as given to
            `muonclip`, so that gammas can be told from the maxima. Infinity for the maxima of a
            model that is not clipped. None: nothing is measured of attention.
        qk_clip_blocks: Which attention blocks there are, as for `muonclip`. Static.
        param_shardings: As for `scale_by_muon`. Needed where the mesh has Auto axes and `init` runs
            inside `jit`. Static.

    Returns:
        A transformation with state `MetricsState`. It hands all extra arguments on. With a
        threshold, `update` needs `max_logits=`.

    Raises:
        TypeError: If `inner` is no gradient transformation.
        ValueError: If `every` or a setting of the clip is not what it can be; from `update`, if
            maxima are missing or do not fit the attention blocks.

    Example:
        >>> import jax.numpy as jnp
        >>> from muonclip_jax.transforms import read_metrics, scale_by_muon
        >>> params = {"dense": {"kernel": jnp.eye(4, 16)}}
        >>> tx = metrics(optax.chain(scale_by_muon(ns_method="svd"), optax.scale(-0.02)), every=10)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> for name, value in read_metrics(state, params).scalars(leaves=False).items():
        ...     print(name, round(float(value), 4))
        muon/update_rms 0.005
        muon/spectral_norm 0.02
        muon/orthogonality_error 0.0
        muon/effective_rank 4.0
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"metrics takes a gradient transformation such as muonclip_jax.muonclip(1e-3), got "
            f"{type(inner).__name__}."
        )
    check_every(every, "the number of updates from one sample to the next")
    if qk_clip_threshold is not None:
        check_clip_settings(qk_clip_threshold, 0.5, "query", prefix="qk_clip_", schedules=True)
    attention = block_rules(qk_clip_blocks, "qk_clip_blocks")
    measured = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> MetricsState:
        blocks = 0
        if qk_clip_threshold is not None:
            blocks = sum(block.selected for block in blocks_of(params, attention)[1])
        count = jnp.zeros([], jnp.int32)
        sample = no_sample(plan_matrices(params, rules).total, blocks)
        state = (count, sample, no_effect(blocks))
        count, sample, effect = _whole(state, params, param_shardings)
        return MetricsState(count, sample, effect, measured.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MetricsState]:
        updates, inner_state = measured.update(updates, state.inner_state, params, **extra_args)
        plan = plan_matrices(updates, rules)
        recorded, threshold = [], jnp.inf
        if qk_clip_threshold is not None:
            clips = not (is_concrete(qk_clip_threshold) and qk_clip_threshold == jnp.inf)
            recorded = recorded_in(updates, extra_args.get("max_logits"), attention, clips)
            threshold = value_at(qk_clip_threshold, state.count)
        run = _unsharded(updates, param_shardings)
        named = tuple((path, shape) for path, shape, _ in recorded)
        maxima, effect = run(functools.partial(track_clips, named))(
            [arrays for *_, arrays in recorded], threshold, state.clip_effect
        )
        leaves = jax.tree.leaves(updates)
        operands = (
            [leaves[position] for position in plan.positions],
            _momentum(inner_state, plan),
            maxima,
            threshold,
        )
        measure = run(functools.partial(measure_sample, plan))
        now = state.count % every == 0
        if isinstance(now, Tracer):
            sample = jax.lax.cond(
                now, measure, lambda count, *_: state.sample, state.count, *operands
            )
        else:
            # Outside of jit, a cond would be compiled anew on every call.
            sample = measure(state.count, *operands) if now else state.sample
        count = jnp.asarray(optax.safe_increment(jnp.asarray(state.count)))
        small = (count, sample, effect)
        count, sample, effect = _whole(small, updates, param_shardings)
        return updates, MetricsState(count, sample, effect, inner_state)

    return transformation("metrics", init_fn, update_fn)


def _unsharded(updates: Tree, param_shardings: Any) -> Callable[..., Callable[..., Any]]:
    """Returns what lets a function ignore how a mesh with Explicit axes shards its operands.

    There JAX would ask how every product shall lie; the partitioner knows. Elsewhere it returns
    the function itself.
    """
    shardings = read_shardings(updates, param_shardings, warn=False)
    if shardings is None or shardings.inside_manual:
        return lambda function: function
    everywhere = NamedSharding(shardings.mesh, PartitionSpec())
    return functools.partial(jax.sharding.auto_axes, out_sharding=everywhere)


def _momentum(state: Any, plan: MatrixPlan) -> dict[int, jax.Array]:
    """Returns the momentum of the plan's leaves, by number, wherever in the state it is."""
    found: dict[str, jax.Array] = {}
    for node in jax.tree.leaves(state, is_leaf=_has_momentum):
        if _has_momentum(node):
            for path, leaf in flatten_with_paths(node.mu)[0]:
                found.setdefault(path, leaf)
    return {i: found[path] for i, path in enumerate(plan.paths) if path in found}


def _has_momentum(node: Any) -> bool:
    # Optax's word for it, in the states of its own Muon and of Adam too.
    return isinstance(node, tuple) and "mu" in getattr(node, "_fields", ())


def _whole(tree: Any, params: Tree, param_shardings: Any) -> Any:
    """Brings small things whole to every device, where an update leaves them too."""
    shardings = read_shardings(params, param_shardings, warn=False)
    if shardings is None or shardings.inside_manual:
        return tree
    everywhere = NamedSharding(shardings.mesh, PartitionSpec())
    return jax.tree.map(lambda x: place(x, everywhere), tree)
