"""The matrix axes of every leaf, reductions along them, and `scale_by_shape`.

A transformation before or after the polar factor often needs a norm of rows, columns or whole
matrices. `matrix_axes` returns the axes for these. The reductions are `jnp` reductions of the whole
array with kept dimensions: they need no reshape, so they are correct for any sharding, and the
result broadcasts against the leaf.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muonclip_jax._arguments import check_choice, check_number, names_known
from muonclip_jax._tree import ScalarLike, Tree
from muonclip_jax.routing import MatrixRules, Split, batch_axes, normalized_axes, resolve_muon_specs

#: One spec for all leaves, a tree of them (full, prefix or masked), or a function of the tree.
WeightDimNumOrFn: TypeAlias = Any
#: What to reduce along: the axes of the inputs, those of the outputs, or both.
Over = Literal["inputs", "outputs", "matrix"]


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """The matrix axes of one leaf, for `y = x @ W`.

    Attributes:
        batch: Axes with one matrix per entry: stacked layers, experts, heads with a per-head spec.
        inputs: Axes that are summed over; their product is the fan-in.
        outputs: Axes that are produced; their product is the fan-out.
        splits: How axes of a fused kernel are split into separate matrices.

    Example:
        >>> import jax.numpy as jnp
        >>> from muonclip_jax.routing import MatrixSpec
        >>> spec = MatrixSpec((1, (2, 3)))
        >>> axes = matrix_axes(jnp.ones((12, 4, 8, 2)), weight_dimension_numbers=spec)
        >>> axes.batch, axes.inputs, axes.outputs
        ((0,), (1,), (2, 3))
        >>> axes.sum(jnp.ones((12, 4, 8, 2)), "inputs").shape
        (12, 1, 8, 2)
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    splits: tuple[Split, ...] = ()

    def over(self, over: Over) -> tuple[int, ...]:
        """Returns the axes that are reduced."""
        check_choice("over", over, ("inputs", "outputs", "matrix"))
        return self.inputs + self.outputs if over == "matrix" else getattr(self, over)

    def sum(self, x: jax.Array, over: Over) -> jax.Array:
        """Sums along axes of the matrices, in float32 or wider.

        Args:
            x: An array of the leaf's shape.
            over: "inputs" (one sum per output), "outputs" (one per input) or "matrix" (one per
                matrix).

        Returns:
            The sums, broadcastable against `x`: reduced axes have length one, except that a split
            axis keeps its length, each entry with the sum over its own part.
        """
        axes, splits = self.over(over), {split.axis: split for split in self.splits}
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = jnp.sum(x, tuple(axis for axis in axes if axis not in splits), keepdims=True)
        for axis in splits.keys() & axes:
            # Zeros that Explicit mesh axes shard as `x`.
            numbers, sums = _part_numbers(splits[axis], x.ndim), jnp.zeros_like(x)
            for part in range(len(splits[axis].sizes)):
                total = jnp.sum(jnp.where(numbers == part, x, 0), axis, keepdims=True)
                sums = sums + jnp.where(numbers == part, total, 0)
            x = sums
        return x

    def mean(self, x: jax.Array, over: Over) -> jax.Array:
        """The mean along axes of the matrices (see `sum`)."""
        total = self.sum(x, over)
        return total / self.size(x.shape, over).astype(total.dtype)

    def norm(self, x: jax.Array, over: Over) -> jax.Array:
        """The Euclidean norm along axes of the matrices (see `sum`)."""
        return jnp.sqrt(self.sum(jnp.square(jnp.abs(x)), over))

    def size(self, shape: tuple[int, ...], over: Over) -> np.ndarray:
        """Number of entries that `sum` adds, broadcastable against a leaf of this shape."""
        splits = {split.axis: split for split in self.splits}
        size = np.ones((1,) * len(shape))
        for axis in self.over(over):
            length: int | np.ndarray = shape[axis]
            if axis in splits:
                parts = np.array(splits[axis].part_lengths)
                length = parts[_part_numbers(splits[axis], len(shape))]
            size = size * length
        return size


