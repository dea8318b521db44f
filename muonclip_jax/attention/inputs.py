"""The arguments of an attention call, validated and converted to one form."""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from muonclip_jax._devices import entry_axes, plan_platform
from muonclip_jax._tree import ScalarLike
from muonclip_jax.attention.pairs import Geometry, Inputs

#: What a caller may pass as an array.
AnyArray: TypeAlias = jax.Array | np.ndarray
#: Output `[B, T, K, G, D]`, or None where only maxima are asked for, and maxima `[K, G]`.
Result: TypeAlias = tuple[jax.Array | None, jax.Array]


def _check_sequences(query: jax.Array, key: jax.Array, value: jax.Array | None) -> None:
    value = key if value is None else value
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(
                f"{name} has shape {x.shape}; attention takes (batch, time, heads, head_dim), with "
                "any number of batch axes."
            )
        if x.dtype != query.dtype:
            raise ValueError(
                f"query is {query.dtype} and {name} is {x.dtype}; cast them to the same dtype, as "
                "jax.nn.dot_product_attention requires too."
            )
    q, k, v = query.shape, key.shape, value.shape
    real = jnp.issubdtype(query.dtype, jnp.floating)
    for right, message in (
        (real, f"query, key and value must be real floating, got {query.dtype}."),
        (k[:-3] == q[:-3], f"query and key must agree in batch, all axes but 3, got {q} and {k}."),
        (k[-1] == q[-1], f"query and key must agree in head_dim, the last axis, got {q} and {k}."),
        (v[:-1] == k[:-1], f"key and value must agree in all but their last axis: {k} and {v}."),
        (
            k[-2] != 0 and q[-2] % k[-2] == 0,
            f"query has {q[-2]} heads and key {k[-2]}: the query heads must be a multiple of the "
            "key heads, each key head being shared by that many.",
        ),
    ):
        if not right:
            raise ValueError(message)


