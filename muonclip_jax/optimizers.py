"""The optimizers, assembled from the transformations: `muon` and `muonclip`."""

from __future__ import annotations  # so that help() shows the names of types

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._arguments import check_decay, check_number, check_rates, names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree, array_leaves, tree_from
from muonclip_jax.clipping.gamma import check_clip_settings
from muonclip_jax.heads.finding import Blocks, block_rules
from muonclip_jax.newton_schulz import coefficients
from muonclip_jax.newton_schulz.coefficients import Coefficients
from muonclip_jax.routing import (
    MatrixRules,
    as_rules,
    decay_mask,
    resolve_specs,
)
from muonclip_jax.routing.labels import route_once, spec_tree
from muonclip_jax.sharding.mesh_shardings import Distribution
from muonclip_jax.transforms._matrix_axes import WeightDimNumOrFn, scale_by_shape
from muonclip_jax.transforms._qk_clip import qk_clip
from muonclip_jax.transforms._scale_by_muon import scale_by_muon
from muonclip_jax.transforms._states import check_moments, on_mesh, transformation


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
    ns_coeffs: Coefficients = coefficients.DEFAULT_SET,
    ns_steps: int | None = None,
    ns_method: str = coefficients.DEFAULT_METHOD,
    ns_dtype: DTypeLike | None = coefficients.DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    preconditioning: str | None = None,
    eps: ScalarLike = coefficients.DEFAULT_EPS,
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

    The clip uses the maxima from before the update, so logits exceed the threshold until the next
    step. To keep them under a bound, set the threshold to 0.85 times the bound.

    Learning rates, weight decays, `beta`, `qk_clip_threshold` and `qk_clip_alpha` may be numbers,
    traced scalars or schedules of the update count; other numbers may be traced. All other
    arguments are static: if given, list them in `static_args` of `optax.inject_hyperparams`.

    Args:
        learning_rate: Learning rate of both groups. AdamW's, 3e-4 to 2e-3, and up to 8 times that.
        qk_clip_threshold: Heads whose maximum logit exceeds this are scaled down; None switches the
            clip off. With it on, `update` needs `max_logits=`.
        qk_clip_alpha: Exponent of gamma for queries; the exponent for keys is `1 - alpha`.
        qk_clip_shared_keys: Rule for keys that several heads share (see `qk_clip`).
        qk_clip_blocks: Which attention blocks to clip (see `qk_clip`); None clips all of them.
        weight_decay: Decoupled decay of the matrices, multiplied by the learning rate.
        weight_decay_mask: Pytree of bools, or a function that returns one; None decays everything
            except norms, gains and biases.
        beta: Decay rate of Muon's momentum.
        nesterov: Whether Muon uses Nesterov momentum.
        consistent_rms: RMS of Muon's updates; None scales by `sqrt(max(1, fan_out / fan_in))` (see
            `scale_by_shape`).
        ns_coeffs: Newton-Schulz coefficients; the default is the five steps of Kimi K2.
        ns_steps: Number of Newton-Schulz steps (see `orthogonalize`).
        ns_method: Form of the iteration (see `orthogonalize`).
        ns_dtype: Dtype of the products (see `orthogonalize`).
        ns_implementation: "xla" or the name of a kernel (see `orthogonalize`).
        preconditioning: The first rescaling (see `orthogonalize`).
        eps: Prevents division by zero in Newton-Schulz (see `scale_by_muon`).
        mu_dtype: Dtype of the first moments of both groups; None is the parameter's.
        adam_learning_rate: Learning rate of the AdamW group; None is `learning_rate`.
        adam_b1: Decay of Adam's first moment.
        adam_b2: Decay of Adam's second moment.
        adam_eps: Adam's epsilon.
        adam_weight_decay: Decoupled decay of the AdamW group; None is `weight_decay`.
        rules: `MatrixRules`: which group trains each leaf, and how it is divided into matrices.
        param_shardings: Shardings of the parameters, for Auto mesh axes (see `scale_by_muon`).
        axis_name: Mapped axes over which matrices are distributed (see `scale_by_muon`).
        distribution: How matrices are distributed over devices (see `Distribution`).
        platform: "cpu", "gpu" or "tpu": the target platform (see `orthogonalize`).

    Returns:
        The transformation, with labels "muon" and "adamw". With the clip on, call
        `tx.update(grads, state, params, max_logits=max_logits)`.

    Raises:
        TypeError: At construction for an argument of a wrong type or an unknown name.
        ValueError: At construction for a hyperparameter outside its range; while tracing for a leaf
            that cannot be routed, and for maxima that are missing or match no attention block.

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
    check_rates((learning_rate, adam_rate), (weight_decay, adam_decay), weight_decay_mask)
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
        step = _step(weight_decay, mask, learning_rate, param_shardings)
        muon = optax.chain(orthogonalize, scale, *step)
        adamw = optax.chain(adam, *_step(adam_decay, mask, adam_rate, param_shardings))
        return optax.partition({"muon": muon, "adamw": adamw}, decided.labels)

    matrix_rules = as_rules(rules)
    build(matrix_rules)  # checks the settings now
    tx = route_once(lambda params: build(matrix_rules.resolve(params)))
    if qk_clip_threshold is not None:
        clip = qk_clip(
            qk_clip_threshold, qk_clip_alpha, shared_keys=qk_clip_shared_keys, blocks=qk_clip_blocks
        )
        tx = optax.chain(tx, on_mesh(clip, param_shardings))
    return transformation("muonclip", tx.init, tx.update, one_tree=True)


