"""Variants of Muon built on `matrix_axes`: NorMuon, Hyperball, and weight decay with options."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._arguments import (
    check_decay,
    check_flags,
    check_mask,
    check_number,
    names_known,
    value_at,
)
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree
from muonclip_jax.routing import MatrixRules
from muonclip_jax.transforms._matrix_axes import MatrixAxes, WeightDimNumOrFn, matrix_axes
from muonclip_jax.transforms._states import on_mesh


class NeuronRmsState(NamedTuple):
    """State of `scale_by_neuron_rms`.

    Attributes:
        nu: Moving average of the mean square of each output's weights, float32 or wider; of the
            leaf's rank, with length one along the input axes.
    """

    nu: Tree


@names_known
def scale_by_neuron_rms(
    b2: ScalarLike = 0.95,
    eps: ScalarLike = 1e-8,
    *,
    rules: MatrixRules | None = None,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    param_shardings: Tree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides each output's weights by their running RMS and restores each matrix's norm: NorMuon.

    With the polar factor `O` and the mean over the inputs of an output (a neuron),

        nu <- b2 nu + (1 - b2) mean(O * O)
        N = O / (sqrt(nu) + eps)
        O <- N ||O||_F / ||N||_F

    Use it after `scale_by_muon` and before `scale_by_shape`. The average needs no bias correction,
    because the last line removes any factor common to all outputs.

    Args:
        b2: Decay rate of the second moment, in [0, 1). May be traced.
        eps: Term added to the denominator. May be traced.
        rules: As in `scale_by_muon`.
        weight_dimension_numbers: As in `scale_by_muon`.
        param_shardings: As in `scale_by_muon`.

    Returns:
        A transformation with state `NeuronRmsState`.

    Raises:
        ValueError: At construction for an invalid hyperparameter; while tracing for a leaf that is
            not a matrix, with its path.

    Example:
        >>> import jax.numpy as jnp
        >>> updates = {"w": jnp.array([[3.0, 1.0], [4.0, 0.0]])}  # two outputs: columns
        >>> tx = scale_by_neuron_rms()
        >>> scaled, state = tx.update(updates, tx.init(updates))
        >>> [f"{norm:.3f}" for norm in jnp.linalg.norm(scaled["w"], axis=0)]
        ['3.606', '3.606']

    References:
        Li et al. 2025, NorMuon, arXiv 2510.05491, Algorithm 1.
    """
    check_decay("b2", b2)
    check_number("eps", eps, "finite and not negative")

    def square(u: jax.Array, a: MatrixAxes) -> jax.Array:
        return a.mean(jnp.square(jnp.abs(u)), "inputs")

    def init(params: Tree) -> NeuronRmsState:
        axes = matrix_axes(params, rules, weight_dimension_numbers=weight_dimension_numbers)
        nu = jax.eval_shape(lambda tree: jax.tree.map(square, tree, axes), params)
        return NeuronRmsState(nu)

    def update(updates: Tree, state: Tree, params: Tree = None, **_: object) -> tuple[Tree, Tree]:
        axes = matrix_axes(updates, rules, weight_dimension_numbers=weight_dimension_numbers)

        def average(u: jax.Array, v: jax.Array, a: MatrixAxes) -> jax.Array:
            return (b2 * v + (1 - b2) * square(u, a)).astype(v.dtype)

        def scale(u: jax.Array, v: jax.Array, a: MatrixAxes) -> jax.Array:
            scaled = u / (jnp.sqrt(v) + eps)
            return (scaled * _ratio(a.norm(u, "matrix"), a.norm(scaled, "matrix"))).astype(u.dtype)

        nu = jax.tree.map(average, updates, state.nu, axes)
        return jax.tree.map(scale, updates, nu, axes), NeuronRmsState(nu)

    return on_mesh(optax.GradientTransformationExtraArgs(init, update), param_shardings)


