"""Per-head maxima: the largest logit of each head, over the pairs attended to.

    S_h = max over b, t, s attended of  scale q[b, t, h] . k[b, s, h]

XLA goes through the pairs in blocks of queries and keys. Each block is a small matrix
product and a maximum; what lives at once is one block, and memory grows with `T + S` and not with
their product. The last block of an axis is moved back until it fits: pairs seen twice do not
change a maximum, and no padding is needed. Blocks that causality or the window rule out are never
visited.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax._devices import plan_platform
from muonclip_jax._tree import ScalarLike
from muonclip_jax.attention.pairs import (
    Geometry,
    PairArrays,
    allowed_pairs,
    bias_permits,
    cut,
    permitted_max,
)
from muonclip_jax.attention.shards import shares_of
from muonclip_jax.kernels import MAX_LOGITS, load_kernel

#: The names that `implementation` allows.
IMPLEMENTATIONS = ("xla", *MAX_LOGITS)

# Logits alive at once: 2 MB in float32, which a core's caches hold.
_BLOCK_ELEMENTS = 1 << 19
# Queries in a block at least. Under Auto axes it is not known how many devices share a batch, so a
# block may come out many times smaller than one of them would hold: on an accelerator, where every
# block is a launch, it keeps as many as fill a matrix unit. From 512 tokens and 64 features a head
# on, the logits of 256 by 256 pairs take no more memory than queries and keys do.
_LEAST_BLOCK = {"cpu": 32}
_ACCELERATOR_LEAST_BLOCK = 256


def dot_precision(dtype: jax.typing.DTypeLike) -> lax.DotAlgorithmPreset | None:
    """Returns the algorithm of dot products that accumulate in float32.

    For bfloat16 it is named, so that a gradient's products, whose cotangent is float32, stay
    bfloat16 products too (https://github.com/jax-ml/jax/issues/24047). The same name for float16
    exists, but not on every platform.
    """
    return lax.DotAlgorithmPreset.BF16_BF16_F32 if dtype == jnp.bfloat16 else None


def block_logits(
    query: Float[Array, "B t K G H"], key: Float[Array, "B s K H"], scale: ScalarLike
) -> Float[Array, "B K G t s"]:
    """Returns `scale q . k`, accumulated and kept in float32 (float64 for float64 input)."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum(
        "btkgh,bskh->bkgts",
        query,
        key,
        precision=dot_precision(query.dtype),
        preferred_element_type=dtype,
    )
    return logits * jnp.asarray(scale, dtype)


def least_block() -> int:
    """Returns how many queries a block has at least, where there are as many."""
    return _LEAST_BLOCK.get(jax.default_backend(), _ACCELERATOR_LEAST_BLOCK)


def known_product(*sizes: Any) -> int:
    """Multiplies sizes; a symbolic one, of a program exported for any batch, counts as one."""
    return math.prod(size for size in sizes if isinstance(size, int))


