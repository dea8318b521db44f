"""The optimizers, assembled from the transformations: `muon` and `muonclip`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree, array_leaves, tree_from
from muonclip_jax.clipping.gamma import check_clip_settings
from muonclip_jax.heads.finding import Blocks, block_rules
from muonclip_jax.newton_schulz import DEFAULT_DTYPE, DEFAULT_EPS, DEFAULT_METHOD, DEFAULT_SET
from muonclip_jax.newton_schulz.coefficients import resolve_coefficients
from muonclip_jax.routing import (
    MatrixRules,
    as_rules,
    decay_mask,
    resolve_specs,
    route_once,
    spec_tree,
)
from muonclip_jax.sharding import Distribution
from muonclip_jax.transforms import qk_clip, scale_by_muon, scale_by_shape
from muonclip_jax.transforms._checks import (
    check_adam_rate,
    check_fraction,
    check_mask,
    check_moment_dtype,
    check_moments,
    check_non_negative,
    check_rate,
    transformation,
)
from muonclip_jax.transforms._orthogonalize_updates import WeightDimNumOrFn
from muonclip_jax.transforms._placing import on_mesh


@names_known
def muonclip(
    learning_rate: ScalarOrSchedule,
    *,
    qk_clip_threshold: ScalarOrSchedule | None = 100.0,
    qk_clip_alpha: ScalarOrSchedule = 0.5,
    qk_clip_shared_keys: str = "query",
    qk_clip_blocks: Blocks = None,
    weight_decay: ScalarOrSchedule = 0.1,
    weight_decay_mask: Tree | Callable[[optax.Params], Tree] | None = None,
    beta: ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    consistent_rms: ScalarLike | None = 0.2,
    ns_coeffs: Any = DEFAULT_SET,
    ns_steps: int | None = None,
    ns_method: str = DEFAULT_METHOD,
    ns_dtype: DTypeLike | None = DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    preconditioning: str | None = None,
    eps: ScalarLike = DEFAULT_EPS,
    mu_dtype: DTypeLike | None = None,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: ScalarLike = 0.9,
    adam_b2: ScalarLike = 0.95,
    adam_eps: ScalarLike = 1e-8,
    adam_weight_decay: ScalarOrSchedule | None = None,
    rules: MatrixRules | None = None,
    param_shardings: Tree = None,
    axis_name: str | tuple[str, ...] | None = None,
    distribution: Distribution | None = None,
    platform: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon for matrices, AdamW for the rest, QK-Clip at the end, with Kimi K2's settings.

        W <- W - lr (0.2 sqrt(max(fan_in, fan_out)) O + weight_decay W)
        W_q[h], W_k[h] scaled down where the head's maximum logit exceeds the threshold

    The clip sees the maxima from before the update, so logits exceed the threshold until the next
    step. To keep them under a bound, give 0.85 times the bound as threshold.

    Rates, decays, `beta`, `qk_clip_threshold` and `qk_clip_alpha` may be numbers, traced scalars or
    schedules of the number of updates, the other numbers traced scalars. What is neither is static:
    where it is given, `optax.inject_hyperparams` needs its name in `static_args`.

    Args:
        learning_rate: Learning rate of both groups.
        qk_clip_threshold: Heads whose maximum logit exceeds this are scaled down; None switches the
            clip off. With it on, `update` needs `max_logits=`.
        qk_clip_alpha: Exponent of gamma on the query side; the key side has `1 - alpha`.
        qk_clip_shared_keys: Rule for keys that several heads share (see `qk_clip`).
        qk_clip_blocks: Which attention blocks to clip (see `qk_clip`); None is all of them.
        weight_decay: Decoupled decay of the matrices, multiplied by the learning rate.
        weight_decay_mask: Tree of bools or a function to one; None is all but norms and biases.
        beta: Decay of Muon's momentum.
        nesterov: Whether Muon's momentum is Nesterov's.
        consistent_rms: RMS of Muon's updates (see `scale_by_shape`); None scales by width.
        ns_coeffs: Newton-Schulz coefficients; the default is the five steps of Kimi K2.
        ns_steps: Number of Newton-Schulz steps (see `orthogonalize`).
        ns_method: Form of the iteration (see `orthogonalize`).
        ns_dtype: Dtype of the products (see `orthogonalize`).
        ns_implementation: "xla" or the name of a kernel (see `orthogonalize`).
        preconditioning: The first rescaling (see `orthogonalize`).
        eps: Guards Newton-Schulz against the zero matrix (see `scale_by_muon`).
        mu_dtype: Dtype of the first moments of both groups; None is the parameter's.
        adam_learning_rate: Learning rate of the AdamW group; None is `learning_rate`.
        adam_b1: Decay of Adam's first moment.
        adam_b2: Decay of Adam's second moment.
        adam_eps: Adam's epsilon.
        adam_weight_decay: Decoupled decay of the AdamW group; None is `weight_decay`.
        rules: `MatrixRules`: which group trains a leaf, and as which matrices.
        param_shardings: Shardings of the parameters, for Auto mesh axes (see `scale_by_muon`).
        axis_name: Mapped axes whose devices share the matrices (see `scale_by_muon`).
        distribution: How devices share the matrices, and bounds on memory (see `Distribution`).
        platform: "cpu", "gpu" or "tpu": what the program is for (see `orthogonalize`).

    Returns:
        The transformation. Its labels are "muon" and "adamw". With the clip on, call
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
    adam_decay = weight_decay if adam_weight_decay is None else adam_weight_decay
    adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    _check_rates(learning_rate, adam_learning_rate, weight_decay, adam_decay, weight_decay_mask)
    adam = _adam(adam_b1, adam_b2, adam_eps, 0.0, mu_dtype, False, param_shardings)

    def build(decided: MatrixRules) -> optax.GradientTransformationExtraArgs:
        def mask(params: optax.Params) -> Tree:
            if weight_decay_mask is None:
                return decay_mask(params, decided)
            return tree_from(weight_decay_mask, params, _is_bool)

        orthogonalize = scale_by_muon(
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
        )
        scale = scale_by_shape(consistent_rms=consistent_rms, rules=decided)
        muon = optax.chain(orthogonalize, scale, *_step(weight_decay, mask, learning_rate))
        adamw = optax.chain(adam, *_step(adam_decay, mask, adam_rate))
        return optax.partition({"muon": muon, "adamw": adamw}, decided.labels)

    matrix_rules = as_rules(rules)
    build(matrix_rules)  # checks the settings now
    tx = route_once(matrix_rules.resolve, build)
    if qk_clip_threshold is not None:
        clip = qk_clip(
            qk_clip_threshold, qk_clip_alpha, shared_keys=qk_clip_shared_keys, blocks=qk_clip_blocks
        )
        tx = on_mesh(optax.chain(tx, clip), param_shardings, moments=False)
    return transformation("muonclip", tx.init, tx.update, one_tree=True)


@names_known
def muon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Any = "keller_jordan",
    ns_steps: int | None = None,
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarLike = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Tree | Callable[[optax.Params], Tree] | None = None,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str | None = None,
    adam_b1: ScalarLike = 0.9,
    adam_b2: ScalarLike = 0.999,
    adam_eps_root: ScalarLike = 0.0,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: WeightDimNumOrFn | None = None,
    consistent_rms: ScalarLike | None = None,
    ns_method: str = DEFAULT_METHOD,
    ns_dtype: DTypeLike | None = DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    rules: MatrixRules | None = None,
    param_shardings: Tree = None,
    axis_name: str | tuple[str, ...] | None = None,
    distribution: Distribution | None = None,
    platform: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon for matrices and NAdamW for the rest: a drop-in for `optax.contrib.muon`.

    The same arguments with the same meaning, and the same trajectory up to the rounding of
    `ns_dtype`: float32 on a CPU, 16 bits on a GPU or TPU. The coefficients are not part of the
    state, and `ns_steps` is static. Arguments from `ns_method` on are not in Optax.

    As in Optax every leaf of rank 2 goes to Muon, Flax's attention biases and embeddings too;
    `muon_weight_dimension_numbers=muonclip_jax.infer_dimension_numbers` routes by what a leaf is.

    Args:
        learning_rate: Learning rate of both groups; a number or a schedule.
        ns_coeffs: A name (Optax's "standard" and "dion" among them), a triple or rows. Static.
        ns_steps: Number of steps; None is five for a triple and all rows. With rows it must be at
            least their number, and all of them run, as in Optax.
        beta: Decay of the momentum; here it may be a schedule.
        eps: Added to the denominators of Newton-Schulz and of Adam, absolute as in Optax.
        weight_decay: Decoupled decay of the Muon group; a number or a schedule.
        weight_decay_mask: Tree of bools, or a function from parameters to it.
        mu_dtype: Dtype of the first moments of both groups.
        nesterov: Whether the momentum of both groups is Nesterov's.
        adaptive: Whether to multiply by the dual norm.
        preconditioning: The first rescaling (see `orthogonalize`).
        adam_b1: Decay of Adam's first moment.
        adam_b2: Decay of Adam's second moment.
        adam_eps_root: Adam's epsilon inside the root.
        adam_weight_decay: Decoupled decay of the Adam group.
        adam_learning_rate: Learning rate of the Adam group; None is `learning_rate`.
        muon_weight_dimension_numbers: Where the matrices are; None in a tree is for Adam.
        consistent_rms: RMS of Muon's updates (see `scale_by_shape`); None scales by width.
        ns_method: Form of the iteration (see `orthogonalize`).
        ns_dtype: Dtype of the products (see `orthogonalize`).
        ns_implementation: "xla" or the name of a kernel (see `orthogonalize`).
        rules: `MatrixRules`, in place of `muon_weight_dimension_numbers`.
        param_shardings: Shardings of the parameters, for Auto mesh axes (see `scale_by_muon`).
        axis_name: Mapped axes whose devices share the matrices (see `scale_by_muon`).
        distribution: How devices share the matrices (see `Distribution`).
        platform: "cpu", "gpu" or "tpu" (see `orthogonalize`).

    Returns:
        The transformation. Its labels are "muon" and "adam".

    Raises:
        TypeError: At construction for an argument of a wrong type or an unknown name.
        ValueError: For a bad hyperparameter, or both ways to say where the matrices are.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.eye(2, 3), "b": jnp.zeros(3)}
        >>> tx = muon(learning_rate=0.02)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> sorted(state.inner_states)
        ['adam', 'muon']

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982.
    """
    _check_rates(
        learning_rate, adam_learning_rate, weight_decay, adam_weight_decay, weight_decay_mask
    )
    check_non_negative("adam_eps_root", adam_eps_root)
    adam = _adam(adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, nesterov, param_shardings)
    if rules is not None and muon_weight_dimension_numbers is not None:
        raise ValueError(
            "muon takes muon_weight_dimension_numbers or rules, got both. Rules can hold any "
            "spec: MatrixRules([(pattern, spec)])."
        )
    given = _every_rank_two_leaf if rules is None else rules.dimension_numbers
    if muon_weight_dimension_numbers is not None:
        given = muon_weight_dimension_numbers

    def decide(params: optax.Params) -> Tree:
        if rules is not None:
            rules.check_all_matched(params)
        return spec_tree(given, params)

    def build(dimension_numbers: Tree) -> optax.GradientTransformationExtraArgs:
        def labels(params: optax.Params) -> Tree:
            specs = resolve_specs(params, dimension_numbers, None)
            found = ["adam" if spec is None else "muon" for _, _, spec in specs]
            return jax.tree.unflatten(jax.tree.structure(params), found)

        orthogonalize = scale_by_muon(
            ns_coeffs,
            _steps(ns_coeffs, ns_steps),
            beta,
            eps,
            mu_dtype,
            nesterov=nesterov,
            adaptive=adaptive,
            preconditioning=preconditioning,
            weight_dimension_numbers=dimension_numbers,
            bias_correction=True,
            ns_method=ns_method,
            ns_dtype=ns_dtype,
            ns_implementation=ns_implementation,
            relative_eps=False,
            param_shardings=param_shardings,
            axis_name=axis_name,
            distribution=distribution,
            platform=platform,
        )
        scale = scale_by_shape(dimension_numbers, consistent_rms)
        adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
        step = _step(weight_decay, weight_decay_mask, learning_rate)
        matrices = optax.chain(orthogonalize, scale, *step)
        others = optax.chain(adam, *_step(adam_weight_decay, None, adam_rate))
        return optax.partition({"muon": matrices, "adam": others}, labels)

    build({})  # checks the settings now
    routed = route_once(decide, build)
    return transformation("muon", routed.init, routed.update, one_tree=True)


