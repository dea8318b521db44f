"""A configuration as plain data, which can be printed as a program and simplified by field."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Entry = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter.

    Attributes:
        kind: What it is, for the statistics and the rules.
        path: Its path.
        shape: Its shape.
        dtype: Its dtype.
        dims: Axes of rows and of columns; None is a leaf that Adam trains.
        split: Arguments of `Split`: axis, sizes, view, along; None is one matrix.
        spec: The mesh axes of each dimension.
    """

    kind: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[tuple[int, ...], tuple[int, ...]] | None
    split: tuple[int, tuple[int, ...], tuple[int, ...] | None, int] | None = None
    spec: tuple[Entry, ...] = ()

    @property
    def batch(self) -> tuple[int, ...]:
        """Dimensions that count matrices."""
        if self.dims is None:
            return ()
        return tuple(i for i in range(len(self.shape)) if i not in self.dims[0] + self.dims[1])


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration; `programs.py` writes it as Python.

    Attributes:
        seed: Of the arrays.
        leaves: The tree.
        x64: Whether 64-bit types are on.
        mesh: `(name, size, "Auto" or "Explicit")` of every axis; () is one device without a mesh.
        mode: "jit", "eager", "shard_map" or "pmap".
        set_mesh: Whether `jax.set_mesh` is active.
        given: Whether `param_shardings=` is given.
        manual: The axes of the `shard_map`.
        shared: The axes given as `axis_name=`.
        check_vma: The argument of `shard_map`.
        init: "eager", "jit", or "abstract" where `init` is also called on shapes.
        factory: The public function that builds the transformation.
        options: Its arguments.
        distribution: The arguments of `Distribution`.
        with_rules: Whether every leaf has a rule; else the names decide.
        maxima: The maximum logits of the attention block.
        maxima_spec: The mesh axes of their dimensions; None leaves them on one device.
        gradient: Whether the gradient through the update is compared in place of the updates.
    """

    seed: int
    leaves: tuple[Leaf, ...]
    x64: bool = False
    mesh: tuple[tuple[str, int, str], ...] = ()
    mode: str = "jit"
    set_mesh: bool = False
    given: bool = False
    manual: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    check_vma: bool = True
    init: str = "eager"
    factory: str = "muonclip"
    options: tuple[tuple[str, Any], ...] = ()
    distribution: tuple[tuple[str, Any], ...] = ()
    with_rules: bool = True
    maxima: tuple[Any, ...] | None = None
    maxima_spec: tuple[Entry, ...] | None = None
    gradient: bool = False

    @property
    def option(self) -> dict[str, Any]:
        """The options as a dict."""
        return dict(self.options)

    @property
    def devices(self) -> int:
        """How many devices the case uses."""
        return math.prod(size for _, size, _ in self.mesh)

    @property
    def hidden(self) -> bool:
        """Whether shardings cannot be known while tracing, so that the compiler chooses some."""
        traced = self.mode in ("jit", "shard_map") or self.gradient
        seen = self.given or not traced
        return not seen and any(
            size > 1 and kind == "Auto" and name not in self.manual
            for name, size, kind in self.mesh
        )

    def drawn(self) -> list[str]:
        """What the statistics count."""
        kinds = {kind for _, size, kind in self.mesh}
        mesh = "none" if not self.mesh else kinds.pop() if len(kinds) == 1 else "mixed"
        return [
            f"mode={self.mode}{' partly manual' * self.partly}",
            f"devices={self.devices}",
            f"mesh axes={len(self.mesh)}",
            f"axis types={mesh}",
            f"set_mesh={self.set_mesh}",
            f"factory={self.factory}",
            f"init={self.init}",
            f"x64={self.x64}",
            f"param_shardings={self.given}",
            f"gradient={self.gradient}",
            f"clip={self.maxima is not None}",
            f"leaves={len(self.leaves)}",
            *{f"leaf={leaf.kind}" for leaf in self.leaves},
            *{f"dtype={leaf.dtype}" for leaf in self.leaves},
            *(f"{name}={value!r}" for name, value in self.options),
            *(f"distribution.{name}" for name, _ in self.distribution),
        ]

    @property
    def partly(self) -> bool:
        """Whether a `shard_map` leaves axes to the compiler."""
        return self.mode == "shard_map" and len(self.manual) < len(self.mesh)


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choice(self, *values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def weighted(self, table: dict[Any, float]) -> Any:
        weights = np.array(list(table.values()))
        return list(table)[int(self.rng.choice(len(table), p=weights / weights.sum()))]

    def some(self, values: Sequence[Any], probability: float) -> tuple[Any, ...]:
        return tuple(value for value in values if self.chance(probability))

    def shuffled(self, values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in self.rng.permutation(len(values))]