@names_known
def muon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Coefficients = "keller_jordan",
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
    ns_method: str = coefficients.DEFAULT_METHOD,
    ns_dtype: DTypeLike | None = coefficients.DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    rules: MatrixRules | None = None,
    param_shardings: Tree = None,
    axis_name: str | tuple[str, ...] | None = None,
    distribution: Distribution | None = None,
    platform: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon for matrices and NAdamW for the rest: a drop-in replacement for `optax.contrib.muon`.

    It has the same arguments and follows the same trajectory up to the rounding of `ns_dtype`:
    float32 on CPUs, 16 bits on GPUs and TPUs. The coefficients are not part of the state, and
    `ns_steps` is static. Arguments from `ns_method` on are not in Optax.

    As in Optax, Muon trains every leaf of rank 2, including embeddings and Flax's attention biases;
    `muon_weight_dimension_numbers=muonclip_jax.infer_dimension_numbers` routes by name and shape.

    Args:
        learning_rate: Learning rate of both groups; a number or a schedule. 0.02 is usual.
        ns_coeffs: A name (including Optax's "standard" and "dion"), a triple or rows. Static.
        ns_steps: Number of steps; None means five for a triple, else the number of rows. With rows
            it must be at least their number, and all of them run, as in Optax.
        beta: Decay rate of the momentum; unlike in Optax it may be a schedule.
        eps: Added to the denominators of Newton-Schulz and of Adam, absolute as in Optax.
        weight_decay: Decoupled decay of the Muon group; a number or a schedule.
        weight_decay_mask: Tree of bools, or a function from parameters to it.
        mu_dtype: Dtype of the first moments of both groups.
        nesterov: Whether both groups use Nesterov momentum.
        adaptive: Whether to multiply by the dual norm.
        preconditioning: The first rescaling (see `orthogonalize`).
        adam_b1: Decay of Adam's first moment.
        adam_b2: Decay of Adam's second moment.
        adam_eps_root: Adam's epsilon inside the square root.
        adam_weight_decay: Decoupled decay of the Adam group.
        adam_learning_rate: Learning rate of the Adam group; None is `learning_rate`.
        muon_weight_dimension_numbers: Matrix axes of each leaf; None in a pytree means Adam.
        consistent_rms: RMS of Muon's updates (see `scale_by_shape`).
        ns_method: Form of the iteration (see `orthogonalize`).
        ns_dtype: Dtype of the products (see `orthogonalize`).
        ns_implementation: "xla" or the name of a kernel (see `orthogonalize`).
        rules: `MatrixRules`, instead of `muon_weight_dimension_numbers`.
        param_shardings: Shardings of the parameters, for Auto mesh axes (see `scale_by_muon`).
        axis_name: Mapped axes over which matrices are distributed (see `scale_by_muon`).
        distribution: How matrices are distributed over devices (see `Distribution`).
        platform: "cpu", "gpu" or "tpu" (see `orthogonalize`).

    Returns:
        The transformation, with labels "muon" and "adam".

    Raises:
        TypeError: At construction for an argument of a wrong type or an unknown name.
        ValueError: For an invalid hyperparameter, or both `rules` and
            `muon_weight_dimension_numbers`.

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
    adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    check_rates((learning_rate, adam_rate), (weight_decay, adam_weight_decay), weight_decay_mask)
    check_number("adam_eps_root", adam_eps_root, "finite and not negative")
    adam = _adam(adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, nesterov, param_shardings)
    if rules is not None and muon_weight_dimension_numbers is not None:
        raise ValueError(
            "muon takes muon_weight_dimension_numbers or rules, got both. Rules can contain any "
            "spec: MatrixRules([(pattern, spec)])."
        )
    given = muon_weight_dimension_numbers
    given = _every_rank_two_leaf if given is None else given

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
        step = _step(weight_decay, weight_decay_mask, learning_rate, param_shardings)
        matrices = optax.chain(orthogonalize, scale, *step)
        others = optax.chain(adam, *_step(adam_weight_decay, None, adam_rate, param_shardings))
        return optax.partition({"muon": matrices, "adam": others}, labels)

    build({})  # checks the settings now

    def route(params: optax.Params) -> optax.GradientTransformationExtraArgs:
        numbers = given if rules is None else rules.resolve(params).dimension_numbers
        return build(spec_tree(numbers, params))

    routed = route_once(route)
    return transformation("muon", routed.init, routed.update, one_tree=True)


def _adam(
    b1: ScalarLike,
    b2: ScalarLike,
    eps: ScalarLike,
    eps_root: ScalarLike,
    mu_dtype: DTypeLike | None,
    nesterov: bool,
    param_shardings: Tree,
) -> optax.GradientTransformation:
    """Adam's direction, with checked settings and its state sharded on a mesh."""
    check_decay("adam_b1", b1, mu_dtype)
    check_decay("adam_b2", b2)
    check_number("adam_eps", eps, "finite and not negative")
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)

    def init(params: Tree) -> optax.OptState:
        if mu_dtype is not None:
            check_moments(params, mu_dtype)
        return adam.init(params)

    return on_mesh(optax.GradientTransformation(init, adam.update), param_shardings)


