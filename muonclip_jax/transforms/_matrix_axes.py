"""The matrix axes of every leaf, and reductions along them.

A transformation before or behind the polar factor often needs a norm of rows, of columns or of
whole matrices. `matrix_axes` says which axes of a leaf those are. The reductions are plain `jnp`
reductions of the whole array with kept dimensions: they need no reshape, so they are right however
a mesh shards the leaf, and the result broadcasts against the leaf.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import Tree
from muonclip_jax.routing import MatrixRules, Split, axes_tuple, resolve_muon_specs

#: What to reduce along: the axes of the inputs, those of the outputs, or both.
Over = Literal["inputs", "outputs", "matrix"]


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """The axes of one leaf as those of its matrices, for `y = x @ W`.

    Attributes:
        batch: Axes with a matrix for each entry: stacked layers, experts, heads of a per-head spec.
        inputs: Axes that are summed over; their product is the fan-in.
        outputs: Axes that are produced; their product is the fan-out.
        splits: Where axes of a fused kernel are cut into matrices of their own.

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
        raise ValueError(f"over={over!r} is not known. Write 'inputs', 'outputs' or 'matrix'.")

    def sum(self, x: jax.Array, over: Over) -> jax.Array:
        """Sums along axes of the matrices, in float32 or wider.

        Args:
            x: An array of the leaf's shape.
            over: "inputs" (a number for every output), "outputs" (one for every input) or "matrix"
                (one for every matrix).

        Returns:
            The sums, broadcastable against `x`: reduced axes have length one, except that an axis
            that is cut keeps its length, each entry with the sum over its own part.
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
        """How many entries `sum` adds up, broadcastable against a leaf of this shape."""
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
    """Finds the matrix axes of every leaf of a tree that Muon trains.

    Args:
        tree: Parameters or updates; only paths and shapes are looked at.
        rules: As in `scale_by_muon`.
        weight_dimension_numbers: As in `scale_by_muon`.

    Returns:
        The same tree with a `MatrixAxes` for every leaf, to be mapped beside it by `jax.tree.map`.

    Raises:
        ValueError: For a leaf that is not a matrix, with its path.

    Example:
        Rows of every matrix brought to unit RMS, one row an output:

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
