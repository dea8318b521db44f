"""The matrix axes of every leaf, reductions along them, and `scale_by_shape`.

A transformation before or after the polar factor often needs a norm of rows, columns or whole
matrices. `matrix_axes` returns the axes for these. The reductions are `jnp` reductions of the whole
array with kept dimensions: they need no reshape, so they are correct for any sharding, and the
result broadcasts against the leaf.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import ScalarLike, Tree
from muonclip_jax.routing import MatrixRules, Split, axes_tuple, resolve_muon_specs
from muonclip_jax.transforms._checks import check_positive

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
        match over:
            case "inputs":
                return self.inputs
            case "outputs":
                return self.outputs
            case "matrix":
                return self.inputs + self.outputs
        raise ValueError(f"over={over!r} is unknown. Write 'inputs', 'outputs' or 'matrix'.")

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
        cut = {split.axis: split for split in self.splits}
        axes = self.over(over)
        whole = tuple(axis for axis in axes if axis not in cut)
        x = jnp.sum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), whole, keepdims=True)
        for axis in axes:
            if axis in cut:
                x = _sum_parts(x, cut[axis])
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
        cut = {split.axis: split for split in self.splits}
        size = np.ones((1,) * len(shape))
        for axis in self.over(over):
            if axis in cut:
                lengths = np.array(cut[axis].part_lengths)[_part_numbers(cut[axis])]
                size = size * np.expand_dims(lengths, [a for a in range(len(shape)) if a != axis])
            else:
                size = size * shape[axis]
        return size


@names_known
def matrix_axes(
    tree: Tree, rules: MatrixRules | None = None, *, weight_dimension_numbers: Any = None
) -> Any:
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
        inputs, outputs = (axes_tuple(axes) for axes in spec.dims)
        batch = tuple(axis for axis in range(len(leaf.shape)) if axis not in inputs + outputs)
        found.append(MatrixAxes(batch, inputs, outputs, spec.splits))
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _part_numbers(split: Split) -> np.ndarray:
    """The number of the part that each entry of the axis belongs to."""
    view = (split.length,) if split.view is None else split.view
    along = np.repeat(np.arange(len(split.sizes)), split.sizes)
    others = [axis for axis in range(len(view)) if axis != split.along]
    return np.broadcast_to(np.expand_dims(along, others), view).ravel()


def _sum_parts(x: jax.Array, split: Split) -> jax.Array:
    """Sums each part of an axis, and gives every entry the sum of its part."""
    numbers = np.expand_dims(
        _part_numbers(split), [axis for axis in range(x.ndim) if axis != split.axis]
    )
    sums = jnp.zeros((), x.dtype)
    for part in range(len(split.sizes)):
        inside = numbers == part
        total = jnp.sum(jnp.where(inside, x, 0), split.axis, keepdims=True)
        sums = jnp.where(inside, total, sums)
    return sums


#: Factors of an orthogonal matrix by (fan_in, fan_out), which are numbers or arrays of them.
_RULES: dict[str, Callable[..., np.ndarray]] = {
    # Keller Jordan; Optax's default; torch's "original".
    "width_transfer": lambda fan_in, fan_out: np.sqrt(np.maximum(1.0, fan_out / fan_in)),
    # Unit RMS-to-RMS operator norm: Scion; dion's "spectral_norm".
    "rms_to_rms": lambda fan_in, fan_out: np.sqrt(fan_out / fan_in),
}


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
    if consistent_rms is not None:
        instead = " Write 0.2 for AdamW's RMS, None for none."
        check_positive("consistent_rms", consistent_rms, instead)
    if rule is not None and consistent_rms is not None:
        raise ValueError(
            f"scale_by_shape takes consistent_rms or rule, got consistent_rms={consistent_rms} "
            f"and rule={rule!r}. Leave one of them out."
        )
    factor = _RULES.get("width_transfer" if rule is None else rule)
    if factor is None:
        raise ValueError(
            f"rule={rule!r} is not known. Write {' or '.join(map(repr, _RULES))}; "
            "c sqrt(max(fan_in, fan_out)) is consistent_rms=c."
        )

    def scale_leaf(x: jax.Array, axes: MatrixAxes) -> jax.Array:
        if x.size == 0:
            return x
        fan_in, fan_out = axes.size(x.shape, "inputs"), axes.size(x.shape, "outputs")
        if consistent_rms is None:
            scale = factor(fan_in, fan_out)
        else:
            scale = np.sqrt(np.maximum(fan_in, fan_out)) * consistent_rms
        # Rounded once.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (jnp.asarray(scale, wide) * x.astype(wide)).astype(x.dtype)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        axes = matrix_axes(updates, rules, weight_dimension_numbers=weight_dimension_numbers)
        return jax.tree.map(scale_leaf, updates, axes), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
