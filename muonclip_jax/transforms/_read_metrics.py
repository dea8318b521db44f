"""`read_metrics` returns the measurements of `metrics` by parameter path."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax._tree import Tree
from muonclip_jax.clipping.matching import find_in
from muonclip_jax.heads.finding import Blocks, block_rules
from muonclip_jax.routing import MatrixRules
from muonclip_jax.transforms._figures import OF_MATRICES, matrices_of
from muonclip_jax.transforms._metrics import MetricsState


class MuonMetrics(NamedTuple):
    """The measurements of `metrics` at one update. The structure depends only on shapes.

    Attributes:
        step: Index of the measured update, from 0; -1 if there is none yet.
        update_rms: Path of each leaf that Muon trains -> root mean square of the update, one number
            per matrix of the leaf, `(matrices,)`, float32.
        spectral_norm: Path -> largest singular value of each matrix of the update, by 64 steps of
            the power iteration.
        orthogonality_error: Path -> distance of each matrix of the update from a multiple of an
            orthogonal one: with singular values `s`, the standard deviation of `s^2 / mean(s^2)`;
            1 for the zero matrix.
        effective_rank: Path -> effective rank of each matrix of the momentum,
            `(sum s^2)^2 / sum s^4`; 0 if there is no momentum.
        max_logit: Attention block -> maximum logit over its heads and stacked layers, `()`; empty
            without a threshold.
        min_gamma: Block -> smallest factor of QK-Clip; 1 if nothing was clipped.
        clipped_heads: Block -> number of clipped heads, over all its layers.
        clips_without_effect: Block -> consecutive updates, up to the latest, in which it was
            clipped and its maximum did not decrease; more than a few tens mean that the clip has no
            effect.
    """

    step: jax.Array
    update_rms: dict[str, jax.Array]
    spectral_norm: dict[str, jax.Array]
    orthogonality_error: dict[str, jax.Array]
    effective_rank: dict[str, jax.Array]
    max_logit: dict[str, jax.Array]
    min_gamma: dict[str, jax.Array]
    clipped_heads: dict[str, jax.Array]
    clips_without_effect: dict[str, jax.Array]

    def scalars(self, prefix: str = "muon", *, leaves: bool = True) -> dict[str, jax.Array]:
        """Returns flat scalars for TensorBoard, Weights & Biases or a JSON line.

        Several matrices or blocks are combined by the root mean square (`update_rms`), the maximum
        (`spectral_norm`, `orthogonality_error`, `max_logit`, `clips_without_effect`), the mean
        (`effective_rank`), the minimum (`min_gamma`) or the sum (`clipped_heads`).

        Args:
            prefix: First part of every name.
            leaves: Whether to add the values of each leaf and each attention block.

        Returns:
            "prefix/update_rms" and so on for the whole model, and with `leaves`
            "prefix/update_rms/path/of/leaf". Metrics without entries are left out.

        Example:
            >>> none = {}
            >>> figures = MuonMetrics(jnp.asarray(7), {"w": jnp.ones(2)}, {"w": jnp.arange(2.0)},
            ...     none, none, none, none, none, none)
            >>> {name: float(value) for name, value in figures.scalars().items()}
            {'muon/update_rms': 1.0, 'muon/update_rms/w': 1.0, \
'muon/spectral_norm': 1.0, 'muon/spectral_norm/w': 1.0}
        """
        flat: dict[str, jax.Array] = {}
        for name, reduce in _REDUCTIONS.items():
            by_path: dict[str, jax.Array] = getattr(self, name)
            arrays = {path: jnp.ravel(x) for path, x in by_path.items() if x.size}
            if not arrays:
                continue
            flat[f"{prefix}/{name}"] = reduce(jnp.concatenate(list(arrays.values())))
            for path, x in arrays.items() if leaves else ():
                flat[f"{prefix}/{name}/{path or 'root'}"] = reduce(x)
        return flat


#: What stands for several matrices or blocks.
_REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "update_rms": lambda x: jnp.sqrt(jnp.mean(x**2)),
    "spectral_norm": jnp.max,
    "orthogonality_error": jnp.max,
    "effective_rank": jnp.mean,
    "max_logit": jnp.max,
    "min_gamma": jnp.min,
    "clipped_heads": jnp.sum,
    "clips_without_effect": jnp.max,
}


def read_metrics(
    state: Tree,
    params: Tree,
    *,
    rules: MatrixRules | None = None,
    qk_clip_blocks: Blocks = None,
) -> MuonMetrics:
    """Finds the latest sample of `metrics` in an optimizer state and returns it by path.

    Works inside and outside of `jit`, and copies nothing to the host.

    Args:
        state: The state of any chain that contains `metrics` once.
        params: The parameters; only paths and shapes are used.
        rules: As given to `metrics`.
        qk_clip_blocks: As given to `metrics`.

    Returns:
        The metrics by path.

    Raises:
        ValueError: If the state contains no `metrics` or more than one, or the sample does not
            match the matrices and blocks of `params` under these rules.

    Example:
        >>> import optax
        >>> params = {"dense": {"kernel": jnp.eye(4, 16)}, "bias": jnp.ones(16)}
        >>> from muonclip_jax.transforms import metrics
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
    counts = matrices_of(params, rules).counts
    blocks: list[str] = []
    if sample["max_logit"].size:
        known, _ = find_in(params, block_rules(qk_clip_blocks, "qk_clip_blocks"), whole=False)
        blocks = [block.path for block in known if block.selected]
    have = (sample["update_rms"].size, sample["max_logit"].size)
    if have != (sum(counts.values()), len(blocks)):
        raise ValueError(
            f"The state has metrics of {have[0]} matrices and {have[1]} attention blocks, and "
            f"params have {sum(counts.values())} and {len(blocks)} by these rules. Give "
            "read_metrics the parameters of this optimizer, and the same rules= and "
            "qk_clip_blocks= as metrics has."
        )
    step, bounds = sample.pop("step"), np.cumsum(list(counts.values()))[:-1]
    figures = {
        name: dict(zip(counts, jnp.split(x, bounds), strict=False))
        if name in OF_MATRICES
        else dict(zip(blocks, x, strict=True))
        for name, x in sample.items()
    }
    return MuonMetrics(step, **figures)