def _block_length(length: int, other: int, rows: int) -> int:
    """Returns how much of an axis a block covers, given `rows` products of `other` each."""
    wanted = _BLOCK_ELEMENTS // max(rows * other, 1)
    return min(length, max(least_block(), min(512, wanted // 32 * 32)))


def _block_starts(
    geometry: Geometry, queries: int, keys: int, query_block: int, key_block: int
) -> list[tuple[int, int]]:
    """Lists the blocks in which some pair is attended to, as far as geometry can tell."""
    starts = []
    for query_start in range(0, queries, query_block):
        query_start = min(query_start, queries - query_block)
        low, high = geometry.key_range(query_start, query_start + query_block, keys)
        for key_start in range(low, high, key_block):
            starts.append((query_start, min(key_start, keys - key_block)))
    return starts


def max_logits(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    *,
    scale: ScalarLike,
    geometry: Geometry,
    arrays: PairArrays,
    implementation: str | None = None,
) -> Float[Array, "K G"]:
    """Returns the largest `scale q . k` of every head over the pairs attended to.

    Args:
        query: Queries `[B, T, K, G, H]`, their heads grouped by key head.
        key: Keys `[B, S, K, H]`.
        scale: What the dot products are multiplied by.
        geometry: Causality and window.
        arrays: Mask, bias and lengths. The bias is not added; it only hides pairs.
        implementation: A name of `IMPLEMENTATIONS`; None is "xla".

    Returns:
        The maxima `[K, G]` in float32, -inf for a head with no pair at all. No gradient flows.

    Raises:
        ValueError: If there is no implementation of that name.
        NotImplementedError: If the named implementation cannot serve the call; says why.

    Example:
        >>> import jax.numpy as jnp
        >>> query = jnp.array([3.0, -1.0]).reshape(1, 2, 1, 1, 1)
        >>> key = jnp.array([1.0, -2.0]).reshape(1, 2, 1, 1)
        >>> max_logits(query, key, scale=1.0, geometry=Geometry(), arrays=PairArrays()).tolist()
        [[3.0]]
    """
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is none of {', '.join(map(repr, IMPLEMENTATIONS))},"
            " and not None, which is 'xla'."
        )
    query, key, scale, arrays = lax.stop_gradient((query, key, jnp.asarray(scale), arrays))
    compute = _by_xla if name == "xla" else functools.partial(_by_kernel, name)
    with jax.named_scope("max_logits"):
        shares = shares_of(query)
        if shares is None:
            return compute(query, key, scale, geometry, arrays)
        share = functools.partial(compute, geometry=geometry)
        # What varies between devices is lost where Pallas interprets a kernel.
        return shares.maxima(share, query, key, scale, arrays, check_vma=name == "xla")


def _by_kernel(
    name: str,
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    scale: Float[Array, ""],
    geometry: Geometry,
    arrays: PairArrays,
) -> Float[Array, "K G"]:
    kernel = load_kernel("max_logits", name, plan_platform(None))
    batch, queries, key_heads, groups, head_dim = query.shape
    if query.dtype.name not in kernel.DTYPES or head_dim > kernel.LONGEST_HEAD:
        raise NotImplementedError(
            f"implementation={name!r} takes {' and '.join(kernel.DTYPES)} and heads of up to "
            f"{kernel.LONGEST_HEAD} features, got {query.dtype} and {head_dim}. Pass 'xla'."
        )
    if 0 in (batch, queries, key.shape[1]):
        return jnp.full((key_heads, groups), -jnp.inf, jnp.float32)
    masks = [arrays.mask, None if arrays.bias is None else bias_permits(arrays.bias)]
    masks = [mask for mask in masks if mask is not None]
    ends = [
        jnp.full((batch,), length) if end is None else jnp.minimum(end, length)
        for end, length in (
            (arrays.query_seq_lengths, queries),
            (arrays.key_value_seq_lengths, key.shape[1]),
        )
    ]
    # The maximum of `scale x` is `|scale|` times that of `x` or of `-x`.
    maxima = kernel.max_logits(
        jnp.where(scale < 0, -query, query).reshape(batch, queries, -1, head_dim),
        key,
        [mask.reshape(mask.shape[0], -1, *mask.shape[3:]) for mask in masks],
        jnp.stack(ends, axis=1).astype(jnp.int32),
        is_causal=geometry.is_causal,
        window=geometry.local_window_size,
    )
    # Those of no pair stay -inf, also where the scale is zero.
    scaled = maxima * jnp.abs(scale).astype(jnp.float32)
    maxima = jnp.where(jnp.isneginf(maxima), maxima, scaled)
    return jnp.max(maxima, axis=0).reshape(key_heads, groups)


def _by_xla(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    scale: ScalarLike,
    geometry: Geometry,
    arrays: PairArrays,
) -> Float[Array, "K G"]:
    batch, queries, key_heads, groups, _ = query.shape
    keys = key.shape[1]
    if query.size == 0 or key.size == 0:
        return jnp.full((key_heads, groups), -jnp.inf, jnp.float32)
    key_block, query_block, starts = keys, queries, [(0, 0)]
    if isinstance(queries, int) and isinstance(keys, int):
        rows = known_product(batch, key_heads, groups)
        key_block = _block_length(keys, 256, rows)
        query_block = _block_length(queries, key_block, rows)
        starts = _block_starts(geometry, queries, keys, query_block, key_block)
    if not starts:
        return jnp.full((key_heads, groups), -jnp.inf, jnp.float32)

    def maximum(start: tuple[jax.Array, jax.Array]) -> Float[Array, "K G"]:
        query_start, key_start = start
        logits = block_logits(
            lax.dynamic_slice_in_dim(query, query_start, query_block, axis=1),
            lax.dynamic_slice_in_dim(key, key_start, key_block, axis=1),
            scale,
        )
        block = (query_start, query_block, key_start, key_block)
        allowed = allowed_pairs(geometry, arrays, *block)
        if arrays.bias is not None:
            permitted = bias_permits(cut(arrays.bias, *block))
            allowed = permitted if allowed is None else allowed & permitted
        return permitted_max(logits, allowed, axes=(0, 3, 4))

    if len(starts) == 1:
        query_start, key_start = starts[0]
        return maximum((jnp.asarray(query_start), jnp.asarray(key_start)))
    query_starts, key_starts = (jnp.asarray(axis) for axis in zip(*starts, strict=True))
    return jnp.max(lax.map(maximum, (query_starts, key_starts)), axis=0)
