"""`metrics` measures the updates of the transformation that it wraps."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._arguments import check_number, is_concrete, names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree, flatten_with_paths
from muonclip_jax.attention.maxima import finite_max
from muonclip_jax.clipping.gamma import check_clip_settings, clip_gamma
from muonclip_jax.clipping.matching import (
    find_in,
    match_maxima,
    merge_recordings,
    trailing_shape,
)
from muonclip_jax.heads.clips import read_block
from muonclip_jax.heads.finding import Blocks, Rule, block_rules
from muonclip_jax.routing import MatrixRules
from muonclip_jax.sharding import read_shardings
from muonclip_jax.transforms._checks import transformation, value_at
from muonclip_jax.transforms._figures import (
    OF_MATRICES,
    Matrices,
    matrices_of,
    matrix_figures,
)
from muonclip_jax.transforms._placing import replicate

#: Maxima up to this multiple of the threshold do not count as clipped without effect. An effective
#: clip leaves a maximum at the threshold, and one update raises it again by some percent.
_NOTICEABLE = 1.1
#: A maximum falls where it is below this multiple of the lowest one since the block was clipped.
_FALL = 0.99


class MetricsState(NamedTuple):
    """State of `metrics`.

    Attributes:
        count: Updates so far, int32, `()`.
        sample: Attribute of `MuonMetrics` -> its latest value, one array over all matrices or
            attention blocks of the model. `read_metrics` returns them by path.
        lowest: The lowest maximum of each attention block in its current run of clipped updates,
            float32, `(blocks,)`; 0 if the latest update did not clip it.
        inner_state: State of the inner transformation.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    sample: dict[str, jax.Array]
    lowest: jax.Array
    inner_state: Tree


