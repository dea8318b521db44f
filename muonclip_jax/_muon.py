"""`muon`: Optax's Muon, argument for argument, on this library's parts."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, array_leaves
from muonclip_jax.newton_schulz import DEFAULT_DTYPE, DEFAULT_METHOD
from muonclip_jax.newton_schulz.coefficients import resolve_coefficients
from muonclip_jax.routing import MatrixRules, resolve_specs, route_once, spec_tree
from muonclip_jax.sharding import Distribution
from muonclip_jax.transforms import scale_by_muon, scale_by_shape
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
from muonclip_jax.transforms._scale_by_muon import WeightDimNumOrFn


@names_known
def muon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Any = "keller_jordan",
    ns_steps: int | None = None,
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarLike = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: Any = None,
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
    ns_dtype: Any = DEFAULT_DTYPE,
    ns_implementation: str = "xla",
    rules: MatrixRules | None = None,
    param_shardings: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    distribution: Distribution | None = None,
    platform: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon for matrices and NAdamW for the rest: a drop-in for `optax.contrib.muon`.

    The same arguments with the same meaning, and the same trajectory to the rounding of `ns_dtype`:
    float32 on a CPU, 16 bits on a GPU or TPU. Differences:

    1. Same-shaped matrices share one Newton-Schulz, in the cheaper of two forms (`ns_method`).
    2. Coefficients are no part of the state, and `ns_steps` is static: under
       `optax.inject_hyperparams` name it, where it is given, in
       `static_args=("ns_coeffs", "ns_steps")`.

    By default every leaf of rank 2 goes to Muon, Flax's attention biases and embeddings too, as
    Optax has it. `muon_weight_dimension_numbers=muonclip_jax.infer_dimension_numbers` routes by
    what a leaf is.

    Args:
        learning_rate: Rate of both groups; a number or a schedule.
        ns_coeffs: A name (Optax's "standard" and "dion" among them), a triple or rows. Static.
        ns_steps: Number of steps; None is five of a triple, Optax's default, and all rows. With
            rows it must be at least their number, and all of them are run, as in Optax. Static.
        beta: Decay of the momentum; may be a schedule of the number of updates. Not so in Optax.
        eps: Term added to the denominators of Newton-Schulz and of Adam. As in Optax it is
            absolute: momentum whose norm is not far above it is orthogonalised less.
        weight_decay: Decoupled decay of the Muon group; a number or a schedule.
        weight_decay_mask: Tree of bools, or a function from parameters to it.
        mu_dtype: Dtype of the first moments of both groups.
        nesterov: Whether both groups look one step ahead.
        adaptive: Whether to multiply by the dual norm.
        preconditioning: "frobenius", "spectral", "aol", "schatten" or "schatten8"; None is the one
            that the set was made for, "frobenius" for all of Optax's.
        adam_b1: Decay of Adam's first moment.
        adam_b2: Decay of Adam's second moment.
        adam_eps_root: Adam's epsilon inside the root.
        adam_weight_decay: Decoupled decay of the Adam group.
        adam_learning_rate: Rate of the Adam group; None is `learning_rate`. A number stays as it
            is while a scheduled `learning_rate` decays, and warns.
        muon_weight_dimension_numbers: Where the matrices are (see `scale_by_muon`); None in a
            tree sends the leaf to Adam.
        consistent_rms: RMS of Muon's updates (see `scale_by_shape`); None scales by width.
        ns_method: How to iterate (see `orthogonalize`). Not in Optax.
        ns_dtype: What Newton-Schulz computes in (see `orthogonalize`). Not in Optax.
        ns_implementation: Who computes symmetric products (see `orthogonalize`). Not in Optax.
        rules: `MatrixRules` that choose the leaves and their matrices in place of
            `muon_weight_dimension_numbers`. Not in Optax.
        param_shardings: How the parameters lie on a mesh, needed where it has Auto axes (see
            `scale_by_muon`). Not in Optax.
        axis_name: Names of mapped axes of `pmap` or `shard_map` whose devices share the matrices
            (see `scale_by_muon`). Not in Optax.
        distribution: Who shares the matrices, and bounds on memory (see `Distribution`). Not in
            Optax.
        platform: "cpu", "gpu" or "tpu": what the program is for (see `orthogonalize`). Not in
            Optax.

    Returns:
        The transformation. Its labels are "muon" and "adam".

    Raises:
        TypeError: At construction for an argument of a wrong type or an unknown name.
        ValueError: For a bad hyperparameter, more rows than `ns_steps`, or both
            `muon_weight_dimension_numbers` and `rules`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.eye(2, 3), "b": jnp.zeros(3)}
        >>> tx = muon(learning_rate=0.02)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> sorted(state.inner_states)
        ['adam', 'muon']

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982;
        Boissin et al. 2025, arXiv 2512.04632; Amsel et al. 2025, arXiv 2505.16932.
    """
    check_moment_dtype(mu_dtype, "adam_b1", adam_b1)
    check_rate("learning_rate", learning_rate)
    check_adam_rate(learning_rate, adam_learning_rate)
    check_mask("weight_decay_mask", weight_decay_mask)
    check_non_negative("weight_decay", weight_decay, schedule=True)
    check_non_negative("adam_weight_decay", adam_weight_decay, schedule=True)
    check_fraction("adam_b1", adam_b1, "the decay of Adam's first moment, such as 0.9")
    check_fraction("adam_b2", adam_b2, "the decay of Adam's second moment, such as 0.999")
    check_non_negative("adam_eps_root", adam_eps_root)
    if rules is not None and muon_weight_dimension_numbers is not None:
        raise ValueError(
            "muon takes muon_weight_dimension_numbers or rules, got both. Rules can hold any "
            "spec: MatrixRules([(pattern, spec)])."
        )
    given = _every_rank_two_leaf if rules is None else rules.dimension_numbers
    if muon_weight_dimension_numbers is not None:
        given = muon_weight_dimension_numbers

    def decide(params: optax.Params) -> Any:
        if rules is not None:
            rules.check_all_matched(params)
        return spec_tree(given, params)

    def build(dimension_numbers: Any) -> optax.GradientTransformationExtraArgs:
        def labels(params: optax.Params) -> Any:
            specs = resolve_specs(params, dimension_numbers, None)
            return jax.tree.unflatten(
                jax.tree.structure(params),
                ["adam" if spec is None else "muon" for _, _, spec in specs],
            )

        muon = optax.chain(
            scale_by_muon(
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
            ),
            scale_by_shape(dimension_numbers, consistent_rms),
            optax.add_decayed_weights(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )
        adamw = optax.adamw(
            learning_rate if adam_learning_rate is None else adam_learning_rate,
            b1=adam_b1,
            b2=adam_b2,
            eps=eps,
            eps_root=adam_eps_root,
            weight_decay=adam_weight_decay,
            mu_dtype=mu_dtype,
            nesterov=nesterov,
        )
        adam = with_checked_moments(on_mesh(adamw, param_shardings), mu_dtype)
        return optax.partition({"muon": muon, "adam": adam}, labels)

    build({})  # checks the settings now
    routed = route_once(decide, build)
    return transformation("muon", routed.init, routed.update, one_tree=True)


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
