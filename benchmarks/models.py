"""Shapes of named models, as the trees that an optimizer sees.

A model is a number of equal layers and what lies beside them. Sizes are from the models' published
configurations. Nothing holds an array: leaves are `jax.ShapeDtypeStruct`.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's parameters by shape."""

    layers: int
    layer: Mapping[str, tuple[int, int]]  # path within a layer: `(in, out)` of each matrix
    rest: Mapping[str, tuple[int, ...]]  # what AdamW trains

    def with_layers(self, layers: int) -> "Model":
        """Returns the same model with that many layers."""
        return dataclasses.replace(self, layers=layers)

    def _nested(self, matrix: Any, other: Any) -> dict[str, Any]:
        """Returns nested dicts of a function of the shape, of matrices and of the rest."""
        flat = {path: other(shape) for path, shape in self.rest.items()}
        for i in range(self.layers):
            flat |= {f"block_{i}/{path}": matrix(shape) for path, shape in self.layer.items()}
        tree: dict[str, Any] = {}
        for path, leaf in flat.items():
            *folders, name = path.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[name] = leaf
        return tree

    def tree(self, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Returns the parameters as nested dicts of `jax.ShapeDtypeStruct`, a leaf a matrix."""

        def leaf(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

        return self._nested(leaf, leaf)

    def dimension_numbers(self) -> dict[str, Any]:
        """Returns the tree of `MuonDimensionNumbers`, None where AdamW trains."""
        return self._nested(lambda _: MuonDimensionNumbers((0,), (1,)), lambda _: None)

    def matrices(self) -> Counter[tuple[int, int]]:
        """Counts the matrices by shape, each oriented wide: `(rows, columns)`, rows first."""
        counts: Counter[tuple[int, int]] = Counter()
        for shape in self.layer.values():
            counts[min(shape), max(shape)] += self.layers
        return counts

    def entries(self) -> int:
        """Counts the entries of all matrices."""
        return sum(m * n * count for (m, n), count in self.matrices().items())


def _transformer(
    layers: int, width: int, hidden: int, vocabulary: int, positions: int = 0
) -> Model:
    """A decoder: query, key, value, output and the MLP of every layer; embeddings beside them."""
    names = ("query", "key", "value", "out")
    layer = {f"attention/{name}/kernel": (width, width) for name in names}
    layer |= {"mlp/up/kernel": (width, hidden), "mlp/down/kernel": (hidden, width)}
    # Embeddings and head as two leaves, so that the tree is the one of an untied model.
    rest = {"embed/embedding": (vocabulary, width), "head/kernel": (width, vocabulary)}
    if positions:
        rest["positions/embedding"] = (positions, width)
    return Model(layers, layer, rest)


def layers_of_256(layers: int) -> Model:
    """The synthetic tree of compile times: six small matrices a layer, nothing beside them."""
    return dataclasses.replace(_transformer(layers, 256, 1024, 0), rest={})


#: Every named model.
MODELS: Mapping[str, Model] = {
    "gpt2-small": _transformer(12, 768, 3072, 50257, positions=1024),
    "1.3b": _transformer(24, 2048, 8192, 50257, positions=2048),
    "layers-of-256": layers_of_256(48),
}
