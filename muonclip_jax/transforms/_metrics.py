"""`metrics` measures the updates of the transformation that it wraps; `read_metrics` reads them."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._arguments import check_number, is_concrete, names_known, value_at
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree, flatten_with_paths
from muonclip_jax.attention.maxima import finite_max
from muonclip_jax.clipping.gamma import check_clip_settings, clip_gamma
from muonclip_jax.clipping.matching import find_in, match_maxima, merge_recordings
from muonclip_jax.heads.clips import read_block
from muonclip_jax.heads.finding import Blocks, Rule, block_rules
from muonclip_jax.routing import MatrixRules
from muonclip_jax.transforms._figures import (
    OF_MATRICES,
    Matrices,
    MetricsState,
    MuonMetrics,
    matrices_of,
    matrix_figures,
)
from muonclip_jax.transforms._states import (
    check_inner,
    mesh_shardings,
    place_state,
    transformation,
)

#: Maxima up to this multiple of the threshold do not count as clipped without effect. An effective
#: clip leaves a maximum at the threshold, and one update raises it again by some percent.
_NOTICEABLE = 1.1
#: A maximum falls where it is below this multiple of the lowest one since the block was clipped.
_FALL = 0.99


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
        >>> from muonclip_jax import read_metrics, scale_by_muon
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
    measured = check_inner("metrics", inner)
    hint = "It is the number of updates from one sample to the next."
    check_number("every", every, "an integer from 1", hint)
    threshold = math.inf if qk_clip_threshold is None else qk_clip_threshold
    check_clip_settings(threshold, 0.5, "query", prefix="qk_clip_", schedules=True)
    clips = not (is_concrete(threshold) and threshold == math.inf)
    attention = block_rules(qk_clip_blocks, "qk_clip_blocks")

    def init(params: Tree) -> MetricsState:
        blocks = 0 if qk_clip_threshold is None else len(_selected(params, attention))
        matrices = sum(matrices_of(params, rules)[0].counts)
        zeros, none = functools.partial(jax.ShapeDtypeStruct, (blocks,)), jnp.zeros([], jnp.int32)
        sample = {
            "step": none - 1,
            **dict.fromkeys(OF_MATRICES, jax.ShapeDtypeStruct((matrices,), jnp.float32)),
            "max_logit": zeros(jnp.float32),
            "min_gamma": jnp.ones(blocks, jnp.float32),
            "clipped_heads": zeros(jnp.int32),
            "clips_without_effect": zeros(jnp.int32),
        }
        state = (none, sample, zeros(jnp.float32))
        shardings = mesh_shardings(params, param_shardings)
        count, sample, lowest = place_state(state, params, shardings)
        return MetricsState(count, sample, lowest, measured.init(params))

    def update(updates: Tree, state: Tree, params: Tree = None, **extra: Any) -> tuple[Tree, Tree]:
        updates, inner_state = measured.update(updates, state.inner_state, params, **extra)
        matrices, leaves = matrices_of(updates, rules)
        maxima: list[jax.Array] = []
        if qk_clip_threshold is not None:
            maxima = _maxima(updates, extra.get("max_logits"), attention, clips)
        program: Any = functools.partial(_next_sample, matrices)
        shardings = mesh_shardings(updates, param_shardings)
        if shardings is not None:
            # On Explicit mesh axes JAX would ask how every product is sharded.
            everywhere = NamedSharding(shardings.mesh, PartitionSpec())
            program = jax.sharding.auto_axes(program, out_sharding=everywhere)
        state = (state.count, dict(state.sample), state.lowest)
        momentum, now = _momentum(inner_state, matrices.paths), value_at(threshold, state[0])
        state = program(state, every, leaves, momentum, maxima, now)
        count, sample, lowest = place_state(state, updates, shardings)
        return updates, MetricsState(count, sample, lowest, inner_state)

    return transformation("metrics", init, update)


# Outside of jit, a bare `cond` would be compiled anew on every call.
@functools.partial(jax.jit, static_argnums=0)
def _next_sample(
    matrices: Matrices,
    state: tuple[jax.Array, dict[str, jax.Array], jax.Array],
    every: ScalarLike,
    updates: Sequence[jax.Array],
    momentum: dict[str, jax.Array],
    maxima: Sequence[jax.Array],
    threshold: ScalarLike,
) -> Tree:
    """The count, the sample and the lowest maximum of each clipped block, after one more update."""
    count, old, lowest = state
    now, without_effect = count % every == 0, old["clips_without_effect"]
    sample = old | {"step": count.astype(jnp.int32)}

    def stacked(values: Iterable[jax.Array], dtype: str = "float32") -> jax.Array:
        return jnp.stack([x.astype(dtype) for x in values])

    if maxima:
        gammas = [clip_gamma(x, threshold) for x in maxima]
        sample["max_logit"] = stacked(x.max() for x in maxima)
        sample["min_gamma"] = stacked(gamma.min() for gamma in gammas)
        sample["clipped_heads"] = stacked(((gamma < 1).sum() for gamma in gammas), "int32")
        largest = stacked(finite_max(x, range(x.ndim)) for x in maxima)
        noticed = _NOTICEABLE * jnp.asarray(threshold, jnp.float32)
        clipped = clip_gamma(largest, noticed) < 1
        fell = (lowest == 0) | (largest < _FALL * lowest)
        lowest = jnp.where(clipped, jnp.where(fell, largest, lowest), 0)
        without_effect = jnp.where(clipped & ~fell, without_effect + 1, 0)
    sample |= jax.lax.cond(
        now,
        lambda: matrix_figures(matrices, updates, momentum),
        lambda: {name: old[name] for name in OF_MATRICES},
    )
    sample = {name: jnp.where(now, x, old[name]) for name, x in sample.items()}
    sample["clips_without_effect"] = without_effect
    return optax.safe_increment(count), sample, lowest


def _selected(tree: Tree, rules: tuple[Rule, ...] | None) -> list[str]:
    """Paths of the selected attention blocks."""
    return [block.path for block in find_in(tree, rules, whole=False)[0] if block.selected]


def _maxima(
    tree: Tree, max_logits: Tree, rules: tuple[Rule, ...] | None, clips: bool
) -> list[jax.Array]:
    """The maxima of each selected block; if blocks are clipped, their kernels give the shape."""
    found, frozen = find_in(tree, rules, whole=False)
    selected = [block for block in found if block.selected]
    if not selected:
        return []
    if max_logits is None:
        raise ValueError(
            "metrics has a qk_clip_threshold, but update got no maxima. Call tx.update("
            "grads, state, params, max_logits=max_logits), or leave qk_clip_threshold out of "
            "metrics(...)."
        )
    recorded, given = match_maxima(found, max_logits, frozen, rules)
    given |= {b.path: [read_block(b, *given[b.path]).maxima_shape] for b in selected if clips}
    return [merge_recordings(recorded[path], shapes[0]) for path, shapes in given.items()]


def _momentum(state: Tree, paths: Sequence[str]) -> dict[str, jax.Array]:
    """The momentum of the leaves at these paths, wherever in the state it is."""
    # Optax's word for it, in the states of its own Muon and of Adam too.
    fields = optax.tree.get_all_with_path(
        state, "mu", lambda path, _: isinstance(path[-1], optax.tree_utils.NamedTupleKey)
    )
    found = [dict(flatten_with_paths(mu)[0]) for _, mu in fields]
    return {path: mu[path] for path in paths for mu in reversed(found) if path in mu}


def read_metrics(
    state: Tree,
    params: Tree,
    *,
    rules: MatrixRules | None = None,
    qk_clip_blocks: Blocks = None,
) -> MuonMetrics:
    """Finds the latest sample of `metrics` in an optimizer state and returns it by path.

    Works inside and outside of `jit`.

    Args:
        state: The state of any chain that contains `metrics` once.
        params: The parameters; only paths and shapes are used.
        rules: As given to `metrics`.
        qk_clip_blocks: As given to `metrics`.

    Returns:
        The metrics by path.

    Raises:
        ValueError: If the state does not contain `metrics` exactly once, or its sample does not
            match the matrices and blocks of `params`.

    Example:
        >>> import optax
        >>> params = {"dense": {"kernel": jnp.eye(4, 16)}, "bias": jnp.ones(16)}
        >>> from muonclip_jax import metrics
        >>> tx = metrics(optax.sgd(0.1), every=1)
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> float(read_metrics(state, params).spectral_norm["dense/kernel"][0])
        0.10000000149011612
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MetricsState))
    found = [node for node in nodes if isinstance(node, MetricsState)]
    if len(found) != 1:
        raise ValueError(
            f"The optimizer state has {len(found)} states of metrics, expected one. Write "
            "tx = muonclip_jax.metrics(muonclip_jax.muonclip(...)); if there are several, give the "
            "state of one of them."
        )
    # As arrays, where a library has boxed them.
    sample = {name: jnp.asarray(x) for name, x in found[0].sample.items()}
    matrices, _ = matrices_of(params, rules)
    blocks: list[str] = []
    if sample["max_logit"].size:
        blocks = _selected(params, block_rules(qk_clip_blocks, "qk_clip_blocks"))
    have = (sample["update_rms"].size, sample["max_logit"].size)
    if have != (sum(matrices.counts), len(blocks)):
        raise ValueError(
            f"The state has metrics of {have[0]} matrices and {have[1]} attention blocks, and "
            f"params have {sum(matrices.counts)} and {len(blocks)} by these rules. Give "
            "read_metrics the parameters of this optimizer, and the same rules= and "
            "qk_clip_blocks= as metrics has."
        )
    step, bounds = sample.pop("step"), np.cumsum(matrices.counts)[:-1]
    figures = {
        name: dict(zip(matrices.paths, jnp.split(x, bounds), strict=False))
        if name in OF_MATRICES
        else dict(zip(blocks, x, strict=True))
        for name, x in sample.items()
    }
    return MuonMetrics(step, **figures)
