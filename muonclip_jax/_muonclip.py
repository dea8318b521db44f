"""`muonclip`: the assembly with Kimi K2's settings, and the value that describes it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optax

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, tree_from
from muonclip_jax.clipping.gamma import check_clip_settings
from muonclip_jax.heads.finding import block_rules
from muonclip_jax.newton_schulz import DEFAULT_DTYPE, DEFAULT_EPS, DEFAULT_METHOD, DEFAULT_SET
from muonclip_jax.routing import MatrixRules, as_rules, decay_mask, route_once
from muonclip_jax.sharding import Distribution
from muonclip_jax.transforms import qk_clip, scale_by_muon, scale_by_shape
from muonclip_jax.transforms._checks import (
    check_adam_rate,
    check_fraction,
    check_mask,
    check_non_negative,
    check_rate,
)
from muonclip_jax.transforms._inputs import transformation
from muonclip_jax.transforms._moments import check_moment_dtype, with_checked_moments
from muonclip_jax.transforms._placing import on_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonClipConfig:
    """The settings of `muonclip` as a value: Python values only, frozen, hashable, checked once.

    Attributes are the arguments of `muonclip`, which describes them.

    Raises:
        ValueError: At construction, for a hyperparameter outside its range.
        TypeError: At construction, for a value that cannot be hashed, such as an array.

    Example:
        >>> config = MuonClipConfig(learning_rate=1e-3, qk_clip_threshold=None)
        >>> tx = config.build()
        >>> dataclasses.replace(config, weight_decay=0.0).weight_decay
        0.0
    """

    learning_rate: float | optax.Schedule
    qk_clip_threshold: float | optax.Schedule | None = 100.0
    qk_clip_alpha: float | optax.Schedule = 0.5
    qk_clip_shared_keys: str = "query"
    qk_clip_blocks: Any = None
    weight_decay: float | optax.Schedule = 0.1
    weight_decay_mask: Callable[[optax.Params], Any] | None = None
    beta: float | optax.Schedule = 0.95
    nesterov: bool = True
    consistent_rms: float | None = 0.2
    ns_coeffs: str | Sequence[Any] = DEFAULT_SET
    ns_steps: int | None = None
    ns_method: str = DEFAULT_METHOD
    ns_dtype: Any = DEFAULT_DTYPE
    ns_implementation: str = "xla"
    preconditioning: str | None = None
    eps: float = DEFAULT_EPS
    mu_dtype: Any = None
    adam_learning_rate: float | optax.Schedule | None = None
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    adam_weight_decay: float | optax.Schedule | None = None
    rules: MatrixRules | None = None
    axis_name: str | tuple[str, ...] | None = None
    distribution: Distribution | None = None
    platform: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _as_tuples(getattr(self, field.name)))
        try:
            hash(self)
        except TypeError as error:
            raise TypeError(
                f"MuonClipConfig holds hashable Python values only ({error}). Arrays and traced "
                "values go to muonclip(...) directly."
            ) from error
        self.build()

    def build(self, param_shardings: Any = None) -> optax.GradientTransformationExtraArgs:
        """Builds the transformation.

        Args:
            param_shardings: As in `muonclip`. Shardings hold devices, which belong to a run and not
                to its settings.

        Returns:
            The transformation.
        """
        return muonclip(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            param_shardings=param_shardings,
        )


MuonClipConfig.__init__ = names_known(MuonClipConfig.__init__)


def _as_tuples(value: Any) -> Any:
    """Lists as tuples, so that what was read from a YAML or JSON file can be hashed."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