def _check_rates(
    learning_rate: ScalarOrSchedule,
    adam_learning_rate: ScalarOrSchedule | None,
    weight_decay: ScalarOrSchedule,
    adam_weight_decay: ScalarOrSchedule,
    mask: Tree,
) -> None:
    check_rate("learning_rate", learning_rate)
    check_adam_rate(learning_rate, adam_learning_rate)
    check_non_negative("weight_decay", weight_decay, schedule=True)
    check_non_negative("adam_weight_decay", adam_weight_decay, schedule=True)
    check_mask("weight_decay_mask", mask)


def _adam(
    b1: ScalarLike,
    b2: ScalarLike,
    eps: ScalarLike,
    eps_root: ScalarLike,
    mu_dtype: DTypeLike | None,
    nesterov: bool,
    param_shardings: Tree,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, with its settings checked and its state placed on a mesh."""
    check_fraction("adam_b1", b1, "the decay of Adam's first moment, such as 0.9")
    check_fraction("adam_b2", b2, "the decay of Adam's second moment, such as 0.95")
    check_non_negative("adam_eps", eps)
    check_moment_dtype(mu_dtype, "adam_b1", b1)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    placed = on_mesh(adam, param_shardings)

    def init_fn(params: optax.Params) -> optax.OptState:
        if mu_dtype is not None:
            check_moments(params, mu_dtype)
        return placed.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, placed.update)


def _step(
    weight_decay: ScalarOrSchedule, mask: Tree, learning_rate: ScalarOrSchedule
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Decoupled decay and the learning rate, the end of a group's chain."""
    decay = optax.add_decayed_weights(weight_decay, mask)
    return decay, optax.scale_by_learning_rate(learning_rate)


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool) or getattr(x, "dtype", None) == np.bool_


def _every_rank_two_leaf(params: optax.Params) -> Any:
    array_leaves(params)
    return jax.tree.map(lambda x: MuonDimensionNumbers() if len(x.shape) == 2 else None, params)


def _steps(ns_coeffs: Any, ns_steps: int | None) -> int | None:
    """Optax's rule: a triple runs `ns_steps` times; rows all run, and are not more than it."""
    if ns_steps is None:
        return None
    rows, source = resolve_coefficients(ns_coeffs)
    is_triple = not isinstance(ns_coeffs, str) and len(np.shape(ns_coeffs)) == 1
    if is_triple or source.repeat_row is not None:
        return ns_steps
    if len(rows) > ns_steps:
        raise ValueError(
            f"ns_coeffs has {len(rows)} rows and ns_steps is {ns_steps}. Pass "
            f"ns_steps={len(rows)} to run them all, or the first {ns_steps} rows."
        )
    return None