@names_known
def metrics(
    inner: optax.GradientTransformation,
    every: ScalarLike = 100,
    *,
    rules: MatrixRules | None = None,
    qk_clip_threshold: ScalarOrSchedule | None = None,
    qk_clip_blocks: Blocks = None,
    param_shardings: Tree = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures the updates of a transformation without changing them.

    The first update and then every `every`-th one stores a new sample in the state; other updates
    measure no matrices (`lax.cond`). `read_metrics` returns the sample by parameter path. With a
    threshold, every update also counts the consecutive updates in which a block was clipped and its
    maximum did not decrease. Such a clip has no effect, for example because queries and keys are
    normalised after the kernels that it scales.

    The measured update is the output of `inner`: for `muonclip(...)` it includes learning rate,
    decay and clip, for `scale_by_muon()` it is the output of Newton-Schulz. Put `metrics` inside of
    `accumulate` or `optax.MultiSteps`. Under `jax.vmap` over states every call measures. A sample
    costs fewer operations than one step of Newton-Schulz.

    Args:
        inner: The transformation to measure.
        every: Number of updates between samples, at least 1; may be traced.
        rules: `MatrixRules` as in `muonclip`. Static.
        qk_clip_threshold: QK-Clip's threshold, a number or a schedule as given to `muonclip`.
            Infinity records the maxima of a model without the clip. With None, attention is not
            measured.
        qk_clip_blocks: As for `muonclip`. Static.
        param_shardings: As for `scale_by_muon`. Required on a mesh with Auto axes if `init` runs
            inside `jit`. Static.

    Returns:
        A transformation with state `MetricsState` that passes all extra arguments to `inner`. With
        a threshold, `update` needs `max_logits=`.

    Raises:
        TypeError: If `inner` is not a gradient transformation.
        ValueError: If `every` or a setting of the clip is out of range; from `update`, if maxima
            are missing or do not match the attention blocks.

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
    hint = "It is the number of updates from one sample to the next."
    check_number("every", every, "an integer from 1", hint)
    threshold = math.inf if qk_clip_threshold is None else qk_clip_threshold
    check_clip_settings(threshold, 0.5, "query", prefix="qk_clip_", schedules=True)
    clips = not (is_concrete(threshold) and threshold == math.inf)
    attention = block_rules(qk_clip_blocks, "qk_clip_blocks")
    measured = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> MetricsState:
        blocks = 0
        if qk_clip_threshold is not None:
            blocks = sum(block.selected for block in find_in(params, attention, whole=False)[0])
        matrices = sum(matrices_of(params, rules).counts.values())
        # Every array is made by itself: a state whose leaves share memory cannot be donated.
        sample = {
            "step": jnp.full([], -1, jnp.int32),
            **{name: jnp.zeros(matrices, jnp.float32) for name in OF_MATRICES},
            "max_logit": jnp.zeros(blocks, jnp.float32),
            "min_gamma": jnp.ones(blocks, jnp.float32),
            "clipped_heads": jnp.zeros(blocks, jnp.int32),
            "clips_without_effect": jnp.zeros(blocks, jnp.int32),
        }
        small = (jnp.zeros([], jnp.int32), sample, jnp.zeros(blocks, jnp.float32))
        shardings = read_shardings(params, param_shardings, warn=False)
        return MetricsState(*replicate(small, shardings), measured.init(params))

    def update_fn(
        updates: optax.Updates, state: Tree, params: optax.Params | None = None, **extra: object
    ) -> tuple[optax.Updates, MetricsState]:
        updates, inner_state = measured.update(updates, state.inner_state, params, **extra)
        matrices, leaves = matrices_of(updates, rules), jax.tree.leaves(updates)
        blocks, maxima = (), []
        if qk_clip_threshold is not None:
            blocks, maxima = _recordings(updates, extra.get("max_logits"), attention, clips)
        program: Callable[..., Any] = functools.partial(_next_sample, matrices, blocks)
        shardings = read_shardings(updates, param_shardings, warn=False)
        if shardings is not None and not shardings.inside_manual:
            # On Explicit mesh axes JAX asks how every product is sharded; here the partitioner
            # decides.
            everywhere = NamedSharding(shardings.mesh, PartitionSpec())
            program = jax.sharding.auto_axes(program, out_sharding=everywhere)
        sample, lowest = program(
            state.count % every == 0,
            (state.count, dict(state.sample), state.lowest),
            [leaves[position] for _, position in matrices.leaves],
            _momentum(inner_state, matrices.counts),
            maxima,
            value_at(threshold, state.count),
        )
        count = jnp.asarray(optax.safe_increment(jnp.asarray(state.count)))
        return updates, MetricsState(*replicate((count, sample, lowest), shardings), inner_state)

    return transformation("metrics", init_fn, update_fn)


# Outside of jit, a bare `cond` would be compiled anew on every call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_sample(
    matrices: Matrices,
    blocks: tuple[tuple[str, tuple[int, ...]], ...],
    now: jax.Array,
    state: tuple[jax.Array, dict[str, jax.Array], jax.Array],
    updates: Sequence[jax.Array],
    momentum: dict[str, jax.Array],
    recorded: Sequence[list[jax.Array]],
    threshold: ScalarLike,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The sample, a new one if `now`, and the lowest maximum of each block that is clipped."""
    count, old, lowest = state
    without_effect = old["clips_without_effect"]
    sample = old | {"step": count.astype(jnp.int32)}
    if blocks:
        pairs = zip(blocks, recorded, strict=True)
        maxima = [merge_recordings(arrays, shape, path) for (path, shape), arrays in pairs]
        gammas = [clip_gamma(x, threshold) for x in maxima]
        sample |= {
            "max_logit": jnp.stack([x.max().astype(jnp.float32) for x in maxima]),
            "min_gamma": jnp.stack([gamma.min().astype(jnp.float32) for gamma in gammas]),
            "clipped_heads": jnp.stack([jnp.sum(gamma < 1, dtype=jnp.int32) for gamma in gammas]),
        }
        largest = jnp.stack([finite_max(x, range(x.ndim)).astype(jnp.float32) for x in maxima])
        noticed = _NOTICEABLE * jnp.asarray(threshold, jnp.float32)
        clipped = clip_gamma(largest, noticed) < 1
        fell = (lowest == 0) | (largest < _FALL * lowest)
        lowest = jnp.where(clipped, jnp.where(fell, largest, lowest), 0)
        without_effect = jnp.where(clipped & ~fell, without_effect + 1, 0)
    sample = {name: jnp.where(now, x, old[name]) for name, x in sample.items()}
    sample |= jax.lax.cond(
        now,
        lambda: matrix_figures(matrices, updates, momentum),
        lambda: {name: old[name] for name in OF_MATRICES},
    )
    return sample | {"clips_without_effect": without_effect}, lowest


def _recordings(
    tree: Tree, max_logits: Tree, rules: tuple[Rule, ...] | None, clips: bool
) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], list[list[jax.Array]]]:
    """Path and shape `(*stack, heads)` of every selected block, and its recorded maxima.

    If the blocks are clipped, their kernels give the shape; otherwise they need not be readable.
    """
    found, masked = find_in(tree, rules, whole=False)
    selected = [block for block in found if block.selected]
    if not selected:
        return (), []
    if max_logits is None:
        raise ValueError(
            "metrics has a qk_clip_threshold, but update got no maxima. Call tx.update("
            "grads, state, params, max_logits=max_logits), or leave qk_clip_threshold out of "
            "metrics(...)."
        )
    matched = match_maxima(found, max_logits, masked, rules)
    maxima = [matched[block.path] for block in selected]
    shapes = [trailing_shape(recorded) for recorded in maxima]
    if clips:
        blocks = zip(selected, shapes, strict=True)
        shapes = [read_block(block, shape).maxima_shape for block, shape in blocks]
    return tuple((x.path, shape) for x, shape in zip(selected, shapes, strict=True)), maxima


def _momentum(state: Tree, paths: Iterable[str]) -> dict[str, jax.Array]:
    """The momentum of the leaves at these paths, wherever in the state it is."""

    def has_momentum(node: object) -> bool:
        # Optax's word for it, in the states of its own Muon and of Adam too.
        return isinstance(node, tuple) and "mu" in getattr(node, "_fields", ())

    nodes = filter(has_momentum, jax.tree.leaves(state, is_leaf=has_momentum))
    found = [dict(flatten_with_paths(node.mu)[0]) for node in nodes]
    return {path: mu[path] for path in paths for mu in reversed(found) if path in mu}