@names_known
def muonclip(
    learning_rate: ScalarOrSchedule,
    *,
    qk_clip_threshold: ScalarOrSchedule | None = MuonClipConfig.qk_clip_threshold,
    qk_clip_alpha: ScalarOrSchedule = MuonClipConfig.qk_clip_alpha,
    qk_clip_shared_keys: str = MuonClipConfig.qk_clip_shared_keys,
    qk_clip_blocks: Any = MuonClipConfig.qk_clip_blocks,
    weight_decay: ScalarOrSchedule = MuonClipConfig.weight_decay,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    beta: ScalarOrSchedule = MuonClipConfig.beta,
    nesterov: bool = MuonClipConfig.nesterov,
    consistent_rms: ScalarLike | None = MuonClipConfig.consistent_rms,
    ns_coeffs: Any = MuonClipConfig.ns_coeffs,
    ns_steps: int | None = MuonClipConfig.ns_steps,
    ns_method: str = MuonClipConfig.ns_method,
    ns_dtype: Any = MuonClipConfig.ns_dtype,
    ns_implementation: str = MuonClipConfig.ns_implementation,
    preconditioning: str | None = MuonClipConfig.preconditioning,
    eps: ScalarLike = MuonClipConfig.eps,
    mu_dtype: Any = MuonClipConfig.mu_dtype,
    adam_learning_rate: ScalarOrSchedule | None = MuonClipConfig.adam_learning_rate,
    adam_b1: ScalarLike = MuonClipConfig.adam_b1,
    adam_b2: ScalarLike = MuonClipConfig.adam_b2,
    adam_eps: ScalarLike = MuonClipConfig.adam_eps,
    adam_weight_decay: ScalarOrSchedule | None = MuonClipConfig.adam_weight_decay,
    rules: MatrixRules | None = MuonClipConfig.rules,
    param_shardings: Any = None,
    axis_name: str | tuple[str, ...] | None = MuonClipConfig.axis_name,
    distribution: Distribution | None = MuonClipConfig.distribution,
    platform: str | None = MuonClipConfig.platform,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon for matrices, AdamW for the rest, QK-Clip at the end, with Kimi K2's settings.

        W <- W - lr (0.2 sqrt(max(fan_in, fan_out)) O + weight_decay W)
        W_q[h], W_k[h] rescaled where the head's largest logit passed the threshold

    The clip sees the maxima from before the update, so logits overshoot the threshold until the
    next step. Where they must stay under a bound, give 0.85 times the bound as threshold.

    Arguments marked as static shape the program. Under `optax.inject_hyperparams` those of them
    that are given belong in its `static_args`, such as `static_args=("ns_coeffs", "ns_steps")`.

    Args:
        learning_rate: Rate of both groups: a number, a schedule or a traced scalar.
        qk_clip_threshold: The largest attention logit that is let be; None switches the clip off.
            With it on, `update` needs `max_logits=`. A number, a schedule of the step or traced.
        qk_clip_alpha: Exponent of gamma on the query side; the key side has `1 - alpha`.
        qk_clip_shared_keys: What to do where heads share a key (see `qk_clip`).
        qk_clip_blocks: Which attention blocks to clip (see `qk_clip`); None is all of them.
        weight_decay: Decoupled decay of the matrices, multiplied by the rate.
        weight_decay_mask: Tree of bools, or a function from parameters to it; None is everything
            but norms, gains and biases.
        beta: Decay of Muon's momentum; may be a schedule of the number of updates.
        nesterov: Whether Muon's momentum looks one step ahead. Static.
        consistent_rms: RMS of Muon's updates (see `scale_by_shape`); None scales by width.
        ns_coeffs: Newton-Schulz coefficients (see `orthogonalize`). "keller_jordan" gives the five
            steps of Kimi K2's recipe; the default costs a fifth less and comes nearer. Static.
        ns_steps: Number of Newton-Schulz steps (see `orthogonalize`). Static.
        ns_method: How to iterate (see `orthogonalize`). Static.
        ns_dtype: What Newton-Schulz computes in (see `orthogonalize`). Static.
        ns_implementation: Who computes symmetric products (see `orthogonalize`). Static.
        preconditioning: The first rescaling (see `orthogonalize`). Static.
        eps: Term that guards Newton-Schulz against the zero matrix (see `scale_by_muon`).
        mu_dtype: Dtype of the first moments of both groups. Static.
        adam_learning_rate: Rate of the AdamW group; None is `learning_rate`. A number stays as it
            is while a scheduled `learning_rate` decays, and warns.
        adam_b1: Decay of Adam's first moment.
        adam_b2: Decay of Adam's second moment.
        adam_eps: Adam's epsilon.
        adam_weight_decay: Decoupled decay of the AdamW group; None is `weight_decay`.
        rules: `MatrixRules`: who trains which leaf, as which matrices. Static.
        param_shardings: How the parameters lie on a mesh, needed where it has Auto axes (see
            `scale_by_muon`). Static.
        axis_name: Names of mapped axes of `pmap` or `shard_map` whose devices share the matrices
            (see `scale_by_muon`). Static.
        distribution: Who shares the matrices, and bounds on memory (see `Distribution`). Static.
        platform: "cpu", "gpu" or "tpu": what the program is for (see `orthogonalize`). Static.

    Returns:
        The transformation. Its labels are "muon" and "adamw". With the clip on,
        `tx.update(grads, state, params, max_logits=max_logits)`.

    Raises:
        TypeError: At construction for an argument of a wrong type or an unknown name.
        ValueError: At construction for a hyperparameter outside its range; while tracing for a
            leaf that cannot be routed, and for maxima that are missing or fit no attention block.

    Example:
        >>> import jax.numpy as jnp
        >>> query, key = {"kernel": jnp.ones((4, 2, 2))}, {"kernel": jnp.ones((4, 2, 2))}
        >>> params = {"attention": {"query": query, "key": key}}
        >>> tx = muonclip(learning_rate=1e-3)
        >>> max_logits = {"attention": jnp.array([50.0, 400.0])}
        >>> updates, state = tx.update(params, tx.init(params), params, max_logits=max_logits)
        >>> updates["attention"]["query"]["kernel"].shape
        (4, 2, 2)

    References:
        Kimi K2, arXiv 2507.20534, Algorithm 1; Liu et al. 2025, arXiv 2502.16982.
    """
    if qk_clip_threshold is not None:
        check_clip_settings(
            qk_clip_threshold, qk_clip_alpha, qk_clip_shared_keys, "qk_clip_", schedules=True
        )
        block_rules(qk_clip_blocks, "qk_clip_blocks")
    check_rate("learning_rate", learning_rate)
    check_adam_rate(learning_rate, adam_learning_rate)
    check_mask("weight_decay_mask", weight_decay_mask)
    check_non_negative("weight_decay", weight_decay, schedule=True)
    if adam_weight_decay is not None:
        check_non_negative("adam_weight_decay", adam_weight_decay, schedule=True)
    check_fraction("adam_b1", adam_b1, "the decay of Adam's first moment, such as 0.9")
    check_fraction("adam_b2", adam_b2, "the decay of Adam's second moment, such as 0.95")
    check_non_negative("adam_eps", adam_eps)
    check_moment_dtype(mu_dtype, "adam_b1", adam_b1)

    def build(decided: Any) -> optax.GradientTransformationExtraArgs:
        def mask(params: optax.Params) -> Any:
            if weight_decay_mask is None:
                return decay_mask(params, decided)
            return tree_from(weight_decay_mask, params, _is_bool)

        muon = optax.chain(
            scale_by_muon(
                ns_coeffs,
                ns_steps,
                beta,
                eps,
                mu_dtype,
                nesterov=nesterov,
                preconditioning=preconditioning,
                ns_method=ns_method,
                ns_dtype=ns_dtype,
                ns_implementation=ns_implementation,
                rules=decided,
                param_shardings=param_shardings,
                axis_name=axis_name,
                distribution=distribution,
                platform=platform,
            ),
            scale_by_shape(consistent_rms=consistent_rms, rules=decided),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
        adamw = optax.chain(
            with_checked_moments(
                on_mesh(
                    optax.scale_by_adam(b1=adam_b1, b2=adam_b2, eps=adam_eps, mu_dtype=mu_dtype),
                    param_shardings,
                ),
                mu_dtype,
            ),
            optax.add_decayed_weights(
                weight_decay if adam_weight_decay is None else adam_weight_decay, mask
            ),
            optax.scale_by_learning_rate(
                learning_rate if adam_learning_rate is None else adam_learning_rate
            ),
        )
        return optax.multi_transform({"muon": muon, "adamw": adamw}, decided.labels)

    matrix_rules = as_rules(rules)
    build(matrix_rules)  # checks the settings now
    routed = route_once(matrix_rules.resolve, build)
    if qk_clip_threshold is None:
        chained = routed
    else:
        clip = qk_clip(
            qk_clip_threshold,
            qk_clip_alpha,
            shared_keys=qk_clip_shared_keys,
            blocks=qk_clip_blocks,
        )
        chained = on_mesh(optax.chain(routed, clip), param_shardings, moments=False)

    return transformation("muonclip", chained.init, chained.update, one_tree=True)


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool) or getattr(x, "dtype", None) == np.bool_