class HyperballState(NamedTuple):
    """State of `hyperball`.

    Attributes:
        count: Updates so far, int32, `()`.
        norm: Frobenius norm of each matrix at the first update, float32 or wider; of the leaf's
            rank, with length one along the matrix axes. Zeros before the first update.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    norm: Tree


@names_known
def hyperball(
    learning_rate: ScalarOrSchedule,
    *,
    rules: MatrixRules | None = None,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    param_shardings: Tree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes a step relative to the norm of the weights and keeps that norm: Hyperball.

    With the direction `U` and the norm of the weights `R = ||W||_F`,

        V = W - learning_rate R U / ||U||_F
        W <- R V / ||V||_F

    It replaces `scale_by_shape`, weight decay and the learning rate, because the result does not
    depend on the norms of `U` and `V`. After `scale_by_muon` it is MuonH. `R` is at most the norm
    at the first update; a norm that `qk_clip` has reduced since then stays reduced.

    For a matrix that is zero at the first update, `R` is the norm of LeCun initialisation,
    `sqrt(fan_out)`, as an upper bound: it grows by `learning_rate R` per step until it has that
    norm, and `V` is scaled only if its norm is larger.

    Args:
        learning_rate: Step length relative to the norm of the weights; a number or a schedule.
        rules: As in `scale_by_muon`. They define the matrices: layers of a stack, parts of a fused
            kernel, or heads with a per-head spec.
        weight_dimension_numbers: As in `scale_by_muon`.
        param_shardings: As in `scale_by_muon`.

    Returns:
        A transformation with state `HyperballState` that returns the final update. Its `update`
        needs the parameters.

    Raises:
        ValueError: At construction for an invalid learning rate; from `update` without parameters;
            while tracing for a leaf that is not a matrix, with its path.

    Example:
        >>> import jax.numpy as jnp
        >>> from muonclip_jax import orthogonalize_updates
        >>> params = {"w": 5 * jnp.eye(2, 3)}
        >>> tx = optax.chain(optax.trace(0.95), orthogonalize_updates(), hyperball(0.02))
        >>> gradients = {"w": jnp.ones((2, 3))}
        >>> updates, state = tx.update(gradients, tx.init(params), params)
        >>> print(f'{jnp.linalg.norm(params["w"] + updates["w"]):.4f}')
        7.0711

    References:
        Hyperball, arXiv 2606.16899; arXiv 2603.28743.
    """
    check_number("learning_rate", learning_rate, "positive and finite", schedule=True)

    def norms(params: optax.Params, axes: Tree) -> Tree:
        return jax.tree.map(lambda p, a: a.norm(p, "matrix"), params, axes)

    def init(params: Tree) -> HyperballState:
        axes = matrix_axes(params, rules, weight_dimension_numbers=weight_dimension_numbers)
        norm = jax.eval_shape(lambda tree: norms(tree, axes), params)
        return HyperballState(jnp.zeros([], jnp.int32), norm)

    def update(updates: Tree, state: Tree, params: Tree = None, **_: object) -> tuple[Tree, Tree]:
        if params is None:
            raise ValueError("hyperball needs the parameters: tx.update(grads, state, params).")
        axes = matrix_axes(updates, rules, weight_dimension_numbers=weight_dimension_numbers)
        rate, is_first = value_at(learning_rate, state.count), state.count == 0
        norm = jax.tree.map(
            lambda n, now: jnp.where(is_first, now.astype(n.dtype) + jnp.zeros_like(n), n),
            state.norm,
            norms(params, axes),
        )

        def step(u: jax.Array, p: jax.Array, n: jax.Array, a: MatrixAxes) -> jax.Array:
            wide = jnp.promote_types(jnp.promote_types(u.dtype, p.dtype), jnp.float32)
            u_wide, p_wide = u.astype(wide), p.astype(wide)
            bound = jnp.sqrt(a.size(u.shape, "outputs").astype(n.dtype)) + jnp.zeros_like(n)
            radius = jnp.where(n == 0, bound, jnp.minimum(n, a.norm(p_wide, "matrix")))
            moved = p_wide - rate * _ratio(radius, a.norm(u, "matrix")) * u_wide
            length = a.norm(moved, "matrix")
            kept = jnp.where(n == 0, jnp.minimum(length, radius), radius)
            return (_ratio(kept, length) * moved - p_wide).astype(u.dtype)

        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.map(step, updates, params, norm, axes), HyperballState(count, norm)

    return on_mesh(optax.GradientTransformationExtraArgs(init, update), param_shardings)


