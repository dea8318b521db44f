"""Attention on every device's own share, where the types of arrays say who holds what.

Under Explicit mesh axes a sharding is part of an array's type. What each device does is then known
while tracing: it works on its own sequences and heads, as long as heads that share a key stay
together, and on whole sequences. Queries or keys that come with their sequence divided are gathered
first. Under Auto axes nothing is known here, and the partitioner decides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from muonclip_jax._devices import entry_axes
from muonclip_jax._tree import ScalarLike
from muonclip_jax.attention.pairs import PairArrays

P = PartitionSpec


def divisions(x: jax.Array, axis: int) -> int:
    """Returns into how many parts Explicit mesh axes divide an axis; 1 where nothing is known.

    Example:
        >>> divisions(jnp.ones((4, 8)), 0)
        1
    """
    sharding = jax.typeof(x).sharding
    names = entry_axes((*sharding.spec, *[None] * x.ndim)[axis])
    return math.prod(sharding.mesh.shape[name] for name in names)


@dataclass(frozen=True)
class Shares:
    """Which mesh axes divide what.

    Attributes:
        mesh: The mesh, as types know it.
        batch: Entry of a PartitionSpec for the sequences.
        queries: For the positions of the queries: they are gathered, and divided again.
        key_heads: For the key heads.
        groups: For the query heads of a key head.
    """

    mesh: Any
    batch: Any
    queries: Any
    key_heads: Any
    groups: Any

    def _spec(self, x: jax.Array, *entries: Any) -> PartitionSpec:
        split = zip(entries, x.shape, strict=False)
        return P(*(entry if size > 1 else None for entry, size in split))

    def _placed(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.reshard(x, NamedSharding(self.mesh, spec))

    def maxima(
        self,
        function: Callable[..., Any],
        query: Float[Array, "B T K G H"],
        key: Float[Array, "B S K H"],
        scale: ScalarLike,
        arrays: PairArrays,
        *,
        check_vma: bool = True,
    ) -> Float[Array, "K G"]:
        """Does what `call` does, for a function without a value that takes `arrays` by name."""
        return self.call(
            lambda query, key, _, scale, arrays: function(query, key, scale, arrays=arrays),
            query,
            key,
            None,
            scale,
            arrays,
            check_vma=check_vma,
        )

    def call(
        self,
        function: Callable[..., Any],
        query: Float[Array, "B T K G H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K D"] | None,
        scale: ScalarLike,
        arrays: PairArrays,
        *,
        check_vma: bool = True,
    ) -> Any:
        """Calls a function of these arguments on every device's share.

        Args:
            function: Returns the maxima `[K, G]` of its share; with a value, the output
                `[B, T, K, G, D]` before them.
            query: Queries.
            key: Keys.
            value: Values, or None.
            scale: What the dot products are multiplied by.
            arrays: Mask, bias and lengths.
            check_vma: As of `jax.shard_map`.

        Returns:
            What the function returns, whole.
        """
        heads = (self.batch, None, self.key_heads)
        out = P(self.batch, None, self.key_heads, self.groups)
        in_specs: Any = (
            self._spec(query, *heads, self.groups),
            self._spec(key, *heads),
            None if value is None else self._spec(value, *heads),
            P(),
            jax.tree.map(
                lambda x: (
                    self._spec(x, self.batch, self.key_heads, self.groups)
                    if x.ndim > 1
                    else P(self.batch)
                ),
                arrays,
            ),
        )

        def local(*arguments: Any) -> Any:
            *others, maxima = jax.tree.leaves(function(*arguments))
            if axes := entry_axes(self.batch):
                maxima = lax.pmax(lax.stop_gradient(maxima), axes)
            return (*others, maxima)

        maxima = P(self.key_heads, self.groups)

        def mapped(*arguments: Any) -> tuple[Any, ...]:
            return jax.shard_map(
                local,
                mesh=self.mesh,
                axis_names=set(_explicit_axes(self.mesh)),
                in_specs=in_specs,
                out_specs=(maxima,) if value is None else (out, maxima),
                check_vma=check_vma,
            )(*jax.tree.map(self._placed, arguments, in_specs))

        arguments = (query, key, value, jnp.asarray(scale), arrays)
        if any(jax.typeof(x).sharding.mesh.empty for x in jax.tree.leaves(arguments)):
            # Eagerly, where no mesh is set, an array that is on one device cannot be placed.
            mapped = jax.jit(mapped)
        *others, found = mapped(*arguments)
        if self.queries is not None:
            again = P(self.batch, self.queries, self.key_heads, self.groups)
            others = [self._placed(x, again) for x in others]
        return (*others, found) if others else found


def shares_of(query: Float[Array, "B T K G H"]) -> Shares | None:
    """Returns how Explicit axes divide a call, by its queries; None without such axes."""
    sharding = jax.typeof(query).sharding
    if not _explicit_axes(sharding.mesh) or query.size == 0:
        return None
    batch, queries, key_heads, groups, _ = (*sharding.spec, *[None] * query.ndim)[: query.ndim]
    return Shares(sharding.mesh, batch, queries, key_heads, groups)


def _explicit_axes(mesh: Any) -> list[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Explicit]
