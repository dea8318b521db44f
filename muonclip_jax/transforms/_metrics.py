"""`metrics` measures the updates of the transformation that it wraps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._arguments import is_concrete, names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree, flatten_with_paths
from muonclip_jax.attention.maxima import finite_max
from muonclip_jax.clipping.gamma import check_clip_settings, clip_gamma, is_over
from muonclip_jax.clipping.matching import (
    match_maxima,
    merge_recordings,
    named_leaves,
    trailing_shape,
)
from muonclip_jax.heads.clips import read_block
from muonclip_jax.heads.finding import Blocks, FoundBlock, Rule, block_rules, find_blocks
from muonclip_jax.routing import MatrixRules
from muonclip_jax.sharding import read_shardings
from muonclip_jax.transforms._checks import check_every, transformation, value_at
from muonclip_jax.transforms._figures import (
    Matrices,
    effective_rank,
    matrices_of,
    measure,
    update_figures,
)
from muonclip_jax.transforms._placing import replicate

#: Maxima up to this multiple of the threshold do not count as clipped without effect. An effective
#: clip leaves a maximum at the threshold, and one update raises it again by some percent.
_NOTICEABLE = 1.1
#: A maximum falls where it is below this multiple of the lowest one since the block was clipped.
_FALL = 0.99
#: Figures of matrices; the others are of attention blocks.
OF_MATRICES = ("update_rms", "spectral_norm", "orthogonality_error", "effective_rank")


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
    inner_state: Any


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
    check_every(every, "the number of updates from one sample to the next")
    if qk_clip_threshold is not None:
        check_clip_settings(qk_clip_threshold, 0.5, "query", prefix="qk_clip_", schedules=True)
    attention = block_rules(qk_clip_blocks, "qk_clip_blocks")
    measured = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> MetricsState:
        blocks = 0
        if qk_clip_threshold is not None:
            blocks = sum(block.selected for block in blocks_of(params, attention)[0])
        matrices = sum(matrices_of(params, rules).counts)
        state = (
            jnp.zeros([], jnp.int32),
            # Every array is made by itself: a state whose leaves share memory cannot be donated.
            {
                "step": jnp.full([], -1, jnp.int32),
                **{name: jnp.zeros(matrices, jnp.float32) for name in OF_MATRICES},
                "max_logit": jnp.zeros(blocks, jnp.float32),
                "min_gamma": jnp.ones(blocks, jnp.float32),
                "clipped_heads": jnp.zeros(blocks, jnp.int32),
                "clips_without_effect": jnp.zeros(blocks, jnp.int32),
            },
            jnp.zeros(blocks, jnp.float32),
        )
        state = replicate(state, read_shardings(params, param_shardings, warn=False))
        return MetricsState(*state, measured.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MetricsState]:
        updates, inner_state = measured.update(updates, state.inner_state, params, **extra_args)
        shardings = read_shardings(updates, param_shardings, warn=False)

        def run(function: Callable[..., Any], *operands: Any) -> Any:
            # On Explicit mesh axes JAX asks how every product is sharded; here the partitioner
            # decides.
            if shardings is not None and not shardings.inside_manual:
                everywhere = NamedSharding(shardings.mesh, PartitionSpec())
                function = jax.sharding.auto_axes(function, out_sharding=everywhere)
            return function(*operands)

        matrices, leaves = matrices_of(updates, rules), jax.tree.leaves(updates)
        momentum = _momentum(inner_state, [path for path, _ in matrices.positions])
        operands = ([leaves[position] for _, position in matrices.positions], momentum)
        sample, lowest = dict(state.sample), state.lowest
        old = {name: sample[name] for name in OF_MATRICES}
        now = state.count % every == 0
        if isinstance(now, Tracer):
            measured_now = functools.partial(run, functools.partial(_matrix_figures, matrices))
            sample |= jax.lax.cond(now, measured_now, lambda *_: old, *operands)
        elif now:  # outside of jit, a cond would be compiled anew on every call
            sample |= run(functools.partial(_matrix_figures, matrices), *operands)
        of_now = {"step": state.count.astype(jnp.int32)}
        if qk_clip_threshold is not None:
            clips = not (is_concrete(qk_clip_threshold) and qk_clip_threshold == jnp.inf)
            recorded = _recorded(updates, extra_args.get("max_logits"), attention, clips)
            blocks = tuple((path, shape) for path, shape, _ in recorded)
            figures, lowest, sample["clips_without_effect"] = run(
                functools.partial(_block_figures, blocks),
                [arrays for *_, arrays in recorded],
                value_at(qk_clip_threshold, state.count),
                lowest,
                sample["clips_without_effect"],
            )
            of_now |= figures
        sample |= {name: jnp.where(now, x, sample[name]) for name, x in of_now.items()}
        count = jnp.asarray(optax.safe_increment(jnp.asarray(state.count)))
        return updates, MetricsState(*replicate((count, sample, lowest), shardings), inner_state)

    return transformation("metrics", init_fn, update_fn)


@functools.partial(jax.jit, static_argnums=0)
def _matrix_figures(
    matrices: Matrices, updates: Sequence[jax.Array], momentum: dict[int, jax.Array]
) -> dict[str, jax.Array]:
    rms, norms, errors = measure(update_figures, updates, matrices)
    ranks = jnp.zeros_like(rms)
    if momentum:
        known = [momentum.get(i, jnp.zeros_like(x)) for i, x in enumerate(updates)]
        (ranks,) = measure(effective_rank, known, matrices)
    return dict(zip(OF_MATRICES, (rms, norms, errors, ranks), strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _block_figures(
    blocks: tuple[tuple[str, tuple[int, ...]], ...],
    recorded: Sequence[Sequence[jax.Array]],
    threshold: ScalarLike,
    lowest: jax.Array,
    without_effect: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Figures of each block, and how long its clip has not lowered its maximum."""
    if not blocks:
        return {}, lowest, without_effect
    maxima = [
        merge_recordings(arrays, shape, path)
        for (path, shape), arrays in zip(blocks, recorded, strict=True)
    ]
    gammas = [clip_gamma(x, threshold) for x in maxima]
    finite = [finite_max(x, range(x.ndim)) for x in maxima]
    largest = jnp.stack([x.astype(jnp.float32) for x in finite])
    clipped = is_over(largest, _NOTICEABLE * jnp.asarray(threshold, jnp.float32))
    fell = (lowest == 0) | (largest < _FALL * lowest)
    figures = {
        "max_logit": jnp.stack([x.max().astype(jnp.float32) for x in maxima]),
        "min_gamma": jnp.stack([gamma.min().astype(jnp.float32) for gamma in gammas]),
        "clipped_heads": jnp.stack([jnp.sum(gamma < 1, dtype=jnp.int32) for gamma in gammas]),
    }
    lowest = jnp.where(clipped, jnp.where(fell, largest, lowest), 0)
    return figures, lowest, jnp.where(clipped & ~fell, without_effect + 1, 0)