def _grouped(
    name: str, x: AnyArray | None, full: tuple[int, ...], key_heads: int
) -> jax.Array | None:
    """Reshapes a mask or bias that broadcasts to `(*batch, N, T, S)` to `[B, K, G, T, S]`."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.ndim > len(full) or any(
        size not in (1, wanted) for size, wanted in zip(x.shape[::-1], full[::-1], strict=False)
    ):
        raise ValueError(
            f"{name} has shape {x.shape}; it must broadcast to (batch, heads, queries, keys) = "
            f"{full}."
        )
    if name == "mask" and x.dtype != jnp.bool_:
        raise ValueError(
            f"mask is {x.dtype}; it must be boolean, False for masked pairs. Write "
            "mask.astype(bool), or pass an additive mask as bias."
        )
    x = x.reshape((1,) * (len(full) - x.ndim) + x.shape)
    if any(size != 1 for size in x.shape[:-3]):
        x = jnp.broadcast_to(x, full[:-3] + x.shape[-3:])
    heads = x.shape[-3]
    grouped = (1, 1) if heads == 1 else (key_heads, heads // key_heads)
    return x.reshape(math.prod(x.shape[:-3]), *grouped, *x.shape[-2:])


def _lengths(name: str, x: AnyArray | None, batch: tuple[int, ...]) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != batch or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name} must have one integer per sequence, shape {batch}, got {x.dtype} of shape "
            f"{x.shape}."
        )
    return x.reshape(-1)


def read_inputs(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray | None,
    bias: AnyArray | None = None,
    mask: AnyArray | None = None,
    scale: ScalarLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: AnyArray | None = None,
    key_value_seq_lengths: AnyArray | None = None,
    local_window_size: int | tuple[int, int] | None = None,
) -> tuple[Inputs, Geometry]:
    """Checks the arguments of `jax.nn.dot_product_attention` and converts them to one form.

    Raises:
        ValueError: If shapes or dtypes do not match.
    """
    q, k = jnp.asarray(query), jnp.asarray(key)
    v = None if value is None else jnp.asarray(value)
    _check_sequences(q, k, v)
    *axes, queries, heads, head_dim = q.shape
    batch = tuple(axes) or (1,)
    q, k, v = jax.tree.map(lambda x: x.reshape(math.prod(batch), *x.shape[-3:]), (q, k, v))
    sharding = jax.typeof(q).sharding
    head_axes = entry_axes((*sharding.spec, *[None] * 4)[2])
    keys, key_heads = k.shape[1:3]
    if key_heads % math.prod(sharding.mesh.shape[name] for name in head_axes):
        # Devices divide the query heads further than there are key heads: each gets the keys that
        # its own heads read.
        def repeat(x: jax.Array) -> jax.Array:
            shared = (*x.shape[:3], heads // key_heads, x.shape[3])
            return jnp.broadcast_to(x[:, :, :, None], shared).reshape(len(x), keys, heads, -1)

        k, v = jax.tree.map(repeat, (k, v))
        key_heads = heads
    full = (*batch, heads, queries, keys)
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    inputs = Inputs(
        query=q.reshape(*q.shape[:2], key_heads, heads // key_heads, head_dim),
        key=k,
        value=v,
        scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
        mask=_grouped("mask", mask, full, key_heads),
        bias=_grouped("bias", bias, full, key_heads),
        query_seq_lengths=_lengths("query_seq_lengths", query_seq_lengths, batch),
        key_value_seq_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
    )
    platform = plan_platform(None, sharding.mesh, (q,))
    return inputs, Geometry(is_causal, local_window_size, platform)


def on_each_device(
    function: Callable[[Inputs], Result], inputs: Inputs, *, check_vma: bool = True
) -> Result:
    """Calls `function` on every device's local sequences and heads, if Explicit axes shard them.

    Under Explicit mesh axes a sharding is part of an array's type, so what each device computes is
    known while tracing: its own sequences and key heads, along whole sequences. Queries or keys
    whose positions are sharded are gathered first, and the output is sharded again. Under Auto axes
    the partitioner decides.
    """
    inputs = inputs._replace(scale=jnp.asarray(inputs.scale))
    sharding = jax.typeof(inputs.query).sharding
    mesh = sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = {name for name, kind in kinds if kind == AxisType.Explicit}
    if not explicit or inputs.query.size == 0:
        return function(inputs)
    batch, queries, key_heads, groups, _ = (*sharding.spec, *[None] * 5)[:5]
    keys, pairs = (batch, None, key_heads), (batch, key_heads, groups)
    # Mesh axes of the leading axes of every array, in the order of `Inputs`.
    entries = ((*keys, groups), keys, keys, (), pairs, pairs, (batch,), (batch,))
    arrays = {name: x for name, x in inputs._asdict().items() if x is not None}
    specs = {
        name: P(
            *(axes if n > 1 else None for axes, n in zip(entry, arrays[name].shape, strict=False))
        )
        for name, entry in zip(inputs._fields, entries, strict=True)
        if name in arrays
    }

    def local(share: dict[str, jax.Array]) -> Result:
        out, maxima = function(inputs._replace(**share))
        if axes := entry_axes(batch):
            maxima = lax.pmax(lax.stop_gradient(maxima), axes)
        return out, maxima

    def mapped(arrays: dict[str, jax.Array]) -> Result:
        return jax.shard_map(
            local,
            mesh=mesh,
            axis_names=explicit,
            in_specs=(specs,),
            out_specs=(None if inputs.value is None else P(*keys, groups), P(key_heads, groups)),
            check_vma=check_vma,
        )({name: jax.reshard(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()})

    if any(jax.typeof(x).sharding.mesh.empty for x in arrays.values()):
        # Eagerly, where no mesh is set, an array that is on one device cannot be resharded.
        mapped = jax.jit(mapped)
    out, maxima = mapped(arrays)
    if out is not None and queries is not None:
        out = jax.reshard(out, NamedSharding(mesh, P(batch, queries, key_heads, groups)))
    return out, maxima