@names_known
def matrix_axes(
    tree: Tree, rules: MatrixRules | None = None, *, weight_dimension_numbers: Tree = None
) -> Tree:
    """Finds the matrix axes of every leaf of a pytree that Muon trains.

    Args:
        tree: Parameters or updates; only paths and shapes are used.
        rules: As in `scale_by_muon`.
        weight_dimension_numbers: As in `scale_by_muon`.

    Returns:
        The same pytree with a `MatrixAxes` for every leaf, for use in `jax.tree.map`.

    Raises:
        ValueError: For a leaf that is not a matrix, with its path.

    Example:
        Normalize the weights of every output to unit RMS:

        >>> import jax, optax
        >>> import jax.numpy as jnp
        >>> def normalize(x, axes):
        ...     return x / jnp.sqrt(axes.mean(x**2, "inputs"))
        >>> tx = optax.stateless(lambda u, _: jax.tree.map(normalize, u, matrix_axes(u)))
        >>> updates = {"w": jnp.array([[3.0, 1.0], [4.0, 1.0], [0.0, 1.0], [0.0, 1.0]])}
        >>> tx.update(updates, tx.init(updates))[0]["w"].tolist()
        [[1.2000000476837158, 1.0], [1.600000023841858, 1.0], [0.0, 1.0], [0.0, 1.0]]
    """
    found = []
    for _, leaf, spec in resolve_muon_specs(tree, weight_dimension_numbers, rules):
        inputs, outputs = normalized_axes(spec)
        batch = batch_axes(spec, len(leaf.shape))
        found.append(MatrixAxes(batch, inputs, outputs, spec.splits))
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _part_numbers(split: Split, rank: int) -> np.ndarray:
    """The number of the part of each entry along the split axis, with length one along others."""
    view = split.view or (split.length,)
    along = np.repeat(np.arange(len(split.sizes)), split.sizes)
    along = along.reshape([-1 if axis == split.along else 1 for axis in range(len(view))])
    numbers = np.broadcast_to(along, view)
    return numbers.reshape([-1 if axis == split.axis else 1 for axis in range(rank)])


@names_known
def scale_by_shape(
    weight_dimension_numbers: Tree = None,
    consistent_rms: ScalarLike | None = None,
    *,
    rules: MatrixRules | None = None,
    rule: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the update of each matrix by a factor that depends on its shape.

    For `y = x @ W` with `fan_in` rows and `fan_out` columns after flattening input and output axes
    (each part of a fused kernel has its own shape), the factor is

        sqrt(max(1, fan_out / fan_in))                  by default
        consistent_rms sqrt(max(fan_in, fan_out))       with consistent_rms

    The second gives an orthogonal update of any shape an RMS of `consistent_rms` (Liu et al. 2025,
    Lemma 1); with 0.2, AdamW's learning rate and decay can be used.

    Args:
        weight_dimension_numbers: As in `scale_by_muon`.
        consistent_rms: RMS of a full-rank update. May be traced.
        rules: As in `scale_by_muon`.
        rule: "width_transfer" (the default) or "rms_to_rms": `sqrt(fan_out / fan_in)`, as in Scion.

    Returns:
        A stateless transformation.

    Raises:
        ValueError: If both `consistent_rms` and `rule` are given, a rule is unknown, or
            `consistent_rms` is not positive; while tracing for a leaf that is not a matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_shape(consistent_rms=0.2)
        >>> params = {"w": jnp.ones((4, 25))}
        >>> float(tx.update(params, tx.init(params))[0]["w"][0, 0])
        1.0
    """
    check_choice("rule", rule, (None, "width_transfer", "rms_to_rms"))
    if consistent_rms is not None:
        hint = "Write 0.2 for AdamW's RMS, None for none."
        check_number("consistent_rms", consistent_rms, "positive and finite", hint)
        if rule is not None:
            raise ValueError(
                f"scale_by_shape takes consistent_rms or rule, got consistent_rms={consistent_rms} "
                f"and rule={rule!r}. Leave one of them out."
            )

    def scale_leaf(x: jax.Array, axes: MatrixAxes) -> jax.Array:
        if x.size == 0:
            return x
        fan_in, fan_out = axes.size(x.shape, "inputs"), axes.size(x.shape, "outputs")
        if consistent_rms is not None:
            scale = np.sqrt(np.maximum(fan_in, fan_out)) * consistent_rms
        elif rule == "rms_to_rms":  # unit RMS-to-RMS operator norm: Scion; dion's "spectral_norm"
            scale = np.sqrt(fan_out / fan_in)
        else:  # Keller Jordan; Optax's default; torch's "original"
            scale = np.sqrt(np.maximum(1.0, fan_out / fan_in))
        # Rounded once.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (jnp.asarray(scale, wide) * x.astype(wide)).astype(x.dtype)

    def update(updates: Tree, state: Tree, params: Tree = None, **_: object) -> tuple[Tree, Tree]:
        axes = matrix_axes(updates, rules, weight_dimension_numbers=weight_dimension_numbers)
        return jax.tree.map(scale_leaf, updates, axes), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
