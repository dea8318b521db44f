"""Parameter trees of named models, and how they are laid out on pods, by logical axes.

A leaf says what each of its dimensions is ("layers", "embed", "heads"); a layout says which axes of
the mesh shard which of those. A dimension that its mesh axes do not divide is left whole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Leaf:
    """A parameter: what its dimensions are, and how long."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A mesh, and the mesh axes that shard each logical axis.

    Attributes:
        mesh: Sizes of the mesh axes by name, the slowest first.
        rules: Logical axis -> mesh axes.
    """

    mesh: Mapping[str, int]
    rules: Mapping[str, tuple[str, ...]]

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh.values())

    def spec(self, leaf: Leaf) -> PartitionSpec:
        """How a leaf is sharded; a mesh axis shards the first dimension that asks for it."""
        entries: list[tuple[str, ...] | None] = []
        used: set[str] = set()
        for name, length in zip(leaf.axes, leaf.shape, strict=True):
            axes = tuple(axis for axis in self.rules.get(name, ()) if axis not in used)
            ways = math.prod(self.mesh[axis] for axis in axes)
            if not axes or length % ways:
                entries.append(None)
                continue
            used.update(axes)
            entries.append(axes)
        return PartitionSpec(*entries)

    def on(self, devices: list[Any]) -> Mesh:
        """The mesh of the given devices."""
        shape = tuple(self.mesh.values())
        kinds = (AxisType.Auto,) * len(shape)
        return Mesh(np.array(devices).reshape(shape), tuple(self.mesh), axis_types=kinds)


def dense_7b() -> dict[str, Any]:
    """Llama 7B's widths with 24 scanned layers."""
    layers, embed, heads, size, mlp, vocab = 24, 4096, 32, 128, 11008, 32000
    project = Leaf(("layers", "embed", "heads", "head_dim"), (layers, embed, heads, size))
    out = Leaf(("layers", "heads", "head_dim", "embed"), (layers, heads, size, embed))
    up = Leaf(("layers", "embed", "mlp"), (layers, embed, mlp))
    down = Leaf(("layers", "mlp", "embed"), (layers, mlp, embed))
    norm = {"scale": Leaf(("layers", "norm"), (layers, embed))}
    attention = {name: {"kernel": project} for name in ("query", "key", "value")}
    return {
        "embed": {"embedding": Leaf(("vocab", "embed"), (vocab, embed))},
        "layers": {
            "attention": attention | {"out": {"kernel": out}},
            "attention_norm": norm,
            "mlp": {
                "gate_proj": {"kernel": up},
                "up_proj": {"kernel": up},
                "down_proj": {"kernel": down},
            },
            "mlp_norm": norm,
        },
        "norm": {"scale": Leaf(("norm",), (embed,))},
        "lm_head": {"kernel": Leaf(("embed", "vocab"), (embed, vocab))},
    }


def _latent_attention(layers: tuple[int, ...]) -> dict[str, Any]:
    embed, heads, q_rank, kv_rank, nope, rope, value = 7168, 64, 1536, 512, 128, 64, 128

    def leaf(*dims: tuple[str, int]) -> dict[str, Leaf]:
        names = ("layers",) * len(layers) + tuple(name for name, _ in dims)
        return {"kernel": Leaf(names, layers + tuple(length for _, length in dims))}

    def gain(length: int) -> dict[str, Leaf]:
        return {"scale": leaf(("norm", length))["kernel"]}

    wide, tall = ("embed", embed), ("heads", heads)
    return {
        "wq_a": leaf(wide, ("q_rank", q_rank)),
        "q_a_norm": gain(q_rank),
        "wq_b": leaf(("q_rank", q_rank), tall, ("head_dim", nope + rope)),
        "wkv_a": leaf(wide, ("kv_rank", kv_rank + rope)),
        "kv_a_norm": gain(kv_rank),
        "wkv_b": leaf(("kv_rank", kv_rank), tall, ("head_dim", nope + value)),
        "out": leaf(tall, ("head_dim", value), wide),
    }


