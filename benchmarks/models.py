"""Shapes of named models, as the trees that an optimizer sees.

A model is some stacks of equal layers and what lies beside them. Sizes are from the models'
published configurations; of the two mixtures of experts only the experts are here, which are most
of their matrices. Nothing holds an array: leaves are `jax.ShapeDtypeStruct`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's parameters by shape.

    Attributes:
        stacks: For every stack of equal layers its name, their number, and each leaf's path within
            a layer with its shape `(..., in, out)`; a convolution is `(height, width, in, out)`.
        rest: Paths and shapes of what AdamW trains.
        convolutions: Whether leading axes of a leaf are a convolution's window; otherwise they are
            a batch of matrices, such as experts.
    """

    stacks: tuple[tuple[str, int, Mapping[str, Shape]], ...]
    rest: Mapping[str, Shape]
    convolutions: bool = False

    def with_layers(self, layers: int) -> "Model":
        """Returns the same model with that many layers in every stack."""
        stacks = tuple((name, layers, leaves) for name, _, leaves in self.stacks)
        return dataclasses.replace(self, stacks=stacks)

    def _leaves(self, stacked: bool) -> list[tuple[str, Shape, bool]]:
        leaves = [(path, shape, False) for path, shape in self.rest.items()]
        for name, layers, layer in self.stacks:
            for path, shape in layer.items():
                if stacked:
                    leaves.append((f"{name}/{path}", (layers, *shape), True))
                else:
                    leaves += [(f"{name}_{i}/{path}", shape, True) for i in range(layers)]
        return leaves

    def tree(self, dtype: Any = jnp.float32, *, stacked: bool = False) -> dict[str, Any]:
        """Returns the parameters as nested dicts of `jax.ShapeDtypeStruct`.

        Args:
            dtype: Of every leaf.
            stacked: Whether equal layers are one leaf each, stacked on axis 0 as `nn.scan` does,
                or a leaf a layer.
        """
        dtype = jnp.dtype(dtype)
        leaves = self._leaves(stacked)
        return _nested({p: jax.ShapeDtypeStruct(shape, dtype) for p, shape, _ in leaves})

    def dimension_numbers(self, *, stacked: bool = False) -> dict[str, Any]:
        """Returns the tree of `MuonDimensionNumbers`, None where AdamW trains."""
        return _nested(
            {
                path: self._numbers(shape, stacked) if is_matrix else None
                for path, shape, is_matrix in self._leaves(stacked)
            }
        )

    def _numbers(self, shape: Shape, stacked: bool) -> MuonDimensionNumbers:
        last = len(shape) - 1
        first = (1 if stacked else 0) if self.convolutions else last - 1
        return MuonDimensionNumbers(tuple(range(first, last)), (last,))

    def matrices(self) -> Counter[tuple[int, int]]:
        """Counts the matrices by shape, each oriented wide: `(rows, columns)`, rows first."""
        counts: Counter[tuple[int, int]] = Counter()
        for _, layers, layer in self.stacks:
            for shape in layer.values():
                *leading, fan_in, fan_out = shape
                if self.convolutions:
                    fan_in, leading = math.prod((*leading, fan_in)), []
                rows, columns = sorted((fan_in, fan_out))
                counts[rows, columns] += layers * math.prod(leading)
        return counts

    def entries(self) -> int:
        """Counts the entries of all matrices."""
        return sum(m * n * count for (m, n), count in self.matrices().items())


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def _transformer(
    layers: int,
    width: int,
    hidden: int,
    vocabulary: int,
    *,
    queries: int | None = None,
    keys: int | None = None,
    gated: bool = False,
    positions: int = 0,
    tied: bool = False,
) -> Model:
    """A decoder: query, key, value, output and the MLP of every layer; embeddings beside them."""
    queries, keys = queries or width, keys or width
    layer = {
        "attention/query/kernel": (width, queries),
        "attention/key/kernel": (width, keys),
        "attention/value/kernel": (width, keys),
        "attention/out/kernel": (queries, width),
        **({"mlp/gate/kernel": (width, hidden)} if gated else {}),
        "mlp/up/kernel": (width, hidden),
        "mlp/down/kernel": (hidden, width),
    }
    rest = {"embed/embedding": (vocabulary, width)}
    if positions:
        rest["positions/embedding"] = (positions, width)
    if not tied:
        rest["head/kernel"] = (width, vocabulary)
    return Model((("block", layers, layer),), rest)


def _experts(layers: int, experts: int, width: int, hidden: int) -> Model:
    layer = {
        "experts/gate/kernel": (experts, width, hidden),
        "experts/up/kernel": (experts, width, hidden),
        "experts/down/kernel": (experts, hidden, width),
    }
    return Model((("block", layers, layer),), {})


def _resnet(blocks: tuple[int, ...], width: int, classes: int) -> Model:
    """He et al. 2015, arXiv 1512.03385, with bottlenecks."""
    stacks: list[tuple[str, int, Mapping[str, Shape]]] = []
    channels = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        first = {
            "conv_0/kernel": (1, 1, channels, inner),
            "conv_1/kernel": (3, 3, inner, inner),
            "conv_2/kernel": (1, 1, inner, 4 * inner),
        }
        shortcut = {"conv_shortcut/kernel": (1, 1, channels, 4 * inner)}
        stacks.append((f"stage_{stage}_first", 1, first | shortcut))
        others = first | {"conv_0/kernel": (1, 1, 4 * inner, inner)}
        stacks.append((f"stage_{stage}_block", count - 1, others))
        channels = 4 * inner
    rest = {"stem/conv/kernel": (7, 7, 3, width), "head/kernel": (channels, classes)}
    return Model(tuple(stacks), rest, convolutions=True)


def layers_of_256(layers: int) -> Model:
    """The synthetic tree of compile times: six small matrices a layer, nothing beside them."""
    return dataclasses.replace(_transformer(layers, 256, 1024, 0), rest={})


_VIT = dataclasses.replace(
    _transformer(12, 768, 3072, 0),
    rest={
        "patches/kernel": (16, 16, 3, 768),
        "positions/embedding": (197, 768),
        "head/kernel": (768, 1000),
    },
)

#: Every named model.
MODELS: Mapping[str, Model] = MappingProxyType(
    {
        # Embeddings and head as two leaves, so that the tree is the one of an untied model.
        "gpt2-small": _transformer(12, 768, 3072, 50257, positions=1024),
        "gpt2-xl": _transformer(48, 1600, 6400, 50257, positions=1024),
        "1.3b": _transformer(24, 2048, 8192, 50257, positions=2048),
        "llama3-8b": _transformer(32, 4096, 14336, 128256, keys=1024, gated=True),
        "qwen3-0.6b": _transformer(
            28, 1024, 3072, 151936, queries=2048, keys=1024, gated=True, tied=True
        ),
        "deepseek-v3-experts": _experts(58, 256, 7168, 2048),
        "kimi-k2-experts": _experts(60, 384, 7168, 2048),
        "vit-b16": _VIT,
        "resnet50": _resnet((3, 4, 6, 3), 64, 1000),
        "layers-of-256": layers_of_256(48),
    }
)
