"""A launch that `vmap` and the partitioner understand.

Neither looks into a kernel: the one would add an axis to its grid, the other would refuse it or
gather everything. They are told here what the arguments mean. A mapped axis is more sequences;
sequences and key heads may be split over devices, each of which launches the kernel on its own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from muonclip_jax.kernels.max_logits.operands import Operands
from muonclip_jax.kernels.pairs import Geometry
from muonclip_jax.kernels.shards import entry_axes

P = PartitionSpec


def _batched_over(operands: Operands, is_batched: Operands, size: int) -> Operands:
    """Merges a mapped axis of that size, the first one where there is one, into the sequences."""
    axis = 1 if is_batched.query else 0
    batch = operands.query.shape[axis]

    def merge(x: jax.Array, batched: bool) -> jax.Array:
        own = x.shape[int(batched) :]
        if not batched and own[0] == 1 and batch > 1:
            return x
        x = x if batched else x[None]
        return jnp.broadcast_to(x, (size, batch, *own[1:])).reshape(size * batch, *own[1:])

    return jax.tree.map(merge, operands, is_batched)


def _rule(operands: Operands) -> str:
    """Writes which axes are the sequences and which the heads, in the partitioner's language."""
    group = operands.query.shape[2] // operands.key.shape[2]
    names = [f"b t {'(k g)' if group > 1 else 'k'} h", "b s k h"]
    for number, permit in enumerate(operands.permits):
        first, second, _, _ = permit.shape
        batch = "b" if first > 1 else f"b{number}"
        head = f"n{number}" if second == 1 else ("(k g)" if group > 1 else "k")
        names.append(f"{batch} {head} t{number} s{number}")
    if operands.limits is not None:
        names.append("b two")
    return f"{', '.join(names)} -> b {'(k g)' if group > 1 else 'k'}"


def _partitioned(launch: Callable[..., Any], geometry: Geometry, operands: Operands) -> Any:
    """Returns the launch, split over the devices that split the sequences and the key heads."""

    def local(operands: Operands) -> jax.Array:
        return launch(operands, geometry=geometry)

    def partition(mesh: Mesh, shapes: Any, result: Any) -> Any:
        del result
        (given,) = shapes
        spec = tuple(given.query.sharding.spec) + (None,) * 4
        batch, heads = entry_axes(spec[0]), entry_axes(spec[2])
        key_heads = heads if given.key.shape[2] > 1 else ()
        if given.key.shape[2] % math.prod(mesh.shape[axis] for axis in key_heads):
            heads = key_heads = ()  # a key head and the query heads that share it stay together

        def place(*entries: Any) -> NamedSharding:
            return NamedSharding(mesh, P(*(entry or None for entry in entries)))

        def permit_place(permit: Any) -> NamedSharding:
            return place(
                batch if permit.shape[0] > 1 else None,
                heads if permit.shape[1] > 1 else None,
                None,
                None,
            )

        places = given._replace(
            query=place(batch, None, heads, None),
            key=place(batch, None, key_heads, None),
            permits=tuple(map(permit_place, given.permits)),
            limits=None if given.limits is None else place(batch, None),
        )
        return mesh, local, place(batch, heads), (places,)

    split = custom_partitioning(local)
    group = operands.query.shape[2] // operands.key.shape[2]
    sizes: Any = {"g": group} if group > 1 else {}
    split.def_partition(partition=partition, sharding_rule=_rule(operands), **sizes)
    return split


def launched(
    launch: Callable[..., Any], geometry: Geometry, operands: Operands, *, is_partitioned: bool
) -> jax.Array:
    """Launches a kernel in a way that mapping and partitioning understand.

    Args:
        launch: Returns the maxima of every sequence and head, given operands and geometry.
        geometry: Causality and window.
        operands: The arrays.
        is_partitioned: Whether the platform's partitioner can be told how a launch is split.

    Returns:
        The maxima `[B, N]`.
    """

    @custom_vmap
    def mapped(operands: Operands) -> jax.Array:
        if is_partitioned:
            return _partitioned(launch, geometry, operands)(operands)
        return launch(operands, geometry=geometry)

    @mapped.def_vmap
    def _(size: int, is_batched: list[Operands], operands: Operands) -> tuple[jax.Array, bool]:
        merged = _batched_over(operands, is_batched[0], size)
        maxima = launched(launch, geometry, merged, is_partitioned=is_partitioned)
        return maxima.reshape(size, -1, maxima.shape[1]), True

    return mapped(operands)