def kimi_k2() -> dict[str, Any]:
    """Kimi K2's published shapes: 61 layers, the first of them dense, 384 experts of 2048."""
    layers, embed, experts, hidden, dense, vocab = 60, 7168, 384, 2048, 18432, 163840

    def mlp(width: int, name: str, *stack: tuple[str, int]) -> dict[str, Any]:
        names, lengths = tuple(axis for axis, _ in stack), tuple(length for _, length in stack)
        up = Leaf((*names, "embed", name), (*lengths, embed, width))
        down = Leaf((*names, name, "embed"), (*lengths, width, embed))
        return {
            "gate_proj": {"kernel": up},
            "up_proj": {"kernel": up},
            "down_proj": {"kernel": down},
        }

    def norms(*stack: int) -> dict[str, Any]:
        gain = Leaf(("layers",) * len(stack) + ("norm",), (*stack, embed))
        return {"attention_norm": {"scale": gain}, "mlp_norm": {"scale": gain}}

    stack = ("layers", layers)
    router = Leaf(("layers", "embed", "router"), (layers, embed, experts))
    return {
        "embed": {"embedding": Leaf(("vocab", "embed"), (vocab, embed))},
        "first": {"attention": _latent_attention(()), "mlp": mlp(dense, "mlp"), **norms()},
        "layers": {
            "attention": _latent_attention((layers,)),
            "router": {"kernel": router},
            "experts": mlp(hidden, "expert_mlp", stack, ("experts", experts)),
            "shared_expert": mlp(hidden, "mlp", stack),
            **norms(layers),
        },
        "norm": {"scale": Leaf(("norm",), (embed,))},
        "lm_head": {"kernel": Leaf(("embed", "vocab"), (embed, vocab))},
    }


MODELS = {"7B dense": dense_7b, "Kimi K2": kimi_k2}
#: The largest attention logits that each model records.
MAXIMA = {
    "7B dense": lambda: {"layers/attention": Leaf(("layers", "heads"), (24, 32))},
    "Kimi K2": lambda: {
        "first/attention": Leaf(("heads",), (64,)),
        "layers/attention": Leaf(("layers", "heads"), (60, 64)),
    },
}


def is_leaf(x: Any) -> bool:
    """Whether `x` is a `Leaf`, for `jax.tree.map`."""
    return isinstance(x, Leaf)


def shapes(model: dict[str, Any], shardings: Any = None, dtype: str = "float32") -> Any:
    """The parameters as `jax.ShapeDtypeStruct`, with shardings where they are given."""
    if shardings is None:
        shardings = jax.tree.map(lambda _: None, model, is_leaf=is_leaf)
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=at),
        model,
        shardings,
        is_leaf=is_leaf,
    )


def shardings_of(model: dict[str, Any], layout: Layout, mesh: Mesh) -> Any:
    """The sharding of every leaf."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, layout.spec(leaf)), model, is_leaf=is_leaf)


_TENSOR = {"heads": ("tp",), "mlp": ("tp",), "expert_mlp": ("tp",), "vocab": ("tp",)}
_FSDP = {"embed": ("fsdp",), "q_rank": ("fsdp",), "kv_rank": ("fsdp",)}
# The same devices under two names: those along the second axis can share a matrix.
_FSDP_OF_TWO = dict.fromkeys(_FSDP, ("fsdp", "fsdp_inner"))
#: Model -> name -> layout. Those of one model that fill a pod are compared with each other.
LAYOUTS: dict[str, dict[str, Layout]] = {
    "7B dense": {
        "fsdp x tp": Layout({"fsdp": 128, "tp": 4}, _FSDP | _TENSOR),
        "replicated": Layout({"data": 128, "data_inner": 4}, {}),
        "replicated, 64": Layout({"data": 64}, {}),
        "fsdp": Layout({"fsdp": 128, "fsdp_inner": 4}, _FSDP_OF_TWO),
        "pipeline x fsdp x tp": Layout(
            {"stage": 4, "fsdp": 32, "tp": 4}, _FSDP | _TENSOR | {"layers": ("stage",)}
        ),
        "data parallel": Layout({"data": 8}, {}),
        "fsdp, 8": Layout({"fsdp": 8}, _FSDP),
    },
    "Kimi K2": {
        "expert x fsdp": Layout(
            {"expert": 128, "fsdp": 8},
            _FSDP | {"experts": ("expert",), "heads": ("expert",), "vocab": ("expert",)},
        ),
        "fsdp x tp": Layout({"fsdp": 128, "tp": 8}, _FSDP | _TENSOR),
        "fsdp": Layout({"fsdp": 128, "fsdp_inner": 8}, _FSDP_OF_TWO),
        "pipeline x expert x tp": Layout(
            {"stage": 4, "expert": 64, "tp": 4},
            _TENSOR | {"layers": ("stage",), "experts": ("expert",)},
        ),
        "replicated": Layout({"data": 1024}, {}),
    },
}