def blocks_of(tree: Tree, rules: tuple[Rule, ...] | None) -> tuple[list[FoundBlock], list[str]]:
    """The attention blocks of a tree and what is masked in it; nothing of an empty tree."""
    named = named_leaves(tree)
    if not named.paths:
        return [], []
    return find_blocks(named.by_path, rules, strict=not named.masked), list(named.masked)


def _recorded(
    tree: Tree, max_logits: Tree, rules: tuple[Rule, ...] | None, clips: bool
) -> list[tuple[str, tuple[int, ...], list[jax.Array]]]:
    """Path, shape `(*stack, heads)` and recordings of every selected block.

    The shape is read off the kernels where a clip counts heads by it; a model that is not clipped
    need not have kernels that can be.
    """
    found, masked = blocks_of(tree, rules)
    selected = [block for block in found if block.selected]
    if selected and max_logits is None:
        raise ValueError(
            "metrics has a qk_clip_threshold, but update got no maxima. Call tx.update("
            "grads, state, params, max_logits=max_logits), or leave qk_clip_threshold out of "
            "metrics(...)."
        )
    matched = match_maxima(found, max_logits, masked, rules) if selected else {}
    shapes = [trailing_shape(matched[block.path]) for block in selected]
    if clips:
        shapes = [
            read_block(x, shape).maxima_shape for x, shape in zip(selected, shapes, strict=True)
        ]
    return [(x.path, shape, matched[x.path]) for x, shape in zip(selected, shapes, strict=True)]


def _momentum(state: Any, paths: Sequence[str]) -> dict[int, jax.Array]:
    """The momentum of the leaves at these paths, by number, wherever in the state it is."""
    found: dict[str, jax.Array] = {}
    for node in jax.tree.leaves(state, is_leaf=_has_momentum):
        if _has_momentum(node):
            for path, leaf in flatten_with_paths(node.mu)[0]:
                found.setdefault(path, leaf)
    return {i: found[path] for i, path in enumerate(paths) if path in found}


def _has_momentum(node: Any) -> bool:
    # Optax's word for it, in the states of its own Muon and of Adam too.
    return isinstance(node, tuple) and "mu" in getattr(node, "_fields", ())
