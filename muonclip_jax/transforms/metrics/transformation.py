"""`metrics`: a transformation that measures the one inside it, every so many updates."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._paths import flatten_with_paths
from muonclip_jax._typing import ScalarLike, ScalarOrSchedule, Tree
from muonclip_jax.clipping.blocks import assign_maxima
from muonclip_jax.clipping.gamma import check_clip_settings, clip_gamma
from muonclip_jax.clipping.maxima import merge_recordings, read_maxima, trailing_shape
from muonclip_jax.layouts import MatrixRules
from muonclip_jax.layouts.attention_finding import Rule, block_rules
from muonclip_jax.matrices import place, read_shardings
from muonclip_jax.transforms._checks import is_concrete
from muonclip_jax.transforms.metrics.figures import effective_rank, update_figures
from muonclip_jax.transforms.metrics.plan import (
    MatrixPlan,
    blocks_of,
    measure_stacks,
    plan_matrices,
)


class MetricsSample(NamedTuple):
    """What `metrics` measured at one update. `read_metrics` gives the entries their names.

    Attributes:
        step: Number of the measured update, from 0, int32, `()`; -1 before the first.
        update_rms: Of each matrix of the update, the root of the mean of its squares, float32,
            `(matrices,)`.
        spectral_norm: Of each matrix of the update, its largest singular value (`UpdateFigures`).
        orthogonality_error: Of each matrix of the update, its distance from a multiple of an
            orthogonal one (`UpdateFigures`).
        effective_rank: Of each matrix of the momentum after the update, `effective_rank`; 0 where
            the inner state has no momentum `mu` of it.
        max_logit: Of each attention block, the largest logit of all its heads and stacked layers,
            float32, `(blocks,)`; -inf where the update got no maxima.
        min_gamma: Of each attention block, the smallest of QK-Clip's factors; 1 without a clip.
        clipped_heads: Of each attention block, the number of heads that were clipped, int32.
    """

    step: Any
    update_rms: Any
    spectral_norm: Any
    orthogonality_error: Any
    effective_rank: Any
    max_logit: Any
    min_gamma: Any
    clipped_heads: Any


class MetricsState(NamedTuple):
    """State of `metrics`.

    Attributes:
        count: Updates so far, int32, `()`.
        sample: The latest sample.
        inner_state: State of the inner transformation.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    sample: MetricsSample
    inner_state: Any


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
    in between it keeps the last one and nothing is computed (`lax.cond`). Nothing is sent to the
    host: `read_metrics` gives the sample its names whenever the loop wants to see it.

    What is measured is the update as `inner` returns it. Around `muonclip(...)` that is the step of
    the weights, with rate, decay and clip in it; around `scale_by_muon()` alone it is what
    Newton-Schulz returned. The orthogonality error does not depend on scale, so that both can be
    compared. Put `metrics` inside of `accumulate` or `optax.MultiSteps`, where every call is a
    step.

    A sample costs two products `X X^H` of every matrix that Muon trains and a power iteration on
    the first, about two of the five steps of Newton-Schulz.

    Args:
        inner: The transformation to measure.
        every: Updates from one sample to the next, an integer from 1; may be traced.
        rules: Which leaves are Muon's, and as which matrices: `MatrixRules` as in `muonclip`.
            Static.
        qk_clip_threshold: What QK-Clip's threshold is, a number or a schedule as given to
            `muonclip`, so that gammas can be told from the maxima. None: there is no clip.
        qk_clip_blocks: Which attention blocks there are, as for `muonclip`. Static.
        param_shardings: As for `scale_by_muon`. Needed where the mesh has Auto axes and `init` runs
            inside `jit`. Static.

    Returns:
        A transformation with state `MetricsState`. It hands all extra arguments on, and reads
        `max_logits` where it is one of them.

    Raises:
        TypeError: If `inner` is no gradient transformation.
        ValueError: If `every` or a setting of the clip is not what it can be; from `update`, if
            maxima do not fit the attention blocks.

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
            f"metrics takes a gradient transformation such as muonclip_jax.muonclip(0.02), got "
            f"{type(inner).__name__}."
        )
    if is_concrete(every) and not (every >= 1 and every == every // 1):
        raise ValueError(
            f"every must be an integer from 1, got {every}. It is the number of updates from one "
            "sample to the next."
        )
    if qk_clip_threshold is not None:
        check_clip_settings(qk_clip_threshold, 0.5, "query", prefix="qk_clip_")
    attention = block_rules(qk_clip_blocks, "qk_clip_blocks")
    measured = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> MetricsState:
        blocks = [block for block in blocks_of(params, attention)[1] if block.selected]
        count = jnp.zeros([], jnp.int32)
        sample = _no_sample(plan_matrices(params, rules).total, len(blocks))
        count, sample = _whole((count, sample), params, param_shardings)
        return MetricsState(count=count, sample=sample, inner_state=measured.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MetricsState]:
        updates, inner_state = measured.update(updates, state.inner_state, params, **extra_args)
        plan = plan_matrices(updates, rules)
        recorded = _recorded(updates, extra_args.get("max_logits"), attention)
        threshold = jnp.inf if qk_clip_threshold is None else _at(qk_clip_threshold, state.count)
        leaves = jax.tree.leaves(updates)
        operands = (
            [leaves[position] for position in plan.positions],
            _momentum(inner_state, plan),
            [arrays for _, arrays in recorded],
            threshold,
        )
        # On a mesh with Explicit axes JAX would ask how every product shall lie; the partitioner
        # knows. Elsewhere this is the function itself.
        shardings = read_shardings(updates, param_shardings, warn=False)
        measure = functools.partial(_measure, plan, tuple(path for path, _ in recorded))
        if shardings is not None and not shardings.inside_manual:
            everywhere = NamedSharding(shardings.mesh, PartitionSpec())
            measure = jax.sharding.auto_axes(measure, out_sharding=everywhere)
        now = state.count % every == 0
        if isinstance(now, Tracer):
            sample = jax.lax.cond(
                now, measure, lambda count, *_: state.sample, state.count, *operands
            )
        else:
            # Outside of jit, a cond would be compiled anew on every call.
            sample = measure(state.count, *operands) if now else state.sample
        count = jnp.asarray(optax.safe_increment(jnp.asarray(state.count)))
        count, sample = _whole((count, sample), updates, param_shardings)
        return updates, MetricsState(count=count, sample=sample, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _at(value: Any, count: Any) -> Any:
    return value(count) if callable(value) else value


def _no_sample(matrices: int, blocks: int) -> MetricsSample:
    # Every array is made by itself: a state whose leaves share memory cannot be donated.
    return MetricsSample(
        step=jnp.full([], -1, jnp.int32),
        update_rms=jnp.zeros(matrices, jnp.float32),
        spectral_norm=jnp.zeros(matrices, jnp.float32),
        orthogonality_error=jnp.zeros(matrices, jnp.float32),
        effective_rank=jnp.zeros(matrices, jnp.float32),
        max_logit=jnp.full(blocks, -jnp.inf, jnp.float32),
        min_gamma=jnp.ones(blocks, jnp.float32),
        clipped_heads=jnp.zeros(blocks, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    plan: MatrixPlan,
    blocks: tuple[str, ...],
    count: jax.Array,
    updates: Sequence[jax.Array],
    momentum: dict[int, jax.Array],
    recorded: Sequence[Sequence[jax.Array]],
    threshold: ScalarLike,
) -> MetricsSample:
    # An inner jit: a call outside of one compiles as a whole, and once.
    sample = _no_sample(plan.total, len(blocks))
    rms, norms, errors = measure_stacks(update_figures, updates, plan.stacks, 3)
    ranks = sample.effective_rank
    if momentum:
        known = [momentum.get(i, jnp.zeros_like(x)) for i, x in enumerate(updates)]
        (ranks,) = measure_stacks(lambda x: (effective_rank(x),), known, plan.stacks, 1)
    for i, (path, arrays) in enumerate(zip(blocks, recorded, strict=True)):
        if arrays:
            maxima = merge_recordings(arrays, trailing_shape(arrays), path)
            gamma = clip_gamma(maxima, threshold)
            sample = sample._replace(
                max_logit=sample.max_logit.at[i].set(maxima.max()),
                min_gamma=sample.min_gamma.at[i].set(gamma.min()),
                clipped_heads=sample.clipped_heads.at[i].set(jnp.sum(gamma < 1, dtype=jnp.int32)),
            )
    return sample._replace(
        step=count.astype(jnp.int32),
        update_rms=rms,
        spectral_norm=norms,
        orthogonality_error=errors,
        effective_rank=ranks,
    )


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


def _recorded(
    tree: Tree, max_logits: Tree, rules: tuple[Rule, ...] | None
) -> list[tuple[str, list[jax.Array]]]:
    """Returns every selected block, in their order in the tree, with what was recorded for it."""
    named, found = blocks_of(tree, rules)
    selected = [block.path for block in found if block.selected]
    if max_logits is None or not selected:
        return [(path, []) for path in selected]
    maxima = read_maxima(max_logits)
    modules = assign_maxima(found, list(maxima), bool(named.masked))
    return [(path, [x for name in modules[path] for x in maxima[name]]) for path in selected]


def _whole(tree: Any, params: Tree, param_shardings: Any) -> Any:
    """Brings small things whole to every device, where an update leaves them too."""
    shardings = read_shardings(params, param_shardings, warn=False)
    if shardings is None or shardings.inside_manual:
        return tree
    everywhere = NamedSharding(shardings.mesh, PartitionSpec())
    return jax.tree.map(lambda x: place(x, everywhere), tree)