def _step(
    weight_decay: ScalarOrSchedule, mask: Tree, rate: ScalarOrSchedule, param_shardings: Tree
) -> Iterator[optax.GradientTransformation]:
    """Decoupled decay and learning rate, the end of a chain; counts of schedules on the mesh."""
    decay, step = optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(rate)
    for setting, tx in ((weight_decay, decay), (rate, step)):
        yield on_mesh(tx, param_shardings) if callable(setting) else tx


def _is_bool(x: object) -> bool:
    return isinstance(x, bool) or getattr(x, "dtype", None) == np.bool_


def _every_rank_two_leaf(params: optax.Params) -> Any:
    array_leaves(params)
    return jax.tree.map(lambda x: MuonDimensionNumbers() if len(x.shape) == 2 else None, params)


def _steps(ns_coeffs: Coefficients, ns_steps: int | None) -> int | None:
    """Optax's rule: a triple runs `ns_steps` times; all rows run, and `ns_steps` is no smaller."""
    rows, source = coefficients.resolve_coefficients(ns_coeffs)
    is_triple = not isinstance(ns_coeffs, str) and len(np.asarray(ns_coeffs).shape) == 1
    if ns_steps is None or is_triple or source.repeat_row is not None:
        return ns_steps
    if len(rows) > ns_steps:
        raise ValueError(
            f"ns_coeffs has {len(rows)} rows and ns_steps is {ns_steps}. Pass "
            f"ns_steps={len(rows)} to run them all, or the first {ns_steps} rows."
        )
    return None
