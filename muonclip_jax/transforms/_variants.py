"""Variants of Muon built on `matrix_axes`: NorMuon's normalisation and Hyperball."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import ScalarLike, ScalarOrSchedule, Tree
from muonclip_jax.routing import MatrixRules
from muonclip_jax.sharding import MeshShardings
from muonclip_jax.transforms._checks import (
    check_fraction,
    check_non_negative,
    check_rate,
    value_at,
)
from muonclip_jax.transforms._matrix_axes import MatrixAxes, Over, matrix_axes
from muonclip_jax.transforms._orthogonalize_updates import WeightDimNumOrFn
from muonclip_jax.transforms._placing import mesh_shardings, place_tree, replicate, zeros_on_mesh


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
    check_fraction("b2", b2, "the decay of the second moment, such as 0.95")
    check_non_negative("eps", eps)

    def axes_of(tree: Tree) -> Tree:
        return matrix_axes(tree, rules, weight_dimension_numbers=weight_dimension_numbers)

    def init_fn(params: optax.Params) -> NeuronRmsState:
        return NeuronRmsState(_zeros_beside(params, axes_of(params), "inputs", param_shardings))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, NeuronRmsState]:
        del params, extra_args
        axes = axes_of(updates)
        nu = jax.tree.map(
            lambda u, v, a: (b2 * v + (1 - b2) * a.mean(_square(u), "inputs")).astype(v.dtype),
            updates,
            state.nu,
            axes,
        )
        nu = place_tree(nu, _shardings_beside(updates, axes, "inputs", param_shardings))

        def scale(u: jax.Array, v: jax.Array, a: MatrixAxes) -> jax.Array:
            scaled = u / (jnp.sqrt(v) + eps)
            return (scaled * _ratio(a.norm(u, "matrix"), a.norm(scaled, "matrix"))).astype(u.dtype)

        return jax.tree.map(scale, updates, nu, axes), NeuronRmsState(nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
        >>> from muonclip_jax.transforms import orthogonalize_updates
        >>> params = {"w": 5 * jnp.eye(2, 3)}
        >>> tx = optax.chain(optax.trace(0.95), orthogonalize_updates(), hyperball(0.02))
        >>> gradients = {"w": jnp.ones((2, 3))}
        >>> updates, state = tx.update(gradients, tx.init(params), params)
        >>> print(f'{jnp.linalg.norm(params["w"] + updates["w"]):.4f}')
        7.0711

    References:
        Hyperball, arXiv 2606.16899; arXiv 2603.28743.
    """
    check_rate("learning_rate", learning_rate)

    def axes_of(tree: Tree) -> Tree:
        return matrix_axes(tree, rules, weight_dimension_numbers=weight_dimension_numbers)

    def init_fn(params: optax.Params) -> HyperballState:
        count = jnp.zeros([], jnp.int32)
        return HyperballState(
            count=replicate(count, mesh_shardings(params, param_shardings)),
            norm=_zeros_beside(params, axes_of(params), "matrix", param_shardings),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, HyperballState]:
        del extra_args
        if params is None:
            raise ValueError("hyperball needs the parameters: tx.update(grads, state, params).")
        axes = axes_of(updates)
        rate = value_at(learning_rate, state.count)
        norm = jax.tree.map(
            lambda p, n, a: jnp.where(state.count == 0, a.norm(p, "matrix").astype(n.dtype), n),
            params,
            state.norm,
            axes,
        )
        norm = place_tree(norm, _shardings_beside(updates, axes, "matrix", param_shardings))

        def step(u: jax.Array, p: jax.Array, n: jax.Array, a: MatrixAxes) -> jax.Array:
            wide = jnp.promote_types(jnp.promote_types(u.dtype, p.dtype), jnp.float32)
            u_wide, p_wide = u.astype(wide), p.astype(wide)
            fan_out = a.size(u.shape, "outputs").astype(n.dtype)
            radius = jnp.where(n == 0, jnp.sqrt(fan_out), jnp.minimum(n, a.norm(p_wide, "matrix")))
            moved = p_wide - rate * _ratio(radius, a.norm(u, "matrix")) * u_wide
            length = a.norm(moved, "matrix")
            kept = jnp.where(n == 0, jnp.minimum(length, radius), radius)
            return (_ratio(kept, length) * moved - p_wide).astype(u.dtype)

        count = jnp.asarray(optax.safe_increment(jnp.asarray(state.count)))
        return jax.tree.map(step, updates, params, norm, axes), HyperballState(count, norm)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _square(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(x))


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, and 0 where `y` is 0."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def _shardings_beside(
    tree: Tree, axes: Tree, over: Over, param_shardings: Tree
) -> MeshShardings | None:
    """The shardings of reductions of the leaves, which are replicated along the reduced axes."""
    shardings = mesh_shardings(tree, param_shardings)
    if shardings is None:
        return None
    leaves = tuple(
        tuple(() if axis in a.over(over) else names for axis, names in enumerate(leaf))
        for leaf, a in zip(shardings.leaves, jax.tree.leaves(axes), strict=True)
    )
    return dataclasses.replace(shardings, leaves=leaves)


def _zeros_beside(params: Tree, axes: Tree, over: Over, param_shardings: Tree) -> Any:
    """Zeros in the form of reductions of the leaves, float32 or wider."""

    def form(p: jax.Array, a: MatrixAxes) -> jax.ShapeDtypeStruct:
        real = jnp.finfo(jnp.promote_types(p.dtype, jnp.float32)).dtype
        return jax.eval_shape(lambda x: a.sum(x, over), jax.ShapeDtypeStruct(p.shape, real))

    forms = jax.tree.map(form, params, axes)
    return zeros_on_mesh(forms, None, _shardings_beside(params, axes, over, param_shardings))