@names_known
def add_weight_decay(
    weight_decay: ScalarOrSchedule,
    mask: Tree | Callable[[optax.Params], Tree] | None = None,
    *,
    cautious: bool = False,
    base_width: ScalarLike | None = None,
    rules: MatrixRules | None = None,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds weight decay, optionally cautious or proportional to 1 / width.

    With the direction `U` that a later `optax.scale_by_learning_rate` subtracts,

        U <- U + weight_decay W                            as `optax.add_decayed_weights`
        U <- U + weight_decay W [U W >= 0]                 cautious
        U <- U + weight_decay (base_width / fan_in) W      with base_width

    Cautious decay applies only to entries that the update shrinks too.

    Args:
        weight_decay: The decay; a number or a schedule.
        mask: As in `optax.add_decayed_weights`.
        cautious: Whether to decay only entries in which update and weight have the same sign or one
            of them is zero. Static.
        base_width: Fan-in at which the decay equals `weight_decay`; a matrix with twice that fan-in
            decays half as fast. With None, decay does not depend on width. May be traced.
        rules: As in `scale_by_muon`; used only with `base_width`.
        weight_dimension_numbers: As in `scale_by_muon`; used only with `base_width`.

    Returns:
        A transformation with the state of `optax.add_decayed_weights`. Its `update` needs the
        parameters.

    Raises:
        ValueError: At construction for an invalid hyperparameter; from `update` without parameters.
        TypeError: At construction for a mask that is neither a tree nor a function.

    Example:
        >>> import jax.numpy as jnp
        >>> params, updates = {"w": jnp.array([[2.0, 2.0]])}, {"w": jnp.array([[1.0, -1.0]])}
        >>> tx = add_weight_decay(0.1, cautious=True)
        >>> print(tx.update(updates, tx.init(params), params)[0]["w"])
        [[ 1.2 -1. ]]

    References:
        Cautious weight decay: arXiv 2510.12402. Decay and width: arXiv 2512.05620.
    """
    check_number("weight_decay", weight_decay, "finite and not negative", schedule=True)
    check_mask("mask", mask)
    check_flags(cautious=cautious)
    if base_width is not None:
        hint = "Write the fan-in at which weight_decay holds."
        check_number("base_width", base_width, "positive and finite", hint)
    decay = optax.add_decayed_weights(weight_decay, mask)

    def update(updates: Tree, state: Tree, params: Tree = None, **_: object) -> tuple[Tree, Tree]:
        if params is None:
            raise ValueError(
                "add_weight_decay needs the parameters: tx.update(grads, state, params)."
            )
        decayed = params
        if base_width is not None:
            decayed = jax.tree.map(
                lambda p, a: (p * (base_width / a.size(p.shape, "inputs"))).astype(p.dtype),
                decayed,
                matrix_axes(params, rules, weight_dimension_numbers=weight_dimension_numbers),
            )
        if cautious:
            # By signs, because the product of two small numbers underflows.
            decayed = jax.tree.map(
                lambda u, p: jnp.where(jnp.real(jnp.conj(jnp.sign(u)) * jnp.sign(p)) < 0, 0, p),
                updates,
                decayed,
            )
        return decay.update(updates, state, decayed)

    return optax.GradientTransformationExtraArgs(decay.init, update)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, and 0 where `y` is 0."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))
